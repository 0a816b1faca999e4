"""Decoding of packed samples: the GPU's arithmetic on the CPU, and decoders against each other."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import reference_packed_reader as reference
import torch
from helpers import write_tiny
from nvidia.dali import fn
from reference_packed_reader import TABLE

from pipelines.dataset.open import open_folder
from pipelines.errors import DataError
from pipelines.formats.packed import gather_gpu, gather_triton
from pipelines.formats.packed.decode import PackedSample, open_packed
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.gather_choice import choose_gather
from pipelines.formats.packed.gather_gpu import arrays_of, gather
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.loading.config import LoaderConfig
from pipelines.loading.dali_graphs import define_pipeline, packed_nodes
from pipelines.loading.loader import Loader
from pipelines.loading.transforms import lookup_node, transform
from pipelines.plan import RankSlice
from pipelines.sample import Batch

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
"""Of Triton's kernel: its interpreter is in use without a GPU."""

ROW_BEYOND_TABLE = reference.write(TABLE, [[0, 1, 2, 1], [2, 3, 0, 1]], size=2)
SHORT_BLOCK = reference.write(TABLE, [[0, 1, 2, 1], [2, 2, 0]], size=2, byte_sum=9)


def decode_as_on_gpu(sample: PackedSample, dtype: torch.dtype, *, apply_log: bool) -> torch.Tensor:
    """Decode as `PackedGpuDecoder` does, with another LZ4 decoder in place of DALI's."""
    (blocks,), (starts,), (sizes,), (voxels,), (table,) = arrays_of([sample])
    # DALI leaves zeros where a block is too short.
    chunks = torch.zeros(len(starts), int(voxels[0]), dtype=torch.uint8)
    for chunk, start, size in zip(chunks, starts.tolist(), sizes.tolist(), strict=True):
        block = reference.lz4_inflate(blocks[start : start + size].tobytes())
        chunk[: len(block)] = torch.frombuffer(bytearray(block), dtype=torch.uint8)
    header = sample.header
    values, by_mean = look_up(table, apply_log=apply_log), not apply_log
    chunks, values = chunks.to(DEVICE), values.to(DEVICE)
    outputs = [torch.zeros(header.spec.shape, dtype=dtype, device=DEVICE) for _ in range(2)]
    # Triton's kernel, in its interpreter, writes the same bits.
    for function, out in zip((gather, gather_triton.gather), outputs, strict=True):
        function(chunks, values, out, planes=header.planes, byte_sum=header.byte_sum, by_mean=by_mean)
    assert torch.equal(*(out.view(torch.int16) for out in outputs))
    return outputs[0].cpu()


def look_up(table: npt.NDArray[np.int16], *, apply_log: bool) -> torch.Tensor:
    """Look up `table` with DALI, as the packed graph does."""

    def values_node() -> Any:
        return lookup_node(fn.external_source(source=lambda: [table], batch=True), apply_log=apply_log)

    pipeline = define_pipeline(values_node, LoaderConfig(threads=1), torch.device("cpu"))
    (values,) = pipeline.run()
    return torch.utils.dlpack.from_dlpack(values.as_tensor())[0].clone()


