"""Which addresses are this host's, and whether the job takes those on the cables."""

import pytest

from mlxtp.cluster import addresses

pytestmark = pytest.mark.once


def test_cables_that_are_not_to_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """With MLXTP_CABLES=0 a host in a ring names the address of its Ethernet."""
    monkeypatch.setattr(addresses, "_is_local", lambda it: it == "10.89.0.3")
    monkeypatch.setattr(addresses, "_source_towards", lambda host: "192.168.1.20")
    for value in None, "1":
        if value is not None:
            monkeypatch.setenv("MLXTP_CABLES", value)
        assert addresses.ring_address() == "10.89.0.3"
        assert addresses.own_address(["elsewhere"]) == "10.89.0.3"
    monkeypatch.setenv("MLXTP_CABLES", "0")
    assert addresses.ring_address() is None
    assert addresses.own_address(["elsewhere"]) == "192.168.1.20"
