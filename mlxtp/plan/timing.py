"""Modelled times: arithmetic on what ranks read, compute and send. Nothing is run.

Each half of a layer ends in a collective, for which every rank waits for the slowest:
a token takes the sum over the steps of the slowest rank's time, and the collectives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from mlxtp.dryrun.passes import PIECE, Step
from mlxtp.plan.hardware import Machine, Network
from mlxtp.plan.requirements import Need

# Kernels for each layer with weights on a GPU, where norms, rotations and attention
# are one each: 9 such layers and about 18 kernels in a layer of Llama.
KERNELS_A_CALL = 2


@dataclass(frozen=True)
class Time:
    """Modelled seconds of a pass, and where they go."""

    weights: float = 0.0
    caches: float = 0.0
    arithmetic: float = 0.0
    operations: float = 0.0
    evaluations: float = 0.0
    allreduces: float = 0.0
    gathers: float = 0.0
    messages: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: "Time") -> "Time":
        return Time(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )

    def scaled(self, factor: float) -> "Time":
        return Time(*(getattr(self, part.name) * factor for part in fields(self)))


def decode(
    needs: Sequence[Need], machines: Sequence[Machine], network: Network
) -> Time:
    """A token of each sequence of the batch, with full caches."""
    steps = [need.rehearsed.token for need in needs]
    return _passes(steps, machines, network) + Time(
        caches=max(
            need.cache_bytes / machine.bytes_per_second
            for need, machine in zip(needs, machines, strict=True)
        )
    )


def prefill(
    needs: Sequence[Need], machines: Sequence[Machine], network: Network, tokens: int
) -> Time:
    """A prompt of so many tokens, from the time of its last piece, without attention.

    Attention over what came before is added: for each query head, two products with
    all keys and values, of which half are seen on average.
    """
    steps = [need.rehearsed.piece for need in needs]
    one = _passes(steps, machines, network).scaled(_pieces(tokens))
    attention = max(
        _attention(need, tokens) / machine.flops
        for need, machine in zip(needs, machines, strict=True)
    )
    return one + Time(arithmetic=attention)


def _attention(need: Need, tokens: int) -> float:
    caches = [cache for cache in need.rehearsed.caches if cache.width]
    if not caches:
        return 0.0
    heads = need.query_heads / len(caches)
    return sum(
        2 * heads * cache.width * tokens * min(cache.tokens, tokens / 2)
        for cache in caches
    )


def _passes(
    steps: Sequence[tuple[Step, ...]], machines: Sequence[Machine], network: Network
) -> Time:
    """A forward pass of all ranks together."""
    total = Time()
    for of_ranks in zip(*steps, strict=True):
        slowest = max(
            (
                compute(step, machine)
                for step, machine in zip(of_ranks, machines, strict=True)
            ),
            key=lambda time: time.seconds,
        )
        total += slowest + collective(of_ranks, network)
    return total


def compute(step: Step, machine: Machine) -> Time:
    """A step on a machine: what is longer, to read the weights or to multiply."""
    reading = step.read_bytes / machine.bytes_per_second
    multiplying = step.flops / machine.flops
    return Time(
        weights=reading if reading >= multiplying else 0.0,
        arithmetic=multiplying if multiplying > reading else 0.0,
        operations=machine.operation_seconds
        * (kernels(step) if machine.has_gpu else step.operations),
        evaluations=machine.evaluation_seconds if step.kind else 0.0,
    )


def kernels(step: Step) -> int:
    """What a GPU starts."""
    return KERNELS_A_CALL * len(step.calls)


def collective(of_ranks: Sequence[Step], network: Network) -> Time:
    step = max(of_ranks, key=lambda one: one.part_bytes)
    if not step.kind:
        return Time()
    seconds = network.seconds(step.kind, step.part_bytes, step.item_bytes)
    if step.kind == "allgather":
        return Time(gathers=seconds)
    return Time(allreduces=seconds)


def on_one(steps: Sequence[Step], machine: Machine) -> Time:
    """A pass on one host: nothing is sent, and little evaluated on the way."""
    total = Time()
    for step in steps:
        time = compute(step, machine)
        total += replace(time, evaluations=0.0)
    return total + Time(evaluations=machine.evaluation_seconds)


def prefill_on_one(one: Need, machine: Machine, tokens: int) -> Time:
    """A prompt of so many tokens on one host, from the time of its last piece."""
    time = on_one(one.rehearsed.piece, machine).scaled(_pieces(tokens))
    return time + Time(arithmetic=_attention(one, tokens) / machine.flops)


def _pieces(tokens: int) -> float:
    """How many times the last piece of a prompt is the prompt."""
    last = (tokens - 1) % PIECE or min(PIECE, tokens)
    return max(tokens - 1, 1) / last


def pipeline(
    one: Need, machines: Sequence[Machine], network: Network, tokens: int
) -> tuple[Time, Time]:
    """A token, and a prompt of so many: the same hosts with some of the layers each.

    Layers are shared out by memory; a stage passes the hidden vector on to the next,
    and the last one the token to the first. Pieces of a prompt follow each other:
    while the first waits for no one, the last waits for all stages.
    """
    memory = [machine.limit_bytes or machine.memory_bytes for machine in machines]
    shares = [it / sum(memory) for it in memory]
    sums = (step for step in one.rehearsed.token if step.kind == "allreduce")
    hidden = next(sums).part_bytes
    token = Time(messages=len(machines) * network.message_seconds(hidden))
    stages = []
    for share, machine in zip(shares, machines, strict=True):
        stage = on_one(one.rehearsed.token, machine).scaled(share)
        token += replace(stage, evaluations=machine.evaluation_seconds)
        token += Time(caches=share * one.cache_bytes / machine.bytes_per_second)
        stages.append(prefill_on_one(one, machine, tokens).scaled(share))
    pieces = max(1.0, tokens / PIECE)
    slowest = max(stages, key=lambda time: time.seconds)
    prompt = sum(stages, Time()).scaled(1 / pieces)
    return token, prompt + slowest.scaled(1 - 1 / pieces)
