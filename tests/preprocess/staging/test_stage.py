"""Staging: which node gets which samples, what is read and written, and faults."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import (
    OPEN,
    SIZE,
    can_mount,
    command,
    config_file,
    mounted,
    program,
    run,
    slab_of,
    slabs,
    start,
    tiny_sample,
    write_tiny,
)

from cosmoflow_dali.reporting.ridge_baseline import fit_ridge
from pipelines.dataset.manifest import MANIFEST
from pipelines.dataset.open import open_folder
from pipelines.distributed.locks import locked
from pipelines.distributed.session import Session
from pipelines.distributed.world import World
from pipelines.errors import AccessError, ConfigError, DataError, UserError
from pipelines.formats.packed.decode import PackedSample
from pipelines.formats.packed.encode import encode
from pipelines.formats.packed.tar_shard import write_shard
from pipelines.formats.registry import FORMATS
from pipelines.io import read_file
from pipelines.loading.reader import Reader
from pipelines.sample import Sample
from pipelines.slab import Slab
from preprocess.convert import convert
from preprocess.staging.config import StageConfig, partition_indices
from preprocess.staging.stager import StagingReport, stage
from preprocess.staging.transfer import indices_for_local_rank, indices_to_read

STAGE = "preprocess.stage"


def on_nodes(nodes: int, ranks: int, source: Path, target: Path, *options: str) -> list[tuple[int, str, str]]:
    """Stage `source` on `nodes` nodes of `ranks` ranks each; the disk of node n is `target`/n."""

    def line(node: int) -> list[object]:
        return [STAGE, "-i", source, "-o", target / str(node), *options]

    return as_srun(nodes, ranks, line)


def as_srun(nodes: int, ranks: int, line: Callable[[int], list[object]]) -> list[tuple[int, str, str]]:
    """Run `python -m line(n)` as srun would on each node n: the ranks' exit statuses, output and errors.

    NODE tells a program the number of its node, for paths that are each node's own.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []
    for rank in range(nodes * ranks):
        place = {
            "SLURM_PROCID": str(rank),
            "SLURM_STEP_NUM_TASKS": str(nodes * ranks),
            "SLURM_LOCALID": str(rank % ranks),
            "SLURM_STEP_TASKS_PER_NODE": f"{ranks}(x{nodes})",
            # As enroot's hook sets them for PyTorch, without a local size.
            "RANK": str(rank),
            "WORLD_SIZE": str(nodes * ranks),
            "LOCAL_RANK": str(rank % ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "NODE": str(rank // ranks),
        }
        started = [sys.executable, "-m", *map(str, line(rank // ranks))]
        running.append(start(started, **place))
    said = [process.communicate(timeout=240) for process in running]
    return [(process.wait(), out, err) for process, (out, err) in zip(running, said, strict=True)]


def content(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below `folder`, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 1), pytest.param(2, 1, marks=pytest.mark.slow), (3, 2)])
@pytest.mark.parametrize("format_name", ["tfrecord_gzip", "npy"])
def test_every_node_has_all_samples_and_each_file_is_read_once(
    format_name: str, nodes: int, ranks: int, tmp_path: Path
) -> None:
    data = write_tiny(tmp_path / "data", train=7, validation=2, format_name=format_name)
    before = content(data)
    done = on_nodes(nodes, ranks, data, tmp_path / "disk")
    assert [code for code, _, _ in done] == [0] * (nodes * ranks), done
    size = sum(path.stat().st_size for path in (data / "train").iterdir())
    assert f"staged 7 of 7 samples on {nodes} nodes" in done[0][1] and f"{size:,} bytes read" in done[0][1]
    first = content(tmp_path / "disk" / "0")
    for node in range(nodes):
        assert content(tmp_path / "disk" / str(node)) == first
        split = open_folder(tmp_path / "disk" / str(node) / "train")
        assert (split.format_name, len(split)) == ("npy", 7)
        for index in range(7):
            expected = tiny_sample(index)
            np.testing.assert_array_equal(split.read(index).counts, expected.counts)
            np.testing.assert_array_equal(split.read(index).target, expected.target)
    assert content(data) == before


def test_second_run_stages_only_what_a_node_lost(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=6, validation=1, format_name="tfrecord_gzip")
    on_nodes(2, 1, data, tmp_path / "disk")
    first = content(tmp_path / "disk" / "0")
    done = on_nodes(2, 1, data, tmp_path / "disk")
    assert "staged 0 of 6 samples" in done[0][1] and " 0 bytes read" in done[0][1]
    (tmp_path / "disk" / "1" / "train" / "universe_0003_000_data.npy").unlink()
    up_to_date = (tmp_path / "disk" / "0" / "train" / "universe_0003_000_data.npy").stat()
    FORMATS["tfrecord_gzip"].write(data / "train", "universe_0004_000", tiny_sample(77))
    done = on_nodes(2, 1, data, tmp_path / "disk")
    assert "staged 2 of 6 samples" in done[0][1]
    # The node that had it keeps its file.
    assert (tmp_path / "disk" / "0" / "train" / "universe_0003_000_data.npy").stat() == up_to_date
    again = content(tmp_path / "disk" / "1")
    assert again == content(tmp_path / "disk" / "0") and again.keys() == first.keys()
    np.testing.assert_array_equal(
        open_folder(tmp_path / "disk" / "0" / "train").read(4).counts, tiny_sample(77).counts
    )


def test_damaged_sample_is_named_and_others_are_staged(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=5, validation=1, format_name="tfrecord_gzip")
    bad = data / "train" / "universe_0002_000.tfrecord"
    bad.write_bytes(bad.read_bytes()[:-9])
    done = on_nodes(2, 1, data, tmp_path / "disk")
    assert [code for code, _, _ in done] == [1, 1]
    assert f"error: {bad}: its gzip stream is cut off" in done[0][2]
    assert "staged 4 of 5 samples on 2 nodes" in done[0][1]
    assert "1 samples are damaged" in done[0][2] and "Traceback" not in "".join(err for _, _, err in done)
    for node in "01":
        assert len(list((tmp_path / "disk" / node / "train").glob("*_data.npy"))) == 4


@pytest.mark.parametrize("first", [0, pytest.param(5, marks=pytest.mark.slow)])
def test_unreadable_file_does_not_stop_others(first: int, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=12, validation=1, format_name="tfrecord_gzip")
    bad = data / "train" / f"universe_{first:04d}_000.tfrecord"
    bad.rename(tmp_path / "lost")
    bad.symlink_to("nowhere")
    for done_before in (False, True):
        done = on_nodes(2, 1, data, tmp_path / "disk")
        assert [code for code, _, _ in done] == [1, 1]
        assert f"error: {bad}: cannot be read (No such file or directory)" in done[0][2]
        there = 0 if done_before else 11
        assert f"staged {there} of 12 samples on 2 nodes" in done[0][1]
        assert "error: 1 samples are damaged" in done[0][2] and "Traceback" not in done[0][2] + done[1][2]
        assert [len(open_folder(tmp_path / "disk" / node / "train")) for node in "01"] == [11, 11]
    bad.unlink()
    (tmp_path / "lost").rename(bad)
    assert [code for code, _, _ in on_nodes(2, 1, data, tmp_path / "disk")] == [0, 0]
    assert [len(open_folder(tmp_path / "disk" / node / "train")) for node in "01"] == [12, 12]


def test_missing_source_ends_staging_and_removes_nothing(tmp_path: Path) -> None:
    data, disk = write_tiny(tmp_path / "data", train=20, validation=1), tmp_path / "disk"
    staged(data, disk)
    before = content(disk)
    splits = {name: open_folder(data / name) for name in ("train", "validation")}
    (data / "train").rename(tmp_path / "gone")
    with pytest.raises(AccessError) as error:
        stage(splits, disk, StageConfig(str(disk)), Session(World()))
    assert error.value.path == str(data / "train")
    # The folder exists without files.
    (data / "train").mkdir()
    with pytest.raises(AccessError) as error:
        stage(splits, disk, StageConfig(str(disk)), Session(World()))
    assert "the 16 files before it" in error.value.fault
    assert content(disk) == before


def test_many_unreadable_files_end_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, disk = write_tiny(tmp_path / "data", train=40, validation=1), tmp_path / "disk"

    def lost(path: Path, *, direct: bool = False) -> bytes:
        number = path.name[9:13]  # Of samples; journals are read too.
        there = not number.isdigit() or int(number) not in range(20, 40)
        return read_file(path if there else path.with_suffix(".lost"), direct=direct)

    monkeypatch.setattr("pipelines.storage.local.read_file", lost)
    with pytest.raises(UserError, match="the 16 files before it"):
        staged(data, disk)
    monkeypatch.undo()
    assert staged(data, disk)[0].faults == ()
    assert len(open_folder(disk / "train")) == 40


def test_training_continues_without_an_unreadable_sample(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=8, validation=2, format_name="tfrecord_gzip")
    bad = data / "train" / "universe_0002_000.tfrecord"
    bad.unlink()
    bad.symlink_to("nowhere")
    where = {"dir": str(data), "stage": {"dir": str(tmp_path / "disk")}}
    loader = {"batch_size": 4, "on_bad_sample": "skip"}
    config = config_file(tmp_path / "c.yaml", data, data=where, loader=loader, epochs=1)
    done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["skipped_samples"]["train"] == 1
    logged = (tmp_path / "run" / "mlperf.log").read_text().splitlines()
    (stop,) = (line for line in logged if '"staging_stop"' in line)
    assert '"samples": 9' in stop


def test_node_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=3, validation=1)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "1").write_text("a file where the folder should be")
    start = time.monotonic()
    done = on_nodes(2, 1, data, tmp_path / "disk")
    assert [code for code, _, _ in done] == [1, 1]
    assert "cannot be written (Not a directory)" in done[0][2] and "Traceback" not in done[0][2] + done[1][2]
    assert time.monotonic() - start < 60


def staged(
    data: Path, disk: Path, *, beside: int = 0, skip_source_check: bool = False
) -> list[StagingReport]:
    """Stage `data` to `disk` with one rank; `beside` is the number of its node's ranks of another model."""
    splits = {name: open_folder(data / name) for name in ("train", "validation")}
    done = stage(
        splits,
        disk,
        StageConfig(str(disk)),
        Session(World(other_local_ranks=beside)),
        skip_source_check=skip_source_check,
    )
    for (split, _), name in zip(done, splits, strict=True):
        assert split.root == disk / name
    return [staged for _, staged in done]


def test_changed_source_is_staged_again(tmp_path: Path) -> None:
    data, disk = (
        write_tiny(tmp_path / "data", train=4, validation=1, format_name="tfrecord"),
        tmp_path / "disk",
    )
    assert [one.samples for one in staged(data, disk)] == [4, 1]
    bad = data / "train" / "universe_0002_000.tfrecord"
    bad.write_bytes(bad.read_bytes()[:-9])
    assert staged(data, disk)[0].faults[0].startswith(f"{bad}: is cut off")
    # The sample that was staged before is gone from the manifest and the folder.
    left = open_folder(disk / "train")
    assert [left.sample_id(index) for index in range(len(left))] == [
        f"universe_000{n}_000" for n in (0, 1, 3)
    ]
    assert not list((disk / "train").glob("universe_0002*"))
    FORMATS["tfrecord"].write(data / "train", "universe_0002_000", tiny_sample(2))
    assert [one.samples for one in staged(data, disk)] == [1, 0]
    assert len(open_folder(disk / "train")) == 4
    # With skip_source_check complete folders are not compared with the source files.
    (data / "train" / "universe_0000_000.tfrecord").unlink()
    splits = {name: open_folder(data / name) for name in ("train", "validation")}
    assert len(splits["train"]) == 3
    shutil.rmtree(disk)
    staged(data, disk)
    for path in (data / "train").iterdir():
        os.utime(path, ns=(0, 1))
    assert [one.samples for one in staged(data, disk, skip_source_check=True)] == [0, 0]
    assert [one.samples for one in staged(data, disk)] == [3, 0]


def test_truncated_shard_does_not_stop_others(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=6, validation=1)
    for name in ("train", "validation"):
        assert convert(data / name, tmp_path / "packed" / name, "packed", workers=1, samples_per_shard=3) == 0
    shard = tmp_path / "packed" / "train" / "shard_000001.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    train, validation = staged(tmp_path / "packed", tmp_path / "disk")
    assert (train.samples, len(train.faults)) == (3, 3) and all(
        "is cut off: the shard ends" in fault for fault in train.faults
    )
    assert validation.faults == () and len(open_folder(tmp_path / "disk" / "train")) == 3


def test_missing_shard_is_named_once(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=6, validation=1)
    for name in ("train", "validation"):
        assert convert(data / name, tmp_path / "packed" / name, "packed", workers=1, samples_per_shard=3) == 0
    shard = tmp_path / "packed" / "train" / "shard_000001.tar"
    shard.unlink()
    done = program(STAGE, "-i", tmp_path / "packed", "-o", tmp_path / "disk")
    assert done.code == 1 and "staged 3 of 6 samples" in done.out and "3 samples are damaged" in done.err
    assert done.err.count(f"error: {shard}: cannot be read") == 1


def test_space_for_both_splits_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, disk = (
        write_tiny(tmp_path / "data", train=2, validation=2, format_name="tfrecord"),
        tmp_path / "disk",
    )
    # Enough for the counts, but not for headers and labels.
    monkeypatch.setattr("preprocess.staging.stager.free_space", lambda _: (4 * 2 * 4 * 16**3, 4096))
    with pytest.raises(DataError) as error:
        staged(data, disk)
    assert error.value.path == str(disk) and "131072" in error.value.fault and "163840" in error.value.fault
    assert not list(disk.rglob("*.npy"))


@pytest.mark.parametrize("name", ["data", "link", "split"])
def test_a_data_set_is_not_staged_into_itself(name: str, tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=2, validation=1)
    (tmp_path / "link").symlink_to(data)
    (tmp_path / "split").mkdir()
    (tmp_path / "split" / "train").symlink_to(data / "train")
    files = sorted(path for path in data.rglob("*") if path.is_file())
    with pytest.raises(DataError) as error:
        staged(data, tmp_path / name)
    assert error.value.path == str(tmp_path / name / "train") and str(data / "train") in error.value.fault
    assert sorted(path for path in data.rglob("*") if path.is_file()) == files


def test_two_models_on_one_node_stage_one_after_the_other(tmp_path: Path) -> None:
    data, disk = write_tiny(tmp_path / "data", train=2, validation=1), tmp_path / "disk"
    (disk / "train").mkdir(parents=True)
    with ThreadPoolExecutor(1) as other:
        with locked(disk / "train", lambda holder: None):
            waiting = other.submit(staged, data, disk, beside=1)
            with pytest.raises(TimeoutError):
                waiting.result(timeout=0.3)
            with pytest.raises(DataError) as error:
                staged(data, disk)
            assert error.value.path == str(disk / "train")
        assert [one.samples for one in waiting.result(timeout=30)] == [2, 1]
        with locked(disk / "train", lambda holder: None):
            assert [one.samples for one in staged(data, disk)] == [0, 0]


@pytest.mark.parametrize(
    ("a_node", "nodes", "models", "multiplier"),
    [
        (1, 1, 1, 1),
        (1, 3, 1, 3),
        (2, 1, 1, 1),
        (4, 15, 1, 5),
        (8, 64, 1, 64),
        (8, 64, 8, 1),
        (8, 512, 128, 4),
        (4, 24, 3, 2),
        (1, 4096, 1, 2),
    ],
)
@pytest.mark.parametrize("samples", [0, 1, 1000, 4097])
def test_each_sample_is_read_once_and_written_once_a_node(
    samples: int, a_node: int, nodes: int, models: int, multiplier: int
) -> None:
    config = StageConfig("x", "local", multiplier, preshuffle=True, seed=5)
    teams, alone = config.teams(nodes, models), config.teams(nodes // models)
    read, written = np.zeros(samples, int), np.zeros((models, samples), int)
    for number, team in enumerate(teams):
        share = partition_indices(samples, number, len(teams), config.seed)
        # A model that stages alone needs the same samples on its nodes.
        for place, node in enumerate(team):
            assert node % (nodes // models) in alone[number]
            for local_rank in range(a_node):
                world = World(node * a_node + local_rank, nodes * a_node, local_rank, a_node, "srun")
                mine = indices_for_local_rank(share, world)
                written[node // (nodes // models), mine] += 1
                own = indices_to_read(mine.tolist(), place, len(team))
                read[own] += 1
                # A rank reads exactly what its peers expect from it.
                assert own == [index for turn, index in enumerate(mine.tolist()) if turn % len(team) == place]
    assert sorted(node for team in teams for node in team) == list(range(nodes))
    # Each sample is read once, for any number of copies.
    assert (read == 1).all()
    assert (written == multiplier).all()


def test_models_side_by_side_share_one_staging_step(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=7, validation=3, format_name="tfrecord_gzip")
    options = ["--shard-type", "local", "--preshuffle", "--seed", "4"]
    done = on_nodes(4, 1, data, tmp_path / "disk", *options, "--models", "2")
    assert [code for code, _, _ in done] == [0] * 4, done
    size = sum(path.stat().st_size for path in (data / "train").iterdir())
    assert "staged 7 of 7 samples on 4 nodes" in done[0][1] and f"{size:,} bytes read" in done[0][1]
    disks = [content(tmp_path / "disk" / str(node)) for node in range(4)]
    assert disks[0] == disks[2] and disks[1] == disks[3] and disks[0] != disks[1]
    # The second model alone has nothing left to stage.
    alone = as_srun(2, 1, lambda n: [STAGE, "-i", data, "-o", tmp_path / "disk" / str(n + 2), *options])
    assert "staged 0 of 7" in alone[0][1], alone


@pytest.mark.parametrize(("samples", "teams"), [(7, 2), (8, 4), (65536, 512), (524288, 100)])
def test_partitions_are_almost_equal_and_disjoint(samples: int, teams: int) -> None:
    for seed in (None, 3):
        shares = [partition_indices(samples, team, teams, seed) for team in range(teams)]
        assert {len(share) for share in shares} <= {samples // teams, -(-samples // teams)}
        np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(samples))
    assert not np.array_equal(
        partition_indices(samples, 0, teams, 3), partition_indices(samples, 0, teams, 4)
    )


@pytest.mark.parametrize(
    "options", [pytest.param([], marks=pytest.mark.slow), ["--preshuffle", "--seed", "3"]]
)
def test_teams_get_partitions_and_each_file_is_read_once(options: list[str], tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=7, validation=3, format_name="tfrecord_gzip")
    shards = ["--shard-type", "local", "--shard-multiplier", "2", *options]
    done = on_nodes(4, 1, data, tmp_path / "disk", *shards)
    assert [code for code, _, _ in done] == [0] * 4, done
    size = sum(path.stat().st_size for path in (data / "train").iterdir())
    assert "staged 7 of 7 samples on 4 nodes" in done[0][1] and f"{size:,} bytes read" in done[0][1]
    disks = [content(tmp_path / "disk" / str(node)) for node in range(4)]
    assert disks[0] == disks[1] and disks[2] == disks[3]
    splits = [open_folder(tmp_path / "disk" / str(node) / "train") for node in (0, 2)]
    stems = [split.sample_id(index) for split in splits for index in range(len(split))]
    assert sorted(stems) == [f"universe_{index:04d}_000" for index in range(7)]
    assert abs(len(splits[0]) - len(splits[1])) == 1
    assert "staged 0 of 7" in on_nodes(4, 1, data, tmp_path / "disk", *shards)[0][1]


@pytest.mark.parametrize(
    ("format_name", "killed"),
    [
        pytest.param("packed", False, marks=pytest.mark.slow),
        pytest.param("npy", False, marks=pytest.mark.slow),
        ("npy", True),
    ],
)
def test_nodes_in_another_order_exchange_their_partitions(
    format_name: str, killed: bool, tmp_path: Path
) -> None:
    data = write_tiny(tmp_path / "data", train=7, validation=2, format_name=format_name)

    def staged_as(order: Sequence[int]) -> None:
        done = as_srun(
            2, 1, lambda n: [STAGE, "-i", data, "-o", tmp_path / str(order[n]), "--shard-type", "local"]
        )
        assert [code for code, _, _ in done] == [0, 0], done

    staged_as([0, 1])
    shares = [content(tmp_path / str(disk)) for disk in (0, 1)]
    assert shares[0] != shares[1]
    if killed:
        # As if the first node was killed before it recorded anything.
        (tmp_path / "0" / "train" / MANIFEST).unlink()
    staged_as([1, 0])
    assert [content(tmp_path / str(disk)) for disk in (1, 0)] == shares


@pytest.mark.slow
def test_training_on_partitions_scores_every_sample_and_resumes(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=13, validation=5, format_name="tfrecord_gzip")
    stage = {"dir": str(tmp_path / "disk" / "$NODE"), "shard_type": "local", "preshuffle": True}
    where = {"dir": str(data), "stage": stage}

    def line(epochs: int, batch_size: int, *more: str) -> Callable[[int], list[object]]:
        changes = {"data": where, "loader": {"batch_size": batch_size}, "epochs": epochs, "baseline": True}
        config = config_file(tmp_path / "c.yaml", data, **changes)
        return lambda _: ["cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / "run", *more]

    done = as_srun(2, 1, line(2, 2))
    assert [code for code, _, _ in done] == [0, 0], done
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples"] == 5
    assert (summary["epochs"], summary["steps"]) == (2, 2 * (13 // 2 // 2))
    ridge = fit_ridge(*(Reader(open_folder(data / split)) for split in ("train", "validation")))
    assert summary["baseline"]["mae"] == pytest.approx(ridge.mae)
    rows = (tmp_path / "run" / "predictions.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(5))
    # The score covers the whole split.
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    alone = program("cosmoflow_dali.evaluate", "--data-dir", data, "--weights", newest)
    assert json.loads(alone.out)["mae"] == pytest.approx(summary["mae"], abs=1e-6)
    # Two nodes resume; one node would train in another order.
    done = as_srun(2, 1, line(3, 2, "--resume"))
    assert [code for code, _, _ in done] == [0, 0], done
    shutil.rmtree(tmp_path / "disk")
    ((code, _, err),) = as_srun(1, 1, line(4, 4, "--resume"))
    assert code == 1
    assert "data.stage = one share: the run was trained on 2 shares drawn with seed 0" in err
    assert "Traceback" not in err


def test_nodes_that_share_samples_keep_only_their_slabs(tmp_path: Path) -> None:
    data, size, generator = tmp_path / "data", 64, np.random.default_rng(1)
    # Of few distinct voxels, so that the table is small.
    counts = generator.poisson(0.3, (2, size, size, size, 4)).astype(np.int16)
    samples = [Sample(each, np.zeros(4, np.float32)) for each in counts]
    for name in ("train", "validation"):
        (data / name).mkdir(parents=True)
        # A chunk for each plane.
        members = [(f"{n}.packed", encode(sample, chunk_voxels=size**2)) for n, sample in enumerate(samples)]
        write_shard(data / name / "a.tar", members)

    def staged_by(nodes_per_sample: int) -> str:
        done = on_nodes(2, 1, data, tmp_path / "disk", "--nodes-per-sample", str(nodes_per_sample))
        assert [code for code, _, _ in done] == [0, 0], done
        return done[0][1]

    staged_by(2)
    for node in range(2):
        split = open_folder(tmp_path / "disk" / str(node) / "train")
        states = [path.stat() for path in Path(split.root).glob("*.tar")]
        assert sum(state.st_blocks for state in states) < 0.7 * sum(state.st_size for state in states) / 512
        for slab in slabs(2, 4, 8):
            # A node has those of its own ranks, and no other.
            own = slab.index * 2 // slab.count == node
            for index, sample in enumerate(samples):
                if own:
                    payload = split.payload(index, slab=slab)
                    assert isinstance(payload, PackedSample)
                    np.testing.assert_array_equal(payload.decode(), slab_of(sample.counts, slab))
                else:
                    with pytest.raises(DataError, match="the CRC of chunk"):
                        split.payload(index, slab=slab)
        with pytest.raises(DataError):
            split.read(0)
    assert "staged 0 of 2 samples" in staged_by(2)
    # Whole copies are others, which is noticed without the source files too.
    splits = {name: open_folder(data / name) for name in ("train", "validation")}
    for reports in (2, 0):
        (train, report), _ = stage(
            splits, tmp_path / "disk" / "0", StageConfig("x"), Session(World()), skip_source_check=True
        )
        assert report.samples == reports
        np.testing.assert_array_equal(train.read(0).counts, samples[0].counts)
    assert "staged 2 of 2 samples" in staged_by(1)
    split = open_folder(split.root)
    np.testing.assert_array_equal(split.read(0).counts, samples[0].counts)


@pytest.mark.slow
def test_training_on_staged_slabs_gives_the_losses_of_whole_samples(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, samples in (("train", 8), ("validation", 2)):
        (data / name).mkdir(parents=True)
        numbered = ((f"universe_{n:04d}_000.packed", tiny_sample(n)) for n in range(samples))
        # A chunk for each plane.
        members = [(member, encode(sample, chunk_voxels=SIZE**2)) for member, sample in numbered]
        write_shard(data / name / "a.tar", members)

    def losses(run_dir: Path, **where: object) -> list[float]:
        changes = OPEN | {"data": {"dir": str(data)} | where, "epochs": 2, "parallel": {"spatial": 2}}
        config = config_file(tmp_path / "c.yaml", data, **changes)
        done = as_srun(2, 1, lambda _: ["cosmoflow_dali.train", "--config", config, "--run-dir", run_dir])
        assert [code for code, _, _ in done] == [0, 0], done
        lines = (run_dir / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    expected = losses(tmp_path / "whole")
    disk = tmp_path / "disk"
    assert expected and losses(tmp_path / "slabs", stage={"dir": str(disk / "$NODE")}) == expected
    with pytest.raises(DataError, match="the CRC of chunk"):
        open_folder(disk / "0" / "train").read(0)


def test_whole_samples_are_read_from_the_source_of_slabs(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=3, validation=1, format_name="packed")
    whole = open_folder(data / "train")
    kept = replace(whole, root=tmp_path, whole=whole)
    for dataset, number in ((kept, 0), (kept.subset(np.array([2, 1])), 2)):
        expected = tiny_sample(number)
        np.testing.assert_array_equal(dataset.read(0).counts, expected.counts)
        np.testing.assert_array_equal(dataset.payload(0).target, expected.target)
        with pytest.raises(DataError):
            dataset.payload(0, slab=Slab(0, 2, True))


@pytest.mark.parametrize(
    ("options", "nodes", "key"),
    [
        ({}, 3, "--nodes-per-sample"),
        ({}, 0, "--nodes-per-sample"),
        ({"shard_type": "local", "shard_multiplier": 3}, 2, "data.stage.shard_multiplier"),
    ],
)
def test_teams_that_do_not_hold_whole_groups_are_refused(
    options: dict[str, Any], nodes: int, key: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        StageConfig("x", **options).teams(24 if options else 4, 1, nodes)
    assert raised.value.key == key


def test_nodes_that_share_a_folder_are_refused(tiny: Path, tmp_path: Path) -> None:
    done = as_srun(2, 1, lambda _: [STAGE, "-i", tiny, "-o", tmp_path / "disk"])
    assert [code for code, _, _ in done] == [1, 1]
    assert "stage to each node's own disk" in done[0][2] and "Traceback" not in done[0][2] + done[1][2]


def test_partitions_that_do_not_fit_are_refused(tiny: Path, tmp_path: Path) -> None:
    for options, key in (
        (["--shard-type", "local", "--shard-multiplier", "2"], "data.stage.shard_multiplier = 2"),
        (["--models", "2"], "--models = 2"),
    ):
        done = on_nodes(3, 1, tiny, tmp_path / "disk", *options)
        assert {code for code, _, _ in done} == {1}
        assert f"error: {key}: does not divide" in done[0][2] and "Traceback" not in done[0][2]
    with pytest.raises(ConfigError) as error:
        StageConfig("x", preshuffle=True)
    assert error.value.key == "shard_type"
    with pytest.raises(ConfigError) as error:
        StageConfig("x", "local", shard_multiplier=0)
    assert error.value.key == "shard_multiplier"


@pytest.mark.skipif(not can_mount(), reason="mounting a tmpfs is not allowed here")
def test_full_node_is_reported_before_anything_is_copied(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=9, validation=1, format_name="tfrecord_gzip")
    (tmp_path / "disk").mkdir()
    line = command(STAGE, ["-i", data, "-o", tmp_path / "disk"])
    done = run(mounted("size=200k", tmp_path / "disk", line))
    assert done.code == 1
    assert "bytes free on" in done.err and "409600" in done.err and "Traceback" not in done.err
    assert done.out == ""


def test_folder_with_an_unknown_variable_is_refused() -> None:
    for folder, unknown in (
        ("$NO_SUCH/x", "$NO_SUCH is not set"),
        ("/x/${NO_SUCH}/$HOME", "${NO_SUCH} is not set"),
        ("/x/$", "$ without"),
    ):
        with pytest.raises(ConfigError) as error:
            _ = StageConfig(folder).folder
        assert (error.value.key, error.value.value) == ("data.stage.dir", folder)
        assert unknown in error.value.remedy


def test_direct_reads_give_the_same_bytes(tmp_path: Path) -> None:
    for length in (0, 1, 4095, 4096, 4097, 1 << 20, (1 << 20) + 17):
        path = tmp_path / str(length)
        path.write_bytes(os.urandom(length))
        assert read_file(path, direct=True) == path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["-i", "{tiny}/none"], "cannot be listed"), (["-i", "{tiny}", "--threads", "0"], "threads = 0")],
)
def test_invalid_arguments_are_one_line(arguments: list[str], said: str, tiny: Path, tmp_path: Path) -> None:
    filled = [argument.format(tiny=tiny) for argument in arguments]
    done = program(STAGE, *filled, "-o", tmp_path / "x")
    assert done.code == 1
    assert said in done.err and "Traceback" not in done.err
