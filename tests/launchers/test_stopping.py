"""Stop signals and errors before training begins."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Ranks, command, config_file, started_by, wait_until_gone, write_tiny

from cosmoflow_dali import train
from cosmoflow_dali.arguments import parse
from cosmoflow_dali.training import run_data
from cosmoflow_dali.training.stop_signal import StopSignal
from pipelines.dataset.dataset import SampleDataset
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.errors import UserError


def test_stop_signal_before_training_exits_with_75(tmp_path: Path) -> None:
    made = {"dir": str(tmp_path / "data"), "simulate": {"size": 32, "train": 4096}}
    model = {"size": 32, "blocks": 3, "filters": 2, "dense": [16, 8], "dropout": 0.0}
    config = config_file(tmp_path / "c.yaml", tmp_path, data=made, model=model)
    line = command("cosmoflow_dali.train", ["--config", config, "--run-dir", tmp_path / "run", "--resume"])
    with Ranks(line, [0], 1) as ranks:
        (process,) = ranks.processes.values()
        deadline = time.monotonic() + 60
        while not (children := started_by(process.pid)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        statuses, words = ranks.end(20)
        assert statuses == {75}, words
        wait_until_gone(children)


def test_error_of_an_instance_is_printed_by_its_own_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_tiny(tmp_path / "data", train=4, validation=2)
    config = config_file(tmp_path / "c.yaml", data)
    (tmp_path / "runs" / "2").mkdir(parents=True)
    (tmp_path / "runs" / "2" / "full").touch()
    for name, value in (("RANK", 1), ("SIZE", 2), ("LOCAL_RANK", 1), ("LOCAL_SIZE", 2)):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", str(value))
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    with pytest.raises(SystemExit) as left:
        train.main(["--config", str(config), "--instances", "2", "--run-dir", str(tmp_path / "runs")])
    assert left.value.code == 1
    assert f"error: {tmp_path}/runs/2: is not empty" in capsys.readouterr().err


def test_opening_the_data_set_is_guarded_against_stalls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about: list[str | None] = []

    class Guarded(Session):
        @contextlib.contextmanager
        def stall_guard(self, operation: str | None) -> Iterator[None]:
            about.append(operation)
            yield
            about.pop()

    def hang(folder: Path) -> SampleDataset:
        raise UserError(f"hangs while {about}")

    monkeypatch.setattr(run_data, "open_folder", hang)
    arguments = parse(["--config", str(config_file(tmp_path / "c.yaml", tmp_path))])
    with pytest.raises(UserError, match=r"hangs while .'opening the data set'"):
        train._prepare_run(arguments, Guarded(World()), contextlib.ExitStack())


def test_a_hangup_asks_training_to_stop_unless_nohup_has_it_ignored() -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.received
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
