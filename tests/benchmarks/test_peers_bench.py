"""peers_bench: rows deliver every sample with its values, and one that cannot is named and stops no other."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_tiny

from benchmarks import harness, peers_bench
from benchmarks.peers import process
from benchmarks.peers.contract import Item, Job
from benchmarks.peers.disk import drop_from_cache, limited_disk
from benchmarks.peers.registry import PEERS
from pipelines.dataset.open import open_folder
from pipelines.errors import UserError

SAMPLES, SIZE = 3, 32
OURS, FILLED, BROKEN, ABSENT = "packed", "DataLoader, npy, shared memory", "npy", "SPDL, npy"
FLAGS = ["--samples", str(SAMPLES), "--size", str(SIZE), "--steps", "4", "--rounds", "1"]


@pytest.mark.slow
def test_rows_are_measured_and_failures_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = dataclasses.replace(PEERS[ABSENT], modules=("no_such_package",))
    monkeypatch.setitem(PEERS, ABSENT, absent)
    # Without files, as after a failure of its writer.
    (tmp_path / "data" / f"{SAMPLES}x1x{SIZE}" / BROKEN).mkdir(parents=True)
    flags = [*FLAGS, "--rows", ";".join((OURS, BROKEN, FILLED, ABSENT)), "--data-dir", str(tmp_path / "data")]
    (rows,) = peers_bench.main([*flags, "--output", str(tmp_path / "out")]).values()
    table = capsys.readouterr().out
    assert list(rows) == [OURS, FILLED]
    assert f"{ABSENT}: left out, no_such_package not installed" in table and f"{BROKEN}: failed" in table
    for row in rows.values():
        assert len(row.rounds) == 1 and min(one.samples_per_s for one in row.rounds) > 0
        assert row.cpu_ms.p10 > 0 and row.first_ms > 0 and row.peak_mb > 10
    assert rows[OURS].cpu_of_first == harness.Spread(1.0, 1.0, 1.0)
    # int16 counts at four redshifts, and headers and a target.
    assert rows[FILLED].disk_mb == pytest.approx(8 * SIZE**3 / 1e6, rel=0.01)
    assert rows[OURS].disk_mb < rows[FILLED].disk_mb / 2
    (saved,) = (tmp_path / "out").glob("*.json")
    record = json.loads(saved.read_text())["results"]
    assert record["page cache"].keys() == rows.keys() and record["failed"].keys() == {BROKEN}


@pytest.mark.parametrize("fault", ["none", "value", "missing", "repeated", "shape"])
def test_values_and_samples_of_a_row_are_checked(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny(tmp_path, train=SAMPLES, validation=1, size=8) / "train"
    split = open_folder(source)

    def deliver(job: Job) -> Iterator[Item]:
        order = {"missing": [2, 0], "repeated": [2, 0, 0]}.get(fault, [2, 0, 1])
        for index in order:
            sample = split.read(index)
            volume = torch.log1p(torch.from_numpy(sample.counts.astype(np.float32))).permute(3, 0, 1, 2)[None]
            if fault == "value" and index == 1:
                volume[0, 3, 7, 7, 7] += 1e-5
            yield volume[:, :, 1:] if fault == "shape" else volume, sample.target

    monkeypatch.setitem(PEERS, OURS, dataclasses.replace(PEERS[OURS], open=deliver))
    task = process.Task("check", OURS, str(source), str(source), SAMPLES, 8, 1)
    if fault == "none":
        process.check(task)
    else:
        with pytest.raises(ValueError):
            process.check(task)


def test_cpu_time_of_grandchildren_counts() -> None:
    spin = "import time\nwhile time.process_time() < 30: pass"
    # The second command keeps the shell from replacing itself by the first.
    with subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -c '{spin}'; true"], start_new_session=True
    ) as child:
        try:
            before, deadline = harness.cpu_seconds(), time.monotonic() + 60
            own = time.process_time()
            while harness.cpu_seconds() - before < 0.3 + time.process_time() - own:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            os.killpg(child.pid, 9)


def test_cpu_time_of_a_childs_ended_children_counts() -> None:
    spin = "import time\nwhile time.process_time() < 0.4: pass"
    shell = ["sh", "-c", f"{sys.executable} -c '{spin}'; echo; sleep 60"]
    before, own = harness.cpu_seconds(), time.process_time()
    with subprocess.Popen(shell, start_new_session=True, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout and child.stdout.readline()
            assert harness.cpu_seconds() - before >= 0.3 + time.process_time() - own
        finally:
            os.killpg(child.pid, 9)


@pytest.mark.slow
def test_reads_from_a_limited_disk(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(os.urandom(1 << 23))
    read = ["dd", f"if={file}", "of=/dev/null", "bs=64K"]

    def seconds(enter: Callable[[], None] | None) -> float:
        drop_from_cache(file)
        started = time.perf_counter()
        subprocess.run(read, check=True, preexec_fn=enter, stderr=subprocess.DEVNULL)
        return time.perf_counter() - started

    try:
        with limited_disk(tmp_path, 1 << 22) as enter:
            assert seconds(enter) >= 1.2
            assert seconds(None) < 1.2
    except UserError as error:
        pytest.skip(str(error))
