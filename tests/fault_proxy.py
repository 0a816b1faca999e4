"""An HTTP proxy before a server on this machine: delays and counts answers, and breaks some by rules.

It runs in a process of its own (`fault_proxy_server`), so that its time and its interpreter's lock are not
those of the client under test. Requests pass unchanged with their Host header, which S3's signatures cover.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

HOST = "127.0.0.1"

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
ANSWERS = {
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
"""Status, headers and body of answers that the server does not give."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A fault, and the requests that it meets.

    Attributes:
        fault: See `Fault`.
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
    """A request that came to the proxy.

    Attributes:
        method, path, query: Its first line.
        range: Its Range header, or "".
        received: Bytes of its body, by its header.
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
        program = Path(__file__).with_name("fault_proxy_server.py")
        line = [sys.executable, "-S", str(program), str(target), str(filer)]
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
