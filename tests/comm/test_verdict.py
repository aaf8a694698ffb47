"""Which verdict follows from what is known of the other ranks: a table of cases."""

import time
from dataclasses import replace

import pytest

from mlxtp import RankLostError
from mlxtp.cluster.verdict import (
    VERDICT_MARK,
    VERDICT_VARIABLE,
    CollectiveCall,
    RankOnHost,
    Verdict,
    VerdictFilter,
)
from mlxtp.comm.ending import text_of
from mlxtp.comm.progress import Blocks, GraphState, Progress, Wait
from mlxtp.comm.verdict import (
    Limits,
    Peer,
    ThisRank,
    have_all_raised,
    is_cut_off,
    judge,
    judge_raised,
    judge_termination,
    reconsider,
    unheard,
)

NOW = 1000.0
LIMITS = Limits(timeout_seconds=10, silence_seconds=5)
WAIT = Wait(NOW - 10.1, "allreduce", 7, "model.layers.3", in_graph=False)
CALL = WAIT.call()
COMPUTING = ThisRank(1, "studio2", 7, replace(CALL, waiting=False))
WAITING = replace(COMPUTING, waits=[WAIT])
# The native core waits, while the main thread has called more.
IN_GRAPH = replace(
    COMPUTING,
    number=20,
    last_call=CollectiveCall("allgather", None, "lm_head", waiting=False),
    waits=[WAIT._replace(in_graph=True)],
)
BARRIER = Wait(NOW - 9, "barrier", 21, "", in_graph=False)
WHERE = "; rank 1 on studio2 is in allreduce 7 of model.layers.3: all ranks end"


def peers(**changes: dict[str, object]) -> list[Peer]:
    """Ranks 0, 2 and 3, heard just now, in collective 7, but for `changes`."""
    return [
        replace(
            Peer(rank, f"studio{rank + 1}", heard=NOW - 0.5, number=7, begun=7),
            **changes.get(f"rank_{rank}", {}),
        )
        for rank in (0, 2, 3)
    ]


SILENT = {"heard": NOW - 5.1}


@pytest.mark.parametrize(
    ("known", "this", "why", "lost", "says"),
    [
        # Nobody is missing.
        ({}, replace(WAITING, waits=[WAIT._replace(since=NOW - 9.9)]), None, [], ""),
        ({}, COMPUTING, None, [], ""),
        ({}, replace(WAITING, limited_since=None), None, [], ""),
        ({}, replace(WAITING, limited_since=NOW - 9.9), None, [], ""),
        (
            {"rank_2": {"heard": NOW - 4.9}},
            replace(WAITING, limited_since=None),
            None,
            [],
            "",
        ),
        # Silence counts while this rank computes, and in waits without a limit.
        (
            {"rank_2": SILENT},
            COMPUTING,
            "silent",
            [2],
            "mlxtp: rank 2 on studio3 did not answer for 5 s (stopped or cut off)",
        ),
        ({"rank_2": SILENT}, replace(WAITING, limited_since=None), "silent", [2], ""),
        (
            {"rank_0": SILENT, "rank_3": SILENT},
            WAITING,
            "silent",
            [0, 3],
            "mlxtp: rank 0 on studio1, rank 3 on studio4 did not answer for 5 s",
        ),
        # Who was never heard or has said good-bye is not silent.
        (
            {"rank_2": {"heard": 0.0}},
            COMPUTING,
            None,
            [],
            "",
        ),
        (
            {"rank_2": {**SILENT, "left": True}},
            COMPUTING,
            None,
            [],
            "",
        ),
        # This rank has waited too long.
        (
            {"rank_2": {"left": True}, "rank_3": {"number": 6}},
            WAITING,
            "left",
            [2],
            "mlxtp: rank 2 on studio3 left while others waited",
        ),
        (
            {"rank_3": {"number": 6, "begun": 9}},
            WAITING,
            "late",
            [3],
            "mlxtp: rank 3 on studio4 did not come within 10 s",
        ),
        (
            {},
            WAITING,
            "undelivered",
            [],
            "mlxtp: messages did not arrive within 10 s, though all ranks answer",
        ),
        # So has its native core: who has called more may have begun less.
        (
            {"rank_0": {"number": 20}, "rank_3": {"number": 20, "begun": 6}},
            IN_GRAPH,
            "late",
            [3],
            "mlxtp: rank 3 on studio4 did not come within 10 s",
        ),
        ({"rank_2": {"number": 6}}, IN_GRAPH, "undelivered", [], ""),
        ({"rank_2": {"left": True}}, IN_GRAPH, "left", [2], ""),
        ({"rank_2": SILENT}, IN_GRAPH, "silent", [2], ""),
        ({"rank_2": {"begun": 6}}, replace(IN_GRAPH, limited_since=None), None, [], ""),
        ({}, replace(IN_GRAPH, limited_since=NOW - 9.9), None, [], ""),
        # Both wait: what has lasted longest counts.
        (
            {"rank_0": {"begun": 6}, "rank_3": {"number": 20}},
            replace(IN_GRAPH, waits=[BARRIER, *IN_GRAPH.waits]),
            "late",
            [0],
            "",
        ),
        (
            {"rank_0": {"begun": 6}, "rank_3": {"number": 6}},
            replace(WAITING, waits=[WAIT, BARRIER._replace(in_graph=True)]),
            "late",
            [3],
            "",
        ),
    ],
)
def test_judge(
    known: dict[str, dict[str, object]],
    this: ThisRank,
    why: str | None,
    lost: list[int],
    says: str,
) -> None:
    verdict = judge(peers(**known), NOW, LIMITS, this)
    if why is None:
        assert verdict is None
        return
    assert verdict is not None
    assert verdict.why == why and verdict.reporter == RankOnHost(1, "studio2")
    assert [place.rank for place in verdict.lost] == lost
    assert all(place.host == f"studio{place.rank + 1}" for place in verdict.lost)
    assert verdict.sentence().startswith(says)
    assert verdict.limit_seconds == (5 if why == "silent" else 10)
    if this.waits:
        assert verdict.sentence().endswith(WHERE)


