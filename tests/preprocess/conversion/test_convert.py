"""Conversion: round trips, faults of files and disks, and resume after a kill at any moment."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import (
    DATA,
    ROOT,
    Ranks,
    can_mount,
    command,
    environment,
    inline_workers,
    kill,
    mounted,
    program,
    run,
    started_by,
    tiny_sample,
    wait_until_gone,
    write_tiny,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.dataset.manifest import MANIFEST
from pipelines.dataset.open import open_folder
from pipelines.distributed.locks import LOCK_FILE
from pipelines.distributed.session import RankError, Session
from pipelines.distributed.world import World
from pipelines.errors import AccessError
from pipelines.formats.registry import FORMATS
from pipelines.sample import Sample
from preprocess.conversion.engine import ConversionReport, run_conversion
from preprocess.conversion.progress import STOPPED
from preprocess.convert import plan_conversion

CONVERT = "preprocess.convert"
inline = pytest.mark.usefixtures("inline_workers")

KILLS = int(os.environ.get("KILLS", "3"))
"""Random kills of each kind of conversion."""


def converted(source: Path, target: Path, to: str) -> ConversionReport:
    """Convert the samples in `source` to `to` in `target`, with one worker."""
    plan = plan_conversion(source, target, to, samples_per_shard=2)
    return run_conversion(plan, session=Session(World()), workers=1, unit="sample")


def content(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in `folder`, hidden ones too, by name."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("start", sorted(FORMATS))
@pytest.mark.parametrize("via", sorted(FORMATS))
@settings(max_examples=4, deadline=None)
@given(
    samples=st.integers(1, 5),
    size=st.integers(1, 9),
    most=st.sampled_from([1, 255, 256, 32767]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_is_the_identity(
    start: str, via: str, samples: int, size: int, most: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    with inline_workers(), tempfile.TemporaryDirectory() as name:
        source, middle, back = (Path(name, folder) for folder in ("source", "middle", "back"))
        # Only the converter writes shards of several samples.
        written = Path(name, "npy") if start == "packed" else source
        written.mkdir()
        for index in range(samples):
            counts = rng.integers(0, most, (size, size, size, 4), dtype=np.int16, endpoint=True)
            sample = Sample(counts, rng.uniform(-1, 1, 4).astype(np.float32))
            FORMATS["npy" if start == "packed" else start].write(written, f"universe_{index:03d}", sample)
        if written != source:
            converted(written, source, start)
            (source / MANIFEST).unlink()
        before = content(source)
        assert converted(source, middle, via).written == samples
        assert converted(middle, back, start).written == samples
        assert content(source) == before
        # Byte for byte; `back` also has the manifest and the lists.
        assert {file: digest for file, digest in content(back).items() if file in before} == before
        first, second = open_folder(source), open_folder(middle)
        assert [first.sample_id(i) for i in range(samples)] == [second.sample_id(i) for i in range(samples)]
        for index in range(samples):
            np.testing.assert_array_equal(first.read(index).counts, second.read(index).counts)
            np.testing.assert_array_equal(first.read(index).target, second.read(index).target)


@inline
@pytest.mark.parametrize("folder", ["tfrecord_gzip", "tfrecord_plain"])
def test_tensorflow_records_as_npy(folder: str, tmp_path: Path) -> None:
    converted(DATA / folder, tmp_path, "npy")
    with np.load(DATA / "keras_small.npz") as keras:
        for stem, counts, target in zip(
            (tmp_path / "files_data.lst").read_text().split(), keras["counts"], keras["targets"], strict=True
        ):
            np.testing.assert_array_equal(np.load(tmp_path / stem), counts)
            np.testing.assert_array_equal(np.load(tmp_path / stem.replace("data", "label")), target)


def test_both_splits_and_the_lists_of_the_original(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=5, validation=2, format_name="tfrecord_gzip")
    done = program(CONVERT, "-i", data, "-o", tmp_path / "npy", "--to", "npy")
    assert done.code == 0, done.err
    stems = [f"universe_{index:04d}_000" for index in range(5)]
    listed = (tmp_path / "npy" / "train" / "files_data.lst").read_text()
    assert listed == "".join(f"{stem}_data.npy\n" for stem in stems)
    listed = (tmp_path / "npy" / "train" / "files_label.lst").read_text()
    assert listed == "".join(f"{stem}_label.npy\n" for stem in stems)
    assert len(open_folder(tmp_path / "npy" / "validation")) == 2
    gzip = tmp_path / "gzip"
    done = program(
        "preprocess.convert_tfrecord_to_gzip", "-i", data / "train", "-o", gzip, "-c", "gzip", ranks=3
    )
    assert done.code == 0, done.err
    lines = (gzip / "files_data.lst").read_text().splitlines()
    assert lines == [f"{stem}.tfrecord {(gzip / f'{stem}.tfrecord').stat().st_size}" for stem in stems]


@pytest.mark.parametrize("ranks", [1, 3])
def test_no_tail_is_dropped(ranks: int, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=7, validation=1, format_name="tfrecord_gzip") / "train"
    done = program(
        "preprocess.convert_tfrecord_to_numpy", "-i", data, "-o", tmp_path / "npy", "-c", "gzip", ranks=ranks
    )
    assert done.code == 0, done.err
    assert "7 samples converted" in done.out
    converted(data, tmp_path / "alone", "npy")
    assert content(tmp_path / "npy") == content(tmp_path / "alone")


@inline
def test_rerun_converts_only_missing_and_stale_samples(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=6, validation=1, format_name="tfrecord") / "train"
    target = tmp_path / "npy"
    assert converted(data, target, "npy") == ConversionReport(written=6)
    before = content(target)
    written = {path.name: path.stat().st_mtime_ns for path in target.glob("*.npy")}
    assert converted(data, target, "npy") == ConversionReport(up_to_date=6)
    assert {path.name: path.stat().st_mtime_ns for path in target.glob("*.npy")} == written
    (target / "universe_0001_000_data.npy").unlink()
    (target / "universe_0002_000_label.npy").write_bytes(b"short")
    assert converted(data, target, "npy") == ConversionReport(written=2, up_to_date=4)
    assert content(target) == before
    # A changed source is another sample.
    FORMATS["tfrecord"].write(data, "universe_0004_000", tiny_sample(99))
    assert converted(data, target, "npy") == ConversionReport(written=1, up_to_date=5)
    np.testing.assert_array_equal(open_folder(target).read(4).counts, tiny_sample(99).counts)


@inline
def test_damaged_sample_does_not_stop_others(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=5, validation=1, format_name="tfrecord") / "train"
    path = data / "universe_0002_000.tfrecord"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for ranks in (1, 2):
        target = tmp_path / f"npy{ranks}"
        done = program(CONVERT, "-i", data, "-o", target, "--to", "npy", ranks=ranks)
        assert done.code == 1
        assert f"error: {path}: the record's CRC is wrong" in done.err and "Traceback" not in done.err
        assert len(list(target.glob("*_data.npy"))) == 4 and not (target / MANIFEST).exists()
    path.write_bytes(whole)
    assert converted(data, target, "npy") == ConversionReport(written=1, up_to_date=4)


@inline
def test_order_of_a_list_is_kept(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=3, validation=1) / "train"
    order = [f"universe_{index:04d}_000" for index in (2, 0, 1)]
    for kind in ("data", "label"):
        (data / f"files_{kind}.lst").write_text("".join(f"{stem}_{kind}.npy\n" for stem in order))
    converted(data, tmp_path / "gzip", "tfrecord_gzip")
    split = open_folder(tmp_path / "gzip")
    assert [split.sample_id(index) for index in range(3)] == order


@inline
def test_folder_with_foreign_files_is_unchanged(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=2, validation=1) / "train"
    for name in ("thesis.tex", "other_000.tfrecord", "universe_0000_000_data.npy"):
        target = tmp_path / name / "target"
        target.mkdir(parents=True)
        (target / name).write_text("mine")
        done = program(CONVERT, "-i", data, "-o", target, "--to", "tfrecord")
        assert done.code == 1 and f"holds {name}" in done.err
        assert {path.name for path in target.iterdir()} == {name, LOCK_FILE}
        assert (target / name).read_text() == "mine"


@inline
def test_hidden_files_in_the_target_are_left_alone(tmp_path: Path) -> None:
    source, target = write_tiny(tmp_path / "in", train=3, validation=1), tmp_path / "out"
    hidden = [target / "train" / name for name in (".DS_Store", ".nfs000a1", "._universe_0000_000.tfrecord")]
    hidden[0].parent.mkdir(parents=True)
    for path in hidden:
        path.write_bytes(b"1")
    for _ in range(2):
        done = program("preprocess.convert", "-i", source, "-o", target, "--to", "tfrecord", "--workers", 1)
        assert done.code == 0, done.err
    assert all(path.exists() for path in hidden) and len(open_folder(target / "train")) == 3


def test_invalid_arguments_are_one_line(tiny: Path, tmp_path: Path) -> None:
    data, out = tiny / "train", tmp_path / "out"
    for ranks, arguments, message in (
        (1, ["-i", data, "-o", data, "--to", "npy"], f"is the input {data} itself"),
        (1, ["-i", data, "-o", out, "--to", "npz"], "--to = npz: expected one of npy"),
        (1, ["-i", data, "-o", out, "--to", "npy", "--workers", "0"], "--workers = 0"),
        (1, ["-i", data / "none", "-o", out, "--to", "npy"], "cannot be listed (No such file"),
        (2, ["-i", data / "none", "-o", out, "--to", "npy"], "cannot be listed (No such file"),
        (2, ["-i", data, "-o", "/proc/x", "--to", "npy"], "/proc/x: cannot be written"),
    ):
        done = program(CONVERT, *arguments, ranks=ranks)
        assert done.code == 1
        lines = [line for line in done.err.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and message in lines[0] and "Traceback" not in done.err


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of sixty samples of 32^3, enough to be interrupted."""
    folder = tmp_path_factory.mktemp("many")
    write_tiny(folder, train=60, validation=1, format_name="tfrecord_gzip", size=32)
    return folder / "train"


