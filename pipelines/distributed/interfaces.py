"""Network interfaces of this host, by their addresses."""

from __future__ import annotations

import fcntl
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

_SIOCGIFADDR = 0x8915
"""From linux/sockios.h: get the IPv4 address of an interface."""

_NAME_BYTES, _REQUEST_BYTES, _ADDRESS_AT = 16, 40, 20
"""Lengths of a name and of struct ifreq, and the offset of the address in it; see netdevice(7)."""

_IPV6_ADDRESSES = Path("/proc/net/if_inet6")
"""Address in hexadecimal digits, four numbers, and interface, one a line; see proc_net(5)."""


def is_loopback(address: str) -> bool:
    """Return True if only this host can reach `address`, an IPv4 or IPv6 address."""
    return ip_address(address.partition("%")[0]).is_loopback


def interface(address: str) -> str | None:
    """Return the name of the interface that has `address`, of IPv4 or IPv6; None if none has it."""
    wanted = ip_address(address.partition("%")[0])
    if wanted.version == 6:
        with suppress(OSError):
            for line in _IPV6_ADDRESSES.read_text().splitlines():
                if bytes.fromhex(line.split()[0]) == wanted.packed:
                    return line.split()[-1]
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = name.encode()[: _NAME_BYTES - 1].ljust(_REQUEST_BYTES, b"\0")
            with suppress(OSError):  # An interface without an address.
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, request)
                if answer[_ADDRESS_AT : _ADDRESS_AT + 4] == wanted.packed:
                    return name
    return None