@pytest.mark.parametrize(
    ("silence_seconds", "beat_seconds"), [(60, 1), (5, 1), (2, 0.4)]
)
def test_beats_follow_from_the_limit_of_silence(
    silence_seconds: float, beat_seconds: float
) -> None:
    assert Limits(3, silence_seconds).beat_seconds == beat_seconds


def test_ranks_that_never_found_each_other() -> None:
    """They have as long as a rank may be silent: MPI has started, so all are there."""
    waits = [WAIT._replace(since=NOW - 4.9)]
    first = replace(WAITING, waits=waits, is_connected=False)
    for known in ([], peers(rank_2={"heard": 0.0})):
        assert judge(known, NOW, LIMITS, first) is None
        verdict = judge(known, NOW + 0.2, LIMITS, first)
        assert verdict is not None and verdict.why == "unconnected"
        assert "the ranks did not all find each other within 5 s" in verdict.sentence()


# This rank has left its third block by an exception, its second, in collective 7.
RAISED = replace(COMPUTING, blocks=Blocks(3, 2, 7))


@pytest.mark.parametrize(
    ("known", "since", "raised"),
    [
        # All are still in the block, where they may raise, too.
        ({}, NOW - 9.9, None),
        # Too long for the limit.
        ({}, NOW - 10.1, [1]),
        ({"rank_2": {"blocks": Blocks(3, 2, 7)}}, NOW - 10.1, [1, 2]),
        # One went on: to a collective, out of the block, or to its end.
        ({"rank_3": {"number": 8}}, NOW, [1]),
        ({"rank_3": {"number": 8, "begun": 3}}, NOW, [1]),
        ({"rank_3": {"blocks": Blocks(3, 1, 2)}}, NOW, [1]),
        ({"rank_3": {"left": True}}, NOW, [1]),
        # One raised elsewhere in the block.
        (
            {
                "rank_0": {"blocks": Blocks(3, 2, 7)},
                "rank_3": {"blocks": Blocks(3, 2, 6)},
            },
            NOW,
            [0, 1],
        ),
    ],
)
def test_judge_raised(
    known: dict[str, dict[str, object]], since: float, raised: list[int] | None
) -> None:
    ranks = peers(
        **{
            name: {"blocks": Blocks(2, 1, 2), **known.get(name, {})}
            for name in ("rank_0", "rank_2", "rank_3")
        }
    )
    assert not have_all_raised(ranks, RAISED)
    verdict = judge_raised(ranks, NOW, since, LIMITS, RAISED, "ValueError: no")
    if raised is None:
        assert verdict is None
        return
    assert verdict is not None and verdict.why == "raised"
    assert [place.rank for place in verdict.lost] == raised
    assert "rank 1 on studio2" in verdict.sentence()
    assert " raised ValueError: no, where others did not; " in verdict.sentence()


