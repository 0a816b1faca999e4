"""The process of `fault_proxy.FaultProxy`: python fault_proxy_server.py TARGET FILER.

It reads calls of the methods of `_Server` from standard input, one in JSON a line, and writes what they
return to standard output. It ends with its input.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from dataclasses import astuple
from typing import Any

from fault_proxy import ANSWERS, HOST, Fault, Request, Rule

_CHUNK = 1 << 20
_NO_LINGER = struct.pack("ii", 1, 0)


class _Server:
    """The proxy in one process; `FaultProxy` calls its public methods."""

    def __init__(self, target: int, filer: int) -> None:
        self.target, self.filer = target, filer
        self.latency = 0.0
        self._rules: list[Rule] = []
        self._matched: Counter[int] = Counter()
        self._applied: Counter[int] = Counter()
        self._seen: Counter[str] = Counter()
        self._requests: list[Request] = []
        self._lock = threading.Lock()
        self._clients: set[socket.socket] = set()
        self._port = 0
        self.accept()

    def port(self) -> int:
        return self._port

    def configure(self, rules: list[dict[str, Any]], latency: float) -> None:
        with self._lock:
            self._rules, self.latency = [Rule(**rule) for rule in rules], latency
            self._matched, self._applied = Counter(), Counter()

    def requests(self) -> list[tuple[Any, ...]]:
        return [astuple(request) for request in self._requests]

    def reset(self) -> None:
        self.refuse()
        self.configure([], 0.0)
        self._requests.clear()
        self._seen.clear()
        self.accept()

    def refuse(self) -> None:
        for one in (self._listener, *self._clients):
            # Wakes the thread that waits for it.
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def accept(self) -> None:
        self._listener = socket.create_server((HOST, self._port), backlog=256)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, args=[self._listener], daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self._clients.add(client)
                threading.Thread(target=self._handle, args=[client], daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        try:
            with contextlib.suppress(OSError), client, _Connection(self, client) as connection:
                connection.run()
        finally:
            self._clients.discard(client)

    def rule_of(self, request: Request) -> Rule | None:
        """Note `request`; return what is to happen to it."""
        text = f"{request.method} {request.path}?{request.query}"
        with self._lock:
            self._requests.append(request)
            self._seen[f"{text} {request.range}"] += 1
            for number, rule in enumerate(self._rules):
                if not re.search(rule.match, text):
                    continue
                draw = f"{rule.seed} {number} {text} {request.range} {self._seen[f'{text} {request.range}']}"
                digest = hashlib.blake2b(draw.encode(), digest_size=8).digest()
                if int.from_bytes(digest, "big") / 2.0**64 >= rule.fraction:
                    continue
                self._matched[number] += 1
                spent = rule.times is not None and self._applied[number] >= rule.times
                if self._matched[number] > rule.skip and not spent:
                    self._applied[number] += 1
                    request.fault = rule.fault
                    return rule
        return None


class _Connection:
    """A client's connection, with one of its own to the server; a context that closes the latter."""

    def __init__(self, server: _Server, client: socket.socket) -> None:
        self._server, self._client = server, client
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._upstream = _connect(server.target)
        self._pipe = os.pipe()

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._upstream.close()
        for end in self._pipe:
            os.close(end)

    def run(self) -> None:
        """Pass on one request after the other, until a side closes its connection or a fault ends it."""
        poll = select.poll()
        poll.register(self._client, select.POLLIN)
        poll.register(self._upstream, select.POLLIN)
        while [number for number, _ in poll.poll()] == [self._client.fileno()]:
            head, begun = _read_head(self._client)
            if not head:
                return
            self._pass_on(head, begun)

    def _pass_on(self, head: bytes, begun: bytes) -> None:
        (method, target, _), fields = _parse(head)
        path, _, query = target.partition("?")
        length = int(fields.get("content-length", 0))
        request = Request(method, path, query, fields.get("range", ""), length)
        rule = self._server.rule_of(request)
        if "expect" in fields and not begun:
            self._client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if rule and (rule.fault in ANSWERS or (rule.fault in ("reset", "stall") and rule.after is None)):
            _read(self._client, length - len(begun))
            time.sleep(self._server.latency)
            if rule.fault in ANSWERS:
                start, text = ANSWERS[rule.fault]
                self._send(request, f"HTTP/1.1 {start}\r\n\r\n".encode(), text.encode())
            else:
                self._break(rule.fault)
            return
        upstream, ignore_range = self._upstream, rule is not None and rule.fault == "ignore range"
        if ignore_range and method == "GET":
            # Without a signature, which covers the range.
            filer = self._server.filer
            upstream = _connect(filer or self._server.target)
            prefix = "/buckets" if filer else ""
            head = f"GET {prefix}{path} HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode()
        upstream.sendall(head + begun)
        self._splice(self._client, upstream, length - len(begun))
        self._answer(request, rule, upstream)

    def _answer(self, request: Request, rule: Rule | None, upstream: socket.socket) -> None:
        """Pass on the answer of `upstream`."""
        head, begun = _read_head(upstream)
        while head.startswith(b"HTTP/1.1 100"):
            head, begun = _read_head(upstream, begun)
        if not head:
            raise ConnectionError
        (_, status, *_), fields = _parse(head)
        time.sleep(self._server.latency + (rule.seconds if rule and rule.fault == "delay" else 0.0))
        length = int(fields.get("content-length", 0))
        changed = rule is not None and rule.fault not in ("delay", "ignore range")
        if request.method == "HEAD":
            request.status = int(status)
            self._client.sendall(head)
        elif "chunked" in fields.get("transfer-encoding", ""):
            # Lists of objects and errors: short.
            self._send(request, head, _read_chunked(upstream, begun), rule if changed else None)
        elif changed:
            self._send(request, head, begun + _read(upstream, length - len(begun)), rule)
        else:
            request.status, request.sent = int(status), len(begun)
            self._client.sendall(head + begun)
            self._splice(upstream, self._client, length - len(begun), request)
        if upstream is not self._upstream:
            upstream.close()

    def _send(self, request: Request, head: bytes, body: bytes, rule: Rule | None = None) -> None:
        """Send an answer, with what `rule` changes of its body."""
        request.status = int(head.split(b" ")[1])
        end = None
        if rule and not body:
            request.fault = ""
        elif rule:
            after = len(body) // 2 if rule.after is None else min(rule.after, len(body) - 1)
            if rule.fault == "gzip":
                head, body = head[:-2] + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(body, 1)
            elif rule.fault == "corrupt":
                body = body[:after] + bytes([body[after] ^ 1]) + body[after + 1 :]
            else:
                end = after
        lengths = re.compile(rb"content-length:|transfer-encoding:", re.IGNORECASE)
        lines = [line for line in head.split(b"\r\n") if not lengths.match(line)]
        lines[-2:-2] = [b"Content-Length: %d" % len(body)]
        sent = b"" if request.method == "HEAD" else body[:end]
        request.sent = len(sent)
        self._client.sendall(b"\r\n".join(lines) + sent)
        if rule and end is not None:
            self._break(rule.fault)

    def _break(self, fault: Fault) -> None:
        """End the connection."""
        if fault == "stall":
            select.select([self._client], [], [])
        if fault == "reset":
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        raise ConnectionError

    def _splice(
        self, source: socket.socket, target: socket.socket, length: int, request: Request | None = None
    ) -> None:
        """Move `length` bytes in the kernel, and count them in `request`."""
        while length > 0:
            moved = os.splice(source.fileno(), self._pipe[1], min(length, _CHUNK))
            if not moved:
                raise ConnectionError
            length -= moved
            if request:
                request.sent += moved
            while moved:
                moved -= os.splice(self._pipe[0], target.fileno(), moved)


