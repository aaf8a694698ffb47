"""Drafts, halves, batches and fewer hosts: modelled from the same steps as a token."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from models import LLAMA_3_2_1B
from wide_models import WIDE

from mlxtp.dryrun.requirements import needs
from mlxtp.plan import timing
from mlxtp.plan.__main__ import main
from mlxtp.plan.batches import batches
from mlxtp.plan.drafts import accepted, drafts
from mlxtp.plan.fewer import fewer
from mlxtp.plan.hardware import (
    FEW_TOKENS_SHARE,
    LINKS,
    OPERATION_SECONDS,
    TILE_TOKENS,
    Link,
    Network,
    published,
)
from mlxtp.plan.model import PlannedModel, model_of_config
from mlxtp.plan.planning import Plan, Setting, plan
from mlxtp.plan.report import as_json
from mlxtp.stories import PATH as STORIES

pytestmark = pytest.mark.once

# Heads of eight, so that five ranks do not have the same.
CONFIG = LLAMA_3_2_1B | {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model() -> Iterator[PlannedModel]:
    with model_of_config("two layers", CONFIG, 4) as planned:
        yield planned


@pytest.fixture(scope="module")
def five(model: PlannedModel) -> Plan:
    return plan(model, setting(), [1] * 5)


def setting(link: Link = LINKS["thunderbolt4"], batch: int = 1) -> Setting:
    machines = [published(f"host {k}", "M2 Ultra", 64) for k in range(5)]
    return Setting(tuple(machines), Network(5, link, link.topology), 256, batch)


def test_a_pass_of_more_tokens_is_that_of_a_larger_batch(model: PlannedModel) -> None:
    """Also of experts, of which tokens read some in common: about so many."""
    mixture, _ = WIDE["Qwen3-235B-A22B, 2 of 94 layers"]
    with model_of_config("a mixture", mixture, 4) as experts:
        for each in model, experts:
            [one], [eight] = (needs(each.build, [1], 256, batch=b) for b in (1, 8))
            rows = zip(one.dry_run.token, eight.dry_run.token, strict=True)
            for single, wanted in rows:
                step = single.times(8)
                assert step.part_bytes == wanted.part_bytes
                assert step.flops == pytest.approx(wanted.flops)
                assert step.read_bytes == pytest.approx(wanted.read_bytes, rel=0.03)


def test_a_few_tokens_cost_little_and_many_cost_tiles(five: Plan) -> None:
    """What is read is read once; then products decide, one by one or in tiles."""
    times = [five.decode_pass(n) for n in (1, 2, 8, TILE_TOKENS, 2 * TILE_TOKENS)]
    assert times[1].weights == pytest.approx(times[0].weights, rel=1e-3)
    assert times[1].arithmetic == 0 < times[2].arithmetic
    in_tiles = TILE_TOKENS / (8 / FEW_TOKENS_SHARE) * times[2].arithmetic
    assert times[3].arithmetic == pytest.approx(in_tiles)
    assert times[4].arithmetic == pytest.approx(2 * times[3].arithmetic, rel=0.01)
    waits = [(time.crossings, time.operations) for time in times]
    assert waits == [waits[0]] * 5


def test_a_draft_pays_what_it_is_said_to(model: PlannedModel, five: Plan) -> None:
    assert accepted(3, 0.5) == 1 + 0.5 + 0.25 + 0.125
    found = {draft.where: draft for draft in drafts(five, model, 0.8)}
    assert set(found) == {"one", "all", "split"}
    for draft in found.values():
        seconds = draft.drafting_seconds + five.decode_pass(draft.tokens + 1).seconds
        assert draft.round_seconds == pytest.approx(seconds)
        rate = accepted(draft.tokens, 0.8) / seconds
        assert draft.tokens_per_second == pytest.approx(rate)
        assert draft.fits
    # A split draft of the same model waits as often as the model: it does not pay.
    assert found["split"].tokens == 0
    assert found["one"].tokens > 0 and found["all"].tokens > 0
    # One rank: a broadcast of two hops more. It is one with the most memory left.
    assert max(found["one"].bytes_of_ranks) == found["one"].bytes_of_ranks[3]
    assert found["one"].options == "--draft-rank 3"
    assert min(found["all"].bytes_of_ranks) == max(found["one"].bytes_of_ranks)
    [ngram] = drafts(five, None, 0.8)
    assert ngram.drafting_seconds == 0 and ngram.tokens >= found["all"].tokens
    [none] = drafts(five, None, 0.0)
    assert none.tokens == 0
    assert none.tokens_per_second == pytest.approx(1 / five.decode.seconds)


def test_a_draft_needs_room_and_machines_alike(model: PlannedModel, five: Plan) -> None:
    small = [replace(m, limit_bytes=five.needs[0].bytes) for m in setting().machines]
    full = replace(five, setting=replace(five.setting, machines=tuple(small)))
    assert all(draft.fits is False for draft in drafts(full, model, 0.8))
    other = (*small[:4], published("another", "M4 Max", 64))
    mixed = replace(five, setting=replace(five.setting, machines=other))
    found = {draft.where: draft for draft in drafts(mixed, model, 0.8)}
    assert set(found) == {"one", "split"}
    assert found["one"].fits and found["one"].rank == 4


def test_a_prompt_is_read_in_chunks(model: PlannedModel) -> None:
    """Of 2,049 tokens the last is a chunk of its own; of several prompts all count."""

    def prompt(context: int, batch: int = 1) -> Plan:
        return plan(model, replace(setting(batch=batch), context=context), [1] * 5)

    whole, and_one = prompt(2049), prompt(2050)
    token = and_one.decode.seconds
    for way in "prefill", "prefill_in_halves", "prefill_on_one":
        before, after = (getattr(each, way) for each in (whole, and_one))
        assert before.seconds < after.seconds < before.seconds + 2 * token
    assert and_one.prefill.crossings == 2 * whole.prefill.crossings
    two = prompt(2049, batch=2).prefill.arithmetic
    assert two == pytest.approx(2 * whole.prefill.arithmetic)


def test_a_prompt_of_one_token_takes_a_pass() -> None:
    """Also of a state space, which has no attention."""
    config = {
        **{"model_type": "mamba", "vocab_size": 64, "num_hidden_layers": 2},
        **{"hidden_size": 64, "intermediate_size": 128, "state_size": 8},
        **{"conv_kernel": 4, "time_step_rank": 8},
        **{"use_bias": False, "use_conv_bias": True},
    }
    with model_of_config("a Mamba", config, 16) as mamba:
        result = plan(mamba, replace(setting(), context=1), [1] * 5)
        told = as_json(result, [])["modelled"]["this plan"]
    rates = told["prefill_tokens_per_second"], told["decode_tokens_per_second"]
    assert rates[0] == pytest.approx(rates[1], rel=0.1)


def test_no_more_is_hidden_than_is_computed(five: Plan) -> None:
    """Slow cables are hidden as long as there is something to compute."""
    for hop in 1e-6, 1e-4, 1.0:
        link = replace(LINKS["thunderbolt4"], hop_seconds=hop)
        slow = [replace(m, flops=m.flops / 20) for m in setting().machines]
        result = replace(five, setting=replace(setting(link), machines=tuple(slow)))
        plain, halves = result.prefill, result.prefill_in_halves
        travels = plain.allreduces + plain.crossings
        computed = plain.seconds - travels
        # Each half travels by itself, and one of them at least ends unhidden.
        assert halves.seconds > max(computed, travels)
        assert halves.allreduces < 2 * travels
        if hop == 1e-4:
            assert halves.seconds < computed + 0.6 * travels < plain.seconds
    # A second of hops cannot be hidden by less arithmetic: twice as many hops in all.
    assert halves.seconds > 1.9 * travels


def test_the_server_gets_more_of_a_batch(model: PlannedModel) -> None:
    result = plan(model, setting(batch=6), [1] * 5)
    rows = batches(result)
    assert [row.requests for row in rows] == [1, 2, 4, 6]
    assert rows[-1].gap_seconds == result.decode.seconds
    alone = plan(model, setting(), [1] * 5)
    assert rows[0].gap_seconds == pytest.approx(alone.decode.seconds, rel=0.01)
    rates = [row.tokens_per_second for row in rows]
    assert rates == sorted(rates) and batches(alone) == []
    # A part of a prompt pays the waits of a pass, and half a pass for its tokens.
    assert rows[0].reading_gap_seconds == pytest.approx(2.5 * rows[0].gap_seconds)


def test_it_says_when_fewer_are_faster(five: Plan) -> None:
    slow = fewer(five)
    assert slow is not None and slow.ranks == 1
    rate = 1 / five.decode_on_one.seconds
    assert slow.tokens_per_second == pytest.approx(rate)
    fast = Link(0.0, 1e12, "mesh")
    machines = [replace(m, crossing_seconds=0.0) for m in five.setting.machines]
    best = Setting(tuple(machines), Network(5, fast, "mesh"), 256, 1)
    assert fewer(replace(five, setting=best)) is None
    # Where one has no room: three are all neighbours, five are two hops apart.
    limited = [
        replace(m, limit_bytes=five.one.bytes - 1) for m in five.setting.machines
    ]
    three = fewer(replace(five, setting=replace(five.setting, machines=tuple(limited))))
    assert three is not None and three.ranks == 3
    needed = five.setting.needs(five.model, [1] * 3)
    network = Network(3, LINKS["thunderbolt4"], "ring")
    seconds = timing.decode(needed, limited[:3], network).seconds
    assert three.tokens_per_second == pytest.approx(1 / seconds)


# MLX's source: an exchange in a mesh, N - 1 steps in a ring, each part by halves.
@pytest.mark.parametrize("topology, hops, parts", [("mesh", 1, 1.0), ("ring", 4, 2.0)])
def test_jaccl_gathers_what_it_adds(topology: str, hops: int, parts: float) -> None:
    link = Link(1.0, 1e6, topology, "jaccl")
    network = Network(5, link, topology)
    gather = network.seconds("allgather", 10**6, 2)
    assert gather == pytest.approx(hops + parts)
    adds = network.seconds("allreduce", 10**6, 2) - gather
    assert adds == pytest.approx(6 * OPERATION_SECONDS)
    if topology == "mesh":
        with pytest.raises(ValueError, match="no mesh of 9 ranks"):
            Network(9, link, "mesh")


def test_the_command_line_says_all_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model", str(STORIES), "--context", "64", "--ranks", "5"]
    words += ["--draft-model", "ngram", "--batch", "4", "--acceptance", "0.9"]
    monkeypatch.setattr(sys, "argv", words)
    main()
    said = capsys.readouterr().out
    assert "read in two halves" in said and "in a mesh" in said
    assert "One host alone would be faster than all 5" in said
    assert "with drafts, 90% accepted" in said
    assert "Fastest by n-grams" in said and "Modelled for requests at once" in said
    monkeypatch.setattr(sys, "argv", [*words, "--json", "--fast-synch"])
    main()
    told = json.loads(capsys.readouterr().out)
    assert (
        told["modelled"]["in a mesh"]["decode_tokens_per_second"]
        > (told["modelled"]["this plan"]["decode_tokens_per_second"])
    )
    crossings = told["modelled"]["this plan"]["seconds_a_token"]["crossings"]
    assert crossings == pytest.approx(10 * 5e-6)
    assert [row["requests"] for row in told["modelled_batches"]] == [1, 2, 4]
    assert told["modelled_drafts"][0]["where"] == "ngram"
    assert told["modelled_fewer"]["ranks"] == 1
