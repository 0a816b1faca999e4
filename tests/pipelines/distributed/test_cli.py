"""Errors of command lines and launchers, which every program reports in one line."""

from __future__ import annotations

import pytest
from helpers import program

PROGRAMS = [
    "cosmoflow_dali.train", "cosmoflow_dali.evaluate", "cosmoflow_dali.predict", "cosmoflow_dali.results",
    "preprocess.convert", "preprocess.convert_tfrecord_to_gzip", "preprocess.convert_tfrecord_to_numpy",
    "preprocess.download", "preprocess.prepare", "preprocess.simulate", "preprocess.stage",
    "preprocess.verify",
]  # fmt: skip


def test_unknown_flags_are_reported_in_one_line() -> None:
    for module in PROGRAMS:
        done = program(module, "--no-such-flag")
        assert (done.code, done.out, done.err.count("\n")) == (1, "", 1), module
        assert done.err.startswith("error: ") and done.err.endswith("; see --help\n")


def test_invalid_launcher_variables_are_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for module in (
        "cosmoflow_dali.train",
        "cosmoflow_dali.evaluate",
        "preprocess.convert",
        "preprocess.stage",
    ):
        done = program(module, "--no-such-flag")
        assert done.code == 1 and done.err == "error: RANK = 3: must be below WORLD_SIZE = 2\n"