def test_all_have_raised() -> None:
    """One of them may be on its way already, and have raised again."""
    blocks = {
        "rank_0": {"blocks": Blocks(3, 2, 7)},
        "rank_2": {"blocks": Blocks(3, 2, 7), "number": 9},
        "rank_3": {"blocks": Blocks(4, 3, 9), "number": 9},
    }
    assert have_all_raised(peers(**blocks), RAISED)


def test_which_verdict_counts() -> None:
    """What an exception may have followed from counts before it."""
    whys = ("failed", "raised", "died", "late", "raised", "failed")
    reader, counted, final = VerdictFilter(), [], []
    for why in whys:
        reader.feed(f"{replace(REPORT, why=why).line()}\n".encode())
        counted.append(reader.verdict.why)
        final.append(reader.is_final)
    assert counted == ["failed", "raised", "died", "died", "died", "died"]
    assert final == [False, False, True, True, True, True]


REPORT = Verdict(
    "silent",
    (RankOnHost(2, "studio3"),),
    RankOnHost(3, "studio4"),
    replace(CALL, waiting=False),
    10,
)
FIRST = ThisRank(0, "studio1")


@pytest.mark.parametrize(
    ("report", "known", "why", "lost"),
    [
        # The lowest rank misses the same one, or another as well.
        (REPORT, {"rank_2": {"heard": NOW - 3.1}}, "silent", [2]),
        (REPORT, dict.fromkeys(("rank_2", "rank_3"), SILENT), "silent", [2, 3]),
        # It hears whom the other misses.
        (REPORT, {}, "unreachable", [2]),
        # It is missed itself, or no rank is: the report stands.
        (replace(REPORT, lost=(RankOnHost(0, "studio1"),)), {}, "silent", [0]),
        (replace(REPORT, why="late"), {"rank_3": SILENT}, "late", [2]),
        (replace(REPORT, why="undelivered", lost=()), {}, "undelivered", []),
    ],
)
def test_reconsider(
    report: Verdict, known: dict[str, dict[str, object]], why: str, lost: list[int]
) -> None:
    verdict = reconsider(report, peers(**known), NOW, LIMITS, FIRST)
    assert verdict.why == why and [place.rank for place in verdict.lost] == lost
    assert verdict.reporter == report.reporter
    where = (
        "; rank 3 on studio4 was last in allreduce 7 of model.layers.3: all ranks end"
    )
    assert verdict.sentence().endswith(where)
    if why == "unreachable":
        both = "mlxtp: rank 3 on studio4 and rank 2 on studio3 do not hear each other"
        assert verdict.sentence().startswith(both)


ASKED = NOW - 0.6


@pytest.mark.parametrize(
    ("known", "rank", "lost"),
    [
        ({}, 1, None),  # nobody has died
        ({"rank_2": {"heard": 900.0, "left": True}}, 1, None),
        # The lowest rank that is alive says it.
        ({"rank_2": {"heard": 900.0, "gone": True}}, 1, None),
        ({"rank_0": {"heard": 900.0, "gone": True}}, 1, [0]),
        # A host that says that nobody listens knows it; a busy rank is only slow.
        (
            {"rank_0": {"heard": 900.0}, "rank_2": {"heard": 900.0, "gone": True}},
            1,
            [2],
        ),
        ({"rank_0": {"heard": 900.0}, "rank_2": {"heard": 900.0}}, 1, [0, 2]),
        (
            {f"rank_{rank}": {"heard": 900.0, "gone": True} for rank in (0, 2, 3)},
            1,
            [0, 2, 3],
        ),
    ],
)
def test_judge_termination(
    known: dict[str, dict[str, object]], rank: int, lost: list[int] | None
) -> None:
    this = replace(WAITING, rank=rank)
    verdict = judge_termination(peers(**known), ASKED, LIMITS, this)
    if lost is None:
        assert verdict is None
        return
    assert verdict is not None and verdict.why == "died"
    assert [place.rank for place in verdict.lost] == lost
    assert " died; rank 1 on studio2 is in " in verdict.sentence()


