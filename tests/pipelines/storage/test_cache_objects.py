"""The node-local cache before an object store: what a process asks the store for, counted on the way."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy, Rule
from helpers import SIZE, start, tiny_sample
from object_store import Bucket

from pipelines.dataset.manifest import Entry, Manifest
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.sample import SampleSpec
from pipelines.storage.cache_usage import open_usage

SHARDS, MEMBERS = 4, 6
SAMPLES = SHARDS * MEMBERS

# Another process, as a client of object stores must not be started in one that forks others.
READER = """
import hashlib, sys
from concurrent.futures import ThreadPoolExecutor
from pipelines.dataset.cached import cached
from pipelines.dataset.open import open_folder
from pipelines.plan import permutation
from pipelines.storage.cache import CacheConfig
from pipelines.storage.location import parse_location
from pipelines.storage.requests import COUNTS

url, folder, size, epochs, seed = sys.argv[1:]
data = cached(open_folder(parse_location(url, "data.dir")), CacheConfig(folder, size))

def digest(index):
    return hashlib.md5(data.payload(index).decode().tobytes()).hexdigest()

with ThreadPoolExecutor(4) as threads:
    for epoch in range(int(epochs)):
        requests, hits = COUNTS.requests, COUNTS.cache_hits
        order = permutation(len(data), int(seed) + epoch, "order").tolist()
        found = dict(zip(order, threads.map(digest, order)))
        whole = hashlib.md5("".join(found[index] for index in range(len(data))).encode()).hexdigest()
        print(COUNTS.requests - requests, COUNTS.cache_hits - hits, whole, flush=True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Shards of 6 packed samples each, with their manifest."""
    folder, entries = tmp_path / "train", []
    folder.mkdir()
    for shard in range(SHARDS):
        numbers = range(shard * MEMBERS, (shard + 1) * MEMBERS)
        members = [(f"s{number:02}{MEMBER_SUFFIX}", encode(tiny_sample(number))) for number in numbers]
        entries.append(
            Entry.from_written(f"shard_{shard}", write_shard(folder / f"shard_{shard}.tar", members))
        )
    Manifest("packed", SampleSpec(SIZE), tuple(entries)).save(folder)
    return folder


def reader(url: str, cache: Path, size: str = "100 MB", *, epochs: int = 1, seed: int = 0) -> Any:
    return start([sys.executable, "-c", READER, url, str(cache), size, str(epochs), str(seed)])


def results(process: Any) -> list[tuple[int, int]]:
    """Requests and hits of each epoch of a reader; all of its samples are right."""
    out, err = process.communicate(timeout=60)
    assert process.wait() == 0, err
    digests = [hashlib.md5(tiny_sample(index).counts.tobytes()).hexdigest() for index in range(SAMPLES)]
    expected = hashlib.md5("".join(digests).encode()).hexdigest()
    lines = [line.split() for line in out.splitlines()]
    assert {whole for _, _, whole in lines} == {expected}
    return [(int(requests), int(hits)) for requests, hits, _ in lines]


def fetched(proxy: FaultProxy) -> Counter[tuple[str, str]]:
    """Number of requests for each part of a shard."""
    return Counter((each.path, each.range) for each in proxy.requests() if each.path.endswith(".tar"))


def test_each_part_is_requested_once(
    folder: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    url, cache = bucket.put(folder), tmp_path / "cache"
    assert results(reader(url, cache, epochs=3)) == [(SAMPLES, 0), (0, SAMPLES), (0, SAMPLES)]
    parts = fetched(fault_proxy)
    assert len(parts) == SAMPLES and set(parts.values()) == {1}
    fault_proxy.reset()
    # Of a new run, too.
    assert results(reader(url, cache)) == [(0, SAMPLES)]
    assert not fetched(fault_proxy)
    assert (
        results(reader(url, tmp_path / "half", f"{half_of(cache)} B", epochs=3))[1:]
        == [(SAMPLES // 2, SAMPLES // 2)] * 2
    )


def half_of(cache: Path) -> int:
    """Bytes of half of the samples, which take the same number of blocks each."""
    (size,) = {-(-path.stat().st_size // 4096) * 4096 for path in cache.glob("*/??/*")}
    return size * SAMPLES // 2


def test_two_jobs_fetch_each_part_once(
    folder: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    url, cache = bucket.put(folder), tmp_path / "cache"
    fault_proxy.configure(latency=0.02)
    jobs = [reader(url, cache, epochs=2, seed=seed) for seed in (1, 2)]
    first = [results(job)[0] for job in jobs]
    assert sum(requests for requests, _ in first) == sum(hits for _, hits in first) == SAMPLES
    assert set(fetched(fault_proxy).values()) == {1}


def kill_two_jobs(bucket: Bucket, proxy: FaultProxy, folder: Path, tmp_path: Path, rounds: int) -> None:
    """Kill two jobs on one cache at a random moment, and read from what they leave."""
    url, draw = bucket.put(folder), random.Random(3)
    for turn in range(rounds):
        cache = tmp_path / f"cache {turn}"
        proxy.configure(latency=0.02)
        jobs = [reader(url, cache, epochs=1000, seed=seed) for seed in (turn, turn + 1)]
        while not any(cache.glob("*/??")):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.15))
        for job in jobs:
            os.kill(job.pid, signal.SIGKILL)
        for job in jobs:
            job.communicate()
        proxy.configure()
        with open_usage(cache) as usage:
            sizes = [path.stat().st_size for path in cache.glob("*/??/*")]
            assert usage.bytes == sum(-(-size // 4096) * 4096 for size in sizes)
        whole = [path for path in cache.glob("*/??/*") if path.suffix != ".new"]
        assert results(reader(url, cache)) == [(SAMPLES - len(whole), len(whole))]


@pytest.mark.slow
def test_jobs_that_are_killed_leave_nothing_wrong(
    folder: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    kill_two_jobs(bucket, fault_proxy, folder, tmp_path, 3)


def test_damage_on_the_way_is_not_kept(
    folder: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    url, cache = bucket.put(folder), tmp_path / "cache"
    fault_proxy.configure(Rule("corrupt", r"\.tar", times=5), Rule("truncate", r"\.tar", times=5))
    first, *later = results(reader(url, cache, epochs=2))
    assert first[0] >= SAMPLES + 10
    assert later == [(0, SAMPLES)]