def _connect(port: int) -> socket.socket:
    connection = socket.create_connection((HOST, port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _parse(head: bytes) -> tuple[list[str], dict[str, str]]:
    """Return the words of the first line, and the fields by their names in lower case."""
    first, *lines = head.decode("latin-1").strip().split("\r\n")
    return first.split(" ", 2), {
        name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
    }


def _read_head(source: socket.socket, data: bytes = b"") -> tuple[bytes, bytes]:
    """Return the head of a message that begins with `data`, and what came of its body; at the end nothing."""
    while b"\r\n\r\n" not in data:
        if not (more := source.recv(1 << 16)):
            return b"", b""
        data += more
    head, separator, body = data.partition(b"\r\n\r\n")
    return head + separator, body


def _read(source: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        if not (more := source.recv(min(length - len(data), _CHUNK))):
            raise ConnectionError
        data += more
    return bytes(data)


def _read_chunked(source: socket.socket, begun: bytes) -> bytes:
    """Return a body in chunks without their framing."""
    body = b""
    while True:
        while b"\r\n" not in begun:
            begun += _read(source, 1)
        line, _, begun = begun.partition(b"\r\n")
        length = int(line.split(b";")[0], 16)
        begun += _read(source, length + 2 - len(begun))
        body, begun = body + begun[:length], begun[length + 2 :]
        if not length:
            return body


def _main() -> None:
    server = _Server(int(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(server, name)(*arguments)), flush=True)
    # Threads may wait for clients.
    os._exit(0)


if __name__ == "__main__":
    _main()
