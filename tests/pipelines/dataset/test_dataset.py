"""Data folders: detected by format, opened in the right order, and refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import read_sample, slab_of, slabs, tiny_sample, write_tiny

from pipelines.dataset.file_lists import ListedFile, read_list, write_list
from pipelines.dataset.manifest import MANIFEST, Entry, Manifest
from pipelines.dataset.open import open_folder, split_dirs
from pipelines.errors import AccessError, DataError
from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.registry import FORMATS
from pipelines.sample import SampleSpec


def test_the_format_is_detected(tmp_path: Path) -> None:
    for name in FORMATS:
        split = open_folder(write_tiny(tmp_path / name, train=3, validation=1, format_name=name) / "train")
        assert (split.format_name, len(split), split.spec) == (name, 3, SampleSpec(16))
        assert [split.sample_id(index) for index in range(3)] == [
            f"universe_000{index}_000" for index in range(3)
        ]


def test_a_fingerprint_is_of_names_order_and_contents_in_any_format(tmp_path: Path) -> None:
    first, *others = (
        open_folder(write_tiny(tmp_path / name, train=9, validation=1, format_name=name) / "train")
        for name in FORMATS
    )
    digests = first.fingerprint()
    assert len(set(digests)) == 9 and all(digests)
    assert all(other.fingerprint() == digests for other in others)
    assert first.subset(np.arange(9)[::-1]).fingerprint()[0] != digests[0]
    Path(first.path(8)).write_bytes(b"damaged")
    assert first.fingerprint() == [*digests[:8], ""]


def test_list_files_select_and_order_the_samples(tmp_path: Path) -> None:
    root = write_tiny(tmp_path / "data", train=4, validation=1)
    chosen = [f"universe_000{index}_000" for index in (2, 0, 3)]
    for kind in ("data", "label"):
        text = "".join(f"{stem}_{kind}.npy\n" for stem in chosen)
        (root / "train" / f"files_{kind}.lst").write_text(text)
    split = open_folder(root / "train")
    assert [split.sample_id(index) for index in range(len(split))] == chosen


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("\ufeff", "\n"),
        ("", "\r\n"),
        ("", "\r"),
        ("./", "\n"),
        ("{train}/", "\n"),
        ("{link}/train//", "\n"),
        ("train/", "\n"),
        ("../validation/../train/", "\n"),
        ("  ", "\t123 \n"),
        ("._universe_0000_000_data.npy\n./.DS_Store\n", "\n\n"),
    ],
)
def test_lists_as_other_programs_write_them(before: str, after: str, tmp_path: Path) -> None:
    train = write_tiny(tmp_path / "data", train=4, validation=1) / "train"
    (tmp_path / "link").symlink_to("data")
    before = before.format(train=train, link=tmp_path / "link")
    stems = [f"universe_000{index}_000" for index in (2, 0, 3)]
    for kind in ("data", "label"):
        content = "".join(f"{before}{stem}_{kind}.npy{after}" for stem in stems)
        (train / f"files_{kind}.lst").write_bytes(content.encode())
    split = open_folder(train)
    assert [split.sample_id(index) for index in range(len(split))] == stems


def test_a_list_may_name_what_the_links_of_its_folder_lead_to(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "data", train=2, validation=1) / "train"
    (tmp_path / "links").mkdir()
    for path in source.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    names = sorted(path.name for path in source.glob("*_data.npy"))
    (tmp_path / "links" / "files_data.lst").write_text("".join(f"{source}/{name}\n" for name in names))
    assert len(open_folder(tmp_path / "links")) == 2


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("universe_0001_000_data.npy\n".encode("utf-16"), "zero bytes, as text in UTF-16 does"),
        ("universe_0001_000_data.npy\n".encode("utf-16-be"), "zero bytes, as text in UTF-16 does"),
        ("universe_0001_000_data.npy\nh\xf6he_data.npy\n".encode("latin-1"), "line 2 is not UTF-8"),
        (b"../validation/universe_1000_000_data.npy\n", "is in another folder"),
        (b"validation/universe_1000_000_data.npy\n", "is in another folder"),
        (b"validation/universe_0001_000_data.npy\n", "does not exist"),
        (b"universe_0001_000_label.npy\n", "universe_0001_000_label.npy, which is not one of the"),
        (
            b"universe_0001_000_data.npy\n./universe_0001_000_data.npy 12\n",
            "universe_0001_000_data.npy twice",
        ),
        (b"\xef\xbb\xbf \r\n._a_data.npy\r\n", "lists no sample"),
        (b".\\a_data.npy\r\n", "lists no sample"),
    ],
)
def test_contradictory_lists_are_refused_for_the_true_reason(
    content: bytes, fault: str, tmp_path: Path
) -> None:
    train = write_tiny(tmp_path / "data", train=2, validation=1) / "train"
    (train / "files_data.lst").write_bytes(content)
    with pytest.raises(DataError) as raised:
        open_folder(train)
    assert raised.value.path == str(train / "files_data.lst") and fault in raised.value.fault


def test_a_manifest_that_an_editor_has_saved(tmp_path: Path) -> None:
    written = FORMATS["npy"].write(tmp_path, "a", tiny_sample(1))
    Manifest("npy", SampleSpec(16), (Entry.from_written("a", written),)).save(tmp_path)
    path = tmp_path / MANIFEST
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert open_folder(tmp_path).read(0, verify=True).counts.shape == (16, 16, 16, 4)


APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4064)


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_hidden_files_are_no_samples(format_name: str, tmp_path: Path) -> None:
    root = write_tiny(tmp_path / "data", train=2, validation=1, format_name=format_name)
    for folder in (root, root / "train"):
        for path in list((root / "train").iterdir()):
            (folder / f"._{path.name}").write_bytes(APPLE_DOUBLE)
            shutil.copy(path, folder / f".~{path.name}")
    (root / "train" / ".ipynb_checkpoints").mkdir()
    assert split_dirs(root) == ["train", "validation"]
    split = open_folder(root / "train")
    assert [split.sample_id(index) for index in range(len(split))] == [
        "universe_0000_000",
        "universe_0001_000",
    ]
    for path in (root / "validation").iterdir():
        path.rename(path.with_name(f".{path.name}"))
    with pytest.raises(DataError) as raised:
        open_folder(root / "validation")
    assert ".universe_1000_000" in raised.value.fault


def test_links_to_nowhere_are_named(tmp_path: Path) -> None:
    root = write_tiny(tmp_path / "data", train=1, validation=1)
    shutil.rmtree(root / "train")
    (root / "train").symlink_to("/nowhere/train")
    # A split must not be passed over.
    assert split_dirs(root) == ["train", "validation"]
    with pytest.raises(AccessError, match="restore /nowhere/train, which this symbolic link leads to"):
        open_folder(root / "train")
    (root / "validation" / MANIFEST).symlink_to("/nowhere/manifest")
    with pytest.raises(AccessError) as raised:
        open_folder(root / "validation")
    assert raised.value.path == str(root / "validation" / MANIFEST)


def test_lists_that_do_not_match_the_files_are_refused(tmp_path: Path) -> None:
    train = write_tiny(tmp_path / "data", train=4, validation=1) / "train"
    for data, label, message in (
        ("universe_0009_000_data.npy\n", "", "lists universe_0009_000_data.npy, which does not exist"),
        ("universe_0001_000_data.npy\n" * 2, "", "lists universe_0001_000_data.npy twice"),
        ("\n", "", "lists no sample"),
        ("universe_0001_000_data.npy\n", "universe_0002_000_label.npy\n", "does not list the labels"),
    ):
        (train / "files_data.lst").write_text(data)
        if label:
            (train / "files_label.lst").write_text(label)
        with pytest.raises(DataError, match=message) as raised:
            open_folder(train)
        assert raised.value.path == str(train / ("files_label.lst" if label else "files_data.lst"))


@pytest.mark.parametrize("format_name", ["npy", "tfrecord_gzip"])
def test_names_may_contain_blanks(format_name: str, tmp_path: Path) -> None:
    for name in ("a b 12", " c", "d"):
        FORMATS[format_name].write(tmp_path, name, tiny_sample(1))
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    for kind in ("data", "label") if format_name == "npy" else ("data",):
        names = [name for name in sorted(sizes) if kind in name or format_name != "npy"]
        write_list(
            tmp_path / f"files_{kind}.lst",
            (ListedFile(name, sizes[name] if format_name != "npy" else None) for name in names),
        )
        assert [listed.name for listed in read_list(tmp_path / f"files_{kind}.lst")] == names
    split = open_folder(tmp_path)
    assert [split.sample_id(index) for index in range(3)] == [" c", "a b 12", "d"]


def test_folders_without_usable_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AccessError, match="cannot be listed") as raised:
        open_folder(tmp_path / "train")
    assert raised.value.path == str(tmp_path / "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError, match="holds no samples"):
        open_folder(tmp_path / "train")
    FORMATS["npy"].write(tmp_path / "train", "a", tiny_sample(0))
    FORMATS["tfrecord"].write(tmp_path / "train", "b", tiny_sample(0))
    with pytest.raises(DataError, match=r"a_data\.npy and b\.tfrecord"):
        open_folder(tmp_path / "train")
    (tmp_path / "train" / "b.tfrecord").unlink()
    (tmp_path / "train" / "a_label.npy").unlink()
    with pytest.raises(DataError, match="no label file"):
        open_folder(tmp_path / "train")


@pytest.mark.parametrize("name", ["a\udcff", "a\nb"])
def test_names_that_lists_cannot_hold_are_refused(name: str, tmp_path: Path) -> None:
    FORMATS["tfrecord"].write(tmp_path, name, tiny_sample(0))
    with pytest.raises(DataError, match="give it a name that lists can hold") as raised:
        open_folder(tmp_path)
    assert str(raised.value).isprintable()


def test_a_folder_with_splits_and_samples_is_refused(tmp_path: Path) -> None:
    root = write_tiny(tmp_path / "data", train=1, validation=1)
    assert split_dirs(root) == ["train", "validation"]
    assert split_dirs(root / "train") == ["."]
    (root / "test").symlink_to(root / "validation")
    assert split_dirs(root) == ["train", "validation", "test"]
    (root / "test").unlink()
    write_tiny(tmp_path / "more", train=1, validation=1, format_name="tfrecord")
    (sample,) = (tmp_path / "more" / "train").glob("*.tfrecord")
    sample.rename(root / "x.tfrecord")
    with pytest.raises(DataError, match=r"holds x.tfrecord beside train and validation") as raised:
        split_dirs(root)
    assert raised.value.path == str(root)


def test_temporary_files_are_not_samples(tmp_path: Path) -> None:
    root = write_tiny(tmp_path / "data", train=2, validation=1)
    (root / "train" / ".universe_0009_000_data.npy.77.tmp").write_bytes(b"half")
    assert len(open_folder(root / "train")) == 2


def test_two_kinds_of_tfrecord_in_one_folder_are_refused(tmp_path: Path) -> None:
    for first, second in (("tfrecord", "tfrecord_gzip"), ("tfrecord_gzip", "tfrecord")):
        root = write_tiny(tmp_path / first, train=1, validation=1, format_name=first)
        FORMATS[second].write(root / "train", "z", tiny_sample(1))
        split = open_folder(root / "train")
        with pytest.raises(DataError, match="use one folder for each kind") as raised:
            split.read(1)
        assert raised.value.path == str(root / "train" / "z.tfrecord")


def test_a_file_of_no_known_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no known format"):
        read_sample(tmp_path / "a.hdf5")


def test_numbers_out_of_range_in_a_manifest_are_refused(tmp_path: Path) -> None:
    index, shard = FORMATS["packed"].write(tmp_path, "a", tiny_sample(1))
    for number in (-1, 10**30):
        moved = tuple(member._replace(offset=number) for member in shard.members)
        for wrong in (shard._replace(bytes=number), shard._replace(members=moved)):
            Manifest("packed", SampleSpec(16), (Entry.from_written("a", (index, wrong)),)).save(tmp_path)
            with pytest.raises(DataError, match="the line after 0 samples is not valid") as raised:
                open_folder(tmp_path)
            assert raised.value.path == str(tmp_path / MANIFEST)


def test_a_manifest_of_another_version_is_refused(tmp_path: Path) -> None:
    written = FORMATS["npy"].write(tmp_path, "a", tiny_sample(1))
    Manifest("npy", SampleSpec(16), (Entry.from_written("a", written),)).save(tmp_path)
    path = tmp_path / MANIFEST
    path.write_text(path.read_text().replace('"manifest": 2', '"manifest": 1'))
    with pytest.raises(DataError, match="has version 1, not 2") as raised:
        open_folder(tmp_path)
    assert raised.value.path == str(path)


def bytes_read() -> int:
    """Return the bytes that this thread has read so far, by the kernel's count."""
    return int(Path("/proc/thread-self/io").read_text().split()[1])