def count_complete(folder: Path) -> int:
    """Return the number of files of samples in `folder`; fail if one is not complete."""
    found = list(folder.glob("*.npy"))
    for path in found:
        np.load(path)
    return len(found)


@pytest.mark.skipif(not can_mount(), reason="mounting a tmpfs is not allowed here")
@pytest.mark.parametrize(
    ("options", "said", "ranks"),
    [
        ("size=3m", "cannot be written (No space left on device)", 2),
        ("ro", "cannot be written (Read-only file", 1),
    ],
)
def test_a_full_or_read_only_disk_is_one_line(
    options: str, said: str, ranks: int, many: Path, tmp_path: Path
) -> None:
    start = time.monotonic()
    line = command(CONVERT, ["-i", many, "-o", tmp_path, "--to", "npy"], ranks=ranks)
    done = run(mounted(options, tmp_path, line))
    assert done.code == 1, done.err
    assert said in done.err and "Traceback" not in done.err
    # No incomplete file has its final name.
    assert set(done.out.split()) <= {str(128 + 2 * 4 * 32**3)}
    assert time.monotonic() - start < 60


FILL = """
import shutil, sys
from pathlib import Path
from pipelines.dataset.open import open_folder
from preprocess import convert, prepare

data, disk = Path(sys.argv[1]), Path(sys.argv[2], "x")
cuts = ["--sample-size", "64", "--validation", "0.5"]
for name, main, source, options in (
    ("npy", convert.main, "npy", ["--to", "npy"]),
    ("tfrecord", convert.main, "npy", ["--to", "tfrecord"]),
    ("packed", convert.main, "npy", ["--to", "packed", "--samples-per-shard", "2"]),
    ("prepared", prepare.main, "hdf5", cuts),
):
    try:
        main(["-i", str(data / source), "-o", str(disk), "--workers", "1", *options])
    except SystemExit as end:
        print(name, end.code)
    samples = ("_data.npy", ".tfrecord", ".tar")
    for folder in {path.parent for path in disk.rglob("*.*") if path.name.endswith(samples)}:
        split = open_folder(folder)
        print(name, "whole", *(split.read(index).counts.shape for index in range(len(split))))
    shutil.rmtree(disk)
"""


