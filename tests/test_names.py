"""Folders and files whose names are not UTF-8, or hold line breaks and terminal escapes."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from helpers import config_file, inline_workers, program, tiny_sample, write_tiny

from pipelines.formats.registry import FORMATS

NAME = os.fsdecode(b"caf\xe9\na\x1b[31m")
SHOWN = r"caf\udce9\na\x1b[31m"


@pytest.fixture(autouse=True)
def names_stay_out_of_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest keeps log messages in its reports, which pytest-xdist cannot send with these names.
    for package in ("cosmoflow_dali", "pipelines", "preprocess"):
        monkeypatch.setattr(logging.getLogger(package), "propagate", False)


def test_a_run_in_folders_of_any_name(tmp_path: Path) -> None:
    data, run = write_tiny(tmp_path / NAME, train=8, validation=4), tmp_path / "runs" / NAME
    stage = {"dir": str(tmp_path / f"{NAME}-stage")}
    config = config_file(tmp_path / f"{NAME}.yaml", data, epochs=1, data={"dir": str(data), "stage": stage})
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", run)
    assert done.code == 0, done.err
    assert all(line.isprintable() for line in done.err.splitlines())
    assert f"runs/{SHOWN}, seed" in done.err
    assert SHOWN in (run / "report.html").read_text(encoding="utf-8")
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", run, "--resume")
    assert done.code == 0, done.err

    weights = max((run / "checkpoints").iterdir())
    words = "cosmoflow_dali.predict", "--weights", weights, "--output", tmp_path / f"{NAME}.csv"
    (sample,) = (
        file.path
        for file in FORMATS["tfrecord_gzip"].write(tmp_path, NAME, tiny_sample(1))
        if file.bytes > 99
    )
    assert program(*words, sample).code == 0
    with open(tmp_path / f"{NAME}.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["file", str(sample)]

    # One epoch is too short for a compliant log.
    done = program("cosmoflow_dali.results", run.parent, "--json", tmp_path / f"{NAME}.json")
    assert done.code == 1 and SHOWN in done.out and all(map(str.isprintable, done.out.splitlines()))
    (log,) = json.loads((tmp_path / f"{NAME}.json").read_text())["logs"]
    assert log["path"] == str(run / "mlperf.log")


def test_a_conversion_between_folders_of_any_name(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / NAME, train=2, validation=1)
    with inline_workers():
        for source, target, *words in (
            (data, f"{NAME}-packed", "packed", "--samples-per-shard", 2),
            (tmp_path / f"{NAME}-packed", f"{NAME}-npy", "npy"),
        ):
            done = program("preprocess.convert", "-i", source, "-o", tmp_path / target, "--to", *words)
            assert done.code == 0 and len(done.out.splitlines()) == 1, done
            done = program("preprocess.verify", tmp_path / target)
            assert done.code == 0, done
    for path in data.glob("*/*.npy"):
        assert (tmp_path / f"{NAME}-npy" / path.relative_to(data)).read_bytes() == path.read_bytes()


def test_a_universe_whose_samples_no_list_could_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("good", NAME):
        with h5py.File(tmp_path / "in" / f"{name}.hdf5", "w") as file:
            file["full"], file["unitPar"] = np.zeros((16, 16, 16, 4), np.int16), np.zeros(4, np.float32)
    done = program("preprocess.prepare", "-i", tmp_path / "in", "-o", tmp_path / "out")
    assert done.code == 1 and not (tmp_path / "out").exists()
    assert done.err.startswith(f"error: {tmp_path}/in/{SHOWN}.hdf5: would give") and done.err.count("\n") == 1
