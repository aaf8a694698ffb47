"""Modelled times: arithmetic on what ranks read, compute and send. Nothing is run.

Each half of a layer ends in a collective, in which every rank waits for the slowest. So
a token takes, summed over its steps, the time of the slowest rank and the collective's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from mlxtp.dryrun.calls import Call
from mlxtp.dryrun.passes import CHUNK_TOKENS, Step, chunks
from mlxtp.dryrun.requirements import Need
from mlxtp.plan.hardware import TILE_TOKENS, Machine, Network

# GPU kernels for each call of a layer with weights. A layer of Llama has 9 such calls
# and about 18 kernels, as a norm, a rotation or attention is one each.
KERNELS_A_CALL = 2


@dataclass(frozen=True)
class Time:
    """Modelled seconds of a forward pass, by what they are spent on.

    `weights` and `caches` is reading them, `arithmetic` matrix products that take
    longer than reading, `operations` starting them, `crossings` going from the GPU to
    the CPU and back, `messages` what a pipeline passes on.
    """

    weights: float = 0.0
    caches: float = 0.0
    arithmetic: float = 0.0
    operations: float = 0.0
    crossings: float = 0.0
    allreduces: float = 0.0
    gathers: float = 0.0
    messages: float = 0.0

    @property
    def seconds(self) -> float:
        """The sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def __add__(self, other: "Time") -> "Time":
        """Add part by part."""
        return Time(
            *(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))
        )

    def scaled(self, factor: float) -> "Time":
        """Return every part times `factor`."""
        return Time(*(getattr(self, part.name) * factor for part in fields(self)))


def decode(
    needs: Sequence[Need],
    machines: Sequence[Machine],
    network: Network,
    tokens: int = 1,
    part: float = 1.0,
) -> Time:
    """Return the time of a pass with `tokens` tokens of each sequence, full caches.

    `part` is the part of the batch that decodes. Tokens of one sequence read its caches
    once. One rank is evaluated once, at the end.
    """
    if len(needs) == 1:
        return decode_on_one(needs[0], machines[0], tokens, part)
    steps = _times([need.dry_run.token for need in needs], tokens * part)
    caches = max(
        need.cache_bytes / machine.bytes_per_second
        for need, machine in zip(needs, machines, strict=True)
    )
    return _passes(steps, machines, network) + Time(caches=part * caches)


def prefill(
    needs: Sequence[Need], machines: Sequence[Machine], network: Network, tokens: int
) -> Time:
    """Return the time of a prompt of `tokens` tokens.

    Attention is added: for each query head two products, with the keys and with the
    values, of which it sees half on average.
    """
    total = Time()
    for count, factor in _chunks(tokens):
        steps = _times([need.dry_run.chunk for need in needs], factor)
        total += _passes(steps, machines, network).scaled(count)
    return total + _slowest_attention(needs, machines, tokens)


def prefill_in_halves(
    needs: Sequence[Need], machines: Sequence[Machine], network: Network, tokens: int
) -> Time:
    """Return the time of a prompt whose chunks are read in two halves that take turns.

    While the sums of one half travel, the other computes; then they change. So no more
    travel is hidden than there is to compute meanwhile, and both halves read the
    weights. `allreduces` is the time in which all ranks wait.
    """
    total = Time()
    for count, factor in _chunks(tokens):
        steps = _times([need.dry_run.chunk for need in needs], factor / 2)
        total += _halves(steps, machines, network).scaled(count)
    return total + _slowest_attention(needs, machines, tokens)


def _halves(
    halves: Sequence[tuple[Step, ...]], machines: Sequence[Machine], network: Network
) -> Time:
    """The time of a chunk in two halves, without attention."""
    steps, unlike = _unlike(halves, machines)
    computed = Time()
    computing_ends = travel_ends = 0.0
    ready = [0.0, 0.0]
    for of_ranks in zip(*steps, strict=True):
        slowest = _slowest(of_ranks, unlike)
        travels = collective(of_ranks, network).seconds + slowest.crossings
        slowest = replace(slowest, crossings=0.0)
        for half in (0, 1):
            computing_ends = max(computing_ends, ready[half]) + slowest.seconds
            ready[half] = computing_ends
            if travels:
                travel_ends = max(travel_ends, computing_ends) + travels
                ready[half] = travel_ends
            computed += slowest
    waited = max(0.0, max(ready) - computed.seconds)
    return computed + Time(allreduces=waited)


def _slowest_attention(
    needs: Sequence[Need], machines: Sequence[Machine], tokens: int
) -> Time:
    """The time of attention over a whole prompt, on the rank that takes the longest."""
    return Time(
        arithmetic=max(
            _attention(need, tokens) / machine.flops
            for need, machine in zip(needs, machines, strict=True)
        )
    )


def _attention(need: Need, tokens: int) -> float:
    """Floating-point operations of attention over whole prompts."""
    caches = [cache for cache in need.dry_run.caches if cache.width]
    if not caches:
        return 0.0
    heads = need.query_heads / len(caches)
    return sum(
        2 * need.batch * heads * cache.width * tokens * min(cache.tokens, tokens / 2)
        for cache in caches
    )


def _times(passes: Sequence[tuple[Step, ...]], factor: float) -> list[tuple[Step, ...]]:
    """The steps of passes for `factor` times as many tokens; ranks may share one."""
    known = {id(steps): steps for steps in passes}
    if factor != 1:
        known = {
            key: tuple(step.times(factor) for step in steps)
            for key, steps in known.items()
        }
    return [known[id(steps)] for steps in passes]


