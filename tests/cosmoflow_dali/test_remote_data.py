"""Programs on data in an object store or on a web server give what they give on the same files."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_proxy import FaultProxy, Rule
from helpers import Ranks, command, config_file, inline_workers, program, write_tiny
from object_store import Bucket, client_environment
from run_artifacts import metrics, same_weights

from cosmoflow_dali.training.checkpoint import Checkpoint
from pipelines.dataset.open import open_folder
from pipelines.sample import SPLITS
from pipelines.storage.requests import COUNTS

TRAIN = "cosmoflow_dali.train"


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders npy and packed, each with the same splits and their manifests."""
    root = tmp_path_factory.mktemp("sets")
    write_tiny(root / "npy", train=12, validation=4, test=2)
    with inline_workers():
        line = ["-i", root / "npy", "-o", root / "packed", "--to", "packed", "--samples-per-shard", 5]
        assert program("preprocess.convert", *line).code == 0
        assert program("preprocess.verify", root / "npy", "--write").code == 0
    return root


@pytest.fixture(scope="module")
def finished(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs on the local packed samples."""
    return train(sets / "packed", tmp_path_factory.mktemp("finished"), epochs=2)


def train(data: object, folder: Path, *arguments: object, ranks: int = 1, **changes: object) -> Path:
    """Train on `data` to the end; return the folder of the run in `folder`."""
    config = config_file(folder / "c.yaml", Path("unused"), **changes)
    line = ["--config", config, "--run-dir", folder / "run", "--data-dir", data, *arguments]
    done = program(TRAIN, *line, ranks=ranks)
    assert done.code == 0, done.err
    return folder / "run"


def same(run: Path, other: Path) -> bool:
    return metrics(run) == metrics(other) and same_weights(run, other)


def checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("*.pt"))


def test_a_run_on_faulty_transfers_is_that_on_local_files_and_keeps_no_key(
    sets: Path,
    finished: Path,
    bucket: Bucket,
    fault_proxy: FaultProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    match = r"^GET .*\.tar"
    fault_proxy.configure(
        Rule("corrupt", match, skip=2, times=2),
        Rule("reset", match, 0.05),
        Rule("truncate", match, 0.05),
        Rule("slow down", match, 0.02),
    )
    url, before = bucket.put(sets / "packed"), COUNTS.retries
    run = train(url, tmp_path, epochs=2)
    assert same(run, finished)
    faults = sum(bool(one.fault) for one in fault_proxy.requests())
    transfers = json.loads((run / "summary.json").read_text())["transfers"]
    # What was still in flight at the end is not counted.
    assert 2 <= transfers["retries"] - before <= faults
    assert "repeated" in (run / "report.html").read_text()
    assert url in (run / "config.yaml").read_text()
    # None of them holds a key, nor does what is printed of one that is refused.
    keys = [value for name, value in client_environment(0).items() if name.endswith("_KEY") or "_ID" in name]
    keys.append("wrong-secret-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[-1])
    line = ["--run-dir", run, "--resume", "--epochs", 3, "--data-dir", url.replace("s3://", "s3://other-")]
    refused = program(TRAIN, *line)
    assert (refused.code, refused.err.count("error: ")) == (1, 1)
    texts = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    texts += [refused.out.encode(), refused.err.encode(), caplog.text.encode()]
    assert len(keys) == 3 and not any(key.encode() in text for key in keys for text in texts)


@pytest.mark.parametrize(
    "kind", ["s3", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("http", "file"))]
)
def test_scores_and_predictions_by_url(kind: str, sets: Path, finished: Path, bucket: Bucket) -> None:
    url = f"file://{sets}" if kind == "file" else bucket.put(sets)
    url = f"{bucket.http}/data" if kind == "http" else url
    weights = ("--weights", checkpoint(finished))

    def evaluate(*arguments: object) -> dict[str, Any]:
        done = program("cosmoflow_dali.evaluate", *weights, "--device", "cpu", "--data-dir", *arguments)
        assert done.code == 0, done.err
        found: dict[str, Any] = json.loads(done.out)
        return found

    def predict(path: object) -> list[list[str]]:
        done = program("cosmoflow_dali.predict", *weights, path)
        assert done.code == 0, done.err
        # Without the path of the sample.
        return [line.split(",")[1:] for line in done.out.splitlines()]

    score = evaluate(sets / "packed")
    assert evaluate(f"{url}/packed") == score
    assert evaluate(f"{url}/npy", "--against", f"{url}/packed")["against"] == score
    expected = predict(sets / "packed" / "test")
    for path in ("packed/test", "packed/test/shard_000000.tar", "npy/test"):
        assert predict(f"{url}/{path}") == expected
    assert predict(f"{url}/npy/test/universe_2000_000_data.npy") == expected[:2]
    if kind == "s3":
        # Which needs 50 universes.
        baseline = [program("cosmoflow_dali.baseline", f"{root}/npy") for root in (url, sets)]
        assert baseline[0].err == baseline[1].err.replace(str(sets), url) != ""


def test_what_must_be_on_a_disk_is_refused_by_url(finished: Path, sets: Path, tmp_path: Path) -> None:
    config = config_file(tmp_path / "c.yaml", sets / "npy")
    url, weights = "s3://bucket/folder", checkpoint(finished)
    line = ("--config", config, "--run-dir")
    refused = [
        program(TRAIN, *line, url),
        program(TRAIN, *line, tmp_path / "run", "--set", f"data.stage.dir={url}"),
        program(TRAIN, *line, tmp_path / "run", "--set", f"data.cache={{dir: '{url}', size: 1 GB}}"),
        program("cosmoflow_dali.predict", "--weights", weights, "--output", url, sets / "npy" / "test"),
        program("preprocess.stage", "-i", sets / "npy", "-o", url),
        program("preprocess.download", "--from", sets / "npy", "-o", url),
    ]
    for done in refused:
        assert (done.code, done.err.count("error: ")) == (1, 1), done.err
        assert url in done.err
    assert not Path("s3:").exists()


def test_samples_by_url_are_not_simulated(bucket: Bucket, tmp_path: Path) -> None:
    done = program(TRAIN, "--data-dir", f"{bucket.url}/none", "--run-dir", tmp_path / "run")
    assert (done.code, done.err.count("error: ")) == (1, 1)
    assert f"{bucket.url}/none" in done.err


@pytest.mark.slow
def test_verify_stage_and_convert_by_url(sets: Path, bucket: Bucket, tmp_path: Path) -> None:
    bucket.put(sets)
    for number, url in enumerate((f"{bucket.url}/data", f"{bucket.http}/data")):
        # With worker processes, which are given the storage.
        assert program("preprocess.verify", f"{url}/packed").code == 0
        converted, staged = tmp_path / f"converted {number}", tmp_path / f"staged {number}"
        line = ["-i", f"{url}/npy", "-o", converted, "--to", "packed", "--samples-per-shard", 5]
        assert program("preprocess.convert", *line).code == 0
        assert program("preprocess.stage", "-i", f"{url}/packed", "-o", staged).code == 0
        for shard in (sets / "packed").rglob("*.tar"):
            name = shard.relative_to(sets / "packed")
            assert (converted / name).read_bytes() == shard.read_bytes()
        for split in SPLITS:
            found, expected = (open_folder(root / split) for root in (staged, sets / "packed"))
            assert found.fingerprint() == expected.fingerprint()


IMPATIENT = """
from pipelines.storage import requests
requests.DEADLINE_SECONDS = 3.0
from cosmoflow_dali import train
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World
exit_now(train.main(), World.detect())
"""


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_a_server_that_stops_ends_all_ranks_and_a_resume_is_exact(
    sets: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    changes = {
        "epochs": 6,
        "log": {"every": 1, "checkpoint_every": 1},
        "loader": {"batch_size": 2, "requests_ahead": 2, "on_bad_sample": "skip"},
    }
    (tmp_path / "whole").mkdir()
    whole = train(sets / "packed", tmp_path / "whole", ranks=2, **changes)
    url, run = bucket.put(sets / "packed"), tmp_path / "run"
    config = config_file(tmp_path / "c.yaml", Path("unused"), **changes)
    line = ["--config", str(config), "--run-dir", str(run), "--data-dir", url]
    fault_proxy.configure(latency=0.05)
    with Ranks([sys.executable, "-c", IMPATIENT, *line], range(2), 2) as ranks:
        wait_for(lambda: len(list(run.glob("checkpoints/*.pt"))) > 2)
        fault_proxy.refuse()
        started = time.monotonic()
        codes, output = ranks.end(30)
    assert codes == {1} and time.monotonic() - started < 20
    # One line; of each rank, if none hears of the other's before its own.
    errors = [line for line in output.splitlines() if "error: " in line]
    assert 1 <= len(errors) <= 2 and all(f"{url}/" in line for line in errors)
    assert "Traceback" not in output
    newest = Checkpoint.newest(run / "checkpoints")
    assert newest is not None and newest.position.epoch < 6
    fault_proxy.reset()
    done = program(TRAIN, "--run-dir", run, "--resume", ranks=2)
    assert done.code == 0, done.err
    assert same(run, whole)


@pytest.mark.slow
def test_kills_and_resumes_on_other_ranks_and_places_give_the_bits_of_local_files(
    sets: Path, bucket: Bucket, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    url, run, local = bucket.put(sets / "packed"), tmp_path / "run", sets / "packed"
    log = {"every": 1, "checkpoint_every": 1}
    loader = {"batch_size": 4, "requests_ahead": 2}
    config = config_file(tmp_path / "c.yaml", Path("unused"), epochs=8, log=log, loader=loader)
    cache = ("--set", f"data.cache={{dir: {tmp_path / 'cache'}, size: 1 GB}}")
    fault_proxy.configure(latency=0.05)

    def killed(ranks: int, *arguments: object) -> None:
        newest = checkpoint(run) if run.exists() else None
        with Ranks(command(TRAIN, [*arguments, "--run-dir", run, "--data-dir", url]), range(ranks), ranks):
            wait_for(lambda: run.exists() and any(run.glob("checkpoints/*.pt")))
            wait_for(lambda: checkpoint(run) != newest)

    def resumed(name: str, data: object, ranks: int, batch: int) -> Path:
        copy = shutil.copytree(run, tmp_path / name)
        line = ["--run-dir", copy, "--data-dir", data, "--batch-size", batch, *(cache if data == url else ())]
        done = program(TRAIN, *line, "--resume", ranks=ranks)
        assert done.code == 0, done.err
        return copy

    killed(1, "--config", config)
    first = resumed("local on 4", local, 4, 1)
    killed(4, "--resume", "--batch-size", 1, *cache)
    done = [record for record in metrics(run) if "loss" in record]
    assert done == [record for record in metrics(first) if "loss" in record][: len(done)]
    assert same(resumed("url on 2", url, 2, 2), resumed("local on 2", local, 2, 2))
