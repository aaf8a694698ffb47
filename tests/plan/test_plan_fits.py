"""What fits and what does not: in real runs under a limit, and by what is offered."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from models import LLAMA_3_2_1B, make
from needs import needs
from wide_models import WIDE

from mlxtp.partition.shares import Shares
from mlxtp.plan.auto import _lacking_of_ranks, auto, longest
from mlxtp.plan.hardware import LINKS, Machine, Network, published
from mlxtp.plan.model import PlannedModel, model_of_config, open_model
from mlxtp.plan.planning import MOST_TOKENS, Plan, Setting, plan
from mlxtp.plan.remedies import SYSTEM_BYTES, remedies

pytestmark = pytest.mark.once

LLAMA_405B = WIDE["Llama 3.1 405B, 1 of 126 layers"][0] | {"num_hidden_layers": 126}
# 130 MB of float32, and little else.
SMALL = LLAMA_3_2_1B | {
    "hidden_size": 512,
    "intermediate_size": 4096,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "vocab_size": 8192,
}
CONTEXT = 300
# Data that this process may have: what it has after its imports, and so much more.
UNDER_A_LIMIT = """
import resource, sys
sys.modules["torch"] = None  # which takes memory of its own
from pathlib import Path
import mlxtp
from mlxtp.generation.prompt_cache import SavedPrompt
from transformers import PreTrainedTokenizerFast
status = Path("/proc/self/status").read_text()
data = int(status.partition("VmData:")[2].split()[0]) * 1024
limit = data + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
model, tokenizer = mlxtp.load(sys.argv[1], mlxtp.Communicator.world())
prompt = [2] * (int(sys.argv[3]) - 4)
print(len(list(mlxtp.stream_generate(model, tokenizer, prompt, max_tokens=4))))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("small") / "model", SMALL, mx.float32)


def here(limit_bytes: int) -> Machine:
    """A Linux machine that gives so much."""
    return Machine("here", "a CPU", 1 << 40, limit_bytes, 1e9, 1e9, 1e-6, 0.0)


@needs("linux")
# A tenth of what is needed either way: working memory is estimated, and is less.
@pytest.mark.slow
@pytest.mark.parametrize("factor, fits", [(1.1, True), (0.9, False)])
def test_the_verdict_is_that_of_a_real_run(
    small: Path, factor: float, fits: bool
) -> None:
    with open_model(str(small)) as model:
        alone = Setting((here(1 << 40),), network(1), CONTEXT, 1)
        limit = round(factor * plan(model, alone, [1]).one.bytes)
        limited = replace(alone, machines=(here(limit),))
        assert plan(model, limited, [1]).fits is fits
    words = [sys.executable, "-c", UNDER_A_LIMIT, small, limit, CONTEXT]
    done = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=small_stacks,
    )
    # MLX may crash where it gets no memory, without a word.
    assert (done.returncode == 0) is fits, done.stderr


def small_stacks() -> None:
    """Stacks of threads count as data, 8 MB each, though little is in them."""
    _, most = resource.getrlimit(resource.RLIMIT_STACK)
    resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, most))


def network(ranks: int) -> Network:
    return Network(ranks, LINKS["thunderbolt4"], "ring")


@pytest.fixture(scope="module")
def llama() -> Iterator[PlannedModel]:
    """Of its 126 layers as many as are quickly looked at."""
    with model_of_config(
        "a Llama", LLAMA_405B | {"num_hidden_layers": 12}, 16
    ) as found:
        yield found


def on(memory_gb: list[float], context: int = 8192, chips: str = "M2 Ultra") -> Setting:
    machines = [
        published(f"host {number}", chip.strip(), memory)
        for number, (memory, chip) in enumerate(
            zip(memory_gb, chips.split(",") * len(memory_gb), strict=False)
        )
    ]
    return Setting(tuple(machines), network(len(memory_gb)), context, 1)


def test_remedies_do_what_they_say(llama: PlannedModel) -> None:
    """Each is tried here once more; and the next smaller one would not do."""
    lacking = plan(llama, on([39.0] * 3, context=131072), [1] * 3)
    assert lacking.fits is False
    found = list(remedies(lacking))
    assert len(found) == 5
    for remedy in found:
        words = remedy.how.split()
        if "--shares" in remedy.how:
            assert auto(llama, lacking.setting).fits
        elif "iogpu" in remedy.how:
            megabytes = int(remedy.how.partition("=")[2].split()[0])
            need = max(need.bytes for need in lacking.needs)
            assert need <= megabytes << 20 <= (39 << 30) - SYSTEM_BYTES + (1 << 30)
        elif "--context" in remedy.how:
            tokens = int(words[-1])
            assert fits(llama, lacking, context=tokens)
            assert not fits(llama, lacking, context=tokens + 256)
        elif "--ranks" in remedy.how:
            ranks = int(words[-1])
            assert ranks == 4
            assert plan(llama, on([39.0] * 4, 131072), [1] * 4).fits
        else:
            bits = int(remedy.what.split()[0])
            with model_of_config("fewer", llama.config, bits) as fewer:
                assert fits(fewer, lacking)


