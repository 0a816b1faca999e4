"""Lines between ranks, over which short messages go: JSON objects, each with its length before it.

To rank 0: `{"key", "rank", "name"}` at the door, which it answers with `{"welcome": its name}`, and then
`{"stuck": what or null}` while the rank lives, which it answers with `{}`. From rank 0: `{"begin": word}`
once all are here, and `{"leave": true}`. Both ways: `{"parted": why, "known": whether others may know}`, and
`{"end": true}` where all has gone well.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from multiprocessing.connection import Connection
from typing import Any

from pipelines.distributed.rendezvous import Endpoint
from pipelines.errors import UserError

_LONGEST = 1 << 16
"""Bytes of a message; a stranger at the door that means something else asks for more."""


def listen(meeting: Endpoint, size: int) -> socket.socket:
    """A socket at the first of the meeting's ports that is free; UserError where none is."""
    last: OSError | None = None
    for port in meeting.ports:
        door = socket.socket()
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind(("127.0.0.1" if meeting.address == "127.0.0.1" else "", port))
            door.listen(size)
        except OSError as error:
            door.close()
            last = error
        else:
            return door
    raise UserError(
        f"rank 0 cannot listen at port {meeting.ports[-1]} ({last}); does another run use it? "
        "Set MASTER_PORT to another"
    )


def limit(connection: Connection, seconds: float) -> None:
    """Have a message that stops halfway raise OSError after `seconds`, which are whole ones."""
    with socket.socket(fileno=os.dup(connection.fileno())) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", int(seconds), 0))


def send(connection: Connection, message: dict[str, Any]) -> None:
    """Say `message`; OSError where the line has ended."""
    # Text, not pickled objects: whoever can reach the port shall not run code here.
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> dict[str, Any]:
    """The next message; OSError at the line's end, ValueError where it makes no sense."""
    try:
        message = json.loads(connection.recv_bytes(_LONGEST))
    except EOFError as error:
        raise OSError("the line has ended") from error
    except RecursionError as error:
        raise ValueError("too deep") from error
    if not isinstance(message, dict):
        raise ValueError("no message")
    return message
