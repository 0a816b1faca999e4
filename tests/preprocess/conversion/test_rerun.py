"""A target folder that was there before: what of it is kept, made again, removed, or left alone."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from helpers import tiny_sample, write_tiny

from pipelines.dataset.manifest import MANIFEST, Entry, Manifest
from pipelines.dataset.open import open_folder
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.errors import AccessError, DataError
from pipelines.formats.registry import FORMATS
from pipelines.sample import SampleSpec
from preprocess.conversion.engine import Produced, produce
from preprocess.conversion.journal import Journal
from preprocess.convert import order_conversion
from preprocess.prepare import main as prepare
from preprocess.verify import main as verify

pytestmark = pytest.mark.usefixtures("here")


def converted(source: Path, target: Path, to: str, a_shard: int = 2, *, prune: bool = False) -> Produced:
    """The samples in `source` as `to` in `target`, by this process alone."""
    order, task = order_conversion(source, target, to, a_shard=a_shard, prune=prune)
    return produce(order, task, session=Session(World()), workers=1, unit="sample")


def content(folder: Path) -> dict[str, bytes]:
    """The files in `folder`."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tiny(tmp_path: Path, format_name: str = "npy", train: int = 4) -> Path:
    return write_tiny(tmp_path / "data", train=train, validation=1, format_name=format_name) / "train"


def stem(index: int) -> str:
    return f"universe_{index:04d}_000"