def test_the_next_context_that_fits(llama: PlannedModel) -> None:
    """Also where the one that does not is between two steps."""
    need = plan(llama, on([192.0], context=768), [1]).one.bytes
    machine = replace(on([192.0]).machines[0], limit_bytes=need)
    setting = replace(on([192.0], context=1000), machines=(machine,))
    offered = remedies(plan(llama, setting, [1]))
    assert "--context 768" in (remedy.how for remedy in offered)


def test_no_longer_context_is_offered(llama: PlannedModel) -> None:
    """Below a step there is none to offer; of so many sequences MLX has no step."""
    setting = replace(on([39.0] * 3, context=1), batch=MOST_TOKENS)
    offered = [remedy.how for remedy in remedies(plan(llama, setting, [1] * 3))]
    assert not any("--context" in how for how in offered)


def test_a_limit_is_raised_as_far_as_a_host_has_memory(llama: PlannedModel) -> None:
    """Where the largest is too much for some, each host gets its own."""
    setting = on([192.0] * 2)
    needs = [need.bytes for need in plan(llama, setting, [1, 3]).needs]
    machines = [
        replace(m, limit_bytes=need - 1, memory_bytes=need + (1 << 30) + SYSTEM_BYTES)
        for m, need in zip(setting.machines, needs, strict=True)
    ]
    lacking = plan(llama, replace(setting, machines=tuple(machines)), [1, 3])
    how = next(one.how for one in remedies(lacking) if "iogpu" in one.how)
    for need, command in zip(needs, how.split("; "), strict=True):
        megabytes = int(command.partition("=")[2].split()[0])
        assert need <= megabytes << 20 <= need + (1 << 30)


@pytest.mark.slow
def test_only_a_gpu_has_a_limit_to_raise(llama: PlannedModel) -> None:
    macs = on([39.0] * 3, context=131072)
    others = replace(
        macs, machines=tuple(replace(it, has_gpu=False) for it in macs.machines)
    )
    for setting, named in (macs, True), (others, False):
        found = remedies(plan(llama, setting, [1] * 3))
        assert any("iogpu" in remedy.how for remedy in found) is named


def fits(model: PlannedModel, as_in: Plan, **changes: int) -> bool | None:
    return plan(model, replace(as_in.setting, **changes), as_in.shares).fits


def test_auto_gives_more_to_who_reads_faster(llama: PlannedModel) -> None:
    """Half of the bandwidth gets about half of the work, and it pays."""
    setting = on([192.0] * 3, chips="M2 Ultra,M2 Ultra,M2 Max")
    found = auto(llama, setting)
    even = plan(llama, setting, [1, 1, 1])
    assert found.fits and found.decode.seconds < 0.85 * even.decode.seconds
    assert found.shares[0].mlp >= 1.5 * found.shares[2].mlp


@pytest.mark.slow
def test_auto_gives_less_to_who_has_less_memory(llama: PlannedModel) -> None:
    """The same speed: only memory tells them apart."""
    setting = on([64.0, 64.0, 16.0])
    assert plan(llama, setting, [1, 1, 1]).fits is False
    found = auto(llama, setting)
    assert found.fits
    assert found.needs[2].bytes < 0.6 * found.needs[0].bytes


def test_other_shares_have_room_for_nearly_twice_the_context() -> None:
    """Of the 405B four layers, on five hosts with as much less memory.

    Three ranks have two of eight KV heads, with two caches: they get fewer columns. A
    token takes at most 5 % longer than with even shares.
    """
    memory = [3.25] * 5  # GiB, of which three quarters count
    config = LLAMA_405B | {"num_hidden_layers": 4}
    with model_of_config("4 layers", config, 4) as model:
        even = longest(model, on(memory), Shares([1] * 5))
        found = longest(model, on(memory), None)
        context = even.setting.context
        assert even.fits and context % 256 == 0
        assert not fits(model, even, context=context + 256)
        assert found.fits and found.setting.context >= 1.8 * context
        for setting in even.setting, found.setting:
            seconds = [
                plan(model, setting, shares).decode.seconds
                for shares in (found.shares, even.shares)
            ]
            assert seconds[0] <= 1.05 * seconds[1]
    left = [rest for rest in found.left_bytes if rest is not None]
    assert max(left) < 0.25 * max(rest for rest in even.left_bytes if rest is not None)


def test_auto_leaves_alone_what_is_alike(llama: PlannedModel) -> None:
    assert auto(llama, on([64.0] * 3)).shares == Shares([1, 1, 1])


def test_what_a_host_lacks_is_shared_by_its_ranks(llama: PlannedModel) -> None:
    setting = on([12.0, 12.0, 192.0])
    machines = [
        replace(one, host=host)
        for one, host in zip(setting.machines, "aab", strict=True)
    ]
    lacking = plan(llama, replace(setting, machines=tuple(machines)), [1] * 3)
    of_ranks = _lacking_of_ranks(lacking)
    assert of_ranks[0] == of_ranks[1] == lacking.lacking_bytes / 2 > 0 == of_ranks[2]
