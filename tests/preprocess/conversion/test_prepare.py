"""Preparation of HDF5 universes: every voxel in one sample, no universe in both splits."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import program

from pipelines.dataset.open import open_folder
from pipelines.errors import AccessError, DataError, UnreadableError
from preprocess.conversion.hdf5_task import crops, universe_shape
from preprocess.prepare import find_universes, main, split_universes
from preprocess.verify import main as verify

pytestmark = pytest.mark.usefixtures("inline_workers")

EDGE, SIZE = 8, 4


def write_universe(path: Path, seed: int, **changes: object) -> None:
    """Write a universe of 8^3 in the published layout; `changes` replace its data sets."""
    rng = np.random.default_rng(seed)
    parts: dict[str, object] = {
        "full": rng.poisson(1.0, (EDGE, EDGE, EDGE, 4)).astype(np.int16),
        "unitPar": rng.uniform(-1, 1, 4),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in (parts | changes).items():
            if value is not None:
                file[name] = value


@pytest.fixture
def universes(tmp_path: Path) -> Path:
    """Return a folder with nine universes in three folders, as they are published."""
    for index in range(9):
        write_universe(tmp_path / "in" / f"2169{index % 3}" / f"univ_ics_{index}.hdf5", index)
    return tmp_path / "in"


def test_names_crops_and_splits(universes: Path, tmp_path: Path) -> None:
    assert main(["-i", str(universes), "-o", str(tmp_path / "out"), "--sample-size", "4", "--gzip"]) == 0
    splits = {name: open_folder(tmp_path / "out" / name) for name in ("train", "validation")}
    assert {name: len(split) for name, split in splits.items()} == {"train": 64, "validation": 8}
    seen: dict[str, np.ndarray] = {}
    for split in splits.values():
        assert split.format_name == "tfrecord_gzip" and split.spec.shape == (4, 4, 4, 4)
        for index in range(len(split)):
            universe, _, crop = split.sample_id(index).rpartition("_")
            i, j, k = np.unravel_index(int(crop), (2, 2, 2))
            whole = seen.setdefault(universe, np.full((EDGE, EDGE, EDGE, 4), -1, np.int16))
            part = whole[4 * i : 4 * i + 4, 4 * j : 4 * j + 4, 4 * k : 4 * k + 4]
            assert (part == -1).all()
            part[...] = split.read(index).counts
    # As the reference names them: the folder, then the file.
    assert set(seen) == {f"2169{index % 3}_univ_ics_{index}" for index in range(9)}
    for path in universes.rglob("*.hdf5"):
        with h5py.File(path) as file:
            np.testing.assert_array_equal(seen[f"{path.parent.name}_{path.stem}"], file["full"][:])
    train, validation = ({split.sample_id(i)[:-4] for i in range(len(split))} for split in splits.values())
    assert not train & validation
    assert verify([str(tmp_path / "out")]) == 0


def test_universes_behind_links_are_cut_once_each(
    universes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = set(find_universes(universes))
    # Another file system, and a universe alone.
    (universes / "21691").rename(tmp_path / "moved")
    (universes / "21691").symlink_to(tmp_path / "moved")
    write_universe(tmp_path / "single.hdf5", 9)
    (universes / "21692" / "one.hdf5").symlink_to(tmp_path / "single.hdf5")
    # The same again, and a loop.
    (universes / "again").symlink_to(universes / "21690")
    (universes / "copy.hdf5").symlink_to(universes / "21690" / "univ_ics_0.hdf5")
    (universes / "21690" / "up").symlink_to("..")
    for index in range(3):
        (universes / "21690" / f"._univ_ics_{index}.hdf5").write_bytes(b"\0\5\x16\7")
    assert set(find_universes(universes)) == names | {"21692_one"}
    assert len(caplog.records) == 3
    (universes / "lost").symlink_to("/nowhere/lost")
    with pytest.raises(UnreadableError) as raised:
        find_universes(universes)
    assert raised.value.path == str(universes / "lost")


def test_universes_of_one_name_can_be_told_apart_by_their_links(tmp_path: Path) -> None:
    for number in (1, 2):
        write_universe(tmp_path / str(number) / "same" / "u.hdf5", number)
    (tmp_path / "in").mkdir()
    for number in (1, 2):
        (tmp_path / "in" / f"link{number}").symlink_to(tmp_path / str(number) / "same")
    assert list(find_universes(tmp_path / "in")) == ["link1_u", "link2_u"]


def test_crops_equal_those_of_numpy_split(tmp_path: Path) -> None:
    # The reference cuts with three nested numpy.split.
    write_universe(tmp_path / "u.hdf5", 3)
    with h5py.File(tmp_path / "u.hdf5") as file:
        whole, target = file["full"][:], file["unitPar"][:]
    expected = [c for a in np.split(whole, 2, 0) for b in np.split(a, 2, 1) for c in np.split(b, 2, 2)]
    found = list(crops(tmp_path / "u.hdf5", whole.shape, SIZE))
    assert len(found) == len(expected) == 8
    for sample, crop in zip(found, expected, strict=True):
        np.testing.assert_array_equal(sample.counts, crop)
        np.testing.assert_array_equal(sample.target, target.astype(np.float32))


@pytest.mark.parametrize("size", [SIZE, EDGE])
def test_packed_samples_of_a_universe_are_one_shard(universes: Path, tmp_path: Path, size: int) -> None:
    arguments = ["-i", str(universes), "--sample-size", str(size)]
    for form in ("npy", "packed"):
        assert main([*arguments, "-o", str(tmp_path / form), "--to", form]) == 0
        assert verify([str(tmp_path / form)]) == 0
    for split in ("train", "validation"):
        npy, packed = (open_folder(tmp_path / form / split) for form in ("npy", "packed"))
        assert len(npy) == len(packed) == {"train": 8, "validation": 1}[split] * (EDGE // size) ** 3
        for index in range(len(npy)):
            assert packed.sample_id(index) == npy.sample_id(index)
            np.testing.assert_array_equal(packed.read(index).counts, npy.read(index).counts)
    shards = sorted(path.stem for path in (tmp_path / "packed").rglob("*.tar"))
    assert shards == sorted(find_universes(universes))
    # A rerun keeps them, and another size of samples is refused.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "packed").rglob("*.tar")}
    assert main([*arguments, "-o", str(tmp_path / "packed"), "--to", "packed"]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    arguments[-1] = "2"
    with pytest.raises(SystemExit):
        main([*arguments, "-o", str(tmp_path / "packed"), "--to", "packed"])


@pytest.mark.parametrize("chunks", [None, (1, 8, 8, 4), (3, 2, 8, 4), (8, 8, 8, 1)])
def test_universes_are_read_by_planes_however_they_are_stored(
    chunks: tuple[int, ...] | None, tmp_path: Path
) -> None:
    path, whole = tmp_path / "u.hdf5", np.arange(EDGE**3 * 4).reshape(EDGE, EDGE, EDGE, 4)
    for dtype in (np.int16, np.uint16, np.int64):
        with h5py.File(path, "w") as file:
            file.create_dataset("full", data=whole.astype(dtype), chunks=chunks)
            file["unitPar"] = np.zeros(4)
        for size in (SIZE, EDGE):
            first, *_ = found = [sample.counts for sample in crops(path, whole.shape, size)]
            assert len(found) == (EDGE // size) ** 3 and first.dtype == np.int16
            np.testing.assert_array_equal(first, whole[:size, :size, :size])
            np.testing.assert_array_equal(found[-1], whole[-size:, -size:, -size:])
    # A count that int16 cannot hold is in the last plane.
    whole[-1, -1, -1, -1] = 1 << 15
    with h5py.File(path, "w") as file:
        file.create_dataset("full", data=whole, chunks=chunks)
        file["unitPar"] = np.zeros(4)
    with pytest.raises(DataError) as raised:
        list(crops(path, whole.shape, EDGE))
    assert raised.value.path == str(path)


def test_gzip_and_another_format_are_refused(universes: Path, tmp_path: Path) -> None:
    arguments = ["-i", str(universes), "-o", str(tmp_path / "out"), "--sample-size", "8", "--gzip", "--to"]
    with pytest.raises(SystemExit) as end:
        main([*arguments, "npy"])
    assert end.value.code == 1 and not (tmp_path / "out").exists()
    assert main([*arguments, "tfrecord_gzip"]) == 0


def test_rerun_and_number_of_ranks_change_nothing(universes: Path, tmp_path: Path) -> None:
    def content(root: Path) -> dict[str, str]:
        files = (path for path in sorted(root.rglob("*")) if path.is_file())
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    arguments = ["-i", str(universes), "--sample-size", "4"]
    assert main([*arguments, "-o", str(tmp_path / "one")]) == 0
    once = content(tmp_path / "one")
    (tmp_path / "one" / "train" / "21690_univ_ics_0_003.tfrecord").unlink(missing_ok=True)
    assert main([*arguments, "-o", str(tmp_path / "one")]) == 0
    assert content(tmp_path / "one") == once
    done = program("preprocess.prepare", *arguments, "-o", tmp_path / "two", ranks=2)
    assert done.code == 0, done.err
    assert content(tmp_path / "two") == once


def test_universe_that_would_change_its_split_is_refused_before_anything_changes(
    universes: Path, tmp_path: Path
) -> None:
    arguments = ["-i", universes, "-o", tmp_path / "out", "--sample-size", "4"]
    assert program("preprocess.prepare", *arguments).code == 0
    names = [f"2169{index % 3}_univ_ics_{index}" for index in range(9)]
    _, before = split_universes(names, 1 / 9, seed=0)
    added = next(
        index
        for index in range(9, 99)
        if split_universes([*names, f"21690_univ_ics_{index}"], 1 / 9, 0)[1] != before
    )
    write_universe(universes / "21690" / f"univ_ics_{added}.hdf5", added)
    done = program("preprocess.prepare", *arguments)
    assert done.code == 1 and f"{tmp_path}/out/validation: is of a source with {before[0]}_000" in done.err
    assert {name: len(open_folder(tmp_path / "out" / name)) for name in ("train", "validation")} == {
        "train": 64,
        "validation": 8,
    }


def test_split_depends_on_names_and_seed_alone() -> None:
    names = [f"u_{index}" for index in range(90)]
    train, validation = split_universes(names, 1 / 9, seed=0)
    assert len(validation) == 10 and not set(train) & set(validation)
    again = split_universes(names[::-1], 1 / 9, seed=0)
    assert set(again[1]) == set(validation)
    assert set(split_universes(names, 1 / 9, seed=1)[1]) != set(validation)


def write_times(path: Path) -> None:
    """Write a universe whose counts are of a type of HDF5 that NumPy does not have."""
    write_universe(path, 1, full=None)
    with h5py.File(path, "a") as file:
        space = h5py.h5s.create_simple((EDGE, EDGE, EDGE, 4))
        h5py.h5d.create(file.id, b"full", h5py.h5t.UNIX_D32LE, space)


def compress(path: Path, name: str, shape: tuple[int, ...], code: int) -> None:
    """Write a universe whose data set `name` is compressed with a filter that HDF5 itself has not."""
    write_universe(path, 1, **{name: None})
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk(shape)
    settings.set_filter(code, h5py.h5z.FLAG_OPTIONAL, ())
    with h5py.File(path, "a") as file:
        made = h5py.h5d.create(
            file.id, name.encode(), h5py.h5t.STD_I16LE, h5py.h5s.create_simple(shape), settings
        )
        made.write_direct_chunk((0,) * len(shape), b"compressed", 0)


def lose(path: Path) -> None:
    """Replace a universe by a link to nothing."""
    path.unlink()
    path.symlink_to("nowhere")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    # Numbers of https://github.com/HDFGroup/hdf5_plugins: blosc and zstd.
    "blosc": (
        lambda path: compress(path, "full", (EDGE, EDGE, EDGE, 4), 32001),
        "full is compressed with the HDF5 filter 32001; set HDF5_PLUGIN_PATH",
    ),
    "zstd": (lambda path: compress(path, "unitPar", (4,), 32015), "with the HDF5 filter 32015; set"),
    "no counts": (lambda path: write_universe(path, 1, full=None), "has no data set full"),
    "no target": (lambda path: write_universe(path, 1, unitPar=None), "has no data set unitPar"),
    "floats": (lambda path: write_universe(path, 1, full=np.ones((8, 8, 8, 4))), "full is float64"),
    "no cube": (
        lambda path: write_universe(path, 1, full=np.ones((8, 8, 4, 4), np.int16)),
        "full has shape (8, 8, 4, 4)",
    ),
    "gone": (lose, "cannot be read (No such file"),
    "too many": (
        lambda path: write_universe(path, 1, full=np.full((8, 8, 8, 4), 40000)),
        "counts run from 40000 to 40000",
    ),
    "below zero": (
        lambda path: write_universe(path, 1, full=np.full((8, 8, 8, 4), -1)),
        "counts run from -1 to -1",
    ),
    "another shape": (
        lambda path: write_universe(path, 1, full=np.ones((4, 4, 4, 4), np.int16)),
        "full has shape (4, 4, 4, 4)",
    ),
    "a target that is none": (
        lambda path: write_universe(path, 1, unitPar=np.full(4, np.nan)),
        "the target is [nan",
    ),
    "three parameters": (lambda path: write_universe(path, 1, unitPar=np.zeros(3)), "of shape (3,)"),
    "no HDF5": (lambda path: path.write_bytes(b"no"), "cannot be read as HDF5"),
    "times": (write_times, "cannot be read as HDF5 (No NumPy equivalent"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:700]), "cannot be read as HDF5"),
}


def test_bad_universe_does_not_stop_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # The first universe gives the shape, if it is sound by itself.
    everywhere = [(kind, 1) for kind in BAD] + [(kind, 0) for kind in BAD if kind != "another shape"]
    for kind, number in everywhere:
        folder = tmp_path / f"{kind} {number}"
        for index in range(3):
            write_universe(folder / "in" / "u" / f"v{index}.hdf5", index)
        bad = folder / "in" / "u" / f"v{number}.hdf5"
        damage, fault = BAD[kind]
        damage(bad)
        line = ["-i", str(folder / "in"), "-o", str(folder / "out"), "--validation", "0.4"]
        line += ["--sample-size", "8"]
        assert main(line) == 1
        lines = [line for line in capsys.readouterr().err.splitlines() if str(bad) in line]
        assert len(lines) == 1 and lines[0].startswith("error: ") and fault in lines[0]
        assert len(list((folder / "out").rglob("*.tfrecord"))) == 2
        bad.unlink()
        write_universe(bad, number)
        assert main(line) == 0


def test_first_universe_is_named_if_none_is_sound(universes: Path, tmp_path: Path) -> None:
    for path in universes.rglob("*.hdf5"):
        path.write_bytes(b"no")
    done = program("preprocess.prepare", "-i", universes, "-o", tmp_path / "out", "--sample-size", "4")
    assert done.code == 1 and done.err.startswith(f"error: {universes}/21690/univ_ics_0.hdf5: cannot be read")


def test_invalid_arguments_are_one_line(universes: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (["-i", universes, "--sample-size", "3"], "--sample-size = 3: does not divide"),
        (["-i", universes, "--sample-size", "4", "--validation", "1.5"], "--validation = 1.5"),
        (["-i", tmp_path / "none"], "cannot be read (No such file"),
        (["-i", universes.parent / "out"], "cannot be read"),
    ):
        done = program("preprocess.prepare", *arguments, "-o", tmp_path / "out")
        assert done.code == 1
        assert said in done.err and "Traceback" not in done.err
    write_universe(tmp_path / "in" / "more" / "21690" / "univ_ics_0.hdf5", 1)
    with pytest.raises(DataError) as error:
        find_universes(universes)
    assert "same names" in error.value.fault


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, 524])
def test_universes_are_read_where_files_cannot_be_locked(
    number: int, universes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # HDF5 locks in C, where no test reaches; h5py raises this error.
    opened, theirs = [], h5py.File

    def refuse_locks(path: Path, mode: str, locking: bool | None = None) -> h5py.File:
        opened.append(locking)
        if locking is not False:
            raise OSError(
                number, f"Unable to synchronously open file (unable to lock file, errno = {number})"
            )
        return theirs(path, mode, locking=locking)

    monkeypatch.setattr(h5py, "File", refuse_locks)
    # HDF5 would not let `locking` overrule this variable.
    for value in ("TRUE", "BEST_EFFORT"):
        monkeypatch.setenv("HDF5_USE_FILE_LOCKING", value)
        with pytest.raises(AccessError) as raised:
            universe_shape(next(universes.rglob("*.hdf5")))
        assert raised.value.remedy == "set HDF5_USE_FILE_LOCKING to FALSE" and False not in opened
    monkeypatch.delenv("HDF5_USE_FILE_LOCKING")
    assert main(["-i", str(universes), "-o", str(tmp_path / "out"), "--sample-size", "4"]) == 0
    assert len(open_folder(tmp_path / "out" / "train")) == 64 and False in opened


def test_a_universe_that_is_being_written_is_refused(universes: Path) -> None:
    path = next(universes.rglob("*.hdf5"))
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UnreadableError) as raised:
            universe_shape(path)
    assert raised.value.path == str(path) and raised.value.remedy == "wait for the program that uses it"


def test_a_universe_that_is_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "u.hdf5")
    with pytest.raises(DataError) as raised:
        universe_shape(tmp_path / "u.hdf5")
    assert raised.value.fault == "is a FIFO, not a file"
