"""A plan: a model on some machines, whether it fits, and what it would take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mlxtp.plan import timing
from mlxtp.plan.hardware import Machine, Network
from mlxtp.plan.opening import Opened
from mlxtp.plan.requirements import Need, needs
from mlxtp.plan.timing import Time


@dataclass(frozen=True)
class Setting:
    """On what, and for what, a model is planned."""

    machines: tuple[Machine, ...]
    network: Network
    context: int
    batch: int

    def with_machines(self, machines: Sequence[Machine]) -> "Setting":
        """Others, or more, on links like these."""
        link, topology = self.network.link, self.network.topology
        network = Network(len(machines), link, topology)
        return replace(self, machines=tuple(machines), network=network)

    def needs(self, opened: Opened, shares: Sequence[int]) -> list[Need]:
        """What ranks need that share a model in proportion to `shares`.

        Raises: ValueError if it cannot be split so.
        """
        is_fused = all(machine.has_gpu for machine in self.machines)
        return needs(opened, shares, self.context, self.batch, is_fused=is_fused)

    def left_bytes(self, needs: Sequence[Need]) -> list[int | None]:
        """What is left of the limit of each rank's host, which several may share."""
        wanted: dict[str, int] = {}
        for need, machine in zip(needs, self.machines, strict=True):
            wanted[machine.host] = wanted.get(machine.host, 0) + need.bytes
        return [
            None if it.limit_bytes is None else it.limit_bytes - wanted[it.host]
            for it in self.machines
        ]

    def fits(self, needs: Sequence[Need]) -> bool | None:
        """Whether every host has room; None where a limit is not known."""
        left = self.left_bytes(needs)
        if any(it is not None and it < 0 for it in left):
            return False
        return None if None in left else True


@dataclass(frozen=True)
class Plan:
    """A model shared out in proportion to `shares`; `one` is it on one host."""

    opened: Opened
    setting: Setting
    shares: tuple[int, ...]
    needs: tuple[Need, ...]
    one: Need

    @property
    def left_bytes(self) -> list[int | None]:
        """What of the limit of each rank's host is left."""
        return self.setting.left_bytes(self.needs)

    @property
    def fits(self) -> bool | None:
        """Whether every rank fits; None where a limit is not known."""
        return self.setting.fits(self.needs)

    @property
    def one_fits(self) -> bool | None:
        """Whether it fits on one host, the first; None where its limit is not known."""
        limit = self.setting.machines[0].limit_bytes
        return None if limit is None else self.one.bytes <= limit

    @cached_property
    def decode(self) -> Time:
        """Modelled, of a token."""
        setting = self.setting
        if len(self.needs) == 1:
            return self.decode_on_one
        return timing.decode(self.needs, setting.machines, setting.network)

    @cached_property
    def prefill(self) -> Time:
        """Modelled, of a prompt as long as the context."""
        setting = self.setting
        if len(self.needs) == 1:
            return self.prefill_on_one
        return timing.prefill(
            self.needs, setting.machines, setting.network, setting.context
        )

    @cached_property
    def decode_on_one(self) -> Time:
        machine = self.setting.machines[0]
        caches = self.one.cache_bytes / machine.bytes_per_second
        token = timing.on_one(self.one.rehearsed.token, machine)
        return token + Time(caches=caches)

    @cached_property
    def prefill_on_one(self) -> Time:
        machine, tokens = self.setting.machines[0], self.setting.context
        return timing.prefill_on_one(self.one, machine, tokens)

    @cached_property
    def pipeline(self) -> tuple[Time, Time]:
        """Modelled, of a token and of a prompt."""
        setting = self.setting
        return timing.pipeline(
            self.one, setting.machines, setting.network, setting.context
        )


def plan(opened: Opened, setting: Setting, shares: Sequence[int]) -> Plan:
    """Say what each rank of `setting` needs.

    Raises: ValueError if the model cannot be split so.
    """
    found = tuple(setting.needs(opened, shares))
    one = found[0]
    if len(found) > 1:
        [one] = setting.needs(opened, [1])
    return Plan(opened, setting, tuple(shares), found, one)
