"""A proxy of HTTP servers that delays each answer, and counts requests and bytes of bodies.

    python -m benchmarks.remote.proxy PORT LATENCY COUNTS

It passes requests on to PORT of this machine and writes its own port to standard output. LATENCY is in
seconds. The file COUNTS has two int64: requests, and bytes of the bodies of answers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.object_store import HOST

_PIPE_BYTES = 1 << 20
_HEAD_LIMIT = 1 << 16
_COUNTS = struct.Struct("qq")


class Counts(NamedTuple):
    """Requests so far, and bytes of their answers' bodies."""

    requests: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy: its port, its process, and the file of its counts."""

    port: int
    pid: int
    file: Path


def read_counts(file: Path) -> Counts:
    """Return the counts in the file of a proxy."""
    return Counts(*_COUNTS.unpack(file.read_bytes()))


@contextlib.contextmanager
def proxy(port: int, latency: float, file: Path) -> Iterator[Proxy]:
    """Run a proxy of `port` in a process of its own, with its counts in `file`."""
    command = [sys.executable, "-m", "benchmarks.remote.proxy", str(port), str(latency), str(file)]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as process:
        try:
            assert process.stdout
            yield Proxy(int(process.stdout.readline()), process.pid, file)
        finally:
            process.kill()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: int, latency: float, file: Path) -> None:
        super().__init__((HOST, 0), _Connection)
        self.target, self.latency = target, latency
        self._counts, self._lock = Counts(0, 0), threading.Lock()
        self._file = os.open(file, os.O_CREAT | os.O_WRONLY)
        self.count(0, 0)

    def count(self, requests: int, length: int) -> None:
        """Add to the counts."""
        with self._lock:
            self._counts = Counts(self._counts.requests + requests, self._counts.bytes + length)
            os.pwrite(self._file, _COUNTS.pack(*self._counts), 0)


class _Connection(socketserver.BaseRequestHandler):
    """A client's connection, with one of its own to the server."""

    server: _Server

    def handle(self) -> None:
        """Pass on one request after the other, until a side closes the connection."""
        client: socket.socket = self.request
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        pipe = os.pipe()
        fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            with contextlib.suppress(OSError), socket.create_connection((HOST, self.server.target)) as server:
                server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while self._pass_on(client, server, pipe):
                    pass
        finally:
            for end in pipe:
                os.close(end)

    def _pass_on(self, client: socket.socket, server: socket.socket, pipe: tuple[int, int]) -> bool:
        """Pass on a request and its answer; return whether there was one."""
        request, begun = _read_head(client)
        if not request:
            return False
        server.sendall(request + begun)
        _forward(client, server, _length(request) - len(begun), pipe)
        answer, begun = _read_head(server)
        time.sleep(self.server.latency)
        client.sendall(answer + begun)
        sent = len(begun)
        if b"transfer-encoding: chunked" in answer.lower():
            # Lists of objects and errors; no content of an object.
            while not begun.endswith(b"0\r\n\r\n"):
                begun = server.recv(_HEAD_LIMIT)
                client.sendall(begun)
                sent += len(begun)
        elif not request.startswith(b"HEAD "):
            sent += _forward(server, client, _length(answer) - sent, pipe)
        self.server.count(1, sent)
        return bool(answer)


def _read_head(source: socket.socket) -> tuple[bytes, bytes]:
    """Return the next message's head and what came of its body; two empty ones at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := source.recv(_HEAD_LIMIT)):
            return b"", b""
        data += more
    head, separator, body = data.partition(b"\r\n\r\n")
    return head + separator, body


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _forward(source: socket.socket, target: socket.socket, length: int, pipe: tuple[int, int]) -> int:
    """Move `length` bytes in the kernel; return how many it were before one side closed."""
    left = length
    while left > 0 and (here := os.splice(source.fileno(), pipe[1], min(left, _PIPE_BYTES))):
        left -= here
        while here:
            here -= os.splice(pipe[0], target.fileno(), here)
    return length - left


def main() -> None:
    """Run the command line."""
    server = _Server(int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
