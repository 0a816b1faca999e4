"""Decoding of packed samples: the GPU's arithmetic on the CPU, and decoders against each other."""

from __future__ import annotations

import functools
import itertools
import sys
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import nvidia
import pytest
import reference_packed_reader as reference
import torch
import zstandard
from helpers import slab_of, slabs, tiny_sample, write_tiny
from nvidia.dali import fn
from reference_packed_reader import TABLE

from pipelines.dataset.open import open_folder
from pipelines.errors import DataError
from pipelines.formats.packed import gather_gpu, gather_triton
from pipelines.formats.packed.codecs import Codec
from pipelines.formats.packed.decode import PackedSample, open_packed, open_slab
from pipelines.formats.packed.encode import PRESETS, encode
from pipelines.formats.packed.gather_choice import choose_gather
from pipelines.formats.packed.gather_gpu import device_sample, gather, gather_sample
from pipelines.formats.packed.nvcomp import NvcompInflater, choose_inflater
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.loading import packed_decoders
from pipelines.loading.config import LoaderConfig
from pipelines.loading.dali_graphs import define_pipeline, packed_nodes
from pipelines.loading.loader import Loader
from pipelines.loading.packed_decoders import PackedGpuDecoder
from pipelines.loading.transforms import lookup_node, transform
from pipelines.plan import RankSlice
from pipelines.sample import Batch, SampleSpec
from pipelines.slab import Slab, shape_to_read
from preprocess.convert import convert

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
"""Of Triton's kernel: its interpreter is in use without a GPU."""

FLOATS = torch.float32, torch.float16, torch.bfloat16

ROW_BEYOND_TABLE = reference.write(TABLE, [[0, 1, 2, 1], [2, 3, 0, 1]], size=2)
# The second block inflates to a byte less, which LZ4 does not state.
SHORT_BLOCK = reference.write(
    TABLE, [[0, 1, 2, 1], [2, 2, 0]], size=2, codecs=(reference.STORED, reference.LZ4), symbol_sum=9
)


class Nvcomp:
    """A stand-in for NVIDIA's package, with zstandard in place of a GPU."""

    class BitstreamKind:
        RAW = "raw"

    class Codec:
        def __init__(self, **settings: Any) -> None:
            assert settings["algorithm"] == "Zstd" and settings["bitstream_kind"] == "raw"

        def decode(self, frames: list[torch.Tensor], data_type: str) -> list[npt.NDArray[np.uint8]]:
            assert data_type == "|u1"
            contents = (zstandard.decompress(frame.numpy().tobytes()) for frame in frames)
            return [np.frombuffer(bytearray(content), np.uint8) for content in contents]

    as_array = staticmethod(lambda tensor: tensor)


@pytest.fixture
def nvcomp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.nvcomp", Nvcomp)
    monkeypatch.setattr(nvidia, "nvcomp", Nvcomp, raising=False)


