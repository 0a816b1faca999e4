"""Target folders that exist already: resumed by the same job, refused by any other, and never emptied."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import tiny_sample, write_tiny

from pipelines.dataset.manifest import MANIFEST, Entry
from pipelines.dataset.open import open_folder
from pipelines.distributed.session import RankError, Session
from pipelines.distributed.world import World
from pipelines.errors import AccessError, DataError
from pipelines.formats.registry import FORMATS
from pipelines.sample import SampleSpec
from preprocess.conversion.engine import ConversionReport, run_conversion
from preprocess.conversion.journal import Journal
from preprocess.convert import plan_conversion
from preprocess.prepare import main as prepare
from preprocess.verify import main as verify

pytestmark = pytest.mark.usefixtures("inline_workers")


def convert(source: Path, target: Path, to: str, samples_per_shard: int = 2) -> ConversionReport:
    """Convert the samples in `source` to the format `to` in `target`, in this process alone."""
    plan = plan_conversion(source, target, to, samples_per_shard=samples_per_shard)
    return run_conversion(plan, session=Session(World()), workers=1, unit="sample")


def refuse(source: Path, target: Path, to: str, samples_per_shard: int = 2) -> DataError:
    """Return the error of a conversion that is refused and leaves `target` as it was."""
    before = content(target)
    with pytest.raises(DataError) as error:
        convert(source, target, to, samples_per_shard)
    assert content(target) == before
    return error.value


def content(folder: Path) -> dict[str, bytes]:
    """Return the files in `folder`."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tiny(tmp_path: Path, train: int = 4) -> Path:
    """Return a folder of `train` npy samples."""
    return write_tiny(tmp_path / "data", train=train, validation=1) / "train"


def sample_id(index: int) -> str:
    return f"universe_{index:04d}_000"


def remove_sample(source: Path, index: int) -> dict[Path, bytes]:
    """Remove the files of sample `index`; return them."""
    files = {path: path.read_bytes() for path in source.glob(f"{sample_id(index)}*")}
    for path in files:
        path.unlink()
    return files


def restore(files: dict[Path, bytes]) -> None:
    for path, data in files.items():
        path.write_bytes(data)


def write_older(folder: Path, index: int, other: int) -> None:
    """Replace sample `index` in `folder` by another one whose files have the same lengths and are older."""
    times = {path: os.stat(path).st_mtime_ns for path in folder.glob(f"{sample_id(index)}*")}
    FORMATS["npy"].write(folder, sample_id(index), tiny_sample(other))
    for path, time in times.items():
        os.utime(path, ns=(0, time - 10**9))


class Killed(BaseException):
    """An error that nothing catches."""


@contextlib.contextmanager
def killed_before_recording(name: str) -> Iterator[None]:
    """Kill the body when the entry `name` is complete and not yet recorded."""
    add = Journal.add

    def killed(self: Journal, entries: Any) -> None:
        entries = list(entries)
        if any(entry.name == name and entry.files for entry in entries):
            raise Killed
        add(self, entries)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Journal, "add", killed)
        yield


def finish(source: Path, target: Path, to: str) -> None:
    convert(source, target, to)


def kill(source: Path, target: Path, to: str) -> None:
    """Leave `target` as a killed run does, with its second entry not recorded."""
    with killed_before_recording("shard_000001" if to == "packed" else sample_id(1)):
        convert(source, target, to)


both_states = pytest.mark.parametrize("state", [finish, kill])
State = Callable[[Path, Path, str], None]


@both_states
def test_other_format_is_refused(state: State, tmp_path: Path) -> None:
    data = tiny(tmp_path)
    for first, second in (("tfrecord_gzip", "tfrecord"), ("tfrecord", "npy"), ("npy", "packed")):
        target = tmp_path / first
        state(data, target, first)
        error = refuse(data, target, second)
        assert error.path == str(target) and first in error.fault and second in error.fault