@pytest.mark.skipif(not can_mount(), reason="mounting a tmpfs is not allowed here")
def test_disk_that_fills_during_a_large_file(tmp_path: Path) -> None:
    data, disk = tmp_path / "data", tmp_path / "disk"
    counts = np.random.default_rng(1).integers(0, 32767, (64, 64, 64, 4), dtype=np.int16)
    for folder in (data / "npy" / "train", data / "npy" / "validation", data / "hdf5", disk):
        folder.mkdir(parents=True)
    for index, split in enumerate(["train", "train", "train", "validation"]):
        FORMATS["npy"].write(data / "npy" / split, f"u_{index}", Sample(counts, tiny_sample(index).target))
    for index in range(2):
        with h5py.File(data / "hdf5" / f"u_{index}.hdf5", "w") as file:
            file["full"], file["unitPar"] = counts, np.zeros(4)
    # Room for one file of 2 MiB: the second is too many, and so is a shard of two.
    line = [sys.executable, "-c", FILL, str(data), str(disk)]
    done = run(mounted("size=3500k", disk, line))
    said = [line for line in done.err.splitlines() if line.startswith("error")]
    assert len(said) == 4, done
    assert all("cannot be written (No space left on device)" in line for line in said)
    names = ("npy", "tfrecord", "packed", "prepared")
    printed = [line for line in done.out.splitlines() if line.startswith(names)]
    whole = "whole (64, 64, 64, 4)"
    assert printed == [
        *("npy 1", f"npy {whole}"),
        *("tfrecord 1", f"tfrecord {whole}"),
        "packed 1",
        *("prepared 1", f"prepared {whole}"),
    ]


