"""Packed samples to volumes: the device's way on the CPU as far as that goes, against the host's."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import packed_book
import pytest
import torch
from helpers import write_tiny
from nvidia.dali import fn, pipeline_def
from packed_book import TABLE

from pipelines.dataset.open import open_split
from pipelines.errors import DataError
from pipelines.formats.packed.decode import PackedSample, open_packed
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.gather_gpu import arrays_of, gather
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.loading.config import LoaderConfig
from pipelines.loading.dali_graphs import define_pipeline, packed_nodes
from pipelines.loading.loader import Loader
from pipelines.loading.transforms import lookup_node, transform
from pipelines.plan import RankSlice
from pipelines.sample import Batch, Sample


def packed(sample: Sample) -> PackedSample:
    return open_packed(Path("a.packed"), b"".join(encode(sample)))


def as_on_a_device(one: PackedSample, dtype: torch.dtype, *, apply_log: bool) -> torch.Tensor:
    """Decode as `PackedGpuDecoder` does, with another LZ4 decoder in place of DALI's."""
    (blocks,), (starts,), (sizes,), (voxels,), (table,) = arrays_of([one])
    # What DALI does not find in a block is zero.
    chunks = torch.zeros(len(starts), int(voxels[0]), dtype=torch.uint8)
    for chunk, start, size in zip(chunks, starts.tolist(), sizes.tolist(), strict=True):
        block = packed_book.lz4_inflate(blocks[start : start + size].tobytes())
        chunk[: len(block)] = torch.frombuffer(bytearray(block), dtype=torch.uint8)
    out = torch.zeros(one.header.spec.shape, dtype=dtype)
    values, by_mean = looked_up(table, apply_log=apply_log), not apply_log
    gather(chunks, values, out, planes=one.header.planes, byte_sum=one.header.byte_sum, by_mean=by_mean)
    return out


def looked_up(table: npt.NDArray[np.int16], *, apply_log: bool) -> torch.Tensor:
    """What the packed graph's other half makes of `table`, by DALI."""

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, exec_dynamic=False)  # type: ignore[untyped-decorator]
    def half() -> Any:
        return lookup_node(fn.external_source(source=lambda: [table], batch=True), apply_log=apply_log)

    pipeline = half()
    pipeline.build()
    (values,) = pipeline.run()
    return torch.utils.dlpack.from_dlpack(values.as_tensor())[0].clone()


@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["usual", "256 different", "all different", "one voxel"])
def test_the_device_gathers_what_the_host_does(name: str, dtype: torch.dtype, apply_log: bool) -> None:
    sample = packed_book.samples()[name]
    found = as_on_a_device(packed(sample), dtype, apply_log=apply_log)
    expected = torch.from_numpy(transform(sample.counts, apply_log=apply_log))
    if apply_log and dtype == torch.float32:
        expected = torch.from_numpy(np.log1p(sample.counts.astype(np.float64)).astype(np.float32))
        assert torch.equal(found, expected)
    else:
        resolution = torch.finfo(dtype).eps
        torch.testing.assert_close(found.float(), expected, rtol=resolution, atol=0)


@pytest.mark.parametrize("apply_log", [True, False])
def test_a_row_beyond_the_table_is_no_number_and_nothing_else_is_read(apply_log: bool) -> None:
    rows = [[0, 1, 2, 3], [2, 255, 0, 1]]
    one = open_packed(Path("a.packed"), packed_book.write(TABLE, rows, size=2))
    found = as_on_a_device(one, torch.float32, apply_log=apply_log).view(8, 4)
    assert found.isnan().all(1).tolist() == [False, False, False, True, False, True, False, False]
    counts = np.array(TABLE)[[0, 1, 2, 2, 0, 1]]
    expected = np.log1p(counts) if apply_log else counts / (counts.sum() / 32)
    assert found[[0, 1, 2, 4, 6, 7]].tolist() == [pytest.approx(row) for row in expected.tolist()]


@pytest.mark.parametrize("apply_log", [True, False])
def test_a_block_that_is_too_short_makes_no_number_of_its_sample(apply_log: bool) -> None:
    found = as_on_a_device(open_packed(Path("a.packed"), TOO_SHORT), torch.float32, apply_log=apply_log)
    assert found.isnan().all()


