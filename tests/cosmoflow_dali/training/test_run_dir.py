"""Run folders: one for each run, and one process for each folder."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import Done, command, config_file, program, start, write_tiny

from cosmoflow_dali.training import run_dir
from cosmoflow_dali.training.run_dir import lock_run
from pipelines.errors import DataError

TRAIN = "cosmoflow_dali.train"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    data = write_tiny(folder / "data", train=4, validation=1)
    return config_file(folder / "c.yaml", data, epochs=1)


def test_new_folders_of_one_name_are_numbered(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(run_dir._make_new, [tmp_path / "runs" / "a-1"] * 8))
    names = {"a-1", *(f"a-1-{number}" for number in range(2, 9))}
    assert {path.name for path in made} == names == {path.name for path in (tmp_path / "runs").iterdir()}
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        run_dir._make_new(tmp_path / "file" / "a-1")


def test_runs_of_the_same_second_have_folders_of_their_own(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "20240229-120000")
    # The other run has not written anything yet.
    Path("runs/c-20240229-120000").mkdir(parents=True)
    done = program(TRAIN, "--config", config)
    assert done.code == 0 and "run folder runs/c-20240229-120000-2," in done.err, done.err
    assert not any(Path("runs/c-20240229-120000").iterdir())
    assert Path("runs/c-20240229-120000-2/report.html").exists()


@pytest.mark.parametrize("name", [".DS_Store", "._config.yaml", ".nfs0123", "notes.txt"])
def test_folder_of_hidden_files_alone_is_empty(name: str, config: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).touch()
    done = program(TRAIN, "--config", config, "--run-dir", tmp_path / "run")
    assert (done.code == 0) == name.startswith("."), done.err


@pytest.mark.parametrize("flags", [(), ("--resume",)])
def test_run_that_another_process_has_is_refused(
    flags: tuple[str, ...], config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_dir, "_GRACE", 0.1)
    run = tmp_path / "run"
    if flags:
        assert program(TRAIN, "--config", config, "--run-dir", run).code == 0
    run.mkdir(exist_ok=True)
    before = {path: path.read_bytes() for path in run.iterdir() if path.suffix}

    def train() -> Done:
        return program(TRAIN, "--config", config, "--run-dir", run, "--epochs", 2, *flags)

    with lock_run(run):
        refused = train()
    assert refused.code == 1 and f"error: {run}: is in use by process " in refused.err, refused.err
    assert all(path.read_bytes() == content for path, content in before.items())
    # The lock ends with its process, and an empty lock file is no run.
    assert train().code == 0
    with lock_run(run), pytest.raises(DataError) as error, lock_run(run):
        pass
    assert error.value.path == str(run)


def test_killed_run_is_resumed_at_once_by_one_of_two(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = command(TRAIN, ["--config", config, "--run-dir", run, "--epochs", 400, "--resume"])
    first = start(line)
    while not any((run / "checkpoints").glob("*.pt")):
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    both = [start(line), start(line)]
    try:
        ended = None
        while ended is None:
            ended = next((one for one in both if one.poll() is not None), None)
            time.sleep(0.02)
        (other,) = (one for one in both if one is not ended)
        _, err = ended.communicate(timeout=60)
        assert ended.wait() == 1 and "is in use by process" in err, err
        assert other.poll() is None
        other.send_signal(signal.SIGTERM)
        _, err = other.communicate(timeout=60)
        assert other.wait() == 75, err
    finally:
        for one in (first, *both):
            one.kill()
            one.wait()