def lose(path: Path) -> None:
    """Make `path` unreadable and keep it in its folder's listing, as with a lost storage target."""
    path.rename(path.with_name(f"{path.name}.lost"))
    path.symlink_to("nowhere")


def find(path: Path) -> None:
    """Undo `lose`."""
    path.unlink()
    path.with_name(f"{path.name}.lost").rename(path)


@inline
@pytest.mark.parametrize(
    ("ranks", "to", "others", "first"),
    [
        (1, "npy", 10, 0),
        (2, "packed", 8, 0),
        pytest.param(2, "npy", 10, 5, marks=pytest.mark.slow),
        pytest.param(1, "packed", 8, 5, marks=pytest.mark.slow),
    ],
)
def test_unreadable_file_does_not_stop_others(
    ranks: int, to: str, others: int, first: int, tmp_path: Path
) -> None:
    data = write_tiny(tmp_path / "data", train=12, validation=1, format_name="tfrecord_gzip") / "train"
    target = tmp_path / "out"
    bad = [data / f"universe_{index:04d}_000.tfrecord" for index in (first, first + 3)]
    for path in bad:
        lose(path)
    line = ["-i", data, "-o", target, "--to", to, "--samples-per-shard", 2]
    done = program(CONVERT, *line, ranks=ranks)
    assert done.code == 1 and "Traceback" not in done.err
    for path in bad:
        assert done.err.count(f"error: {path}: cannot be read (No such file or directory)") == 1
    assert f"{others} samples converted" in done.out and not (target / MANIFEST).exists()
    assert len(open_folder(target)) == others
    # A rerun tries again, and is done once they are there.
    done = program(CONVERT, *line)
    assert ": 0 samples converted" in done.out and f" {others} up to date" in done.out
    for path in bad:
        find(path)
    assert converted(data, target, to) == ConversionReport(written=12 - others, up_to_date=others)
    # Its entry from before stays.
    lose(bad[0])
    done = program(CONVERT, *line)
    assert done.code == 1 and f"error: {bad[0]}: cannot be read" in done.err
    assert len(open_folder(target)) == 12 and not (target / MANIFEST).exists()
    find(bad[0])
    assert converted(data, target, to) == ConversionReport(up_to_date=12)


@inline
def test_lost_shard_does_not_stop_others(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=60, validation=1, format_name="tfrecord") / "train"
    plan = plan_conversion(data, tmp_path / "packed", "packed", samples_per_shard=20)
    run_conversion(plan, session=Session(World()), workers=2, unit="file")
    shard = tmp_path / "packed" / "shard_000001.tar"
    shard.rename(tmp_path / "shard")
    done = program(CONVERT, "-i", tmp_path / "packed", "-o", tmp_path / "npy", "--to", "npy")
    assert done.code == 1 and f"error: {shard}: cannot be read" in done.err
    assert "40 samples converted" in done.out and "20 files are damaged" in done.err
    (tmp_path / "shard").rename(shard)
    done = program(CONVERT, "-i", tmp_path / "packed", "-o", tmp_path / "npy", "--to", "npy")
    assert done.code == 0 and "20 samples converted" in done.out and "40 up to date" in done.out


@inline
@pytest.mark.parametrize(("ranks", "to"), [(1, "npy"), (2, "packed")])
def test_many_unreadable_files_in_a_row_end_the_run(ranks: int, to: str, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=80, validation=1, format_name="tfrecord_gzip") / "train"
    line = ["-i", data, "-o", tmp_path / "out", "--to", to, "--samples-per-shard", 20, "--workers", 1]
    assert program(CONVERT, *line).code == 0
    before = content(tmp_path / "out")
    for path in sorted(data.iterdir())[20:]:
        lose(path)
    done = program(CONVERT, *line, ranks=ranks)
    assert done.code == 1 and "Traceback" not in done.err
    tried = 16 if to == "npy" else 19
    assert f"cannot be read (No such file or directory), and neither can the {tried} files" in done.err
    assert "samples converted" not in done.out
    for path in sorted(data.glob("*.tfrecord"))[20:]:
        find(path)
    assert program(CONVERT, *line).code == 0 and content(tmp_path / "out") == before