@pytest.mark.parametrize("format_name", ["npy", "packed"])
def test_little_more_than_a_slab_is_read(format_name: str, tmp_path: Path) -> None:
    sample, size = tiny_sample(1, 64), 64
    if format_name == "npy":
        FORMATS["npy"].write(tmp_path, "a", sample)
    else:
        # A chunk is as much of a sample as those of 128^3 are.
        write_shard(tmp_path / "a.tar", [("a.packed", encode(sample, chunk_voxels=2 * size**2))])
    dataset = open_folder(tmp_path)
    for slab in slabs(2, 4):
        start = bytes_read()
        of_the_count = bytes_read() - start
        start = bytes_read()
        payload = dataset.payload(0, slab=slab)
        found = bytes_read() - start - of_the_count
        if isinstance(payload, PackedSample):
            apart = payload.header.chunks_start
            whole = int(dataset.member_extents[0]["bytes"]) - apart
            np.testing.assert_array_equal(payload.decode(), slab_of(sample.counts, slab))
        else:
            apart, whole = 2 * 128 + 4 * 4, dataset.spec.bytes
            np.testing.assert_array_equal(payload.counts, slab_of(sample.counts, slab))
        assert 1 / slab.count < (found - apart) / whole < 1 / slab.count + 2 / size + 0.05
