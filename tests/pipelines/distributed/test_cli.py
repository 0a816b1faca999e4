"""What every program says of a command line, or of a launch, that makes no sense."""

from __future__ import annotations

import pytest
from helpers import program

PROGRAMS = [
    "cosmoflow_dali.train", "cosmoflow_dali.evaluate", "cosmoflow_dali.predict", "cosmoflow_dali.results",
    "preprocess.convert", "preprocess.convert_tfrecord_to_gzip", "preprocess.convert_tfrecord_to_numpy",
    "preprocess.download", "preprocess.prepare", "preprocess.simulate", "preprocess.stage",
    "preprocess.verify",
]  # fmt: skip


@pytest.mark.parametrize("module", PROGRAMS)
def test_a_command_line_that_makes_no_sense_is_one_line(module: str) -> None:
    done = program(module, "--no-such-flag")
    assert (done.code, done.out) == (1, "")
    assert (
        done.err.startswith("error: ") and done.err.endswith("; see --help\n") and done.err.count("\n") == 1
    )


@pytest.mark.parametrize("module", ["cosmoflow_dali.evaluate", "preprocess.convert", "preprocess.stage"])
def test_a_launch_that_makes_no_sense_is_one_line(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    done = program(module, "--no-such-flag")
    assert done.code == 1 and done.err == "error: RANK = 3: must be below WORLD_SIZE = 2\n"
