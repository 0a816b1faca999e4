"""A SLURM cluster of several nodes on this machine, for tests: its own munge, controller and daemons.

All nodes are this host under other names (slurmd -N), each with a port of its own; nothing outside the
cluster's folder is touched, and what was started is stopped by its own pid files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_FINISHED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
StateSaveLocation={folder}/state
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
SchedulerParameters=sched_interval=1
MinJobAge=600
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What is not installed of the programs that a cluster needs."""
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin"
    return [program for program in _PROGRAMS if shutil.which(program, path=path) is None]


class Cluster:
    """A cluster of `size` nodes n1, n2, ... in `folder`; a context that starts and stops it."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        self.nodes = [f"n{number + 1}" for number in range(size)]
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}{os.pathsep}/usr/sbin",
        }

    def __enter__(self) -> Cluster:
        ports = _free_ports(1 + len(self.nodes))
        lines = [
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=8"
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        values = {"folder": self.folder, "port": ports[0], "host": socket.gethostname()}
        user = self._run("id", "-un").strip()
        (self.folder / "slurm.conf").write_text(_CONF.format(**values, user=user, nodes="\n".join(lines)))
        # Without cgroups, which a container has not; a daemon of an older version knows no CgroupPlugin.
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        # munged refuses folders that others may write to, unless forced; this one lies below /tmp.
        names = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        options = [f"--{option}={self.folder}/munge.{name}" for option, name in names.items()]
        self._run("munged", "--force", *options)
        self._run("slurmctld", "-c")
        for name in self.nodes:
            self.start_node(name)
        return self

    def __exit__(self, *_: object) -> None:
        # The controller first, which would take what it sees of the others' end for a fault.
        for pattern in ("slurmctld.pid", "slurmd.*.pid", "munge.pid"):
            for pid_file in self.folder.glob(pattern):
                _stop(pid_file)

    def start_node(self, name: str) -> None:
        """Start the daemon of node `name`, and wait until it takes jobs."""
        self._run("slurmd", "-N", name)
        self._wait(
            lambda: self._run("sinfo", "-h", "-n", name, "-o", "%T").strip() == "idle",
            lambda: f"{name} is not idle",
        )

    def kill_node(self, name: str) -> None:
        """Take node `name` away, with the tasks on it."""
        _stop(self.folder / f"slurmd.{name}.pid", signal.SIGKILL)
        self._kill(f"SLURMD_NODENAME={name}")
        self._run("scontrol", "update", f"nodename={name}", "state=down", "reason=test")

    def kill_rank(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Send `number` to the task with the number `rank` of the only job step."""
        self._kill(f"SLURM_PROCID={rank}", "SLURM_STEP_TASKS_PER_NODE=", number=number)

    def _kill(self, *variables: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Send `number` to the cluster's processes that have all these `variables`, written as NAME=VALUE."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                given = (process / "environ").read_text(errors="replace").split("\0")
                daemon = "slurmstepd" in (process / "cmdline").read_text(errors="replace")
            except OSError:
                continue
            wanted = (f"SLURM_CONF={self.folder}/slurm.conf", *variables)
            if not daemon and all(any(one.startswith(want) for one in given) for want in wanted):
                _signal(int(process.name), number)

    def submit(self, line: Sequence[str], cwd: Path, **variables: str) -> int:
        """Submit the sbatch command `line` from `cwd` with `variables` in its environment: the job's id."""
        said = self._run("sbatch", "--parsable", *line, cwd=cwd, **variables)
        return int(said.split(";")[0])

    def state(self, job: int) -> str:
        """The state of `job`, such as RUNNING."""
        fields = dict(
            word.partition("=")[::2]
            for word in self._run("scontrol", "show", "job", str(job)).split()
            if "=" in word
        )
        return fields["JobState"]

    def wait_for(self, job: int, *states: str, seconds: float = 180) -> str:
        """Wait until `job` is in one of `states`, by default until it has ended: its state."""
        self._wait(
            lambda: self.state(job) in (states or _FINISHED),
            lambda: f"job {job} is {self.state(job)}",
            seconds,
        )
        return self.state(job)

    def run(self, *line: str) -> str:
        """Run one of SLURM's commands: what it prints."""
        return self._run(*line)

    def _run(self, *line: str, cwd: Path | None = None, **variables: str) -> str:
        done = subprocess.run(
            line,
            env=self.environment | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(line)} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def _wait(self, condition: Callable[[], bool], message: Callable[[], str], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(path.read_text()[-2000:] for path in sorted(self.folder.glob("*.log")))
                raise TimeoutError(f"{message()} after {seconds:g} s\n{logs}")
            time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _stop(pid_file: Path, number: signal.Signals = signal.SIGTERM) -> None:
    pid = int(pid_file.read_text())
    _signal(pid, number)
    deadline = time.monotonic() + 3
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    _signal(pid, signal.SIGKILL)
    pid_file.unlink(missing_ok=True)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
