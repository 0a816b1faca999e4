"""Fixtures of an object store: SeaweedFS, with a bucket for each test, and a proxy that breaks answers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_proxy import FaultProxy

from benchmarks.object_store import HOST, ObjectStore, client_environment

__all__ = ["HOST", "Bucket", "FaultProxy", "ObjectStore", "bucket", "client_environment", "fault_proxy"]

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket of a running server.

    Attributes:
        store: The server; a test may stop it and start it again.
        name: Name of the bucket.
        url: s3:// address of the bucket.
        http: http:// address of the same by SeaweedFS's plain file server, without keys.
    """

    store: ObjectStore
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    @property
    def http(self) -> str:
        return f"http://{HOST}:{self.store.filer_port}/buckets/{self.name}"

    def put(self, folder: Path, prefix: str = "data") -> str:
        """Upload the files of `folder`; return the s3:// address of the copy."""
        self.store.put(folder, prefix, self.name)
        return f"{self.url}/{prefix}"

    def write(self, key: str, content: bytes) -> str:
        """Write an object; return its s3:// address."""
        self.store.write(key, content, self.name)
        return f"{self.url}/{key}"


@pytest.fixture(scope="session")
def _store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    # Each of pytest-xdist's workers has its own, which costs 0.2 s of CPU time.
    store = ObjectStore(tmp_path_factory.mktemp("seaweedfs"))
    yield store
    store.stop()


@pytest.fixture(scope="session")
def _proxy(_store: ObjectStore) -> Iterator[FaultProxy]:
    with FaultProxy(_store.port, _store.filer_port) as proxy:
        yield proxy


@pytest.fixture
def bucket(_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A new bucket, with the environment variables of clients set for it."""
    if not _store.running:
        _store.start()
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    own = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    own["AWS_EC2_METADATA_DISABLED"] = "true"
    for name, value in (own | client_environment(_store.port)).items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(_numbers)}"
    _store.make_bucket(name)
    return Bucket(_store, name)


@pytest.fixture
def fault_proxy(_proxy: FaultProxy, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy between clients and the store, to which the environment variables of clients then point."""
    for name, value in client_environment(_proxy.port).items():
        monkeypatch.setenv(name, value)
    yield _proxy
    _proxy.reset()