@pytest.mark.parametrize(
    ("silent", "cut_off"),
    [([], False), ([0], False), ([0, 2], True), ([0, 2, 3], True)],
)
def test_who_is_cut_off(silent: list[int], cut_off: bool) -> None:
    known = peers(**{f"rank_{rank}": {"heard": NOW - 3.1} for rank in silent})
    assert [peer.rank for peer in unheard(known, NOW, LIMITS)] == silent
    assert is_cut_off(known, NOW, LIMITS) == cut_off


def test_progress() -> None:
    """Collectives count when they are called, in MLX's graph or out of it."""
    progress = Progress()
    assert (progress.last_call(), progress.waits()) == (None, [])
    with progress.collective("bcast"):
        [wait] = progress.waits()
        assert str(wait.call()) == "bcast 1" and not wait.in_graph
    assert str(progress.last_call()) == "bcast 1" and progress.waits() == []
    assert progress.put_in_graph("allreduce", "model.layers.0") == 2
    assert progress.put_in_graph("allgather", "lm_head") == progress.number == 3
    # Over MLX's own backends nobody knows what has begun.
    assert str(progress.last_call()) == "the graph with an allgather of lm_head"
    state = GraphState(2, "allreduce", "model.layers.0", 1.5)
    progress.graph = lambda: state
    [wait] = progress.waits()
    assert str(wait.call()) == "allreduce 2 of model.layers.0" and wait.in_graph
    assert time.monotonic() - wait.since == pytest.approx(1.5, abs=0.5)
    assert str(progress.last_call()) == "the graph with an allgather of lm_head"
    state = GraphState(3, "allgather", "lm_head")  # and in none now
    assert str(progress.last_call()) == "allgather 3 of lm_head"
    assert progress.waits() == []
    progress.end_block(raised=True)
    assert progress.blocks == Blocks(1, 1, raised_at=3)


def test_waits_without_a_limit() -> None:
    """A wait of the native core that outlasts them has its limit from then on."""
    progress = Progress()
    begin = time.monotonic()
    with progress.unlimited():
        with progress.unlimited():
            assert progress.limited_since is None
        assert progress.limited_since is None
    assert progress.limited_since is not None and progress.limited_since >= begin


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (CALL, "allreduce 7 of model.layers.3"),
        (CollectiveCall("barrier", 4, "", waiting=False), "barrier 4"),
        (
            CollectiveCall("allgather", None, "lm_head", waiting=False),
            "the graph with an allgather of lm_head",
        ),
    ],
)
def test_collectives_in_words(call: CollectiveCall, says: str) -> None:
    assert str(call) == says


@pytest.mark.parametrize(
    "verdict",
    [
        REPORT,
        replace(REPORT, why="raised", error="ValueError: no"),
        replace(REPORT, lost=(), collective=None),
    ],
)
def test_as_data(verdict: Verdict) -> None:
    assert Verdict.from_json(verdict.to_json()) == verdict
    assert verdict.line().startswith(VERDICT_MARK) and "\n" not in verdict.line()
    assert "\n" not in verdict.sentence()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "3", REPORT.to_json()[:-9], '{"why": "bored"}']
)
def test_what_is_no_verdict(text: str) -> None:
    with pytest.raises(ValueError):
        Verdict.from_json(text)
    bored = REPORT.to_json().replace('"silent"', '"bored"')
    with pytest.raises(ValueError, match="not a verdict"):
        Verdict.from_json(bored)


def test_data_is_printed_for_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VERDICT_VARIABLE, raising=False)
    assert text_of(REPORT) == REPORT.sentence()
    monkeypatch.setenv(VERDICT_VARIABLE, "1")
    assert text_of(REPORT) == f"{REPORT.sentence()}\n{REPORT.line()}"


def test_an_error_with_its_verdict() -> None:
    error = RankLostError(REPORT)
    assert error.verdict == REPORT and str(error) == REPORT.sentence()