def decode_as_on_gpu(
    sample: PackedSample, dtype: torch.dtype, codec: Codec, *, apply_log: bool
) -> torch.Tensor:
    """Decode as `PackedGpuDecoder` does, with another LZ4 decoder in place of DALI's."""
    prepared = device_sample(sample, codec)
    blocks, *extents, escapes, table = prepared.arrays
    symbols = torch.from_numpy(blocks.copy())
    if codec == Codec.LZ4:
        starts, sizes, (voxels,) = extents
        # DALI leaves zeros where a block is too short.
        symbols = torch.zeros(len(starts), int(voxels), dtype=torch.uint8)
        for chunk, start, size in zip(symbols, starts.tolist(), sizes.tolist(), strict=True):
            block = reference.lz4_inflate(blocks[start : start + size].tobytes())
            chunk[: len(block)] = torch.frombuffer(bytearray(block), dtype=torch.uint8)
    elif codec == Codec.ZSTD:
        symbols = NvcompInflater(torch.device("cpu")).inflate(symbols, prepared.starts, prepared.sizes)
    values, by_mean = look_up(table, apply_log=apply_log), not apply_log
    given = symbols.to(DEVICE), torch.from_numpy(escapes).to(DEVICE), values.to(DEVICE)
    shape = shape_to_read(sample.header.spec, sample.slab)
    outputs = [torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    # Triton's kernel, in its interpreter, writes the same bits.
    for function, out in zip((gather, gather_triton.gather), outputs, strict=True):
        gather_sample(function, prepared, given, out, by_mean=by_mean)
    assert torch.equal(*(out.view(torch.int16) for out in outputs))
    return outputs[0].cpu()


def look_up(table: npt.NDArray[np.int16], *, apply_log: bool) -> torch.Tensor:
    """Look up `table` with DALI, as the packed graph does."""

    def values_node() -> Any:
        return lookup_node(fn.external_source(source=lambda: [table], batch=True), apply_log=apply_log)

    pipeline = define_pipeline(values_node, LoaderConfig(threads=1), torch.device("cpu"))
    (values,) = pipeline.run()
    return torch.utils.dlpack.from_dlpack(values.as_tensor())[0].clone()


@pytest.mark.usefixtures("nvcomp")
@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("name", ["usual", "256 different", "all different", "one voxel"])
def test_gpu_decoding_equals_the_transform(name: str, codec: Codec, apply_log: bool) -> None:
    sample = reference.samples()[name]
    expected = torch.from_numpy(transform(sample.counts, apply_log=apply_log))
    # Either codec of a sample on every one of the device.
    for preset, dtype in zip(("fast", "lz4"), FLOATS[codec:] + FLOATS[:codec], strict=False):
        packed = open_packed(Path("a.packed"), b"".join(encode(sample, preset, chunk_voxels=1000)))
        found = decode_as_on_gpu(packed, dtype, codec, apply_log=apply_log)
        if apply_log and dtype == torch.float32:
            exact = np.log1p(sample.counts.astype(np.float64)).astype(np.float32)
            assert torch.equal(found, torch.from_numpy(exact))
        else:
            torch.testing.assert_close(found.float(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.usefixtures("nvcomp")
@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("chunk_voxels", [1000, 1024])
def test_gpu_decoding_of_slabs_equals_slabs_of_the_transform(chunk_voxels: int, codec: Codec) -> None:
    # Of the shorter chunks the last one has fewer voxels, which are followed by those of the first.
    sample = reference.samples()["usual"]
    size = len(sample.counts)
    expected = np.log1p(sample.counts.astype(np.float64)).astype(np.float32)
    for preset, slab in itertools.product(("fast", "lz4"), slabs(1, 2, 4)):
        content = b"".join(encode(sample, preset, chunk_voxels=chunk_voxels))
        read = functools.partial(lambda all_of_it, at, length: all_of_it[at : at + length], content)
        packed = open_slab(Path("a.packed"), read, len(content), SampleSpec(size), slab)
        found = decode_as_on_gpu(packed, torch.float32, codec, apply_log=True)
        np.testing.assert_array_equal(found.numpy(), slab_of(expected, slab))


@pytest.mark.parametrize("apply_log", [True, False])
def test_a_row_beyond_the_table_becomes_nan(apply_log: bool) -> None:
    rows = [[0, 1, 2, 3], [2, 255, 0, 1]]
    packed = open_packed(Path("a.packed"), reference.write(TABLE, rows, size=2))
    found = decode_as_on_gpu(packed, torch.float32, Codec.STORED, apply_log=apply_log).view(8, 4)
    assert found.isnan().all(1).tolist() == [False, False, False, True, False, True, False, False]
    counts = np.array(TABLE)[[0, 1, 2, 2, 0, 1]]
    expected = np.log1p(counts) if apply_log else counts / (counts.sum() / 32)
    assert found[[0, 1, 2, 4, 6, 7]].tolist() == [pytest.approx(row) for row in expected.tolist()]


MANY = np.arange(300 * 4, dtype=np.int16).reshape(300, 4)
"""A table whose rows need escapes."""


def test_an_escape_beyond_the_table_becomes_nan() -> None:
    rows = np.zeros(343, np.int64)
    rows[[3, 40, 200, 300, 342]] = 299, 300, 255, 1000, 254
    content = reference.write(MANY, [rows[:172], rows[172:]], size=7)
    packed = open_packed(Path("a.packed"), content)
    found = decode_as_on_gpu(packed, torch.float32, Codec.STORED, apply_log=True).view(-1, 4)
    beyond = rows >= 300
    assert found.isnan().all(1).tolist() == found.isnan().any(1).tolist() == beyond.tolist()
    np.testing.assert_allclose(found[~beyond], np.log1p(MANY[rows[~beyond]]), rtol=1e-6)


@pytest.mark.parametrize("apply_log", [True, False])
def test_a_short_block_makes_its_whole_sample_nan(apply_log: bool) -> None:
    packed = open_packed(Path("a.packed"), SHORT_BLOCK)
    assert decode_as_on_gpu(packed, torch.float32, Codec.LZ4, apply_log=apply_log).isnan().all()
    with pytest.raises(DataError):
        device_sample(packed, Codec.STORED)


@pytest.mark.usefixtures("nvcomp")
@pytest.mark.parametrize("codec", Codec)
def test_other_symbols_than_were_packed_make_a_sample_nan(codec: Codec) -> None:
    # Whichever side inflates them, and if they are compressed again on the way.
    content = reference.write(TABLE, [[0, 1, 2, 1], [2, 2, 0, 1]], size=2, symbol_sum=5)
    packed = open_packed(Path("a.packed"), content)
    assert decode_as_on_gpu(packed, torch.float32, codec, apply_log=True).isnan().all()


@pytest.mark.parametrize("escapes", [[[0, 7], [1]], [[0, 7], [1, 2, 3]], [[], []]])
def test_more_or_fewer_escapes_than_symbols_for_them_make_a_sample_nan(escapes: list[list[int]]) -> None:
    symbols = np.zeros(343, np.int64)
    symbols[[3, 40, 200, 300]] = 255
    content = reference.write(MANY, [symbols[:172], symbols[172:]], size=7, escapes=escapes)
    packed = open_packed(Path("a.packed"), content)
    assert decode_as_on_gpu(packed, torch.float16, Codec.STORED, apply_log=True).isnan().all()


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize("voxels", [1, 21, 4098, 5000])
def test_kernel_gathers_any_rows(planes: int, voxels: int) -> None:
    generator = torch.Generator().manual_seed(planes)
    symbols = torch.randint(250, 256, (voxels,), dtype=torch.uint8, generator=generator)
    count = int((symbols == 255).sum())
    escapes = torch.randint(0, 256, (planes, count + 1), dtype=torch.uint8, generator=generator)
    # Half of the rows are beyond a table of 400.
    escapes[1:, : count // 2] = 0
    for rows, total in ((2, 0), (257, 0), (258, 0), (400, 0), (400, 1)):
        table = torch.randn(rows, 4, generator=generator).to(DEVICE)
        table[-1] = torch.nan
        outputs = [torch.zeros(voxels, 4, dtype=torch.float16, device=DEVICE) for _ in range(2)]
        for function, out in zip((gather, gather_triton.gather), outputs, strict=True):
            given = symbols.to(DEVICE), escapes.to(DEVICE), table
            function(*given, out, byte_sum=int(symbols.sum()) + total, by_mean=False)
        assert torch.equal(*(out.view(torch.int16) for out in outputs))


def test_gather_writes_memory_of_either_layout() -> None:
    symbols = torch.randint(0, 3, (8,), dtype=torch.uint8)
    table = torch.tensor([*TABLE, [0, 0, 0, 0]], dtype=torch.float32)
    channels_last, channels_first = torch.zeros(2, 2, 2, 4), torch.zeros(4, 2, 2, 2).permute(1, 2, 3, 0)
    for out in (channels_last, channels_first):
        escapes = torch.zeros(1, 1, dtype=torch.uint8)
        gather(symbols, escapes, table, out, byte_sum=int(symbols.sum()), by_mean=False)
        assert torch.equal(out.reshape(8, 4), table[symbols.long()])


def test_a_gather_that_differs_or_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton = gather_triton.gather
    assert choose_gather(DEVICE) is triton

    def off_by_one(*tensors: torch.Tensor, **options: Any) -> None:
        triton(*tensors, **options)
        tensors[-1][-1, -1] += 1

    def ignores_damage(*tensors: torch.Tensor, **options: Any) -> None:
        triton(*tensors, **options | {"byte_sum": int(tensors[0].sum())})

    def fails(*tensors: torch.Tensor, **options: Any) -> None:
        raise RuntimeError("no kernel image\nis available")

    for bad in (off_by_one, ignores_damage, fails):
        monkeypatch.setattr(gather_triton, "gather", bad)
        caplog.clear()
        assert choose_gather(DEVICE) is gather_gpu.gather
        assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]


@pytest.mark.usefixtures("nvcomp")
def test_nvcomp_that_differs_or_fails_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert choose_inflater(torch.device("cpu")) and not caplog.messages
    decode = Nvcomp.Codec.decode

    def differs(self: Nvcomp.Codec, *given: Any, **options: Any) -> list[npt.NDArray[np.uint8]]:
        contents = decode(self, *given, **options)
        contents[1][0] += 1
        return contents

    def fails(self: Nvcomp.Codec, *given: Any, **options: Any) -> None:
        raise RuntimeError("no device\nis there")

    for bad in (differs, fails):
        monkeypatch.setattr(Nvcomp.Codec, "decode", bad)
        caplog.clear()
        assert choose_inflater(torch.device("cpu")) is None
        assert len(caplog.messages) == 1 and "\n" not in caplog.messages[0]


def test_the_packed_graph_is_serialised_without_a_gpu() -> None:
    for codec, apply_log in itertools.product(Codec, (True, False)):
        pipeline = define_pipeline(
            lambda: packed_nodes(deque(), codec, DEVICE, apply_log=apply_log),  # noqa: B023
            LoaderConfig(batch_size=2),
            torch.device("cpu"),
        )
        serialised = pipeline.serialize()
        assert (b"decoders__Inflate" in serialised) == (codec == Codec.LZ4) and b"LookupTable" in serialised


def write_damaged(root: Path, content: bytes) -> Path:
    """Write a packed data set whose sample 3 is `content`; return that sample's path."""
    write_tiny(root, train=6, validation=1, format_name="packed", size=2)
    name = "universe_0003_000"
    write_shard(root / "train" / f"{name}.tar", [(f"{name}.packed", [content])])
    return root / "train" / f"{name}.tar" / f"{name}.packed"


def open_loader(root: Path, device: str, slab: Slab | None = None, **options: Any) -> Loader:
    return Loader(
        open_folder(root / "train"),
        LoaderConfig(**options),
        rank_slice=RankSlice(),
        seed=0,
        shuffle=False,
        ragged="drop",
        device=torch.device(device),
        slab=slab,
    )


def test_damage_that_only_decoding_finds_is_named_or_skipped(tmp_path: Path) -> None:
    path = write_damaged(tmp_path, ROW_BEYOND_TABLE)
    loader = open_loader(tmp_path, "cpu", batch_size=2)
    with pytest.raises(DataError, match="row 3") as raised:
        list(loader.batches(0))
    assert raised.value.path == str(path)
    loader.close()
    loader = open_loader(tmp_path, "cpu", batch_size=2, on_bad_sample="skip")
    assert [batch.index.tolist() for batch in loader.batches(0)] == [[0, 1], [2, 4], [4, 5]]
    assert list(loader.skipped) == [str(path)]
    loader.close()


@pytest.mark.usefixtures("nvcomp")
@pytest.mark.parametrize("slab", [None, Slab(0, 2, False), Slab(1, 2, True)])
@pytest.mark.parametrize("codec", [Codec.STORED, Codec.ZSTD])
def test_the_gpu_decoder_decodes_on_a_cpu_what_dali_need_not_inflate(
    codec: Codec, slab: Slab | None, tmp_path: Path
) -> None:
    root = write_tiny(tmp_path, train=5, validation=1, format_name="packed", size=16)
    expected = open_loader(root, "cpu", slab, batch_size=2)
    loader = open_loader(root, "cpu", slab, batch_size=2)
    inflater = choose_inflater(torch.device("cpu")) if codec == Codec.ZSTD else None
    shape, config = shape_to_read(loader.split.spec, slab), LoaderConfig(batch_size=2)
    loader._decoder = PackedGpuDecoder(shape, config, torch.device("cpu"), codec, inflater)
    for epoch, first in ((0, 0), (1, 0), (0, 1)):
        for one, other in zip(expected.batches(epoch, first), loader.batches(epoch, first), strict=True):
            assert torch.equal(one.volume, other.volume) and (one.index == other.index).all()
    expected.close()
    loader.close()


@pytest.mark.usefixtures("nvcomp")
def test_frames_that_nvcomp_inflates_to_another_length_are_named(tmp_path: Path) -> None:
    for number, rows in enumerate(([2, 2, 0], [2, 2, 0, 0, 0])):
        codecs = (reference.STORED, reference.ZSTD)
        content = reference.write(TABLE, [[0, 1, 2, 1], rows], size=2, codecs=codecs)
        path = write_damaged(tmp_path / str(number), content)
        loader, cpu = open_loader(tmp_path / str(number), "cpu", batch_size=2), torch.device("cpu")
        config, inflater = LoaderConfig(batch_size=2), choose_inflater(cpu)
        loader._decoder = PackedGpuDecoder(loader.split.spec.shape, config, cpu, Codec.ZSTD, inflater)
        with pytest.raises(DataError) as raised:
            list(loader.batches(0))
        assert raised.value.path == str(path)
        loader.close()


def test_the_first_sample_of_a_data_set_decides_who_inflates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Codec] = []

    def decoder(*given: Any) -> None:
        made.append(given[3])

    monkeypatch.setattr(packed_decoders, "PackedGpuDecoder", decoder)
    for preset in PRESETS:
        members = [("a.packed", encode(tiny_sample(1, 32), preset))]
        (tmp_path / preset).mkdir()
        write_shard(tmp_path / preset / "shard_000000.tar", members)
        packed_decoders.make_packed_gpu_decoder(
            open_folder(tmp_path / preset), LoaderConfig(), torch.device("cpu")
        )
    assert made == [Codec.LZ4, Codec.STORED, Codec.STORED]
    # A partition without samples has none to decide.
    nothing = open_folder(tmp_path / "lz4").subset(np.empty(0, np.int64))
    packed_decoders.make_packed_gpu_decoder(nothing, LoaderConfig(), torch.device("cpu"))
    assert made[-1] == Codec.STORED


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("apply_log", [True, False])
@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("slab", [None, Slab(0, 2, False), Slab(1, 2, True)])
def test_gpu_batches_equal_those_of_the_cpu(
    slab: Slab | None, size: int, apply_log: bool, batch_size: int, preset: str, tmp_path: Path
) -> None:
    if slab is not None and not apply_log:
        pytest.skip("the mean of a sample needs all of it")
    source = write_tiny(tmp_path / "npy", train=7, validation=1, format_name="npy", size=size)
    root = tmp_path / "packed"
    convert(source, root, "packed", workers=1, codec=preset)
    options = {"batch_size": batch_size, "apply_log": apply_log}
    cpu, gpu = (open_loader(root, device, slab, **options) for device in ("cpu", "cuda:0"))
    shape = shape_to_read(cpu.split.spec, slab)
    half = torch.zeros(batch_size, *shape, dtype=torch.float16, device="cuda")
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
