"""Time and memory of sixteen ranks on one machine."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path

import pytest
from helpers import ROOT, command, config_file, environment, started_by, write_tiny


def proportional_set_size(pids: list[int]) -> int:
    """Return the bytes of memory of the processes `pids`; shared pages count once."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


@pytest.mark.slow
def test_sixteen_ranks_train_a_step_within_12_gb_and_3_minutes(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=16, validation=16)
    config = config_file(tmp_path / "config.yaml", data, loader={"batch_size": 1}, epochs=1)
    arguments = ["--config", config, "--run-dir", tmp_path / "run"]
    began, peak = time.monotonic(), 0
    with (tmp_path / "said").open("w") as said:
        line = command("cosmoflow_dali.train", arguments, ranks=16)
        ranks = subprocess.Popen(line, cwd=ROOT, env=environment(), stdout=said, stderr=said)
        while ranks.poll() is None and time.monotonic() - began < 240:
            peak = max(peak, proportional_set_size(started_by(ranks.pid)))
            time.sleep(0.5)
        ranks.kill()
        ranks.wait()
    assert ranks.returncode == 0, (tmp_path / "said").read_text()
    assert time.monotonic() - began < 180
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["ranks"], summary["steps"]) == (16, 1)
    # Each rank takes a hundred megabytes at least, or nothing was measured.
    assert 1.6e9 < peak < 12e9
