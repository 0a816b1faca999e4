"""Staging: every sample on every node, each file read once."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, can_mount, command, environment, mounted, program, run, tiny_sample, write_tiny

from pipelines.dataset import open_split
from pipelines.dist import World
from pipelines.files import read_file
from pipelines.formats import FORMATS
from preprocess.staging import of_place, to_read

STAGE = "preprocess.stage"


def on_nodes(nodes: int, ranks: int, source: Path, target: Path) -> list[tuple[int, str, str]]:
    """Run the program as srun would on `nodes` nodes of `ranks` each, node n's disk being `target`/n.

    Gives each rank's exit status, output and errors.
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
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        line = list(map(str, [sys.executable, "-m", STAGE, "-i", source, "-o", target / str(rank // ranks)]))
        pipe, told = subprocess.PIPE, environment() | place
        running.append(subprocess.Popen(line, cwd=ROOT, env=told, stdout=pipe, stderr=pipe, text=True))
    return [(process.wait(240), *process.communicate()) for process in running]


def content(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, by name."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("form", ["tfrecord_gzip", "npy"])
def test_every_node_has_everything_and_each_file_was_read_once(
    form: str, nodes: int, ranks: int, tmp_path: Path
) -> None:
    data = write_tiny(tmp_path / "data", train=7, validation=2, form=form)
    before = content(data)
    done = on_nodes(nodes, ranks, data, tmp_path / "disk")
    assert [code for code, _, _ in done] == [0] * (nodes * ranks), done
    size = sum(path.stat().st_size for path in (data / "train").iterdir())
    assert f"staged 7 of 7 samples on {nodes} nodes" in done[0][1] and f"{size:,} bytes read" in done[0][1]
    first = content(tmp_path / "disk" / "0")
    for node in range(nodes):
        assert content(tmp_path / "disk" / str(node)) == first
        split = open_split(tmp_path / "disk" / str(node), "train")
        assert (split.form, len(split)) == ("npy", 7)
        for index in range(7):
            expected = tiny_sample(index)
            np.testing.assert_array_equal(split.read(index).counts, expected.counts)
            np.testing.assert_array_equal(split.read(index).target, expected.target)
    assert content(data) == before


def test_a_second_run_stages_nothing_and_a_node_that_lost_something_gets_it_back(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=6, validation=1, form="tfrecord_gzip")
    on_nodes(2, 1, data, tmp_path / "disk")
    first = content(tmp_path / "disk" / "0")
    done = on_nodes(2, 1, data, tmp_path / "disk")
    assert "staged 0 of 6 samples" in done[0][1] and " 0 bytes read" in done[0][1]
    (tmp_path / "disk" / "1" / "train" / "universe_0003_000_data.npy").unlink()
    FORMATS["tfrecord_gzip"].write(data / "train", "universe_0004_000", tiny_sample(77))
    done = on_nodes(2, 1, data, tmp_path / "disk")
    assert "staged 2 of 6 samples" in done[0][1]
    again = content(tmp_path / "disk" / "1")
    assert again == content(tmp_path / "disk" / "0") and again.keys() == first.keys()
    np.testing.assert_array_equal(
        open_split(tmp_path / "disk" / "0", "train").read(4).counts, tiny_sample(77).counts
    )


def test_a_damaged_sample_is_named_and_the_others_are_staged(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=5, validation=1, form="tfrecord_gzip")
    bad = data / "train" / "universe_0002_000.tfrecord"
    bad.write_bytes(bad.read_bytes()[:-9])
    done = on_nodes(2, 1, data, tmp_path / "disk")
    assert [code for code, _, _ in done] == [1, 1]
    assert f"error: {bad}: its gzip stream is cut off" in done[0][2]
    assert "1 samples are damaged" in done[0][2] and "Traceback" not in "".join(err for _, _, err in done)
    for node in "01":
        assert len(list((tmp_path / "disk" / node / "train").glob("*_data.npy"))) == 4


def test_a_node_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=3, validation=1)
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "1").write_text("a file where the folder should be")
    start = time.monotonic()
    done = on_nodes(2, 1, data, tmp_path / "disk")
    assert [code for code, _, _ in done] == [1, 1]
    assert "cannot be written (Not a directory)" in done[0][2] and "Traceback" not in done[0][2] + done[1][2]
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("a_node", "ranks"), [(1, 1), (1, 3), (1, 4096), (2, 2), (4, 60), (8, 8), (8, 512), (8, 4096)]
)
@pytest.mark.parametrize("samples", [0, 1, 1000, 4097])
def test_any_number_of_ranks_reads_each_sample_once_and_writes_it_once_a_node(
    samples: int, a_node: int, ranks: int
) -> None:
    wanted = np.arange(samples)
    read, written = np.zeros(samples, int), np.zeros(samples, int)
    for rank in range(ranks):
        world = World(rank, ranks, rank % a_node, a_node, "srun")
        mine = of_place(wanted, world)
        written[mine] += 1
        own = to_read(mine.tolist(), world)
        read[own] += 1
        # What it reads is what its peers expect of it: the turns of its node.
        assert own == [index for turn, index in enumerate(mine.tolist()) if turn % world.nodes == world.node]
    assert (read == 1).all()
    assert (written == ranks // a_node).all()


@pytest.mark.skipif(not can_mount(), reason="this machine lets nobody mount a tmpfs")
def test_a_node_without_room_is_told_before_anything_is_copied(tmp_path: Path) -> None:
    data = write_tiny(tmp_path / "data", train=9, validation=1, form="tfrecord_gzip")
    (tmp_path / "disk").mkdir()
    line = command(STAGE, ["-i", data, "-o", tmp_path / "disk"])
    done = run(mounted("size=200k", tmp_path / "disk", line))
    assert done.code == 1
    assert "bytes free on" in done.err and "294912 are to come" in done.err and "Traceback" not in done.err
    assert done.out == ""


def test_direct_reads_give_the_same_bytes(tmp_path: Path) -> None:
    for length in (0, 1, 4095, 4096, 4097, 1 << 20, (1 << 20) + 17):
        path = tmp_path / str(length)
        path.write_bytes(os.urandom(length))
        assert read_file(path, direct=True) == path.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["-i", "{tiny}/none"], "cannot be listed"), (["-i", "{tiny}", "--threads", "0"], "stage.threads = 0")],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], said: str, tiny: Path, tmp_path: Path) -> None:
    filled = [argument.format(tiny=tiny) for argument in arguments]
    done = program(STAGE, *filled, "-o", tmp_path / "x")
    assert done.code == 1
    assert said in done.err and "Traceback" not in done.err