@inline
def test_missing_source_removes_nothing(tmp_path: Path) -> None:
    data, target = write_tiny(tmp_path / "data", train=4, validation=1) / "train", tmp_path / "out"
    converted(data, target, "packed")
    plan = plan_conversion(data, target, "packed", samples_per_shard=2)
    data.rename(tmp_path / "gone")
    with pytest.raises(RankError) as error:
        run_conversion(plan, session=Session(World()), workers=1, unit="file")
    assert isinstance(error.value.error, AccessError) and error.value.error.path == str(data)
    assert len(list(target.glob("*.tar"))) == 2


@inline
@pytest.mark.parametrize("ranks", [1, 2])
def test_source_that_vanishes_is_one_line(ranks: int, many: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "npy"
    shutil.copytree(many, source)
    line = command(CONVERT, ["-i", source, "-o", target, "--to", "npy", "--workers", 1])
    with Ranks(line, range(ranks), ranks) as running:
        while len(list(target.glob("*_data.npy"))) < 3 and running.processes[0].poll() is None:
            pass
        source.rename(tmp_path / "gone")
        codes, output = running.end(30)
    assert codes == {1} and "Traceback" not in output
    assert "cannot be read (No such file or directory)" in output
    assert count_complete(target) > 0 and not (target / MANIFEST).exists()
    (tmp_path / "gone").rename(source)
    converted(source, target, "npy")
    converted(source, tmp_path / "undisturbed", "npy")
    assert content(target) == content(tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("format_name", "pattern", "count"), [("npy", "*_data.npy", 60), ("packed", "*.tar", 20)]
)
def test_killed_at_any_moment(format_name: str, pattern: str, count: int, many: Path, tmp_path: Path) -> None:
    chance, midway, target = random.Random(3), 0, tmp_path / "target"
    arguments = ["-i", many, "-o", target, "--to", format_name, "--samples-per-shard", 3]
    assert program(CONVERT, *arguments).code == 0
    undisturbed = content(target)
    for _ in range(KILLS):
        shutil.rmtree(target, ignore_errors=True)
        line, quiet = command(CONVERT, arguments, ranks=3), subprocess.DEVNULL
        running = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=quiet, stderr=quiet)
        # At a random number of files, somewhere between one file and the next.
        files = chance.randrange(0, count * 3 // 4)
        while len(list(target.glob(pattern))) < files and running.poll() is None:
            pass
        time.sleep(chance.uniform(0, 0.01))
        # mpirun and its ranks, or one of these processes.
        processes = [running.pid, *started_by(running.pid)]
        kill(chance.choice([processes, [chance.choice(processes)]]))
        running.wait(timeout=30)
        wait_until_gone(processes)
        midway += 0 < len(list(target.glob(pattern))) < count
        done = program(CONVERT, *arguments)
        assert done.code == 0, done.err
        assert content(target) == undisturbed
    assert midway >= KILLS // 2, f"only {midway} of {KILLS} kills fell between the first file and the last"


WAITING = """
import os

real = os.open
os.open = lambda path, flags, *more, **named: real(path, flags & ~os.O_NONBLOCK, *more, **named)
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_stopped_conversion_leaves_no_worker_and_resumes(stop: signal.Signals, tmp_path: Path) -> None:
    data, target = write_tiny(tmp_path / "data", train=6, validation=1) / "train", tmp_path / "out"
    converted(data, tmp_path / "undisturbed", "tfrecord")
    last = data / "universe_0005_000_label.npy"
    whole = (last.read_bytes(), last.stat().st_mtime_ns)
    last.unlink()
    os.mkfifo(last)
    # Have the worker wait for the FIFO's writer, as a file system that does not respond would have it wait.
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WAITING)
    line = command(CONVERT, ["-i", data, "-o", target, "--to", "tfrecord", "--workers", "1"])
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(tmp_path / "site")},
        stderr=subprocess.PIPE,
        text=True,
        # Tests in the background ignore Ctrl-C, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    journal = target / ".journal.tfrecord.1.jsonl"
    # With all others recorded, the worker reads the last one.
    while not (journal.exists() and journal.read_text().count('".tfrecord"') == 5):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = started_by(process.pid)
    process.send_signal(stop)
    _, err = process.communicate(timeout=30)
    if stop == signal.SIGINT:
        assert (process.returncode, err) == (130, f"{STOPPED}\n")
    # The folder may belong to another run by now.
    wait_until_gone(workers)
    last.unlink()
    last.write_bytes(whole[0])
    os.utime(last, ns=(0, whole[1]))
    done = program(CONVERT, "-i", data, "-o", target, "--to", "tfrecord")
    assert "1 samples converted" in done.out and "5 up to date" in done.out
    assert content(target) == content(tmp_path / "undisturbed")
