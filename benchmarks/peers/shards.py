"""Rows of libraries that stream shards to a DataLoader's workers: WebDataset, MosaicML Streaming, LitData."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.peers import tars
from benchmarks.peers.contract import AHEAD, WORKERS, Item, Job, Peer, Resume
from benchmarks.peers.volumes import (
    Counts,
    Volumes,
    batches_of,
    blosc2_bytes,
    each_once,
    only,
    raw,
    read_blosc2,
    read_raw,
    same,
)
from pipelines.sample import Sample

Decode = Callable[[bytes], Counts]
Encode = Callable[[Sample], bytes]

_LITDATA_CHUNK = 1 << 26
"""Bytes of LitData's chunks, and about those of MosaicML's shards by default."""


def _is_planar(decode: Decode) -> bool:
    return decode is read_blosc2


def _target(data: bytes) -> Any:
    return np.frombuffer(data, np.float32)


def _webdataset(job: Job) -> Any:
    import webdataset

    paths = [str(job.folder / f"{shard}.tar") for shard in range(tars.SHARDS)]
    shards = webdataset.WebDataset(paths, shardshuffle=tars.SHARDS, empty_check=False)
    return shards.repeat(job.epochs).shuffle(AHEAD * WORKERS)


def _open_webdataset_plain(job: Job) -> Iterator[Item]:
    import webdataset

    def decode(sample: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        return torch.log1p(torch.from_numpy(sample["npy"])), _target(sample["target"]).copy()

    loader = webdataset.WebLoader(_webdataset(job).decode().map(decode), batch_size=1, num_workers=WORKERS)
    for volume, target in loader:
        yield volume.permute(0, 4, 1, 2, 3), target


def _open_webdataset(decode: Decode, job: Job) -> Iterator[Item]:
    import webdataset

    volumes = Volumes(job.size, planar=_is_planar(decode), processes=True)

    def fill(sample: dict[str, bytes]) -> tuple[int, Any]:
        return volumes.fill(decode(sample["counts"])), _target(sample["target"])

    loader = webdataset.WebLoader(
        _webdataset(job).map(fill),
        batch_size=None,
        num_workers=WORKERS,
        prefetch_factor=AHEAD,
        collate_fn=same,
    )
    return batches_of(loader, volumes)


def _write_mosaicml(encode: Encode, folder: Path, samples: Sequence[Sample]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"counts": "bytes", "target": "bytes"}) as writer:
        for _, sample, data in each_once(samples, encode):
            writer.write({"counts": data, "target": sample.target.tobytes()})


def _open_mosaicml(decode: Decode, job: Job) -> Iterator[Item]:
    from streaming import Stream, StreamingDataset

    volumes = Volumes(job.size, planar=_is_planar(decode), processes=True)

    class Filled(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: Any) -> Any:
            sample = super().__getitem__(at)
            return volumes.fill(decode(sample["counts"])), _target(sample["target"])

    # Repeated, because workers stop at the end of an epoch, which is long in practice.
    dataset = Filled(
        streams=[Stream(local=str(job.folder), repeat=job.epochs)],
        shuffle=True,
        batch_size=1,
        num_canonical_nodes=1,
    )
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=1, num_workers=WORKERS, prefetch_factor=AHEAD, collate_fn=only
    )
    return batches_of(loader, volumes)


def _litdata_item(sample: Sample) -> dict[str, Any]:
    return {"counts": sample.counts, "target": sample.target}


def _write_litdata(compression: str | None, folder: Path, samples: Sequence[Sample]) -> None:
    import litdata

    litdata.optimize(
        _litdata_item,
        samples,
        str(folder),
        chunk_bytes=_LITDATA_CHUNK,
        compression=compression,
        compression_level="sample" if compression else None,
        num_workers=1,
        start_method="fork",
        verbose=False,
    )


def _open_litdata(job: Job) -> Iterator[Item]:
    import litdata

    volumes = Volumes(job.size, planar=False, processes=True)

    def fill(sample: dict[str, Any]) -> tuple[int, Any]:
        return volumes.fill(sample["counts"]), np.array(sample["target"])

    dataset = litdata.StreamingDataset(str(job.folder), shuffle=True, transform=fill)
    loader = litdata.StreamingDataLoader(
        dataset,
        batch_size=1,
        num_workers=WORKERS,
        prefetch_factor=AHEAD,
        collate_fn=only,
        persistent_workers=True,
    )
    for _ in range(job.epochs):
        yield from batches_of(loader, volumes)


_WEBDATASET = Resume(False, False, "WebDataset has no state; its FAQ resamples shards instead")
_MOSAICML = Resume(True, True, "MosaicML Streaming, Fast Resumption and Elastic Determinism")
_LITDATA = Resume(True, True, "LitData, litdata/streaming/elastic.py of version 0.2.76")
_TAR, _LIT = ("webdataset",), ("litdata",)
_MDS = ("benchmarks.peers.torchvision_operators", "streaming")

PEERS = [
    Peer(
        "WebDataset, npy, plain",
        _TAR,
        "tar_npy",
        tars.write_npy,
        _open_webdataset_plain,
        _WEBDATASET,
        plain=True,
    ),
    Peer(
        "WebDataset, raw", _TAR, "tar_raw", tars.write_raw, partial(_open_webdataset, read_raw), _WEBDATASET
    ),
    Peer(
        "WebDataset, Blosc2 zstd",
        (*_TAR, "blosc2"),
        "tar_blosc2",
        tars.write_blosc2,
        partial(_open_webdataset, read_blosc2),
        _WEBDATASET,
    ),
    Peer(
        "MosaicML, raw",
        _MDS,
        "mds_raw",
        partial(_write_mosaicml, raw),
        partial(_open_mosaicml, read_raw),
        _MOSAICML,
    ),
    Peer(
        "MosaicML, Blosc2 zstd",
        (*_MDS, "blosc2"),
        "mds_blosc2",
        partial(_write_mosaicml, blosc2_bytes),
        partial(_open_mosaicml, read_blosc2),
        _MOSAICML,
    ),
    Peer("LitData, raw", _LIT, "litdata_raw", partial(_write_litdata, None), _open_litdata, _LITDATA),
    Peer("LitData, zstd", _LIT, "litdata_zstd", partial(_write_litdata, "zstd"), _open_litdata, _LITDATA),
]
