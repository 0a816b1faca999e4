"""The program predict: what it takes, and what it never overwrites."""

from __future__ import annotations

import csv
import io
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import DATA, Done, config_file, framed, inline_workers, program, tiny_sample, write_tiny

from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.registry import FORMATS
from pipelines.formats.tf_example import encode_example
from pipelines.formats.tfrecord import TFRecord
from pipelines.io import write_file
from pipelines.sample import UNKNOWN_TARGET, Sample

PREDICT, EVALUATE, TRAIN = "cosmoflow_dali.predict", "cosmoflow_dali.evaluate", "cosmoflow_dali.train"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network for tiny samples."""
    root = tmp_path_factory.mktemp("weights")
    config = config_file(root / "c.yaml", write_tiny(root / "data", train=4, validation=2), epochs=1)
    assert program(TRAIN, "--config", config, "--run-dir", root / "run").code == 0
    return max((root / "run" / "checkpoints").iterdir())


def predicted(text: str) -> dict[str, str]:
    """The prediction of sigma_8 by the column `file`."""
    return {row["file"]: row["sigma_8"] for row in csv.DictReader(io.StringIO(text))}


def unlabeled_npy(folder: Path) -> Path:
    FORMATS["npy"].write(folder, "a", tiny_sample(1))
    (folder / "a_label.npy").unlink()
    return folder / "a_data.npy"


def npy_in_a_list(folder: Path) -> Path:
    # The lists are those of labeled samples.
    path = unlabeled_npy(folder)
    (folder / "files_data.lst").write_text("a_data.npy\n")
    (folder / "files_label.lst").write_text("b_label.npy\n")
    return path.parent


def npy_with_a_manifest(folder: Path) -> Path:
    FORMATS["npy"].write(folder, "a", tiny_sample(1))
    with inline_workers():
        assert program("preprocess.verify", folder, "--write").code == 0
    (folder / "a_label.npy").unlink()
    return folder


def nan_in_npy(folder: Path) -> Path:
    FORMATS["npy"].write(folder, "a", Sample(tiny_sample(1).counts, UNKNOWN_TARGET))
    return folder / "a_data.npy"


def nan_in_tfrecord_gzip(folder: Path) -> Path:
    FORMATS["tfrecord_gzip"].write(folder, "a", Sample(tiny_sample(1).counts, UNKNOWN_TARGET))
    return folder / "a.tfrecord"


def tfrecord_without_y(folder: Path) -> Path:
    # A map entry of another key is a feature that is not read.
    record = b"".join(encode_example(tiny_sample(1))).replace(b"\n\x01y", b"\n\x01z")
    return write_file(folder / "a.tfrecord", framed(record)).path


def tfrecord_with_other_labels(folder: Path) -> Path:
    sample = Sample(tiny_sample(1).counts, np.zeros(5, np.float32))
    return TFRecord(compressed=False).write(folder, "a", sample)[-1].path


def nan_in_packed(folder: Path) -> Path:
    members = [("a.packed", encode(Sample(tiny_sample(1).counts, UNKNOWN_TARGET)))]
    return write_shard(folder / "shard.tar", members)[-1].path


UNLABELED = [
    unlabeled_npy,
    npy_in_a_list,
    npy_with_a_manifest,
    nan_in_npy,
    nan_in_tfrecord_gzip,
    tfrecord_without_y,
    tfrecord_with_other_labels,
    nan_in_packed,
]


@pytest.mark.parametrize("write", UNLABELED)
def test_a_prediction_needs_counts_alone(
    write: Callable[[Path], Path], weights: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    labeled = FORMATS["tfrecord"].write(tmp_path, "labeled", tiny_sample(1))[-1].path
    (expected,) = predicted(program(PREDICT, "--weights", weights, labeled).out).values()
    path = write(tmp_path / "in")
    done = program(PREDICT, "--weights", weights, path)
    assert done.code == 0, done.err
    assert list(predicted(done.out).values()) == [expected]


@pytest.mark.parametrize("write", UNLABELED)
@pytest.mark.parametrize("module", [EVALUATE, TRAIN])
def test_scores_and_training_need_labels(
    module: str, write: Callable[[Path], Path], weights: Path, tmp_path: Path
) -> None:
    data = write_tiny(tmp_path / "data", train=4, validation=1)
    shutil.rmtree(data / "validation")
    (data / "validation").mkdir()
    write(data / "validation")
    if module == EVALUATE:
        done = program(EVALUATE, "--data-dir", data, "--weights", weights)
    else:
        config = config_file(tmp_path / "c.yaml", data, epochs=1)
        done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 1
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert str(data / "validation") in line and "Traceback" not in done.err


@pytest.mark.parametrize("format_name", sorted(FORMATS))
def test_each_sample_of_a_shard_a_folder_and_a_pattern_has_a_line(
    format_name: str, weights: Path, tmp_path: Path
) -> None:
    suffix = FORMATS[format_name].suffix
    data = write_tiny(tmp_path / "data", train=3, validation=2, format_name=format_name)
    if format_name == "packed":
        members = ((f"{name}.packed", encode(tiny_sample(name))) for name in (0, 1, 2))
        shard = write_shard(tmp_path / "shard.tar", members)[-1].path
        assert list(predicted(program(PREDICT, "--weights", weights, shard).out)) == [
            f"{shard}/{name}.packed" for name in (0, 1, 2)
        ]
    for paths, count in (
        ([data], 5),
        ([data / "train"], 3),
        ([data / "train" / f"*{suffix}"], 3),
        ([data / "t*" / f"*{suffix}", data / "validation"], 5),
        (sorted((data / "validation").glob(f"*{suffix}")), 2),
    ):
        done = program(PREDICT, "--weights", weights, *paths)
        assert done.code == 0, done.err
        files = predicted(done.out)
        assert len(files) == count and all(str(data) in file for file in files)


def test_patterns_reach_each_sample_once(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tiny(tmp_path / "set [1]", train=2, validation=1)
    (data / "train" / "loop").symlink_to(data)
    (data / "validation" / "loop").symlink_to(data)
    (data / "train" / "._a_data.npy").write_bytes(b"\0\5\x16\7")
    monkeypatch.chdir(data)
    for pattern, count in (
        (data / "**", 3),
        (data / "**" / "*_data.npy", 3),
        (data / "**" / "train" / "*.npy", 2),
        (tmp_path / "*" / "**" / "universe_0000*", 1),
        (Path("**"), 3),
        (data / "t*" / "*_data.npy", 2),
        (data / "train" / "u*", 2),
    ):
        done = program(PREDICT, "--weights", weights, pattern)
        assert done.code == 0 and len(predicted(done.out)) == count, (pattern, done)
    for pattern in (data / "**" / "*.tar", tmp_path / "**[", Path("no") / "**"):
        done = program(PREDICT, "--weights", weights, pattern)
        assert done.code == 1 and done.err.splitlines()[-1].startswith(f"error: {pattern}: "), done


ARRAYS: dict[str, dict[str, Any]] = {
    "another program's": {"arr_0": np.ones(3)},
    "a part": {"conv0/kernel": np.ones((3, 3, 3, 4, 8), np.float32)},
    "another rank": {"conv0/kernel": np.ones((3, 3)), "conv0/bias": np.ones(3)},
    "text": {"conv0/kernel": np.array("x"), "conv0/bias": np.array(["y"])},
    "objects": {"conv0/kernel": np.array([None]), "conv0/bias": np.array([None])},
}


@pytest.mark.parametrize("name", [*ARRAYS, "an array", "a page", "nothing", "damage"])
def test_arrays_that_are_no_weights_are_refused_by_name(name: str, tmp_path: Path) -> None:
    sample = FORMATS["npy"].write(tmp_path, "a", tiny_sample(1))[-1].path
    path = tmp_path / "w.npz"
    if name in ARRAYS:
        np.savez(path, **ARRAYS[name])
    elif name == "an array":
        shutil.copy(sample, path)
    elif name == "damage":
        content = bytearray((DATA / "keras_small.npz").read_bytes())
        content[1000:-4000] = bytes(len(content) - 5000)
        path.write_bytes(content)
    else:
        path.write_text("<html>404</html>" if name == "a page" else "")
    assert refused(program(PREDICT, "--weights", path, sample), path)


def test_lines_are_written_as_they_are_predicted(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in "abc":
        FORMATS["npy"].write(tmp_path / "in", name, tiny_sample(1))
    (tmp_path / "in" / "c_data.npy").write_bytes(b"damaged")
    done = program(PREDICT, "--weights", weights, tmp_path / "in")
    assert refused(done, tmp_path / "in" / "c_data.npy")
    assert len(predicted(done.out)) == 2
    # A file is complete or not there.
    output = tmp_path / "out.csv"
    for before in (None, "earlier"):
        if before:
            output.write_text(before)
        assert program(PREDICT, "--weights", weights, "--output", output, tmp_path / "in").code == 1
        assert (output.read_text() if before else output.exists()) == (before or False)
    assert sorted(os.listdir(tmp_path)) == ["in", "out.csv"]


def refused(done: Done, path: Path) -> bool:
    """Return True if `done` is a refusal of `path` in one line."""
    return done.code == 1 and done.err.startswith(f"error: {path}: ") and done.err.count("\n") == 1


def test_no_input_is_overwritten(weights: Path, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=2, validation=1)
    with inline_workers():
        assert program("preprocess.verify", data, "--write").code == 0
    weights = Path(shutil.copy(weights, tmp_path / "weights.pt"))
    sample = data / "train" / "universe_0001_000_data.npy"
    (tmp_path / "hard").hardlink_to(sample)
    (tmp_path / "soft").symlink_to(sample)
    (tmp_path / "link.pt").symlink_to(weights)
    names = [sample, tmp_path / "hard", tmp_path / "soft", weights, tmp_path / "link.pt"]
    names += [data / "train" / name for name in ("universe_0000_000_label.npy", "manifest.jsonl")]
    before = {path: path.read_bytes() for path in names}
    for output in names:
        assert refused(program(PREDICT, "--weights", weights, "--output", output, data), output)
    assert {path: path.read_bytes() for path in names} == before
    (tmp_path / "results.csv").symlink_to("other.csv")
    for _ in range(2):
        done = program(PREDICT, "--weights", weights, "--output", tmp_path / "results.csv", data)
        assert done.code == 0, done.err
    assert (tmp_path / "results.csv").is_symlink()
    assert len(predicted((tmp_path / "other.csv").read_text())) == 3


def test_a_fifo_is_written_if_it_has_a_reader(weights: Path, tmp_path: Path) -> None:
    FORMATS["npy"].write(tmp_path, "a", tiny_sample(1))
    fifo, read = tmp_path / "fifo", []
    os.mkfifo(fifo)
    line = ["--weights", weights, "--output", fifo, tmp_path / "a_data.npy"]
    assert refused(program(PREDICT, *line), fifo)
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor) as file:
        done = program(PREDICT, *line)
        reader = threading.Thread(target=lambda: read.append(file.read()))
        reader.start()
        reader.join(timeout=30)
    assert done.code == 0 and len(predicted(read[0])) == 1


@pytest.mark.parametrize("kind", ["FIFO", "folder"])
@pytest.mark.parametrize("name", ["a.pt", "a.npz", "a_data.npy", "a.tfrecord", "a.tar"])
def test_what_is_no_file_is_refused_in_one_line(name: str, kind: str, weights: Path, tmp_path: Path) -> None:
    path = tmp_path / name
    os.mkfifo(path) if kind == "FIFO" else path.mkdir()
    sample = FORMATS["npy"].write(tmp_path, "valid", tiny_sample(1))[-1].path
    line = ["--weights", path, sample] if path.suffix in (".pt", ".npz") else ["--weights", weights, path]
    assert refused(program(PREDICT, *line), path)
    if kind == "folder":
        assert refused(program(PREDICT, "--weights", weights, "--output", path, sample), path)


def test_a_path_that_does_not_exist_is_refused_first(weights: Path, tmp_path: Path) -> None:
    sample = FORMATS["npy"].write(tmp_path, "a", tiny_sample(1))[-1].path
    for path in (tmp_path / "none_data.npy", tmp_path / "*.tar"):
        done = program(PREDICT, "--weights", weights, sample, path)
        assert refused(done, path) and not done.out


def test_samples_of_another_shape_are_refused(weights: Path, tmp_path: Path) -> None:
    counts = np.zeros((16, 16, 16, 3), np.int16)
    path = FORMATS["npy"].write(tmp_path, "a", Sample(counts, tiny_sample(1).target))[-1].path
    small = FORMATS["npy"].write(tmp_path, "b", tiny_sample(1, size=8))[-1].path
    keras = DATA / "keras_small.npz"
    for line, named in (((weights, path), path), ((weights, small), small), ((keras, small), small)):
        assert refused(program(PREDICT, "--weights", *line), named)
