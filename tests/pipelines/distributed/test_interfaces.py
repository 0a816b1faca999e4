"""Interfaces of this host by their addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.distributed import interfaces


def test_the_interface_of_an_address() -> None:
    assert interfaces.interface("127.0.0.1") == "lo"
    # RFC 5737 and RFC 3849: addresses for documentation, which no host has.
    assert interfaces.interface("192.0.2.1") is None and interfaces.interface("2001:db8::1") is None


def test_the_interface_of_an_ipv6_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = tmp_path / "if_inet6"
    table.write_text(
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fe80000000000000021122fffe334455 02 40 20 80     eth1\n"
    )
    monkeypatch.setattr(interfaces, "_IPV6_ADDRESSES", table)
    assert interfaces.interface("::1") == "lo"
    assert interfaces.interface("fe80::211:22ff:fe33:4455%eth1") == "eth1"


def test_loopback_addresses() -> None:
    assert all(map(interfaces.is_loopback, ("127.0.0.1", "127.0.1.1", "::1")))
    assert not any(map(interfaces.is_loopback, ("10.0.0.1", "fe80::1%eth0")))