def test_the_gather_writes_into_memory_of_either_layout() -> None:
    blocks = torch.randint(0, 3, (2, 4), dtype=torch.uint8)
    table = torch.tensor([*TABLE, [0, 0, 0, 0]], dtype=torch.float32)
    last, first = torch.zeros(2, 2, 2, 4), torch.zeros(4, 2, 2, 2).permute(1, 2, 3, 0)
    for out in (last, first):
        gather(blocks, table, out, planes=1, byte_sum=int(blocks.sum()), by_mean=False)
        assert torch.equal(out.reshape(8, 4), table[blocks.view(8).long()])


@pytest.mark.parametrize("apply_log", [True, False])
def test_the_graph_can_be_defined_and_serialised_without_a_gpu(apply_log: bool) -> None:
    pipeline = define_pipeline(
        lambda: packed_nodes(deque(), apply_log=apply_log), LoaderConfig(batch_size=2), torch.device("cpu")
    )
    serialised = pipeline.serialize()
    assert b"decoders__Inflate" in serialised and b"LookupTable" in serialised


ROW_BEYOND = packed_book.write(TABLE, [[0, 1, 2, 1], [2, 3, 0, 1]], size=2)
TOO_SHORT = packed_book.write(TABLE, [[0, 1, 2, 1], [2, 2, 0]], size=2, total=9)


def damaged(root: Path, content: bytes = ROW_BEYOND) -> Path:
    """A packed data set whose sample 3 is `content`, damaged but for its checksums."""
    write_tiny(root, train=6, validation=1, format_name="packed", size=2)
    name = "universe_0003_000"
    write_shard(root / "train" / f"{name}.tar", [(f"{name}.packed", [content])])
    return root / "train" / f"{name}.tar" / f"{name}.packed"


def loader(root: Path, device: str, **options: object) -> Loader:
    return Loader(
        open_split(root, "train"),
        LoaderConfig(**options),  # type: ignore[arg-type]
        rank_slice=RankSlice(),
        seed=0,
        shuffle=False,
        ragged="drop",
        device=torch.device(device),
    )


def test_a_damaged_sample_is_named_or_skipped(tmp_path: Path) -> None:
    path = damaged(tmp_path)
    batches = loader(tmp_path, "cpu", batch_size=2)
    with pytest.raises(DataError, match="chunk 1 has the row 3") as raised:
        list(batches.batches(0))
    assert raised.value.path == str(path)
    batches.close()
    batches = loader(tmp_path, "cpu", batch_size=2, on_bad_sample="skip")
    assert [batch.index.tolist() for batch in batches.batches(0)] == [[0, 1], [2, 4], [4, 5]]
    assert list(batches.skipped) == [str(path)]
    batches.close()


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("size", [16, 48])
def test_on_a_gpu_batches_are_those_of_the_host(
    size: int, apply_log: bool, batch_size: int, tmp_path: Path
) -> None:
    root = write_tiny(tmp_path, train=7, validation=1, format_name="packed", size=size)
    options = {"batch_size": batch_size, "apply_log": apply_log}
    host, device = loader(root, "cpu", **options), loader(root, "cuda:0", **options)
    half = torch.zeros(batch_size, size, size, size, 4, dtype=torch.float16, device="cuda")
    into = Batch(half.permute(0, 4, 1, 2, 3), torch.zeros(batch_size, 4, device="cuda"), np.arange(0))
    for epoch in range(2):
        for one, other in zip(host.batches(epoch), device.batches(epoch), strict=True):
            torch.testing.assert_close(other.volume.cpu(), one.volume, rtol=2e-7, atol=0)
            assert torch.equal(other.target.cpu(), one.target) and (other.index == one.index).all()
    for one, other in zip(host.batches(2), device.batches(2, into=into), strict=True):
        assert other.volume.data_ptr() == half.data_ptr()
        torch.testing.assert_close(other.volume.cpu().float(), one.volume, rtol=1e-3, atol=0)
    host.close()
    device.close()


@pytest.mark.gpu
@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize(
    ("content", "said"),
    [(ROW_BEYOND, "chunk 1 has the row 3"), (TOO_SHORT, "plane 0 of chunk 1 inflates to 3 bytes, not 4")],
)
def test_on_a_gpu_damage_becomes_no_number(
    content: bytes, said: str, apply_log: bool, tmp_path: Path
) -> None:
    damaged(tmp_path, content)
    batches = loader(tmp_path, "cuda:0", batch_size=6, apply_log=apply_log)
    (batch,) = batches.batches(0)
    assert batch.volume.isnan().flatten(1).any(1).tolist() == [False, False, False, True, False, False]
    with pytest.raises(DataError, match=said):
        batches.raise_if_damaged(batch.index)
    batches.close()
