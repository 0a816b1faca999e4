"""The node-local cache: what is read twice is fetched once, and nothing wrong is ever taken from it."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import ConfigError, DataError
from pipelines.storage import cache, cache_usage
from pipelines.storage.base import FileState, Storage
from pipelines.storage.cache import CacheConfig, CachedStorage
from pipelines.storage.cache_folder import CachedSet, Claim, digest_of
from pipelines.storage.cache_usage import open_usage
from pipelines.storage.local import LocalStorage
from pipelines.storage.location import Location
from pipelines.storage.requests import COUNTS

SHARD = Path("/data/shard.tar")
BLOCK = 4096
# Later versions of Python warn of forks beside threads; what is forked here uses none of them.
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Memory(LocalStorage):
    """One object in memory in place of every file, and the requests for it."""

    content: bytearray
    requests: list[tuple[Any, ...]] = field(default_factory=list)

    def read(self, path: Location, *, direct: bool = False) -> bytes:
        self.requests.append((path,))
        return bytes(self.content)

    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        self.requests.append((path, offset, length))
        return bytes(self.content[offset : offset + length])

    def read_ranges(self, path: Location, extents: Sequence[tuple[int, int]]) -> list[bytes]:
        self.requests.append((path, *extents))
        return [bytes(self.content[offset : offset + length]) for offset, length in extents]

    def state(self, path: Location) -> FileState:
        self.requests.append((path, "state"))
        return FileState(len(self.content), "etag")


@pytest.fixture(autouse=True)
def _opened_anew() -> Iterator[None]:
    cache._entries.cache_clear()
    yield
    cache._entries.cache_clear()


@pytest.fixture
def inner() -> Memory:
    return Memory(bytearray(random.Random(0).randbytes(1 << 20)))


def storage(
    inner: Storage, folder: Path, size: str = "1 GB", dataset: str = "s3://b/train 1"
) -> CachedStorage:
    return CachedStorage(inner, CacheConfig(str(folder / "cache"), size), dataset)


def files(folder: Path, pattern: str = "*/??/*") -> list[Path]:
    """The files of entries of the cache in `folder`."""
    return sorted((folder / "cache").glob(pattern))


def check_count(folder: Path, size: int | None = None) -> None:
    """The count is the blocks of all files of entries, and at most `size`."""
    with open_usage(folder / "cache") as usage:
        taken = sum(-(-file.stat().st_size // BLOCK) * BLOCK for file in files(folder))
        assert usage.bytes == taken
    assert size is None or taken <= size


def test_fetches_each_part_once(inner: Memory, tmp_path: Path) -> None:
    read = storage(inner, tmp_path)
    expected = bytes(inner.content)

    def read_all() -> None:
        assert read.read_range(SHARD, 1000, 500) == expected[1000:1500]
        assert read.read_range(SHARD, 1000, 501) == expected[1000:1501]
        assert read.read_range(SHARD, 1 << 20, 10) == b""
        assert read.read(SHARD) == expected
        assert read.state(SHARD) == FileState(1 << 20, "etag")
        extents = [(0, 100), (1000, 500), (2000, 7), (3000, 0x8000)]
        assert read.read_ranges(SHARD, extents) == [expected[at : at + size] for at, size in extents]

    read_all()
    # The second of the joined parts is there already.
    assert inner.requests[-2:] == [(SHARD, (0, 100)), (SHARD, (2000, 7), (3000, 0x8000))]
    inner.requests.clear()
    hits, size = COUNTS.cache_hits, COUNTS.cache_bytes
    read_all()
    cache._entries.cache_clear()
    read_all()
    assert not inner.requests
    assert COUNTS.cache_hits - hits == 2 * 9
    assert COUNTS.cache_bytes - size >= 2 * (1 << 20)
    check_count(tmp_path)
    storage(inner, tmp_path, dataset="s3://b/train 2").read(SHARD)
    assert len(inner.requests) == 1


def test_is_picklable(tmp_path: Path) -> None:
    copy = pickle.loads(pickle.dumps(storage(LocalStorage(), tmp_path)))
    (tmp_path / "file").write_bytes(b"content")
    assert copy.read(tmp_path / "file") == b"content"


def damage_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere/at/all")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte": damage_byte,
    "cut off": lambda path: os.truncate(path, path.stat().st_size - 1),
    "in the header": lambda path: os.truncate(path, 20),
    "its length": lambda path: path.write_bytes(path.read_bytes()[:8] + b"\xff" * 8 + path.read_bytes()[16:]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "of another sample": lambda path: shutil.copy(max(path.parents[1].glob("??/*")), path),
    "foreign": lambda path: path.write_bytes(b"#!/bin/sh\n" * 100),
    "a link to nowhere": replace_by_link,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_entries_are_fetched_again(kind: str, inner: Memory, tmp_path: Path) -> None:
    read = storage(inner, tmp_path)
    for at in range(0, 50_000, 5000):
        read.read_range(SHARD, at, 5000)
    inner.requests.clear()
    DAMAGES[kind](files(tmp_path)[0])
    for _ in range(2):
        for at in range(0, 50_000, 5000):
            assert read.read_range(SHARD, at, 5000) == inner.content[at : at + 5000]
    assert len(inner.requests) == 1
    assert len(files(tmp_path)) == 10


def test_renews_what_the_reader_refuses(inner: Memory, tmp_path: Path) -> None:
    read, expected = storage(inner, tmp_path), bytes(inner.content[:100])
    inner.content[50] ^= 1

    def checked(source: Storage) -> bytes:
        content = source.read_range(SHARD, 0, 100)
        if content != expected:
            inner.content[50] ^= 1
            raise DataError(SHARD, "damaged", "fetch it again")
        return content

    assert read.retry_damaged(checked) == expected
    assert len(inner.requests) == 2
    assert read.retry_damaged(checked) == expected
    assert len(inner.requests) == 2
    check_count(tmp_path)


def test_refuses_a_folder_of_other_files(inner: Memory, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "thesis.tex").write_text("text")
    with pytest.raises(ConfigError) as caught:
        storage(inner, tmp_path).read(SHARD)
    assert (caught.value.key, caught.value.value) == ("data.cache.dir", str(folder))
    assert "thesis.tex" in str(caught.value)
    assert os.listdir(folder) == ["thesis.tex"]


def unusable(folder: Path) -> None:
    (folder / "cache").write_text("a file")


def removed(folder: Path) -> None:
    shutil.rmtree(folder / "cache")


def without_marker(folder: Path) -> None:
    shutil.rmtree(folder / "cache")
    (folder / "cache").mkdir()


@pytest.mark.parametrize(("harm", "first"), [(unusable, False), (removed, True), (without_marker, True)])
def test_goes_on_without_its_folder(
    harm: Callable[[Path], None],
    first: bool,
    inner: Memory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    read = storage(inner, tmp_path)
    if first:
        read.read_range(SHARD, 0, 10)
    harm(tmp_path)
    for at in range(10):
        assert read.read_range(SHARD, at, 5000) == inner.content[at : at + 5000]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(tmp_path / "cache") in caplog.text


def test_goes_on_when_the_disk_is_full(
    inner: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read, write = storage(inner, tmp_path), os.pwrite
    kept = read.read_range(SHARD, 0, 5000)

    def refuse(descriptor: int, content: bytes, offset: int) -> int:
        # Half of the content is still written.
        if len(content) > 2500:
            return write(descriptor, content[:2500], offset)
        if offset > 200:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    for at in range(10):
        assert read.read_range(SHARD, at, 5000) == inner.content[at : at + 5000]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    monkeypatch.undo()
    inner.requests.clear()
    # What was kept before is still used.
    assert read.read_range(SHARD, 0, 5000) == kept
    assert not inner.requests
    assert len(files(tmp_path)) == 1
    check_count(tmp_path)
    # Later, once there is space again, it keeps samples again.
    monkeypatch.setattr(time, "monotonic", lambda: time.perf_counter() + 1e6)
    read.read_range(SHARD, 1, 5000)
    assert len(files(tmp_path)) == 2


def test_half_of_a_set_is_hit_half_of_the_time(inner: Memory, tmp_path: Path) -> None:
    # 20 entries of 3 blocks each, in any order; 10 of them fit.
    read, order = storage(inner, tmp_path, f"{10 * 3 * BLOCK}B"), random.Random(1)
    for epoch in range(4):
        inner.requests.clear()
        for place in order.sample(range(20), 20):
            at = place * 3 * BLOCK
            assert read.read_range(SHARD, at, 2 * BLOCK) == inner.content[at : at + 2 * BLOCK]
        assert len(inner.requests) == (10 if epoch else 20)
    check_count(tmp_path, 10 * 3 * BLOCK)


def fill(folder: Path, size: str, dataset: str, entries: int) -> None:
    """Read `entries` of 3 blocks each in a process of its own."""

    def work() -> None:
        read = storage(Memory(bytearray(1 << 20)), folder, size, dataset)
        for place in range(entries):
            read.read_range(SHARD, place * 3 * BLOCK, 2 * BLOCK)

    process = _fork.Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_removes_what_was_used_least_recently(tmp_path: Path) -> None:
    size = f"{60 * 3 * BLOCK}B"
    inner = Memory(bytearray(1 << 20))
    in_use = storage(inner, tmp_path, size, "in use")
    for place in range(10):
        in_use.read_range(SHARD, place * 3 * BLOCK, 2 * BLOCK)
    for dataset in ("older", "newer"):
        fill(tmp_path, size, dataset, 20)
    sets = {file.read_text().strip(): file.parent for file in files(tmp_path, "*/dataset")}
    os.utime(sets["older"] / "dataset", (1, 1))
    os.utime(sets["in use"] / "dataset", (0, 0))

    def held() -> dict[str, int]:
        return {name: len(list(folder.glob("??/*"))) for name, folder in sets.items()}

    # Ten more fit. For the rest, entries that no process uses make room: 5% of 60 at a time, twice.
    fill(tmp_path, size, "third", 15)
    assert held() == {"in use": 10, "older": 14, "newer": 20}
    fill(tmp_path, size, "fourth", 30)
    assert held()["in use"] == 10
    assert held()["older"] == 0
    check_count(tmp_path, 60 * 3 * BLOCK)
    inner.requests.clear()
    in_use.read_range(SHARD, 0, 2 * BLOCK)
    assert not inner.requests


def test_a_restart_of_the_system_has_it_counted_again(inner: Memory, tmp_path: Path) -> None:
    read = storage(inner, tmp_path)
    read.read_range(SHARD, 0, 5000)
    # As a power failure may leave it.
    usage = tmp_path / "cache" / "usage"
    boot, *_ = usage.read_text().split()
    for content in (f"{'0' * len(boot)} 0 0.0", "", "\0" * 40, f"{boot} 12"):
        usage.write_text(content)
        check_count(tmp_path)


def test_a_change_that_is_broken_off_has_it_counted_again(inner: Memory, tmp_path: Path) -> None:
    read = storage(inner, tmp_path)
    for at in range(3):
        read.read_range(SHARD, at, 5000)
    with pytest.raises(InterruptedError), open_usage(tmp_path / "cache") as usage:
        usage.remove(str(files(tmp_path)[0]))
        raise InterruptedError
    check_count(tmp_path)
    assert len(files(tmp_path)) == 2


def test_what_is_kept_just_before_a_claim_is_taken(
    inner: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, claim = storage(inner, tmp_path), CachedSet.claim

    def late_claim(entries: CachedSet, digest: bytes) -> Claim | None:
        monkeypatch.undo()
        read.read_range(SHARD, 0, 100)
        return claim(entries, digest)

    monkeypatch.setattr(CachedSet, "claim", late_claim)
    assert read.read_range(SHARD, 0, 100) == inner.content[:100]
    assert len(inner.requests) == 1
    check_count(tmp_path)


@dataclass(frozen=True)
class Recorded(LocalStorage):
    """Files whose reads are recorded in `log`, each as a line, and take some time."""

    log: Path

    def read_range(self, path: Location, offset: int, length: int, *, direct: bool = False) -> bytes:
        with open(self.log, "a") as file:
            file.write(f"{offset}\n")
        time.sleep(0.005)
        return super().read_range(path, offset, length, direct=direct)


def read_in_any_order(read: CachedStorage, path: Path, entries: int, seed: int, threads: int) -> None:
    """Read all entries of 5000 bytes of a file, in threads, each in its own order."""
    content = path.read_bytes()

    def work(thread: int) -> None:
        for place in random.Random(f"{seed} {thread}").sample(range(entries), entries):
            if read.read_range(path, place * 5000, 5000) != content[place * 5000 :][:5000]:
                os._exit(3)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


def read_forever(*arguments: Any) -> None:
    while True:
        read_in_any_order(*arguments)


def start(target: Callable[..., None], *arguments: Any) -> Any:
    process = _fork.Process(target=target, args=arguments)
    process.start()
    return process


def test_processes_and_threads_fetch_once(tmp_path: Path) -> None:
    path, log = tmp_path / "file", tmp_path / "log"
    path.write_bytes(random.Random(0).randbytes(40 * 5000))
    read = storage(Recorded(log), tmp_path)
    processes = [start(read_in_any_order, read, path, 40, seed, 4) for seed in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert sorted(log.read_text().split()) == sorted(str(place * 5000) for place in range(40))
    check_count(tmp_path)
    assert not files(tmp_path, "*/??/*.new")


def test_does_not_wait_forever_for_another_process(
    inner: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_WAIT_SECONDS", 0.05)
    read = storage(inner, tmp_path)
    entries = cache._entries(read.config, read.dataset, os.getpid())
    assert entries
    digest = digest_of(read.dataset, SHARD, 0, 100)
    with entries.claim(digest) or pytest.fail("claimed already"):
        assert read.read_range(SHARD, 0, 100) == inner.content[:100]
    assert not files(tmp_path)


def test_does_not_wait_forever_for_the_count(
    inner: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_usage, "_LOCK_SECONDS", 0.05)
    read = storage(inner, tmp_path)
    read.read_range(SHARD, 0, 100)
    with open_usage(tmp_path / "cache"):
        assert read.read_range(SHARD, 1, 100) == inner.content[1:101]
    assert len(caplog.records) == 1


def kill_at_random(folder: Path, rounds: int, seed: int) -> None:
    """Kill two readers that share a cache too small for their sets, and check what they leave each time."""
    draw, path, log = random.Random(seed), folder / "file", folder / "log"
    path.write_bytes(draw.randbytes(60 * 5000))
    size = 40 * 2 * BLOCK
    (folder / "cache").mkdir()

    def read(name: str) -> CachedStorage:
        return storage(Recorded(log), folder, f"{size}B", name)

    for turn in range(rounds):
        names = f"set {turn % 3}", f"set {(turn + 1) % 3}"
        readers = [start(read_forever, read(name), path, 60, turn, 2) for name in names]
        time.sleep(draw.uniform(0.02, 0.15))
        for process in readers:
            os.kill(process.pid, signal.SIGKILL)
        for process in readers:
            process.join()
            assert process.exitcode == -signal.SIGKILL
        check_count(folder, size)
        # Nothing wrong in it, nothing locked for ever, and all of the space can be used.
        check = start(read_in_any_order, read("set 0"), path, 60, turn, 1)
        check.join()
        assert check.exitcode == 0
        check_count(folder, size)
    sets = {file.read_text().strip(): file.parent for file in files(folder, "*/dataset")}
    assert len(list(sets["set 0"].glob("??/*"))) >= 38


def test_kills_leave_nothing_wrong(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 3, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("200 GB", 200e9), ("1.5TB", 1.5e12), ("512 MiB", 512 << 20), ("10 B", 10), ("5 KiB", 5120)],
)
def test_size(text: str, expected: float) -> None:
    assert CacheConfig("cache", text).bytes == expected


@pytest.mark.parametrize("text", ["", "200", "GB", "-1 GB", "200 gigabytes", "0 GB", "1e3 GB"])
def test_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig("cache", text)
    assert caught.value.key == "size"


def test_variables_in_the_folder(inner: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_DISK", str(tmp_path))
    CachedStorage(inner, CacheConfig("$NODE_DISK/cache", "1 GB"), "set").read(SHARD)
    assert len(files(tmp_path)) == 1
    monkeypatch.delenv("NODE_DISK")
    cache._entries.cache_clear()
    with pytest.raises(ConfigError):
        CachedStorage(inner, CacheConfig("$NODE_DISK/cache", "1 GB"), "set").read(SHARD)
