"""Measure the all-reduce alone, to check the ranks' network before a run.

    mpirun -n 8 python benchmarks/allreduce_bench.py
    srun -N 16 --ntasks-per-node 8 python benchmarks/allreduce_bench.py

All ranks sum float32 tensors of some sizes, among them that of the reference network's gradients, over NCCL
on GPUs and gloo elsewhere. Rank 0 prints the time and the bus bandwidth as NCCL defines it (nccl-tests,
doc/PERFORMANCE.md): bytes / seconds * 2 (n - 1) / n, the load of each rank's link on a ring, independent of
the number of ranks. Each sum is checked.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import harness
from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.models.reference import ReferenceConfig
from pipelines.distributed.cli import launched, report_errors
from pipelines.distributed.session import Session, exit_now
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, UserError

_LARGE = 160 * 10**6
"""Size in bytes for which the bandwidth dominates."""


@dataclass(frozen=True, slots=True)
class Reduced:
    """An all-reduce of `bytes` bytes: time in ms and bus bandwidth in GB/s."""

    bytes: int
    milliseconds: harness.Spread
    bus: harness.Spread


def gradient_bytes() -> int:
    """Return the size of the reference network's float32 gradients in bytes."""
    model = build_model(ReferenceConfig(), 0)
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def reduce(session: Session, device: torch.device, size: int, rounds: int) -> Reduced:
    """Sum `size` bytes over all ranks `rounds` times; raise UserError if a sum is wrong."""
    world, count = session.world, size // 4
    seconds = []
    for warm in [False] * 3 + [True] * rounds:
        tensor = torch.full((count,), float(world.rank + 1), device=device)
        _finish(device)
        start = time.perf_counter()
        session.sum(tensor)
        _finish(device)
        if warm:
            seconds.append(time.perf_counter() - start)
        expected = world.size * (world.size + 1) / 2
        if not bool((tensor == expected).all()):
            raise UserError(
                f"the all-reduce of {size} bytes is wrong on rank {world.rank}: expected {expected}"
            )
    factor = 2 * (world.size - 1) / world.size
    return Reduced(
        size,
        harness.Spread.of(1e3 * each for each in seconds),
        harness.Spread.of(1e-9 * 4 * count * factor / each for each in seconds),
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> list[Reduced]:
    """Run the command line; return what this rank measured."""
    parser = harness.make_parser(__doc__)
    parser.add_argument("--bytes", type=int, nargs="+", help="sizes (default: the gradients', and 160 MB)")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    results: list[Reduced] = []
    world = launched()
    with report_errors(world) as session:
        sizes = options.bytes or [gradient_bytes(), _LARGE]
        if min(sizes) < 4 or options.rounds < 1:
            raise ConfigError("--bytes", sizes, "must be at least 4, and --rounds at least 1")
        device = world.device(options.device)
        session.connect(device)
        results = [reduce(session, device, size, options.rounds) for size in sizes]
        if world.is_root:
            print(f"{world.size} ranks on {world.nodes} nodes, {device.type}")
            for result in results:
                took, bus = result.milliseconds, result.bus
                print(
                    f"{result.bytes / 1e6:9.2f} MB  {took.median:8.3f} ms ({took.p10:.3f}-{took.p90:.3f})  "
                    f"bus {bus.median:7.2f} GB/s ({bus.p10:.2f}-{bus.p90:.2f})"
                )
            if options.output:
                settings = vars(options) | {"ranks": world.size, "nodes": world.nodes}
                print(
                    "written to",
                    harness.save("allreduce_bench", settings, {"sizes": results}, options.output),
                )
    return results


if __name__ == "__main__":
    main()
    exit_now(0, World.detect())
