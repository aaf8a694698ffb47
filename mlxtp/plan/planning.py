"""A plan: a model on some machines, whether it fits, and how fast it would be."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from mlxtp.dryrun.requirements import Need, needs
from mlxtp.partition.shares import Share, Shares
from mlxtp.plan import timing
from mlxtp.plan.hardware import Machine, Network
from mlxtp.plan.model import PlannedModel
from mlxtp.plan.timing import Time

# Of all sequences together: MLX counts the elements of an axis in 32 bits, and a
# mixture of experts takes each token as often as it chooses experts.
MOST_TOKENS = 1 << 27


@dataclass(frozen=True)
class Setting:
    """On what, and for what, a model is planned.

    One machine for each rank, in rank order; ranks may share a host. `context` are the
    tokens in the caches, `batch` the sequences at once. `is_listed` says that the
    command line lists the ranks' machines or shares, so that `--ranks` alone does not
    change how many there are.
    """

    machines: tuple[Machine, ...]
    network: Network
    context: int
    batch: int
    is_listed: bool = False

    def with_machines(self, machines: Sequence[Machine]) -> "Setting":
        """Return the same setting with other machines, on links like these."""
        link, topology = self.network.link, self.network.topology
        network = Network(len(machines), link, topology)
        return replace(self, machines=tuple(machines), network=network)

    def with_topology(self, topology: str) -> "Setting":
        """Return the same setting with its links in another topology, calculated."""
        network = Network(len(self.machines), self.network.link, topology)
        return replace(self, network=network)

    def needs(self, model: PlannedModel, shares: Sequence[int | Share]) -> list[Need]:
        """Say what the ranks need that share `model` in proportion to `shares`.

        Raises: ValueError if it cannot be split so.
        """
        is_fused = all(machine.has_gpu for machine in self.machines)
        return needs(model.build, shares, self.context, self.batch, is_fused=is_fused)

    def left_bytes(self, needs: Sequence[Need]) -> list[int | None]:
        """Return, for each rank, the bytes that are left of its host's limit.

        Ranks on one host share its limit. None where the limit is not known.
        """
        needed: dict[str, int] = {}
        for need, machine in zip(needs, self.machines, strict=True):
            needed[machine.host] = needed.get(machine.host, 0) + need.bytes
        return [
            None
            if machine.limit_bytes is None
            else machine.limit_bytes - needed[machine.host]
            for machine in self.machines
        ]

    def fits(self, needs: Sequence[Need]) -> bool | None:
        """Whether every host has room; None where a limit is not known."""
        left = self.left_bytes(needs)
        if any(rest is not None and rest < 0 for rest in left):
            return False
        return None if None in left else True


@dataclass(frozen=True)
class Plan:
    """A model split over ranks in proportion to `shares`.

    `needs` are those of the ranks; `one` is what the whole model needs on one host.
    All times are modelled.
    """

    model: PlannedModel
    setting: Setting
    shares: Shares
    needs: tuple[Need, ...]
    one: Need

    @property
    def left_bytes(self) -> list[int | None]:
        """For each rank, the bytes that are left of its host's limit."""
        return self.setting.left_bytes(self.needs)

    @property
    def lacking_bytes(self) -> int:
        """Bytes that the fullest host lacks; 0 where every known limit is kept."""
        return max([0, *(-left for left in self.left_bytes if left is not None)])

    @property
    def fits(self) -> bool | None:
        """Whether every rank fits; None where a limit is not known."""
        return self.setting.fits(self.needs)

    @property
    def one_fits(self) -> bool | None:
        """Whether it fits on the first host alone; None where no limit is known."""
        limit = self.setting.machines[0].limit_bytes
        return None if limit is None else self.one.bytes <= limit

    @cached_property
    def decode(self) -> Time:
        """The time of a token of each sequence."""
        return self.decode_pass()

    def decode_pass(self, tokens: int = 1, part: float = 1.0) -> Time:
        """Return the time of a pass with `tokens` tokens of each of some sequences.

        `part` is the part of the batch that decodes.
        """
        setting = self.setting
        return timing.decode(
            self.needs, setting.machines, setting.network, tokens, part
        )

    @cached_property
    def prefill(self) -> Time:
        """The time of a prompt as long as the context."""
        setting = self.setting
        if len(self.needs) == 1:
            return self.prefill_on_one
        return timing.prefill(
            self.needs, setting.machines, setting.network, setting.context
        )

    @cached_property
    def prefill_in_halves(self) -> Time:
        """The time of that prompt, read in two halves that take turns."""
        setting = self.setting
        if len(self.needs) == 1:
            return self.prefill_on_one
        return timing.prefill_in_halves(
            self.needs, setting.machines, setting.network, setting.context
        )

    @cached_property
    def decode_on_one(self) -> Time:
        """The time of a token on the first host alone."""
        return timing.decode_on_one(self.one, self.setting.machines[0])

    @cached_property
    def prefill_on_one(self) -> Time:
        """The time of a prompt as long as the context on the first host alone."""
        machine, tokens = self.setting.machines[0], self.setting.context
        return timing.prefill_on_one(self.one, machine, tokens)

    @cached_property
    def pipeline(self) -> tuple[Time, Time]:
        """The times of a token and of a prompt, with some layers on each host."""
        setting = self.setting
        return timing.pipeline(
            self.one, setting.machines, setting.network, setting.context
        )


def plan(model: PlannedModel, setting: Setting, shares: Sequence[int | Share]) -> Plan:
    """Say what each rank of `setting` needs, and how fast all of them would be.

    Raises: ValueError if the model cannot be split so.
    """
    of_ranks = tuple(setting.needs(model, shares))
    one = of_ranks[0]
    if len(of_ranks) > 1:
        [one] = setting.needs(model, [1])
    return Plan(model, setting, Shares(shares), of_ranks, one)