@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("name", ["usual", "256 different", "all different", "one voxel"])
def test_gpu_decoding_equals_the_transform(name: str, apply_log: bool) -> None:
    sample = reference.samples()[name]
    packed = open_packed(Path("a.packed"), b"".join(encode(sample)))
    expected = torch.from_numpy(transform(sample.counts, apply_log=apply_log))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = decode_as_on_gpu(packed, dtype, apply_log=apply_log)
        if apply_log and dtype == torch.float32:
            exact = np.log1p(sample.counts.astype(np.float64)).astype(np.float32)
            assert torch.equal(found, torch.from_numpy(exact))
        else:
            torch.testing.assert_close(found.float(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("apply_log", [True, False])
def test_a_row_beyond_the_table_becomes_nan(apply_log: bool) -> None:
    rows = [[0, 1, 2, 3], [2, 255, 0, 1]]
    packed = open_packed(Path("a.packed"), reference.write(TABLE, rows, size=2))
    found = decode_as_on_gpu(packed, torch.float32, apply_log=apply_log).view(8, 4)
    assert found.isnan().all(1).tolist() == [False, False, False, True, False, True, False, False]
    counts = np.array(TABLE)[[0, 1, 2, 2, 0, 1]]
    expected = np.log1p(counts) if apply_log else counts / (counts.sum() / 32)
    assert found[[0, 1, 2, 4, 6, 7]].tolist() == [pytest.approx(row) for row in expected.tolist()]


def test_a_short_block_makes_its_whole_sample_nan() -> None:
    packed = open_packed(Path("a.packed"), SHORT_BLOCK)
    for apply_log in (True, False):
        assert decode_as_on_gpu(packed, torch.float32, apply_log=apply_log).isnan().all()


@pytest.mark.parametrize("planes", [1, 2, 3, 4])
@pytest.mark.parametrize(("chunks", "voxels"), [(1, 1), (3, 7), (2, 2049), (1, 5000)])
def test_kernel_gathers_any_planes_and_chunks(planes: int, chunks: int, voxels: int) -> None:
    generator = torch.Generator().manual_seed(planes)
    blocks = torch.randint(0, 256, (chunks * planes, voxels), dtype=torch.uint8, generator=generator)
    # Most rows are beyond the table.
    blocks.view(chunks, planes, voxels)[:, 1:, : voxels // 2] = 0
    for rows, byte_sum in ((2, int(blocks.sum())), (200, int(blocks.sum())), (200, 2**32 - 1)):
        table = torch.randn(rows, 4, generator=generator).to(DEVICE)
        table[-1] = torch.nan
        outputs = [torch.zeros(chunks * voxels, 4, dtype=torch.float16, device=DEVICE) for _ in range(2)]
        for function, out in zip((gather, gather_triton.gather), outputs, strict=True):
            function(blocks.to(DEVICE), table, out, planes=planes, byte_sum=byte_sum, by_mean=False)
        assert torch.equal(*(out.view(torch.int16) for out in outputs))


def test_gather_writes_memory_of_either_layout() -> None:
    blocks = torch.randint(0, 3, (2, 4), dtype=torch.uint8)
    table = torch.tensor([*TABLE, [0, 0, 0, 0]], dtype=torch.float32)
    channels_last, channels_first = torch.zeros(2, 2, 2, 4), torch.zeros(4, 2, 2, 2).permute(1, 2, 3, 0)
    for out in (channels_last, channels_first):
        gather(blocks, table, out, planes=1, byte_sum=int(blocks.sum()), by_mean=False)
        assert torch.equal(out.reshape(8, 4), table[blocks.view(8).long()])


def test_a_gather_that_differs_or_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton = gather_triton.gather
    assert choose_gather(DEVICE) is triton

    def off_by_one(blocks: torch.Tensor, table: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
        triton(blocks, table, out, **options)
        out[-1, -1] += 1

    def ignores_damage(blocks: torch.Tensor, table: torch.Tensor, out: torch.Tensor, **options: Any) -> None:
        triton(blocks, table, out, **options | {"byte_sum": int(blocks.sum())})

    def fails(*tensors: torch.Tensor, **options: Any) -> None:
        raise RuntimeError("no kernel image\nis available")

    for bad in (off_by_one, ignores_damage, fails):
        monkeypatch.setattr(gather_triton, "gather", bad)
        caplog.clear()
        assert choose_gather(DEVICE) is gather_gpu.gather
        assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]


def test_the_packed_graph_is_serialised_without_a_gpu() -> None:
    for apply_log in (True, False):
        pipeline = define_pipeline(
            lambda: packed_nodes(deque(), apply_log=apply_log),  # noqa: B023
            LoaderConfig(batch_size=2),
            torch.device("cpu"),
        )
        serialised = pipeline.serialize()
        assert b"decoders__Inflate" in serialised and b"LookupTable" in serialised


def write_damaged(root: Path, content: bytes) -> Path:
    """Write a packed data set whose sample 3 is `content`; return that sample's path."""
    write_tiny(root, train=6, validation=1, format_name="packed", size=2)
    name = "universe_0003_000"
    write_shard(root / "train" / f"{name}.tar", [(f"{name}.packed", [content])])
    return root / "train" / f"{name}.tar" / f"{name}.packed"


def open_loader(root: Path, device: str, **options: Any) -> Loader:
    return Loader(
        open_folder(root / "train"),
        LoaderConfig(**options),
        rank_slice=RankSlice(),
        seed=0,
        shuffle=False,
        ragged="drop",
        device=torch.device(device),
    )


def test_damage_that_only_decoding_finds_is_named_or_skipped(tmp_path: Path) -> None:
    path = write_damaged(tmp_path, ROW_BEYOND_TABLE)
    loader = open_loader(tmp_path, "cpu", batch_size=2)
    with pytest.raises(DataError, match="chunk 1 has the row 3") as raised:
        list(loader.batches(0))
    assert raised.value.path == str(path)
    loader.close()
    loader = open_loader(tmp_path, "cpu", batch_size=2, on_bad_sample="skip")
    assert [batch.index.tolist() for batch in loader.batches(0)] == [[0, 1], [2, 4], [4, 5]]
    assert list(loader.skipped) == [str(path)]
    loader.close()


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("size", [16, 48])
def test_gpu_batches_equal_those_of_the_cpu(
    size: int, apply_log: bool, batch_size: int, tmp_path: Path
) -> None:
    root = write_tiny(tmp_path, train=7, validation=1, format_name="packed", size=size)
    options = {"batch_size": batch_size, "apply_log": apply_log}
    cpu, gpu = open_loader(root, "cpu", **options), open_loader(root, "cuda:0", **options)
    half = torch.zeros(batch_size, size, size, size, 4, dtype=torch.float16, device="cuda")
    into = Batch(half.permute(0, 4, 1, 2, 3), torch.zeros(batch_size, 4, device="cuda"), np.arange(0))
    for epoch in range(2):
        for one, other in zip(cpu.batches(epoch), gpu.batches(epoch), strict=True):
            torch.testing.assert_close(other.volume.cpu(), one.volume, rtol=2e-7, atol=0)
            assert torch.equal(other.target.cpu(), one.target) and (other.index == one.index).all()
    for one, other in zip(cpu.batches(2), gpu.batches(2, into=into), strict=True):
        assert other.volume.data_ptr() == half.data_ptr()
        torch.testing.assert_close(other.volume.cpu().float(), one.volume, rtol=1e-3, atol=0)
    # A seek while other steps are in the pipeline.
    for one, other in zip(cpu.batches(0, 1), gpu.batches(0, 1), strict=True):
        torch.testing.assert_close(other.volume.cpu(), one.volume, rtol=2e-7, atol=0)
    cpu.close()
    gpu.close()


@pytest.mark.gpu
@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("content", [ROW_BEYOND_TABLE, SHORT_BLOCK])
def test_on_a_gpu_damage_becomes_nan(content: bytes, apply_log: bool, tmp_path: Path) -> None:
    path = write_damaged(tmp_path, content)
    loader = open_loader(tmp_path, "cuda:0", batch_size=6, apply_log=apply_log)
    (batch,) = loader.batches(0)
    assert batch.volume.isnan().flatten(1).any(1).tolist() == [False, False, False, True, False, False]
    with pytest.raises(DataError) as raised:
        loader.raise_if_damaged(batch.index)
    assert raised.value.path == str(path)
    loader.close()
