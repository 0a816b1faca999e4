"""Rows of the table of remote loaders: this project's, WebDataset, MosaicML Streaming and LitData.

Each delivers the samples of the files that its row of `benchmarks.peers` writes, from a bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.peers import tars
from benchmarks.peers.contract import AHEAD, WORKERS, Item, Peer
from benchmarks.peers.registry import PEERS
from benchmarks.peers.volumes import Counts, Volumes, read_blosc2, read_raw
from pipelines.dataset.cached import cached
from pipelines.dataset.manifest import Entry, Manifest
from pipelines.dataset.open import open_folder
from pipelines.formats.packed.encode import DEFAULT_PRESET, encode
from pipelines.formats.packed.format import MEMBER_SUFFIX
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from pipelines.sample import Sample, SampleSpec
from pipelines.storage.cache import CacheConfig
from pipelines.storage.location import parse_location

CLIENTS = ("boto3", "obstore.store")
"""Modules by which the loaders speak to S3, imported before anything is timed like those of the rows."""

_PREDOWNLOAD = 64
"""Samples that a worker of MosaicML Streaming asks for ahead; with the default, 8, it waits for shards."""

_SHARD = 64
"""Samples of this project's shards, the default of its converter."""


@dataclass(frozen=True, slots=True)
class RemoteJob:
    """Samples to deliver, in random order, epoch after epoch.

    Attributes:
        url: s3:// address of the files.
        http: http:// address of the same.
        cache: Empty folder for what the loader keeps.
        size: Edge in voxels.
        batch: Samples of a batch on this rank.
        rank, ranks: This process among those that share the samples.
        state: What `Batches.state` returned, if these are to continue there.
    """

    url: str
    http: str
    cache: Path
    size: int
    batch: int = 1
    rank: int = 0
    ranks: int = 1
    state: Any = None


@dataclass(frozen=True, slots=True)
class Batches:
    """An open loader.

    Attributes:
        epoch: Iterates over the batches of the next epoch, or of the rest of the resumed one. A volume is
            valid until the next batch is taken.
        state: Returns the position after the last batch taken, to be pickled; None if the loader has none.
    """

    epoch: Callable[[], Iterator[list[Item]]]
    state: Callable[[], Any] | None = None


Open: TypeAlias = Callable[[RemoteJob], Batches]


@dataclass(frozen=True, slots=True)
class Remote:
    """A row of the table: the row of `benchmarks.peers` with its modules and files, and what opens these."""

    name: str
    peer: Peer
    open: Open

    @property
    def files(self) -> str:
        """Name of the files; rows with the same one share them."""
        return self.peer.files

    def write(self, folder: Path, samples: Sequence[Sample]) -> None:
        """Write `samples` to `folder`."""
        (_write_packed if self.peer.name == "packed" else self.peer.write)(folder, samples)


def _write_packed(folder: Path, samples: Sequence[Sample]) -> None:
    """Write shards and their manifest."""
    entries = []
    for first in range(0, len(samples), _SHARD):
        named = enumerate(samples[first : first + _SHARD], first)
        members = ((f"{i:04d}{MEMBER_SUFFIX}", encode(sample, DEFAULT_PRESET)) for i, sample in named)
        name = f"shard_{first // _SHARD:06d}"
        entries.append(Entry.from_written(name, write_shard(folder / f"{name}.tar", members)))
    Manifest("packed", SampleSpec(samples[0].counts.shape[0]), tuple(entries)).save(folder)


def _open_packed(job: RemoteJob, *, keep: bool) -> Batches:
    cache = CacheConfig(str(job.cache), "100 GB") if keep else None
    split = cached(open_folder(parse_location(job.url, "url")), cache)
    options: dict[str, Any] = {"seed": 0, "shuffle": True, "ragged": "drop", "device": torch.device("cpu")}
    options["rank_slice"] = RankSlice(job.rank, job.ranks)
    loader = Loader(split, LoaderConfig(job.batch, WORKERS), **options)
    position = list(job.state or (0, 0))

    def epoch() -> Iterator[list[Item]]:
        for batch in loader.batches(*position):
            position[1] += 1
            yield [(batch.volume[row, None], batch.target[row]) for row in range(job.batch)]
        position[:] = position[0] + 1, 0

    return Batches(epoch, lambda: tuple(position))


