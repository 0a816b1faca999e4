"""An HTTP proxy before a server on this machine: delays and counts answers, and breaks some by rules.

`FaultProxy` starts it in a process of its own, so that its time and its interpreter's lock are not those of
the client under test. Requests pass unchanged with their Host header, which S3's signatures cover.
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
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, astuple, dataclass
from typing import Any, Literal

HOST = "127.0.0.1"
_CHUNK = 1 << 20
_NO_LINGER = struct.pack("ii", 1, 0)

Fault = Literal[
    "delay",  # `seconds` more before the answer
    "reset",  # reset of the connection, after `after` bytes of the body if given, else before the answer
    "stall",  # the same, with silence on an open connection
    "truncate",  # the end of the connection after `after` bytes of the body, half of it by default
    "corrupt",  # one bit flipped in the byte at `after` of the body, in the middle by default
    "gzip",  # a body with Content-Encoding: gzip
    "ignore range",  # the whole object with status 200
    "html",  # status 200 and a web page
    "slow down",
    "expired token",
    "clock skew",
    "redirect",
]


def _error(status: str, code: str, message: str, header: str = "") -> tuple[str, str]:
    error = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{error}'
    return f"{status}\r\nContent-Type: application/xml{header}", body


# Status, code and message as in the list of S3's error responses.
_ANSWERS = {
    "html": ("200 OK\r\nContent-Type: text/html", "<!DOCTYPE html><html><body>Please sign in.</body></html>"),
    "slow down": _error("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "expired token": _error("400 Bad Request", "ExpiredToken", "The provided token has expired."),
    "clock skew": _error(
        "403 Forbidden",
        "RequestTimeTooSkewed",
        "The difference between the request time and the server's time is too large.",
    ),
    "redirect": _error(
        "301 Moved Permanently",
        "PermanentRedirect",
        "The bucket you are attempting to access must be addressed using the specified endpoint.",
        "\r\nx-amz-bucket-region: eu-central-1",
    ),
}


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens to some requests.

    Attributes:
        fault: What happens.
        match: Regular expression, searched for in "METHOD /path?query".
        fraction: Part of these requests, drawn by `seed` from what is requested and how often it was before:
            the order in which they arrive does not matter, and a repeated request is drawn anew.
        skip: How many of them pass before.
        times: To how many it happens; None for no limit.
        after: Bytes of the body, see `Fault`.
        seconds: Of a delay.
        seed: Of the draws.
    """

    fault: Fault
    match: str = ""
    fraction: float = 1.0
    skip: int = 0
    times: int | None = None
    after: int | None = None
    seconds: float = 0.0
    seed: int = 0


@dataclass(slots=True)
class Request:
    """A request that arrived.

    Attributes:
        method, path, query: Its first line.
        range: Its Range header, or "".
        received: Bytes of its body.
        status: Of the answer; 0 if there was none.
        sent: Bytes of the answer's body.
        fault: What was done to it, or "".
    """

    method: str
    path: str
    query: str
    range: str
    received: int = 0
    status: int = 0
    sent: int = 0
    fault: str = ""


class FaultProxy:
    """A running proxy of the server at port `target`; a context that ends it.

    Attributes:
        port: Its port.
        pid: Its process.
    """

    def __init__(self, target: int, filer: int = 0) -> None:
        """Start it. `filer` is the port of SeaweedFS's filer if `target` is its S3: for "ignore range"."""
        line = [sys.executable, "-I", __file__, str(target), str(filer)]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        self.port: int = self._call("port")

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def configure(self, *rules: Rule, latency: float = 0.0) -> None:
        """Apply the first of `rules` that a request meets, and add `latency` seconds before each answer."""
        self._call("configure", [asdict(rule) for rule in rules], latency)

    def requests(self) -> list[Request]:
        """Return what arrived, in order. What a client has received is counted."""
        return [Request(*request) for request in self._call("requests")]

    def reset(self) -> None:
        """Forget rules, latency and requests, accept connections, and close those that are open."""
        self._call("reset")

    def refuse(self) -> None:
        """Close all connections and refuse new ones, until `accept`."""
        self._call("refuse")

    def accept(self) -> None:
        """Accept connections again, at the same port."""
        self._call("accept")

    def _call(self, name: str, *arguments: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class _Server:
    """The proxy in its own process; its public methods are what `FaultProxy` calls."""

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
                threading.Thread(target=self._handle, args=[client], daemon=True).start()

    def _handle(self, client: socket.socket) -> None:
        self._clients.add(client)
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
                draw = f"{rule.seed} {text} {request.range} {self._seen[f'{text} {request.range}']}"
                if _uniform(draw) >= rule.fraction:
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
        self._pipe = os.pipe()
        self._upstream = _connect(server.target)

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
        if rule and (rule.fault in _ANSWERS or (rule.fault in ("reset", "stall") and rule.after is None)):
            _read(self._client, length - len(begun))
            time.sleep(self._server.latency)
            if rule.fault in _ANSWERS:
                start, text = _ANSWERS[rule.fault]
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
            rest, _, begun = begun.partition(b"\r\n\r\n")
            head, begun = (rest + b"\r\n\r\n", begun) if rest else _read_head(upstream)
        if not head:
            raise ConnectionError
        (_, status, *_), fields = _parse(head)
        time.sleep(self._server.latency + (rule.seconds if rule and rule.fault == "delay" else 0.0))
        length = int(fields.get("content-length", 0))
        if request.method == "HEAD":
            request.status = int(status)
            self._client.sendall(head)
        elif "chunked" in fields.get("transfer-encoding", ""):
            # Lists of objects and errors: short.
            self._send(request, head, _read_chunked(upstream, begun))
        elif rule is None or rule.fault in ("delay", "ignore range"):
            request.status, request.sent = int(status), len(begun)
            self._client.sendall(head + begun)
            self._splice(upstream, self._client, length - len(begun), request)
        else:
            body = begun + _read(upstream, length - len(begun))
            self._send_faulty(request, rule, head, body)
        if upstream is not self._upstream:
            upstream.close()

    def _send_faulty(self, request: Request, rule: Rule, head: bytes, body: bytes) -> None:
        after = len(body) // 2 if rule.after is None else min(rule.after, len(body) - 1)
        if rule.fault == "gzip":
            packed = gzip.compress(body, 1)
            self._send(request, head[:-2] + b"Content-Encoding: gzip\r\n\r\n", packed)
        elif rule.fault == "corrupt":
            self._send(request, head, body[:after] + bytes([body[after] ^ 1]) + body[after + 1 :])
        else:
            request.status, request.sent = int(head.split(b" ")[1]), after
            self._client.sendall(head + body[:after])
            self._break(rule.fault)

    def _send(self, request: Request, head: bytes, body: bytes) -> None:
        """Send an answer with the length of `body`."""
        old = re.compile(rb"content-length:|transfer-encoding:", re.IGNORECASE)
        lines = [line for line in head.split(b"\r\n") if not old.match(line)]
        lines[-2:-2] = [b"Content-Length: %d" % len(body)]
        if request.method == "HEAD":
            body = b""
        request.status, request.sent = int(head.split(b" ")[1]), len(body)
        self._client.sendall(b"\r\n".join(lines) + body)

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


def _read_head(source: socket.socket) -> tuple[bytes, bytes]:
    """Return the next message's head and what came of its body; two empty ones at the end."""
    data = b""
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


def _uniform(text: str) -> float:
    """Return a number in [0, 1) drawn by `text`."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _main() -> None:
    server = _Server(int(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(server, name)(*arguments)), flush=True)
    # Threads may wait for clients.
    os._exit(0)


if __name__ == "__main__":
    _main()
