"""The HTML report: self-contained, with the scores of the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from cosmoflow_dali.config import resolve
from cosmoflow_dali.reporting import summary
from cosmoflow_dali.reporting import system_info as machine
from cosmoflow_dali.reporting.html_report import write_report
from cosmoflow_dali.training import run_dir as runs
from cosmoflow_dali.training.evaluation import Evaluation


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Return the folder of a run of three epochs, with a name that needs escaping."""
    folder = tmp_path / "a <b> & c"
    folder.mkdir()
    rng = np.random.default_rng(0)
    targets = rng.uniform(-1, 1, (40, 4))
    evaluation = Evaluation(np.arange(40), 0.8 * targets + 0.1 * rng.standard_normal((40, 4)), targets)
    runs.save_config(folder, resolve({}))
    runs.write_predictions(folder, evaluation)
    trivial = evaluation.trivial_mae_per_parameter
    summary = evaluation.scores() | {
        "trivial_mae": float(np.mean(list(trivial.values()))),
        "trivial_mae_per_parameter": trivial,
        "residual_rms": evaluation.residual_rms,
        "baseline": {"name": "ridge <x>", "mae": 0.3, "mae_per_parameter": trivial},
        "outcome": "finished",
        "seed": 3,
        "epochs": 3,
        "steps": 30,
        "global_batch": 4,
        "ranks": 2,
        "parameters": 78100,
        "samples_per_s": 12.3,
        "data_wait_fraction": {"mean": 0.1, "worst_rank": 0.2},
        "seconds": {"simulate": 3.0, "train": 20.0},
        "versions": machine.versions(),
        "hardware": machine.hardware(),
    }
    (folder / runs.SUMMARY).write_text(json.dumps(summary))
    timed = {"samples_per_s": 10.0, "data_wait_ms": 2.0, "step_ms": 20.0}
    lines = [{"kind": "step", "step": s, "loss": 1 / s, "lr": 0.1 / s, **timed} for s in range(10, 31, 10)]
    lines += [
        {"kind": "eval", "step": s, "mae": 0.3, "mse": 0.1, "mae_per_parameter": trivial}
        for s in (10, 20, 30)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_page_has_no_external_links_and_well_formed_pictures(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 3
    for picture in pictures:
        ElementTree.fromstring(picture)
    links = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert all(link.startswith("data:") for link in links)
    assert "<script" not in page


def test_page_has_the_scores_and_escapes_text(run_folder: Path) -> None:
    page = write_report(run_folder).read_text()
    summary = json.loads((run_folder / "summary.json").read_text())
    assert f"{summary['mae']:.4f}" in page and f"{summary['trivial_mae']:.4f}" in page
    assert "a &lt;b&gt; &amp; c" in page and "ridge &lt;x&gt;" in page and "<b>" not in page
    # A standard error in physical units: H_0's is 7 km/s/Mpc for a residual of 1.
    assert f"{7 * summary['residual_rms']['H_0']:.3g} km/s/Mpc" in page


def test_no_report_without_matplotlib(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level("INFO", "cosmoflow_dali"):
        summary._write_report(run_folder)
    assert "no report: matplotlib is not installed" in caplog.text
    assert not (run_folder / "report.html").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"text.usetex": True},
        {"savefig.format": "pdf", "savefig.dpi": 3000},
        {"path.sketch": (1, 100, 2), "font.family": "serif", "axes.facecolor": "black"},
    ],
)
def test_page_does_not_depend_on_the_users_matplotlibrc(run_folder: Path, settings: Any) -> None:
    expected = write_report(run_folder).read_bytes()
    with matplotlib.rc_context(settings):
        assert write_report(run_folder).read_bytes() == expected


def test_pictures_are_drawn_where_a_variable_names_a_missing_backend() -> None:
    code = "from cosmoflow_dali.reporting.plot_style import plot_style\nwith plot_style(): pass"
    environment = os.environ | {"MPLBACKEND": "module://backend_of_a_notebook"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_page_of_the_same_run_is_identical(run_folder: Path) -> None:
    assert write_report(run_folder).read_bytes() == write_report(run_folder).read_bytes()