@both_states
def test_other_shape_is_refused(state: State, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    state(data, target, "npy")
    other = write_tiny(tmp_path / "other", train=4, validation=1, size=8) / "train"
    error = refuse(other, target, "npy")
    assert "(16, 16, 16, 4)" in error.fault and "(8, 8, 8, 4)" in error.fault


@both_states
def test_other_shards_are_refused(state: State, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    state(data, target, "packed")
    for samples_per_shard in (1, 3, 4):
        assert "shards of 2 samples" in refuse(data, target, "packed", samples_per_shard).fault
    # A single shard in a manifest does not tell how many samples it might have had.
    (whole := tmp_path / "whole").mkdir()
    convert(data, whole, "packed", 4)
    refuse(data, whole, "packed", 3)


@both_states
def test_other_source_is_refused(state: State, tmp_path: Path) -> None:
    data = tiny(tmp_path)
    for to in ("tfrecord", "packed"):
        target = tmp_path / to
        state(data, target, to)
        # The names of shards are the same in every packed set.
        assert sample_id(0) in refuse(tmp_path / "data" / "validation", target, to).fault


@both_states
def test_source_that_lost_samples_is_refused(state: State, tmp_path: Path) -> None:
    data = tiny(tmp_path)
    for to, index in itertools.product(("npy", "packed"), (0, 3)):
        target = tmp_path / f"{to}{index}"
        state(data, target, to)
        lost = remove_sample(data, index)
        error = refuse(data, target, to)
        # Also sample 3 of the killed run, which had not come to it.
        assert sample_id(index) in error.fault and "new folder" in error.remedy
        restore(lost)
        convert(data, target, to)
        assert len(open_folder(target)) == 4 and (target / MANIFEST).exists()


@both_states
def test_source_that_grew_is_converted(state: State, tmp_path: Path) -> None:
    data = tiny(tmp_path, train=5)
    for to, index in itertools.product(("npy", "packed"), (0, 4)):
        target, fresh = tmp_path / f"{to}{index}", tmp_path / f"fresh_{to}{index}"
        late = remove_sample(data, index)
        state(data, target, to)
        restore(late)
        convert(data, target, to)
        convert(data, fresh, to)
        assert content(target) == content(fresh)


def test_replaced_source_is_converted_again(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    for to, written in (("tfrecord", 1), ("packed", 2)):
        target = tmp_path / to
        assert convert(data, target, to) == ConversionReport(written=4)
        write_older(data, 1, 77)
        assert convert(data, target, to) == ConversionReport(written, 4 - written)
        np.testing.assert_array_equal(open_folder(target).read(1).counts, tiny_sample(77).counts)
        # A label alone, of the same length and older.
        label = data / f"{sample_id(2)}_label.npy"
        changed = os.stat(label).st_mtime_ns - 10**9
        np.save(label, tiny_sample(88).target)
        os.utime(label, ns=(0, changed))
        assert convert(data, target, to) == ConversionReport(written, 4 - written)
        assert open_folder(target).read(2).target.tolist() == tiny_sample(88).target.tolist()
        write_older(data, 1, 1)
        write_older(data, 2, 2)


def test_other_order_makes_other_shards(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    convert(data, tmp_path / "out", "packed")
    order = [sample_id(index) for index in (1, 0, 3, 2)]
    (data / "files_data.lst").write_text("".join(f"{name}_data.npy\n" for name in order))
    assert convert(data, tmp_path / "out", "packed") == ConversionReport(written=4)
    # From shards to shards too, whose files are the same ones.
    convert(tmp_path / "out", tmp_path / "again", "packed", 4)
    dataset = open_folder(tmp_path / "again")
    assert [dataset.sample_id(index) for index in range(4)] == order


def test_record_does_not_outlive_its_file(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    (data / "files_data.lst").write_text("".join(f"{sample_id(index)}_data.npy\n" for index in range(4)))
    shutil.copytree(data, tmp_path / "earlier")
    for to in ("npy", "packed"):
        target = tmp_path / to
        convert(data, target, to)
        before = content(target)
        write_older(data, 1, 77)
        order = (f"{sample_id(index)}_data.npy\n" for index in (1, 0, 3, 2))
        (data / "files_data.lst").write_text("".join(order))
        kill(data, target, to)
        assert content(target) != before
        # The source as it was, with its times: no record says what the killed run wrote.
        shutil.rmtree(data)
        shutil.copytree(tmp_path / "earlier", data)
        report = convert(data, target, to)
        assert report.written >= 1 and report.written + report.up_to_date == 4
        assert content(target) == before


def test_files_without_records_are_refused(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    for to in ("tfrecord", "packed"):
        target = tmp_path / to
        convert(data, target, to)
        before = content(target)
        (target / MANIFEST).unlink()
        assert "no manifest or journal" in refuse(data, target, to).fault
        # With a manifest that no conversion wrote, the files count as made from an unknown source.
        (target / "files_data.lst").unlink()
        assert verify([str(target), "--write", "--workers", "1"]) == 0
        assert convert(data, target, to) == ConversionReport(written=4)
        assert content(target) == before


def test_remedy_for_a_damaged_manifest_works(tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    convert(data, target, "npy")
    before = content(target)
    (target / MANIFEST).write_text("{")
    assert "preprocess.verify --write" in refuse(data, target, "npy").remedy
    (target / MANIFEST).unlink()
    assert verify([str(target), "--write", "--workers", "1"]) == 0
    convert(data, target, "npy")
    assert content(target) == before


def test_files_of_a_killed_run_that_lost_its_last_records_are_converted_again(tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    kill(data, target, "npy")
    (target / ".journal.npy.1.jsonl").unlink()  # As after a power failure.
    assert convert(data, target, "npy") == ConversionReport(written=4)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    names = (".thesis.tex.77.tmp", "thesis.tex", "other_000_data.npy")
    for state, name in itertools.product((None, finish, kill), names):
        target = tmp_path / f"{state and state.__name__}{name}"
        target.mkdir()
        if state:
            state(data, target, "npy")
        (target / name).write_text("mine")
        before = content(target)
        with pytest.raises(DataError) as error:
            convert(data, target, "npy")
        assert name in error.value.fault and content(target).items() >= before.items()


def test_damaged_source_keeps_earlier_files_and_takes_the_manifest(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    bad = data / f"{sample_id(1)}_data.npy"
    for to, written in (("tfrecord", 1), ("packed", 2)):
        target = tmp_path / to
        convert(data, target, to)
        before = content(target)
        sound = bad.read_bytes()
        bad.write_bytes(sound[:-1])
        report = convert(data, target, to)
        assert len(report.faults) == 1 and report.written == 0 and report.up_to_date == 4 - written
        left = content(target)
        assert MANIFEST not in left
        assert all(left[name] == before[name] for name in before if name.startswith(("univ", "shard")))
        bad.write_bytes(sound)
        assert convert(data, target, to) == ConversionReport(written, 4 - written)
        assert {name: data for name, data in content(target).items() if name != MANIFEST} == {
            name: data for name, data in before.items() if name != MANIFEST
        }


def test_unreadable_source_keeps_earlier_files(tmp_path: Path) -> None:
    data = tiny(tmp_path, train=5)
    (data / "files_data.lst").write_text("".join(f"{sample_id(index)}_data.npy\n" for index in range(5)))
    label = data / f"{sample_id(1)}_label.npy"
    for to in ("tfrecord", "packed"):
        target = tmp_path / to
        convert(data, target, to)
        before = content(target)
        label.rename(tmp_path / "label")
        label.symlink_to("/proc/self/mem")
        report = convert(data, target, to)
        assert len(report.faults) == 1 and report.written == 0
        left = content(target)
        assert MANIFEST not in left
        assert all(left[name] == before[name] for name in before if name.startswith(("univ", "shard")))
        label.unlink()
        (tmp_path / "label").rename(label)
        assert convert(data, target, to) == ConversionReport(up_to_date=5)
        assert content(target) == before


def test_shard_of_other_samples_stays_while_its_successor_cannot_be_made(tmp_path: Path) -> None:
    data, target = tiny(tmp_path, train=5), tmp_path / "out"
    late = remove_sample(data, 0)
    convert(data, target, "packed")
    before = content(target)
    restore(late)
    label = data / f"{sample_id(3)}_label.npy"
    label.rename(tmp_path / "label")
    label.symlink_to("/proc/self/mem")
    report = convert(data, target, "packed")
    assert len(report.faults) == 1 and report.up_to_date == 0
    # Samples 3 and 4, of which 3 cannot be made again.
    assert content(target)["shard_000001.tar"] == before["shard_000001.tar"]
    label.unlink()
    (tmp_path / "label").rename(label)
    convert(data, target, "packed")
    convert(data, tmp_path / "fresh", "packed")
    assert content(target) == content(tmp_path / "fresh")


def test_killed_run_whose_source_is_then_damaged(tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    kill(data, target, "tfrecord")
    bad = data / f"{sample_id(1)}_data.npy"
    sound = bad.read_bytes()
    bad.write_bytes(sound[:-1])
    assert len(convert(data, target, "tfrecord").faults) == 1
    assert not (target / MANIFEST).exists()
    bad.write_bytes(sound)
    convert(data, target, "tfrecord")
    convert(data, tmp_path / "fresh", "tfrecord")
    assert {k: v for k, v in content(target).items() if k != MANIFEST} == {
        k: v for k, v in content(tmp_path / "fresh").items() if k != MANIFEST
    }


def test_universe_that_is_damaged_in_its_middle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    for index in range(9):
        path = tmp_path / "in" / "u" / f"v{index}.hdf5"
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            file["full"] = rng.integers(0, 9, (8, 8, 8, 4), dtype=np.int16)
            file["unitPar"] = np.zeros(4)
    line = ["-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--sample-size", "4", "--workers", "1"]
    assert prepare(line) == 0
    train = tmp_path / "out" / "train"
    name = min(path.name[:4] for path in train.glob("u_v*.tfrecord"))
    universe = tmp_path / "in" / "u" / f"{name[2:]}.hdf5"
    with h5py.File(universe, "r+") as file:
        counts = file["full"][:]
        file["full"][7, 7, 7, 3] = -1  # Its first crops are sound, the last is not.
    assert prepare(line) == 1 and not (train / MANIFEST).exists()
    universe.rename(tmp_path / "away")
    with pytest.raises(SystemExit):
        prepare(line)
    assert f"{name}_000" in capsys.readouterr().err
    (tmp_path / "away").rename(universe)
    with h5py.File(universe, "r+") as file:
        file["full"][...] = counts
    assert prepare(line) == 0 and len(open_folder(train)) == 64
    # Another size of samples is another job, though the names begin alike.
    line[line.index("4")] = "8"
    with pytest.raises(SystemExit):
        prepare(line)
    assert len(open_folder(train)) == 64


def test_journal_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / ".journal.npy.1.jsonl"
    path.symlink_to("/dev/full")
    with pytest.raises(AccessError) as error, Journal(tmp_path, "npy", SampleSpec(16), 0) as journal:
        journal.add([Entry("a", ())])
    assert error.value.path == str(path)


def test_journal_error_is_reported_by_its_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Journal, entries: object) -> None:
        raise AccessError(tmp_path, "cannot be written", "free some space")

    monkeypatch.setattr(Journal, "add", fail)
    with pytest.raises(RankError) as error:
        convert(tiny(tmp_path), tmp_path / "npy", "npy")
    assert isinstance(error.value.error, AccessError)


def test_two_samples_of_one_name_are_refused(tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "packed"
    convert(data, target, "packed", 4)
    (target / MANIFEST).unlink()
    (target / "files_data.lst").unlink()
    shutil.copy(target / "shard_000000.tar", target / "shard_000001.tar")
    with pytest.raises(DataError) as error:
        open_folder(target)
    assert "shard_000001.tar" in error.value.path and "shard_000000.tar" in error.value.fault
