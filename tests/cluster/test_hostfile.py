"""Open MPI's hostfiles: what is read of them, and what is refused."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtp.cluster import hostfile

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,12}", fullmatch=True)
HOSTS = st.dictionaries(NAMES, st.integers(0, 9), min_size=1).filter(
    lambda hosts: any(hosts.values())
)
SPACES = st.sampled_from(["", " ", "\t", "  "])


@given(HOSTS, st.data())
def test_what_is_written_is_read_however_it_is_spaced(
    hosts: dict[str, int], data: st.DataObject
) -> None:
    lines = []
    for name, slots in hosts.items():
        before, after, around = (data.draw(SPACES) for _ in range(3))
        given_slots = f"slots{around}={after}{slots}"
        more = data.draw(st.sampled_from(["", " max_slots=9", "\tmax-slots = 7 # x"]))
        lines += [f"{before}{name} {given_slots}{more}", data.draw(SPACES), "# no one"]
    assert hostfile.parse("\n".join(lines), "it") == hosts


@given(HOSTS)
def test_by_rank_fills_a_host_before_the_next(hosts: dict[str, int]) -> None:
    ranks = hostfile.by_rank(hosts)
    assert len(ranks) == sum(hosts.values())
    assert list(dict.fromkeys(ranks)) == [name for name in hosts if hosts[name]]
    assert ranks == sorted(ranks, key=list(hosts).index)


def test_a_host_may_be_named_again_and_slots_may_be_left_out() -> None:
    text = "a slots=2\nb\nmac-mini max-slots=3 slots=1\na slots=1\n"
    assert hostfile.parse(text, "it") == {"a": 3, "b": 1, "mac-mini": 1}


@pytest.mark.parametrize(
    "text, says",
    [
        ("# nobody\n", "the file names no host that takes a rank"),
        ("a slots=0", "the file names no host that takes a rank"),
        ("a slots=1\n-oProxyCommand=x", "the file, line 2: wanted a host's name"),
        ("a b", "the file, line 1: wanted a host's name and slots=N, not 'a b'"),
        ("a slots=many", "the file, line 1: wanted"),
        ("a slots=", "the file, line 1: wanted"),
        ("a slots=-1", "the file, line 1: wanted"),
        ("a; reboot", "the file, line 1: wanted"),
    ],
)
def test_what_is_no_hostfile_is_named_with_its_line(text: str, says: str) -> None:
    with pytest.raises(ValueError) as refused:
        hostfile.parse(text, "the file")
    assert str(refused.value).startswith(says)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for file, says in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
    ):
        with pytest.raises(ValueError) as refused:
            hostfile.read(file)
        assert str(refused.value) == f"no hostfile {file}: {says}"
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="bytes, line 1"):
        hostfile.read(tmp_path / "bytes")


def test_the_hostfiles_that_are_here() -> None:
    hosts = {file.name: hostfile.read(file) for file in ROOT.glob("hostfiles/*")}
    assert hosts["localhost"] == {"localhost": 5}
    assert hosts["studio5"] == {f"studio{k}": 1 for k in range(1, 6)}


@pytest.mark.parametrize("name", ["studio1.local", "10.89.0.1", "mac-mini", "a_b"])
def test_names(name: str) -> None:
    assert hostfile.is_name(name)


@pytest.mark.parametrize("name", ["", "-oProxyCommand=reboot", "a b", "a slots=1"])
def test_what_is_no_name(name: str) -> None:
    assert not hostfile.is_name(name)
