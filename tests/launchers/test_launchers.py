"""Sessions of ranks that mpirun and torchrun start; test_slurm.py has those of srun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import ROOT, environment, mpirun, run
from rank_programs import CONNECT, HEAD


def test_torchrun_connects_ranks(tmp_path: Path) -> None:
    (tmp_path / "connect.py").write_text(CONNECT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "connect.py")],
        env=environment() | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Several processes write to one pipe, and their lines may be mixed.
    assert done.stdout.count("torchrun") == done.stdout.count("11.0") == 2


def test_mpirun_connects_ranks_of_two_instances() -> None:
    program = """
world = world.partition_ranks(2)
with report_errors(world) as session:
    session.connect()
    print("instance", world.instance, session.gather(world.rank))
"""
    done = run([*mpirun(4), sys.executable, "-c", HEAD + program])
    assert done.code == 0, done.err
    assert [done.out.count(f"instance {instance} [0, 1]") for instance in range(2)] == [2, 2]


def test_mpi_gives_instances_on_several_nodes_endpoints_of_their_own() -> None:
    program = """
import os
from pipelines.distributed.rendezvous import find_endpoint
from pipelines.distributed.world import World

world = World.detect().partition_ranks(2)
environ = {name: value for name, value in os.environ.items() if name != "PMIX_NAMESPACE"}
print(f"instance {world.instance} at", find_endpoint(world, environ).key)
"""
    done = run([*mpirun(4), sys.executable, "-c", program])
    assert done.code == 0, done.err
    lines = sorted(done.out.splitlines())
    assert lines[0] == lines[1] and lines[2] == lines[3] and lines[0].split()[3] != lines[2].split()[3]


def test_error_line_of_rank_0_precedes_the_exit_of_others() -> None:
    # A launcher ends all ranks when the first one exits.
    program = """
with report_errors(world) as session:
    session.connect()
    def fail():
        raise UserError("refused")
    if world.is_root:
        write = sys.stderr.write
        sys.stderr.write = lambda text: (time.sleep(1), write(text))[1]
    session.run_on_root(fail)
"""
    done = run([*mpirun(3), sys.executable, "-c", HEAD + program])
    assert done.code == 1 and done.err.count("error: refused") == 1, done.err