def _open_webdataset(decode: Callable[[bytes], Counts], job: RemoteJob, *, keep: bool) -> Batches:
    import webdataset

    fill = _Filler(job, decode)
    # The documented way to read S3 and web servers, by a process of curl for each shard.
    urls = [f"pipe:curl -s -f -L {job.http}/{shard}.tar" for shard in range(tars.SHARDS)]
    cache = {"cache_dir": str(job.cache)} if keep else {}
    shards = webdataset.WebDataset(urls, shardshuffle=tars.SHARDS, empty_check=False, **cache)
    samples = shards.shuffle(AHEAD * WORKERS).map(lambda sample: fill(sample["counts"], sample["target"]))
    return Batches(partial(fill.batches, _loader(samples, job, webdataset.WebLoader)))


def _open_mosaicml(decode: Callable[[bytes], Counts], job: RemoteJob) -> Batches:
    from streaming import Stream, StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    fill = _Filler(job, decode)

    class Filled(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return fill(sample["counts"], sample["target"])

    dataset = Filled(
        streams=[Stream(remote=job.url, local=str(job.cache))],
        shuffle=True,
        batch_size=job.batch,
        num_canonical_nodes=1,
        predownload=_PREDOWNLOAD,
    )
    # Its client has fetched the index. Forked workers with its open connection take answers of each other.
    for stream in dataset.streams:
        if client := stream._downloader._s3_client:
            client.close()
    return fill.resumable(_loader(dataset, job, StreamingDataLoader))


def _open_litdata(job: RemoteJob) -> Batches:
    import litdata
    from litdata.streaming import downloader
    from litdata.streaming.resolver import Dir

    # It has no setting for a server without TLS.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    fill = _Filler(job, None)
    # It drops the last samples on several ranks alone by default, and refuses a state of the other kind.
    dataset = litdata.StreamingDataset(
        Dir(path=str(job.cache), url=job.url),
        shuffle=True,
        drop_last=True,
        transform=lambda sample: fill(sample["counts"], np.array(sample["target"])),
    )
    return fill.resumable(_loader(dataset, job, litdata.StreamingDataLoader))


class _Filler:
    """Fills volumes in worker processes, and makes batches of them in the main one.

    Args:
        job: What is delivered.
        decode: Decodes a sample's counts; None if the library does.
    """

    def __init__(self, job: RemoteJob, decode: Callable[[bytes], Counts] | None) -> None:
        self._volumes = Volumes(job.size, planar=decode is read_blosc2, processes=True, batch=job.batch)
        self._decode, self._job = decode, job

    def __call__(self, counts: Any, target: Any) -> tuple[int, Any]:
        """Return the number of the filled volume, and the target."""
        if self._decode is not None:
            counts, target = self._decode(counts), np.frombuffer(target, np.float32)
        return self._volumes.fill(counts), target

    def batches(self, loader: Any) -> Iterator[list[Item]]:
        """Yield the batches of the next epoch of `loader`."""
        for numbers, targets in loader:
            yield [
                (self._volumes.batch(number), target) for number, target in zip(numbers, targets, strict=True)
            ]

    def resumable(self, loader: Any) -> Batches:
        """Return a `loader` that has a state."""
        if self._job.state is not None:
            loader.load_state_dict(self._job.state)
        return Batches(partial(self.batches, loader), loader.state_dict)


def _loader(dataset: Any, job: RemoteJob, kind: Callable[..., DataLoader[Any]]) -> DataLoader[Any]:
    return kind(
        dataset,
        batch_size=job.batch,
        num_workers=WORKERS,
        prefetch_factor=AHEAD,
        collate_fn=_columns,
        persistent_workers=True,
    )


def _columns(items: Sequence[tuple[int, Any]]) -> tuple[list[int], list[Any]]:
    """Return the numbers of the volumes of a batch, and its targets."""
    numbers, targets = zip(*items, strict=True)
    return list(numbers), list(targets)


_ROWS: tuple[tuple[str, Open], ...] = (
    ("packed", partial(_open_packed, keep=False)),
    ("packed, cached", partial(_open_packed, keep=True)),
    ("WebDataset, raw", partial(_open_webdataset, read_raw, keep=False)),
    ("WebDataset, Blosc2 zstd", partial(_open_webdataset, read_blosc2, keep=False)),
    ("WebDataset, Blosc2 zstd, cached", partial(_open_webdataset, read_blosc2, keep=True)),
    ("MosaicML, raw", partial(_open_mosaicml, read_raw)),
    ("MosaicML, Blosc2 zstd", partial(_open_mosaicml, read_blosc2)),
    ("LitData, raw", _open_litdata),
    ("LitData, zstd", _open_litdata),
)

REMOTES = {name: Remote(name, PEERS[name.removesuffix(", cached")], open_) for name, open_ in _ROWS}
