"""Modelled times follow from what was measured, or from what links are known to do."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from mlx.utils import tree_flatten
from wide_models import WIDE

from mlxtp.cluster.measured import Collective, Host, Measured, Pair
from mlxtp.dryrun.requirements import needs
from mlxtp.plan.__main__ import main
from mlxtp.plan.calibration import measured_machines
from mlxtp.plan.hardware import (
    OPERATION_SECONDS,
    Link,
    MeasuredNetwork,
    Network,
    network_of,
)
from mlxtp.plan.model import model_of_config, open_model
from mlxtp.plan.planning import Setting, plan
from mlxtp.plan.timing import Time, compute
from mlxtp.stories import PATH as STORIES

pytestmark = pytest.mark.once

# Three hosts on a ring: the last reads at half the speed of the others.
HOSTS = tuple(
    Host(
        rank,
        f"studio{rank + 1}",
        "a CPU",
        False,
        10**10,
        8 * 10**9,
        rate,
        1e12,
        1e7 / rate,
    )
    for rank, rate in enumerate([2e9, 2e9, 1e9])
)
MEASURED = Measured(
    HOSTS,
    tuple(Pair(ranks, 1e-3, 1e9) for ranks in [(0, 1), (0, 2), (1, 2)]),
    (
        Collective("allreduce", 1000, 2e-3),
        Collective("allreduce", 2000, 3e-3),
        Collective("allgather", 1000, 5e-3),
    ),
)


def test_a_collective_takes_what_was_measured() -> None:
    network = network_of(MEASURED, [0, 1, 2], "ring")
    assert isinstance(network, MeasuredNetwork)
    assert network.seconds("allreduce", 1500, 2) == pytest.approx(2.5e-3)
    assert network.seconds("allreduce", 10, 2) == pytest.approx(2e-3)
    # The last line goes on.
    assert network.seconds("allreduce", 4000, 2) == pytest.approx(5e-3)
    assert network.seconds("allgather", 9000, 2) == pytest.approx(5e-3)
    # Of two ranks no collective was measured, but their link.
    two = network_of(MEASURED, [0, 1], "ring")
    assert two.seconds("allreduce", 2, 2) == pytest.approx(1e-3, rel=1e-3)
    # Nor of all in another order.
    assert not isinstance(network_of(MEASURED, [1, 0, 2], "ring"), MeasuredNetwork)


def test_ranks_are_chosen_by_their_hosts_names() -> None:
    """With or without a domain; a host of several ranks is named as often."""
    names = "studio1.local", "studio2", "STUDIO3", "studio2"
    hosts = (replace(HOSTS[0], host=name) for name in names)
    measured = replace(MEASURED, hosts=tuple(hosts))
    chosen = measured.ranks_of(["studio3.lan", "studio2", "studio1", "studio2"])
    assert chosen == [2, 1, 0, 3]
    with pytest.raises(
        ValueError, match=r"^studio3: only 1 of its ranks were measured"
    ):
        measured.ranks_of(["studio3", "studio3"])
    with pytest.raises(ValueError, match=r"^studio1\.lan: was not measured; measured"):
        measured.ranks_of(["studio1.lan"])
    # The link of the two that are chosen counts, and no other.
    far = replace(MEASURED, pairs=(MEASURED.pairs[0], Pair((1, 2), 7e-3, 1e8)))
    assert network_of(far, [2, 1], "ring").link.hop_seconds == 7e-3


def test_a_token_is_the_sum_of_its_steps() -> None:
    machines = tuple(measured_machines(HOSTS))
    setting = Setting(machines, network_of(MEASURED, range(3), "ring"), 256, 1)
    with open_model(str(STORIES)) as model:
        found = plan(model, setting, [1, 1, 1])
    token = found.decode
    # Four layers with two sums each, one for the embedding, of 192 elements.
    assert token.allreduces == pytest.approx(9 * 2e-3)
    assert token.gathers == pytest.approx(5e-3)
    # The slow rank decides in every step: it is last in each, with a third.
    reads = sum(step.read_bytes for step in found.needs[2].dry_run.token)
    most = sum(
        max(n.dry_run.token[i].read_bytes / m.bytes_per_second
            for n, m in zip(found.needs, machines, strict=True))
        for i in range(len(found.needs[0].dry_run.token))
    )  # fmt: skip
    assert token.weights == pytest.approx(most) and most >= reads / 1e9
    # A rank starts as many operations as one that is alone, whose token took 10 ms.
    whole = sum(step.read_bytes for step in found.one.dry_run.token)
    counts = [
        sum(step.operations for step in need.dry_run.token)
        for need in (found.needs[2], found.one)
    ]
    beside = 0.01 - whole / 1e9
    assert token.operations == pytest.approx(beside * counts[0] / counts[1])


def test_a_token_alone_takes_what_it_took() -> None:
    """On a CPU all but weights is operations; on a GPU, but for kernels, waits."""
    mac = replace(HOSTS[0], chip="Apple M2 Ultra", has_gpu=True)
    pc = replace(HOSTS[0], chip="NVIDIA GeForce RTX 4090", has_gpu=True)
    with open_model(str(STORIES)) as model:
        [need] = needs(model.build, [1], 64)
    for host in HOSTS[1], HOSTS[2], mac, pc:
        [machine] = measured_machines([replace(host, token_seconds=0.01)])
        total = sum((compute(step, machine) for step in need.dry_run.token), Time())
        assert total.seconds == pytest.approx(0.01)
        assert (total.crossings > 0) == host.has_gpu
        assert (machine.chip, machine.limit_bytes) == (host.chip, 8 * 10**9)
    assert machine.operation_seconds == OPERATION_SECONDS


# From docs/communication.md: hops of one-shot and two-shot, parts over the busiest
# cable.
@pytest.mark.parametrize(
    "topology, ranks, one_shot, two_shot",
    [
        ("ring", 2, (1, 1.0), (2, 1.0)),
        ("ring", 3, (1, 1.0), (2, 2 / 3)),
        ("ring", 4, (2, 1.5), (4, 1.125)),
        ("ring", 5, (2, 2.0), (4, 1.0)),
        ("ring", 8, (4, 3.5), (8, 1.6875)),
        ("switch", 5, (1, 4.0), (2, 1.6)),
        ("mesh", 5, (1, 1.0), (2, 0.4)),
    ],
)
def test_links_carry_what_the_algorithms_send(
    topology: str, ranks: int, one_shot: tuple[int, float], two_shot: tuple[int, float]
) -> None:
    latency = Network(ranks, Link(1.0, 1e30, topology), topology)
    assert latency.seconds("allreduce", 1, 2) == pytest.approx(one_shot[0])
    rate = Network(ranks, Link(0.0, 1e9, topology), topology)
    parts = min(one_shot[1], two_shot[1])
    # Adding takes less than a thousandth of what the links take here.
    seconds = rate.seconds("allreduce", 10**6, 10**6)
    assert seconds == pytest.approx(parts * 1e-3, rel=1e-3)
    gather = latency.seconds("allgather", 1, 2), rate.seconds("allgather", 10**6, 2)
    assert gather == pytest.approx((one_shot[0], one_shot[1] * 1e-3))


def test_the_command_line_reads_what_doctor_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "measured.json"
    MEASURED.write(file)
    words = ["mlxtp.plan", "--model", str(STORIES), "--measured", str(file), "--json"]
    monkeypatch.setattr("sys.argv", [*words, "--context", "256", "--shares", "auto"])
    main()
    found = json.loads(capsys.readouterr().out)
    assert [rank["host"] for rank in found["ranks"]] == [
        "studio1",
        "studio2",
        "studio3",
    ]
    assert [rank["limit_bytes"] for rank in found["ranks"]] == [8 * 10**9] * 3
    # The slow one gets less.
    assert found["shares"][2]["mlp"] < found["shares"][0]["mlp"]
    hostfile = tmp_path / "two"
    hostfile.write_text("studio3\nstudio1\n")
    words += ["--hostfile", str(hostfile), "--context", "256"]
    monkeypatch.setattr("sys.argv", [*words, "--shares", "auto"])
    main()
    found = json.loads(capsys.readouterr().out)
    assert [rank["host"] for rank in found["ranks"]] == ["studio3", "studio1"]
    assert found["shares"][0]["mlp"] < found["shares"][1]["mlp"]
    hostfile.write_text("studio1\nstudio9\n")
    for more, message in (
        ([], "studio9: was not measured; measured were studio1, studio2, studio3"),
        (["--memory", "64"], "leave --chip, --chips, --memory and --fast-synch out"),
    ):
        if more:
            hostfile.write_text("studio1\n")
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit):
            main()
        [line] = capsys.readouterr().err.splitlines()
        assert line.endswith(message)


def test_a_token_reads_the_experts_that_it_chooses() -> None:
    config, _ = WIDE["Qwen3-235B-A22B, 2 of 94 layers"]  # 8 of 128 experts
    with model_of_config("a mixture", config, 4) as model:
        [one] = needs(model.build, [1], 256)
        parameters = dict(tree_flatten(model.build().model.parameters()))
    path = "model.layers.1.mlp.switch_mlp.gate_proj"
    held = sum(a.nbytes for name, a in parameters.items() if name.startswith(path))
    calls = [call for step in one.dry_run.token for call in step.calls]
    [read] = [call.read_bytes for call in calls if call.path == path]
    assert read == pytest.approx(held * 8 / 128)
    assert one.owned.experts == 128 and one.owned.expert_columns == (1536, 1536)
