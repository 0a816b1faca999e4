"""Rows of torch's DataLoader over files of arrays: npy, Zarr and HDF5."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.contract import WORKERS, Item, Job, Peer, Resume
from benchmarks.peers.volumes import CHANNELS, Counts, each_once, filled_batches, planar
from pipelines.sample import Sample

_RESUME = Resume(
    False, False, "no state in torch.utils.data.DataLoader (torchdata's StatefulDataLoader has one, per rank)"
)


def write_npy(folder: Path, samples: Sequence[Sample]) -> None:
    """Write a pair of .npy files for each sample."""
    for index, sample in enumerate(samples):
        np.save(folder / f"{index:04d}_data.npy", sample.counts)
        np.save(folder / f"{index:04d}_label.npy", sample.target)


def read_npy(folder: Path, index: int) -> tuple[Counts, Any]:
    """Return counts and target of a sample, the counts mapped from the page cache."""
    counts = np.load(folder / f"{index:04d}_data.npy", mmap_mode="r")
    return counts, np.load(folder / f"{index:04d}_label.npy")


class _Plain(Dataset[Any]):
    def __init__(self, job: Job) -> None:
        self._job = job

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        data = np.load(self._job.folder / f"{index:04d}_data.npy")
        label = np.load(self._job.folder / f"{index:04d}_label.npy")
        return torch.log1p(torch.from_numpy(data)), torch.from_numpy(label)


def _open_plain(job: Job) -> Iterator[Item]:
    for volume, target in DataLoader(_Plain(job), 1, sampler=job.order(), num_workers=WORKERS):
        yield volume.permute(0, 4, 1, 2, 3), target


def _open_npy(job: Job) -> Iterator[Item]:
    return filled_batches(job, lambda index: read_npy(job.folder, index), planar=False)


def _write_zarr(folder: Path, samples: Sequence[Sample]) -> None:
    import zarr
    from zarr.codecs import BloscCodec

    first: dict[int, Path] = {}
    for index, sample in enumerate(samples):
        path = folder / f"{index:04d}.zarr"
        if known := first.get(id(sample)):
            shutil.copytree(known, path)
            continue
        first[id(sample)] = path
        counts = planar(sample)
        codec = BloscCodec(cname="zstd", clevel=9, shuffle="shuffle")
        array = zarr.create_array(
            str(path), shape=counts.shape, dtype=counts.dtype, chunks=counts.shape, compressors=codec
        )
        array[...] = counts
        array.attrs["target"] = sample.target.tolist()


def _open_zarr(job: Job) -> Iterator[Item]:
    import numcodecs
    import zarr

    # A chunk is a sample and workers are processes: more threads only take turns.
    numcodecs.blosc.set_nthreads(1)
    zarr.config.set({"threading.max_workers": 1, "async.concurrency": 1})

    def read(index: int) -> tuple[Counts, Any]:
        array = zarr.open_array(str(job.folder / f"{index:04d}.zarr"), mode="r")
        return np.asarray(array[...]), np.array(array.attrs["target"], np.float32)

    return filled_batches(job, read, planar=True)


def _write_hdf5(folder: Path, samples: Sequence[Sample]) -> None:
    import h5py
    import hdf5plugin

    def encode(sample: Sample) -> bytes:
        counts, path = planar(sample), folder / "encoded"
        codec = hdf5plugin.Blosc2(cname="zstd", clevel=9, filters=hdf5plugin.Blosc2.SHUFFLE)
        with h5py.File(path, "w") as file:
            file.create_dataset("counts", data=counts, chunks=counts.shape, **codec)
            file["target"] = sample.target
        return path.read_bytes()

    for stem, _, data in each_once(samples, encode):
        (folder / f"{stem}.h5").write_bytes(data)
    (folder / "encoded").unlink()


def _open_hdf5(job: Job) -> Iterator[Item]:
    import h5py
    import hdf5plugin  # noqa: F401, registers the filter

    reused = np.zeros((CHANNELS, job.size, job.size, job.size), np.int16)

    def read(index: int) -> tuple[Counts, Any]:
        # One chunk that is read whole passes no cache of chunks.
        with h5py.File(job.folder / f"{index:04d}.h5", "r", rdcc_nbytes=0) as file:
            file["counts"].read_direct(reused)
            return reused, file["target"][...]

    return filled_batches(job, read, planar=True)


PEERS = [
    Peer("DataLoader, npy, plain", (), "npy_pairs", write_npy, _open_plain, _RESUME, plain=True),
    Peer("DataLoader, npy, shared memory", (), "npy_pairs", write_npy, _open_npy, _RESUME),
    Peer("DataLoader, Zarr, Blosc zstd", ("zarr", "numcodecs"), "zarr", _write_zarr, _open_zarr, _RESUME),
    Peer("DataLoader, HDF5, Blosc2 zstd", ("h5py", "hdf5plugin"), "hdf5", _write_hdf5, _open_hdf5, _RESUME),
]