def write_older(folder: Path, index: int, other: int) -> None:
    """Put another sample in the place of `index` in `folder`, whose files are as long, and older."""
    times = {path: os.stat(path).st_mtime_ns for path in folder.glob(f"{stem(index)}*")}
    FORMATS["npy"].write(folder, stem(index), tiny_sample(other))
    for path, time in times.items():
        os.utime(path, ns=(0, time - 10**9))


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(("first", "second"), [("tfrecord_gzip", "tfrecord"), ("tfrecord", "npy")])
def test_a_folder_of_another_format_is_refused(
    first: str, second: str, finished: bool, tmp_path: Path
) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    converted(data, target, first)
    if not finished:
        entries = Manifest.load(target)
        assert entries is not None
        with Journal(target, first, entries.spec, 0) as journal:
            journal.add(entries.entries[0])
        (target / MANIFEST).unlink()
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(DataError, match=f"holds samples as {first}, not {second}; choose another folder"):
        converted(data, target, second)
    assert {path: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize("to", ["tfrecord", "packed"])
def test_a_source_that_was_replaced_by_an_older_one_is_made_again(to: str, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    assert converted(data, target, to) == Produced(made=4)
    write_older(data, 1, 77)
    made = 2 if to == "packed" else 1
    assert converted(data, target, to) == Produced(made=made, kept=4 - made)
    np.testing.assert_array_equal(open_folder(target).read(1).counts, tiny_sample(77).counts)
    # A label alone, as long as it was and older.
    label = data / f"{stem(2)}_label.npy"
    changed = os.stat(label).st_mtime_ns - 10**9
    np.save(label, tiny_sample(88).target)
    os.utime(label, ns=(0, changed))
    assert converted(data, target, to) == Produced(made=made, kept=4 - made)
    assert open_folder(target).read(2).target.tolist() == tiny_sample(88).target.tolist()


def test_another_order_makes_other_shards(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    converted(data, tmp_path / "out", "packed")
    order = [stem(index) for index in (1, 0, 3, 2)]
    (data / "files_data.lst").write_text("".join(f"{name}_data.npy\n" for name in order))
    assert converted(data, tmp_path / "out", "packed") == Produced(made=4)
    # From shards to shards too, whose files are the same ones.
    converted(tmp_path / "out", tmp_path / "again", "packed", a_shard=4)
    split = open_folder(tmp_path / "again")
    assert [split.sample_id(index) for index in range(4)] == order


def test_what_is_no_longer_wanted_is_removed_and_nothing_else(tmp_path: Path) -> None:
    data, target = tiny(tmp_path, train=5), tmp_path / "out"
    bad = data / f"{stem(4)}_data.npy"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-1])
    assert len(converted(data, target, "packed").faults) == 1
    bad.write_bytes(whole)
    assert converted(data, target, "packed") == Produced(made=1, kept=4)
    # Without two samples there is a shard less, but nothing goes that nobody has asked to go.
    for path in [*data.glob(f"{stem(4)}*"), *data.glob(f"{stem(3)}*")]:
        path.unlink()
    before = content(target)
    with pytest.raises(DataError, match=rf"not in the source, 2 in all, the first {stem(3)}; .* --prune"):
        converted(data, target, "packed")
    assert content(target) == before
    assert converted(data, target, "packed", prune=True) == Produced(made=1, kept=2)
    assert sorted(path.name for path in target.glob("*.tar")) == ["shard_000000.tar", "shard_000001.tar"]
    assert len(open_folder(target)) == 3
    # What nobody vouches for is not ours, and is as it was.
    (target / "shard_000002.tar").write_text("mine")
    with pytest.raises(DataError, match=r"holds shard_000002\.tar, which is no sample"):
        converted(data, target, "packed")
    assert (target / "shard_000002.tar").read_text() == "mine"


@pytest.mark.parametrize("name", [".notes.tmp", ".thesis.tex.77.tmp", ".journal.of.mine"])
def test_hidden_files_of_others_are_left_alone(name: str, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    target.mkdir()
    (target / name).write_text("mine")
    with pytest.raises(DataError, match=f"holds {name}"):
        converted(data, target, "npy")
    assert (target / name).read_text() == "mine"


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("notes", ["manifest", "journal", "none"])
@pytest.mark.parametrize("to", ["tfrecord", "packed"])
def test_a_folder_of_another_source_is_not_emptied(to: str, notes: str, prune: bool, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    converted(data, target, to)
    if notes == "journal":
        entries = Manifest.load(target)
        assert entries is not None
        with Journal(target, to, entries.spec, 0) as journal:
            journal.add(entries.entries[0])
    if notes != "manifest":
        (target / MANIFEST).unlink()
    before = content(target)
    other = tmp_path / "data" / "validation"
    expected = "no sample of this source; choose another folder"
    if notes != "manifest":
        expected = "which is no sample of the source as"
    # The names of shards are the same in every packed set.
    with pytest.raises(DataError, match=expected):
        converted(other, target, to, prune=prune)
    assert content(target) == before
    assert len(open_folder(target)) == 4


@pytest.mark.parametrize("to", ["npy", "packed"])
def test_a_source_that_has_lost_some_takes_nothing_along(to: str, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    converted(data, target, to)
    before = content(target)
    for path in data.glob(f"{stem(1)}*"):
        path.unlink()
    with pytest.raises(DataError, match=rf"not in the source, 1 in all, the first {stem(1)}; bring them"):
        converted(data, target, to)
    assert content(target) == before
    # Of two shards of two, both hold others now.
    done = Produced(made=3) if to == "packed" else Produced(kept=3)
    assert converted(data, target, to, prune=True) == done
    assert len(open_folder(target)) == 3
    assert stem(1) not in [open_folder(target).sample_id(index) for index in range(3)]


@pytest.mark.parametrize("finished", [True, False])
def test_a_source_that_has_grown_at_its_beginning_is_packed_anew(finished: bool, tmp_path: Path) -> None:
    data, target = tiny(tmp_path, train=5), tmp_path / "out"
    first = {path: path.read_bytes() for path in data.glob(f"{stem(0)}*")}
    for path in first:
        path.unlink()
    converted(data, target, "packed")
    if not finished:
        # As a run leaves it that was killed: files are there that no note tells of.
        (target / MANIFEST).unlink()
    for path, whole in first.items():
        path.write_bytes(whole)
    assert converted(data, target, "packed") == Produced(made=5)
    converted(data, tmp_path / "undisturbed", "packed")
    assert content(target) == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("to", ["tfrecord", "packed"])
def test_what_was_made_of_a_source_that_is_out_of_reach_stays(to: str, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    order = [f"{stem(index)}_data.npy\n" for index in range(4)]
    (data / "files_data.lst").write_text("".join(order))
    converted(data, target, to)
    before = content(target)
    away = tmp_path / "away.npy"
    (data / f"{stem(1)}_label.npy").rename(away)
    (data / f"{stem(1)}_label.npy").symlink_to("/proc/self/mem")
    done = converted(data, target, to)
    assert len(done.faults) == 1 and "cannot be read" in done.faults[0] and done.made == 0
    left = content(target)
    assert MANIFEST not in left
    samples = [name for name in before if name.endswith((".tfrecord", ".tar"))]
    assert samples and all(left[name] == before[name] for name in samples)
    (data / f"{stem(1)}_label.npy").unlink()
    away.rename(data / f"{stem(1)}_label.npy")
    assert converted(data, target, to) == Produced(kept=4)
    assert content(target) == before


def test_a_universe_cut_in_part_can_be_taken_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    (name, *_) = {path.name[:4] for path in train.glob("u_v*.tfrecord")}
    universe = tmp_path / "in" / "u" / f"{name[2:]}.hdf5"
    with h5py.File(universe, "r+") as file:
        # Its first crops are sound, its last are not.
        file["full"][7, 7, 7, 3] = -1
    assert prepare(line) == 1
    # One that is damaged leaves nothing behind, so that it can be taken out as the last line says.
    assert not list(train.glob(f"{name}_*")) and not (train / MANIFEST).exists()
    universe.unlink()
    assert prepare(line) == 0
    assert not list(train.glob(f"{name}_*")) and len(open_folder(train)) == 56
    # Another size of samples is another cut, though the names begin alike.
    line[line.index("4")] = "8"
    with pytest.raises(SystemExit):
        prepare(line)
    assert "holds samples of shape (4, 4, 4, 4), not (8, 8, 8, 4)" in capsys.readouterr().err
    assert len(open_folder(train)) == 56


@pytest.mark.parametrize("to", ["tfrecord", "packed"])
def test_nothing_vouches_for_a_sample_whose_source_is_refused(to: str, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    converted(data, target, to)
    bad = data / f"{stem(1)}_data.npy"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-1])
    done = converted(data, target, to)
    assert len(done.faults) == 1 and not (target / MANIFEST).exists()
    left = open_folder(target)
    assert stem(1) not in [left.sample_id(index) for index in range(len(left))]
    bad.write_bytes(whole)
    made = 2 if to == "packed" else 1
    assert converted(data, target, to) == Produced(made=made, kept=4 - made)


def test_a_journal_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".journal.npy.1.jsonl").symlink_to("/dev/full")
    there = tmp_path, "npy", SampleSpec(16), 0
    with pytest.raises(AccessError, match="cannot be written"), Journal(*there) as journal:
        journal.add(Entry("a", ()))


def test_two_samples_of_one_name_are_refused(tmp_path: Path) -> None:
    data = tiny(tmp_path)
    converted(data, tmp_path / "packed", "packed", a_shard=4)
    (tmp_path / "packed" / MANIFEST).unlink()
    (tmp_path / "packed" / "files_data.lst").unlink()
    shutil.copy(tmp_path / "packed" / "shard_000000.tar", tmp_path / "packed" / "shard_000001.tar")
    with pytest.raises(DataError, match=rf"000001\.tar/{stem(0)}.*same name as shard_000000\.tar/{stem(0)}"):
        open_folder(tmp_path / "packed")


class Killed(BaseException):
    """Nothing that anybody catches."""


@contextlib.contextmanager
def killed_at(where: type, name: str, which: Callable[[Any], bool]) -> Iterator[None]:
    """The body is killed when it calls the method `name` of `where` with what `which` is true of."""
    method = getattr(where, name)

    def killed(self: Any, *given: Any, **more: Any) -> Any:
        if which(given[0] if given else self):
            raise Killed
        return method(self, *given, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(where, name, killed)
        yield


def killed_before_noting(stem: str) -> contextlib.AbstractContextManager[None]:
    """The body is killed when the entry `stem` is there and not yet noted."""
    return killed_at(Journal, "add", lambda entry: entry.name == stem)


@pytest.mark.parametrize("to", ["npy", "packed"])
def test_a_note_does_not_outlive_the_file_that_it_is_of(to: str, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    (data / "files_data.lst").write_text("".join(f"{stem(index)}_data.npy\n" for index in range(4)))
    converted(data, target, to)
    before = content(target)
    shutil.copytree(data, tmp_path / "earlier")
    write_older(data, 1, 77)
    (data / "files_data.lst").write_text("".join(f"{stem(index)}_data.npy\n" for index in (1, 0, 3, 2)))
    with killed_before_noting("shard_000001" if to == "packed" else stem(1)):
        converted(data, target, to)
    assert content(target) != before
    # The source as it was, its times too: what was made from the other one is noted nowhere.
    shutil.rmtree(data)
    shutil.copytree(tmp_path / "earlier", data)
    done = converted(data, target, to)
    assert done.made >= 1 and done.made + done.kept == 4
    assert content(target) == before


@pytest.mark.parametrize("prune", [False, True])
def test_a_run_that_is_killed_while_it_removes_goes_on(prune: bool, tmp_path: Path) -> None:
    data, target = tiny(tmp_path, train=8), tmp_path / "out"
    converted(data, target, "packed", a_shard=1)
    for index in range(4) if prune else ():
        for path in data.glob(f"{stem(index)}*"):
            path.unlink()
    with killed_at(Path, "unlink", lambda path: str(path).endswith("shard_000006.tar")):
        converted(data, target, "packed", a_shard=4, prune=prune)
    assert not (target / "shard_000005.tar").exists() and (target / "shard_000006.tar").exists()
    assert not (target / MANIFEST).exists()
    converted(data, target, "packed", a_shard=4, prune=prune)
    converted(data, tmp_path / "undisturbed", "packed", a_shard=4)
    assert content(target) == content(tmp_path / "undisturbed")


def test_larger_shards_take_the_place_of_those_that_a_killed_run_has_not_noted(tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    with killed_before_noting("shard_000003"):
        converted(data, target, "packed", a_shard=1)
    assert (target / "shard_000003.tar").exists()
    assert converted(data, target, "packed", a_shard=4) == Produced(made=4)
    assert [path.name for path in target.glob("*.tar")] == ["shard_000000.tar"]


def test_a_shard_that_is_named_as_a_sample_is_looked_into(tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    converted(tmp_path / "data" / "validation", target, "packed")
    (target / "shard_000000.tar").rename(target / f"{stem(1)}.tar")
    for name in ("shard_000000.idx", MANIFEST, "files_data.lst"):
        (target / name).unlink()
    with pytest.raises(DataError, match=rf"holds {stem(1)}\.tar, which is no sample of the source as packed"):
        converted(data, target, "packed")
    # One that is damaged tells nothing of what it holds.
    with open(target / f"{stem(1)}.tar", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=rf"holds {stem(1)}\.tar, which is no sample of the source as packed"):
        converted(data, target, "packed")


def test_a_universe_that_a_killed_run_had_begun_can_be_taken_out(tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    with killed_before_noting(stem(2)):
        converted(data, target, "npy")
    assert (target / f"{stem(2)}_data.npy").exists()
    for path in data.glob(f"{stem(2)}*"):
        path.unlink()
    with pytest.raises(DataError, match=rf"not in the source, 1 in all, the first {stem(2)}; .* --prune"):
        converted(data, target, "npy")
    assert converted(data, target, "npy", prune=True) == Produced(made=1, kept=2)
    assert len(open_folder(target)) == 3 and not list(target.glob(f"{stem(2)}*"))


@pytest.mark.parametrize("to", ["npy", "packed"])
def test_prune_removes_what_verify_has_noted(to: str, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    converted(data, target, to, a_shard=1)
    (target / MANIFEST).unlink()
    assert verify([str(target), "--write", "--workers", "1"]) == 0
    for path in data.glob(f"{stem(2)}*"):
        path.unlink()
    with pytest.raises(DataError, match="--prune"):
        converted(data, target, to, a_shard=1)
    converted(data, target, to, a_shard=1, prune=True)
    converted(data, tmp_path / "undisturbed", to, a_shard=1)
    assert content(target) == content(tmp_path / "undisturbed")


def test_the_way_out_of_a_damaged_manifest_leads_out(tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    converted(data, target, "npy")
    before = content(target)
    (target / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="remove it, and convert again or regenerate it"):
        converted(data, target, "npy")
    (target / MANIFEST).unlink()
    assert converted(data, target, "npy") == Produced(made=4)
    assert content(target) == before


def test_shards_of_others_make_room_though_a_sample_is_damaged(tmp_path: Path) -> None:
    data, target = tiny(tmp_path, train=8), tmp_path / "out"
    converted(data, target, "packed", a_shard=1)
    bad = data / f"{stem(5)}_data.npy"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:-1])
    assert len(converted(data, target, "packed", a_shard=4).faults) == 1
    # What there is of it can be used: no sample is there twice.
    assert len(open_folder(target)) == 4
    bad.write_bytes(whole)
    converted(data, target, "packed", a_shard=4)
    converted(data, tmp_path / "undisturbed", "packed", a_shard=4)
    assert content(target) == content(tmp_path / "undisturbed")


def test_a_shard_of_others_is_not_kept_for_one_that_is_out_of_reach(tmp_path: Path) -> None:
    data, target = tiny(tmp_path, train=5), tmp_path / "out"
    away = {path: path.read_bytes() for path in data.glob(f"{stem(0)}*")}
    for path in away:
        path.unlink()
    converted(data, target, "packed")
    for path, whole in away.items():
        path.write_bytes(whole)
    label = data / f"{stem(3)}_label.npy"
    label.rename(tmp_path / "label")
    label.symlink_to("/proc/self/mem")
    done = converted(data, target, "packed")
    assert len(done.faults) == 1 and done.kept == 0
    found = open_folder(target)
    assert [found.sample_id(index) for index in range(len(found))] == [stem(index) for index in (0, 1, 4)]
    label.unlink()
    (tmp_path / "label").rename(label)
    converted(data, target, "packed")
    converted(data, tmp_path / "undisturbed", "packed")
    assert content(target) == content(tmp_path / "undisturbed")


def test_what_a_killed_run_has_made_of_a_source_that_is_then_damaged_is_removed(tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    with killed_before_noting(stem(2)):
        converted(data, target, "tfrecord")
    bad = data / f"{stem(2)}_data.npy"
    bad.write_bytes(bad.read_bytes()[:-1])
    assert len(converted(data, target, "tfrecord").faults) == 1
    assert not list(target.glob(f"{stem(2)}*")) and len(open_folder(target)) == 3


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_of_another_shape_is_refused(killed: bool, tmp_path: Path) -> None:
    data, target = tiny(tmp_path), tmp_path / "out"
    other = write_tiny(tmp_path / "other", train=4, validation=1, size=8) / "train"
    if killed:
        with killed_before_noting(stem(2)):
            converted(data, target, "npy")
    else:
        converted(data, target, "npy")
    before = content(target)
    with pytest.raises(DataError, match=r"holds samples of shape \(16, 16, 16, 4\), not \(8, 8, 8, 4\)"):
        converted(other, target, "npy")
    assert content(target) == before
