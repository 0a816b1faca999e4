"""Shards: tar files that tar and DALI read too."""

from __future__ import annotations

import io
import itertools
import os
import random
import resource
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny_sample, write_tiny

from pipelines.dataset.open import open_folder
from pipelines.errors import AccessError, DataError
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import read_member, read_members, write_shard
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.plan import RankSlice
from pipelines.storage.local import clear_open_files
from preprocess.convert import convert

CONTENTS = {
    "universe_0000_000.packed": b"",
    "universe_0001_000.packed": b"x",
    "universe_0002_000.packed": bytes(range(256)) * 2,
    "universe_0003_000.packed": bytes(range(256)) * 5 + b"end",
}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard_000000.tar"
    write_shard(path, ((name, [content[:1], content[1:]]) for name, content in CONTENTS.items()))
    return path


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Return a data set of eleven samples in four shards."""
    source = write_tiny(tmp_path / "npy", train=11, validation=1)
    assert (
        convert(source / "train", tmp_path / "packed" / "train", "packed", workers=1, samples_per_shard=3)
        == 0
    )
    return tmp_path / "packed"


def test_tar_reads_a_shard(shard: Path) -> None:
    with tarfile.open(shard) as tar:
        assert tar.getnames() == list(CONTENTS)
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None and file.read() == CONTENTS[member.name]
    done = subprocess.run(["tar", "--list", "--file", shard], capture_output=True, text=True, check=True)
    assert done.stdout.split() == list(CONTENTS) and done.stderr == ""


def test_the_index_equals_that_of_dalis_tool(shard: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.idx"
    tool = Path(sys.executable).with_name("wds2idx")
    subprocess.run([tool, shard, theirs], check=True, capture_output=True)
    assert shard.with_suffix(".idx").read_text() == theirs.read_text()


def test_dalis_reader_finds_the_samples(packed: Path) -> None:
    from nvidia.dali import fn, pipeline_def

    shards = sorted((packed / "train").glob("*.tar"))
    assert len(shards) == 4

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)  # type: ignore[untyped-decorator]
    def members() -> object:
        indices = [str(path.with_suffix(".idx")) for path in shards]
        return fn.readers.webdataset(paths=list(map(str, shards)), index_paths=indices, ext=["packed"])

    pipeline, split = members(), open_folder(packed / "train")
    pipeline.build()
    for index in range(len(split)):
        (output,) = pipeline.run()
        assert np.asarray(output.at(0)).tobytes() == split.read_contents(index)[".packed"]


def test_members_are_read_in_any_order(shard: Path) -> None:
    members = list(read_members(shard))
    assert [member.name for member in members] == list(CONTENTS)
    random.Random(2).shuffle(members)
    with ThreadPoolExecutor(4) as threads:
        for direct in (False, True):
            read = threads.map(lambda member: read_member(shard, *member, direct=direct), members)  # noqa: B023
            assert list(read) == [CONTENTS[member.name] for member in members]


def test_a_shard_that_is_cut_off_is_refused(shard: Path) -> None:
    content, *_, last = shard.read_bytes(), *read_members(shard)
    ends = [0, 1, 511, 512, 513, last.offset - 512, last.offset - 1, last.offset + last.bytes - 1]
    for end in ends:
        shard.write_bytes(content[:end])
        with pytest.raises(DataError, match="is not a complete tar archive") as raised:
            read_members(shard)
        assert raised.value.path == str(shard)
        with pytest.raises(DataError, match="is cut off: the shard ends after") as raised:
            read_member(shard, *last, direct=True)
        assert raised.value.path == str(shard / last.name)


def test_a_damaged_header_is_refused(shard: Path) -> None:
    content = shard.read_bytes()
    # A negative length in an otherwise valid header, which leads back to the header itself.
    negative = bytearray(content)
    negative[124:136] = (256**12 - 512).to_bytes(12, "big")
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative[:512])
    damaged = [negative]
    for at in (0, 130, 150, 512 + 99):
        damaged.append(bytearray(content))
        damaged[-1][at] ^= 1
    for broken in damaged:
        shard.write_bytes(broken)
        with pytest.raises(DataError) as raised:
            read_members(shard)
        assert raised.value.path == str(shard)


def test_members_other_than_files_and_folders_are_refused(tmp_path: Path) -> None:
    path, members = tmp_path / "a.tar", []
    for name, kind in (
        ("line\nbreak.packed", tarfile.REGTYPE),
        ("a.packed", tarfile.LNKTYPE),
        ("a.packed", tarfile.SYMTYPE),
        ("a.packed", tarfile.GNUTYPE_SPARSE),
        ("a.packed", tarfile.FIFOTYPE),
    ):
        member = tarfile.TarInfo(name)
        member.type = kind
        members.append(member)
    sparse = tarfile.TarInfo("a.packed")
    sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "0"}
    for member in (*members, sparse):
        format_name = tarfile.PAX_FORMAT if member.pax_headers else tarfile.GNU_FORMAT
        with tarfile.open(path, "w", format=format_name) as tar:
            tar.addfile(member)
        with pytest.raises(DataError, match="has ") as raised:
            read_members(path)
        assert raised.value.path == str(path) and "\n" not in str(raised.value)


@pytest.mark.parametrize("format_name", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_other_writers_are_read(format_name: int, tmp_path: Path) -> None:
    member = tarfile.TarInfo("long" * 70 + ".packed")
    member.size = 6
    with tarfile.open(tmp_path / "a.tar", "w", format=format_name) as tar:
        tar.addfile(member, io.BytesIO(b"sample"))
    (found,) = read_members(tmp_path / "a.tar")
    assert found.name == member.name and read_member(tmp_path / "a.tar", *found) == b"sample"


@pytest.mark.parametrize("format_name", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_folders_and_pax_times_are_skipped(format_name: int, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.packed").write_bytes(b"sample")
    folder = tarfile.TarInfo("other")
    # The length of a folder has no content in the file.
    folder.type, folder.size = tarfile.DIRTYPE, 1024
    with tarfile.open(tmp_path / "a.tar", "w", format=format_name) as tar:
        tar.addfile(folder)
        tar.add(tmp_path / "data", "data")
    (member,) = read_members(tmp_path / "a.tar")
    assert member.name == "data/a.packed" and read_member(tmp_path / "a.tar", *member) == b"sample"


def test_hidden_members_are_skipped(shard: Path, tmp_path: Path) -> None:
    expected = read_members(shard)
    with tarfile.open(shard) as source, tarfile.open(tmp_path / "mac.tar", "w") as target:
        for entry in source:
            content = source.extractfile(entry)
            assert content is not None
            apple = tarfile.TarInfo(f"./._{entry.name}")
            apple.size = 4
            target.addfile(apple, io.BytesIO(b"\0\5\x16\7"))
            snapshot = tarfile.TarInfo(f".snapshot/{entry.name}")
            snapshot.type, snapshot.linkname = tarfile.SYMTYPE, entry.name
            target.addfile(snapshot)
            entry.name = f"./{entry.name}"
            target.addfile(entry, content)
    found = read_members(tmp_path / "mac.tar")
    assert [(f.name.removeprefix("./"), f.bytes) for f in found] == [(f.name, f.bytes) for f in expected]


def test_missing_shards_and_names_that_are_too_long_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AccessError):
        read_members(tmp_path / "none.tar")
    with pytest.raises(AccessError):
        read_member(tmp_path / "none.tar", "a", 0, 1)
    with pytest.raises(DataError, match="cannot hold a member named"):
        write_shard(tmp_path / "a.tar", [("x" * 300, [b""])])
    assert list(tmp_path.iterdir()) == []


def test_an_exception_from_the_members_leaves_no_shard(tmp_path: Path) -> None:
    def contents() -> object:
        yield "a.packed", [b"a"]
        raise KeyError

    with pytest.raises(KeyError):
        write_shard(tmp_path / "a.tar", contents())  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gone", [[], ["manifest.jsonl"], ["manifest.jsonl", "files_data.lst"]])
def test_a_folder_of_shards_is_read_with_and_without_its_manifest(gone: list[str], packed: Path) -> None:
    for name in gone:
        (packed / "train" / name).unlink()
    split = open_folder(packed / "train")
    assert [split.sample_id(index) for index in range(len(split))] == [
        f"universe_{index:04d}_000" for index in range(11)
    ]
    assert split.entry_names == [f"shard_{index:06d}" for index in range(4)]
    for index in random.Random(1).sample(range(11), 11):
        np.testing.assert_array_equal(split.read(index).counts, tiny_sample(index).counts)
        assert split.payload(index).target.tolist() == tiny_sample(index).target.tolist()


def test_members_may_lie_in_folders(packed: Path, tmp_path: Path) -> None:
    shard, folder = tmp_path / "s.tar", packed / "train"
    first = sorted(folder.glob("*.tar"))[0]
    contents = {name: read_member(first, name, *place) for name, *place in read_members(first)}
    write_shard(shard, ((f"some/where/{name}", [content]) for name, content in contents.items()))
    split = open_folder(tmp_path)
    assert split.entry_names == ["s"] and split.files(0) == (shard,)
    for index in range(len(contents)):
        np.testing.assert_array_equal(split.read(index).counts, tiny_sample(index).counts)


def test_a_process_opens_a_shard_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{number}.tar" for number in range(2000)]
    for path in paths:
        path.write_bytes(b"content")
    opened, theirs = [], os.open

    def noted(path: Path, flags: int) -> int:
        opened.append(path)
        return theirs(path, flags)

    monkeypatch.setattr(os, "open", noted)
    clear_open_files()
    for path in (*paths, *paths):
        assert read_member(path, "x", 3, 2) == b"te"
    assert opened == paths
    clear_open_files()


def test_a_tar_without_samples_is_named(packed: Path, tmp_path: Path) -> None:
    for name in ("manifest.jsonl", "files_data.lst"):
        (packed / "train" / name).unlink()
    other = packed / "train" / "shard_000002.tar"
    write_shard(other, [("readme.txt", [b"nothing here"])])
    with pytest.raises(DataError, match="holds no samples; expected a tar of") as raised:
        open_folder(packed / "train")
    assert raised.value.path == str(other)


def test_an_outdated_manifest_is_noticed(packed: Path) -> None:
    open_folder(packed / "train").read(4)
    path = packed / "train" / "shard_000001.tar"
    one, two, three = read_members(path)
    content = {member.name: read_member(path, *member) for member in (one, two, three)}
    # The same samples at other offsets: with the old manifest, the wrong bytes are read.
    write_shard(path, [(name, [content[name]]) for name in (three.name, two.name, one.name)])
    fresh = open_folder(packed / "train")
    assert one.bytes != three.bytes
    with pytest.raises(DataError, match=f"{path.name}/{two.name}"):
        fresh.read(4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_stays_flat_over_an_epoch_of_many_small_samples(tmp_path: Path) -> None:
    samples, shards = 200_000, 100
    content = [b"".join(encode(tiny_sample(index, 4))) for index in range(50)]
    (tmp_path / "train").mkdir()
    for shard in range(shards):
        names = (f"universe_{shard:03d}_{index:05d}.packed" for index in range(samples // shards))
        members = ((name, [content[index % 50]]) for index, name in enumerate(names))
        write_shard(tmp_path / "train" / f"shard_{shard:06d}.tar", members)
    loader = Loader(
        open_folder(tmp_path / "train"),
        LoaderConfig(batch_size=64),
        rank_slice=RankSlice(),
        seed=1,
        shuffle=True,
        ragged="drop",
        device=torch.device("cpu"),
    )
    held: list[int] = []
    for step, batch in enumerate(itertools.chain(loader.batches(0), loader.batches(1))):
        assert len(batch.index) == 64
        if step % 100 == 0:
            # Resident pages; proc_pid_statm(5).
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    loader.close()
    assert len(held) == 2 * (samples // 64) // 100 + 1
    # Less than ten megabytes more over the second epoch: 50 bytes a sample. Over the first one, after its
    # first tenth, less than twenty: malloc reaches its size in steps of some four.
    half = len(held) // 2 + 1
    assert max(held[3:half]) - held[3] < 20_000_000
    assert max(held[half:]) - held[half] < 10_000_000