def _passes(
    steps: Sequence[tuple[Step, ...]], machines: Sequence[Machine], network: Network
) -> Time:
    """The time of a forward pass of all ranks together."""
    steps, machines = _unlike(steps, machines)
    total = Time()
    for of_ranks in zip(*steps, strict=True):
        total += _slowest(of_ranks, machines) + collective(of_ranks, network)
    return total


def _unlike(
    passes: Sequence[tuple[Step, ...]], machines: Sequence[Machine]
) -> tuple[list[tuple[Step, ...]], list[Machine]]:
    """One of all ranks that compute the same on machines alike."""
    ranks = {
        (id(steps), replace(machine, host="")): (steps, machine)
        for steps, machine in zip(passes, machines, strict=True)
    }
    return [steps for steps, _ in ranks.values()], [m for _, m in ranks.values()]


def _slowest(of_ranks: Sequence[Step], machines: Sequence[Machine]) -> Time:
    """The time of the rank that takes the longest for a step."""
    times = map(compute, of_ranks, machines)
    return max(times, key=lambda time: time.seconds)


def compute(step: Step, machine: Machine) -> Time:
    """Return the time of a step without its collective.

    Reading weights and multiplying overlap: what takes longer counts.
    """
    reading = step.read_bytes / machine.bytes_per_second
    multiplying = sum(_multiplying(call, machine) for call in step.calls)
    return Time(
        weights=reading if reading >= multiplying else 0.0,
        arithmetic=multiplying if multiplying > reading else 0.0,
        operations=machine.operation_seconds
        * (kernels(step) if machine.has_gpu else step.operations),
        crossings=machine.crossing_seconds if step.kind else 0.0,
    )


def _multiplying(call: Call, machine: Machine) -> float:
    """The seconds of a call's products, by the kernel that takes less.

    One multiplies anew for each token, the other takes tokens in tiles.
    """
    tokens = call.tokens * call.share  # of experts: those that each gets
    in_tiles = call.flops / machine.flops
    if machine.has_gpu:
        in_tiles *= max(1.0, TILE_TOKENS / tokens)
    return min(in_tiles, call.flops / machine.few_tokens_flops)


def kernels(step: Step) -> int:
    """Return how many kernels a GPU starts in a step."""
    return KERNELS_A_CALL * len(step.calls)


def collective(of_ranks: Sequence[Step], network: Network) -> Time:
    """Return the time of the collective that ends a step; the largest part decides."""
    step = max(of_ranks, key=lambda step: step.part_bytes)
    if not step.kind:
        return Time()
    seconds = network.seconds(step.kind, step.part_bytes, step.item_bytes)
    if step.kind == "allgather":
        return Time(gathers=seconds)
    return Time(allreduces=seconds)


def on_one(steps: Sequence[Step], machine: Machine) -> Time:
    """Return the time of a pass on one host, which is evaluated once, at its end."""
    total = Time()
    for step in steps:
        total += replace(compute(step, machine), crossings=0.0)
    return total + Time(crossings=machine.crossing_seconds)


def decode_on_one(
    one: Need, machine: Machine, tokens: int = 1, part: float = 1.0
) -> Time:
    """Return the time of a pass on one host, as in `decode`."""
    [steps] = _times([one.dry_run.token], tokens * part)
    caches = part * one.cache_bytes / machine.bytes_per_second
    return on_one(steps, machine) + Time(caches=caches)


def prefill_on_one(one: Need, machine: Machine, tokens: int) -> Time:
    """Return the time of a prompt of `tokens` tokens on one host, as in `prefill`."""
    total = Time()
    for count, factor in _chunks(tokens):
        [steps] = _times([one.dry_run.chunk], factor)
        total += on_one(steps, machine).scaled(count)
    return total + _slowest_attention([one], [machine], tokens)


def _chunks(tokens: int) -> list[tuple[int, float]]:
    """How many chunks of a prompt are alike, and their length in that of the last."""
    *before, last = chunks(tokens - 1)
    return [(len(before), CHUNK_TOKENS / max(last, 1)), (1, 1.0)]


def pipeline(
    one: Need, machines: Sequence[Machine], network: Network, tokens: int
) -> tuple[Time, Time]:
    """Return the times of a token, and of a prompt, with some layers on each host.

    Each host gets layers in proportion to its memory. A stage sends the hidden vector
    to the next one, and the last sends the token to the first. The stages work on
    successive chunks of a prompt at the same time: the first chunk passes all stages,
    and then the slowest stage decides.
    """
    memory = [machine.limit_bytes or machine.memory_bytes for machine in machines]
    shares = [part / sum(memory) for part in memory]
    allreduces = (step for step in one.dry_run.token if step.kind == "allreduce")
    hidden_bytes = next(allreduces).part_bytes
    token = Time(messages=len(machines) * network.message_seconds(hidden_bytes))
    stages = []
    for share, machine in zip(shares, machines, strict=True):
        stage = on_one(one.dry_run.token, machine).scaled(share)
        token += replace(stage, crossings=machine.crossing_seconds)
        token += Time(caches=share * one.cache_bytes / machine.bytes_per_second)
        stages.append(prefill_on_one(one, machine, tokens).scaled(share))
    number = max(1.0, tokens / CHUNK_TOKENS)  # of chunks
    slowest = max(stages, key=lambda time: time.seconds)
    prompt = sum(stages, Time()).scaled(1 / number)
    return token, prompt + slowest.scaled(1 - 1 / number)
