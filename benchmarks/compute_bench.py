"""Measure the compute stage alone: training steps on resident data.

    python benchmarks/compute_bench.py
    python benchmarks/compute_bench.py --network open --size 32 --batch-size 16
    python benchmarks/compute_bench.py --precision fp32,bf16 --engine eager,graph --batch-size 1,8 --output
    python benchmarks/compute_bench.py --loop

Each row is a way to take steps, in a separate process; the processes take turns. A step is forward, backward
and update. `plain PyTorch` is the straightforward program: contiguous, float32, eager, torch.optim.SGD,
default threads and memory. `the record's recipe` is that of NVIDIA's MLPerf HPC v3.0 submission: fp16
autocast with loss scaling, channels last, a CUDA graph, fused momentum SGD, and cuDNN's search. The limits
are measured in the same run: a large matrix product in the same precision, by the fastest available library,
and a copy. With --loop, each of the project's rows is measured again as a whole loop, in which the loader
reads packed samples during the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.compute_table import PLAIN, RECORD, TARGETS, Result, row_name, show
from benchmarks.limits import Limits, measure_limits, step_flops
from benchmarks.picture import draw
from benchmarks.recipes import Recipe, RecipeProcess, Timing
from cosmoflow_dali.compute.config import ComputeConfig
from pipelines.distributed.world import World
from pipelines.errors import UserError

_LOOP = ", from packed"

STEPS = {"cpu": 3, "cuda": 30}
"""Steps of a round, by device type."""


def recipes(options: argparse.Namespace, device: torch.device, data: Path | None = None) -> list[Recipe]:
    """Return the named recipes and those that the options span; with `data`, also as whole loops."""
    gpu = device.type == "cuda"
    found = []
    for batch_size in options.batch_size:
        # torch's default for float32 convolutions; a plain recipe does not configure it.
        named = ComputeConfig("tf32" if gpu else "fp32", "eager")
        name = row_name(PLAIN, batch_size)
        plain = Recipe(name, batch_size, named, plain=True, layout="contiguous", optimizer="default")
        found.append(plain)
        if gpu:
            compute = ComputeConfig(precision="fp16", engine="graph")
            # Like the record's optimizer, and unlike torch's default, it does not wait for the GPU.
            record = Recipe(row_name(RECORD, batch_size), batch_size, compute, plain=True, optimizer="fused")
            found.append(record)
        for precision, engine, kernels, blocks, layout, optimizer in itertools.product(
            options.precision or (["bf16"] if gpu else ["fp32"]),
            options.engine,
            options.kernels,
            options.checkpoint_blocks,
            options.layout,
            options.optimizer,
        ):
            compute = ComputeConfig(
                precision=precision, engine=engine, checkpoint_blocks=blocks, kernels=kernels
            )
            words = [precision, compute.engine_on(device), optimizer]
            words += [word for word in (kernels, layout) if word not in ("auto", "channels_last")]
            words += [f"{blocks} checkpointed"] if blocks else []
            name = row_name(" ".join(words), batch_size)
            found.append(Recipe(name, batch_size, compute, layout=layout, optimizer=optimizer))
            if data is not None:
                found.append(replace(found[-1], name=name + _LOOP, data=data))
    return found


def run(
    options: argparse.Namespace, device: torch.device, data: Path | None = None
) -> Iterator[tuple[Limits, dict[str, Result]]]:
    """Measure all rows in turns; with `data`, packed samples, also whole loops.

    Yields:
        The limits and the rows measured so far: first none, then all after each round, and at last with the
        blocks of one row more each time.
    """
    entries, steps = recipes(options, device, data), options.steps or STEPS[device.type]
    limits = measure_limits({recipe.compute.precision for recipe in entries}, device)
    yield limits, {}
    flops = step_flops(options.network, options.size)
    with contextlib.ExitStack() as stack:
        candidates = {}
        for recipe in entries:
            candidate = RecipeProcess(recipe, options.network, options.size, str(device))
            candidates[recipe.name] = stack.enter_context(contextlib.closing(candidate))
        for candidate in candidates.values():
            candidate.wait()
        timings: dict[str, list[Timing]] = {recipe.name: [] for recipe in entries}
        for _ in range(options.rounds):
            for recipe in entries:
                timings[recipe.name].append(candidates[recipe.name].take_steps(steps))
            peaks = {name: candidate.peak() for name, candidate in candidates.items()}
            results = _results(entries, timings, peaks, limits, flops)
            yield limits, results
        for recipe in entries:
            if not recipe.data:
                layers = candidates[recipe.name].layers()
                results[recipe.name] = replace(results[recipe.name], layers=layers)
                yield limits, results
        if options.profile:
            candidates[entries[-1].name].profile(str(options.profile))


def _results(
    entries: Sequence[Recipe],
    timings: Mapping[str, Sequence[Timing]],
    peaks: Mapping[str, int],
    limits: Limits,
    flops: float,
) -> dict[str, Result]:
    """Return the rows of `entries`, without layers."""
    results = {}
    sizes = {recipe.name: recipe.batch_size for recipe in entries}
    readings = {
        name: [harness.Reading(wall / sizes[name], cpu / sizes[name]) for wall, cpu, _ in own]
        for name, own in timings.items()
    }
    for recipe in entries:
        own = readings[recipe.name]
        rate = harness.Spread.of(1 / reading.wall for reading in own)
        record = readings.get(row_name(RECORD, recipe.batch_size))
        resident = readings[recipe.name.removesuffix(_LOOP)] if recipe.data else None
        results[recipe.name] = Result(
            precision=recipe.compute.precision,
            samples_per_s=rate,
            forward_ms=harness.Spread.of(
                1e3 * forward / recipe.batch_size for *_, forward in timings[recipe.name]
            ),
            cpu_ms=harness.Spread.of(1e3 * reading.cpu for reading in own),
            tflops=1e-12 * flops * rate.median,
            share_of_matrix=flops * rate.median / limits.matrix[recipe.compute.precision],
            speed_of_plain=harness.ratio(readings[row_name(PLAIN, recipe.batch_size)], own, "wall"),
            speed_of_record=harness.ratio(record, own, "wall") if record else None,
            speed_of_resident=harness.ratio(resident, own, "wall") if resident else None,
            peak=peaks[recipe.name],
            layers=[],
        )
    return results


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--network", choices=("reference", "open"), default="reference")
    parser.add_argument("--size", type=int, default=128, choices=(16, 32, 64, 128), help="edge in voxels")
    parser.add_argument("--batch-size", type=harness.numbers, default=[1], help="comma-separated")
    parser.add_argument("--precision", type=_among("fp32", "tf32", "fp16", "bf16"), help="comma-separated")
    parser.add_argument("--engine", type=_among("auto", "eager", "graph", "compile"), default=["auto"])
    parser.add_argument("--kernels", type=_among("auto", "torch", "triton"), default=["auto"])
    parser.add_argument("--checkpoint-blocks", type=_counts, default=[0], help="comma-separated")
    parser.add_argument("--layout", type=_among("channels_last", "contiguous"), default=["channels_last"])
    parser.add_argument("--optimizer", type=_among("auto", "apex", "fused"), default=["auto"])
    parser.add_argument("--steps", type=harness.positive, help="of a round (default: 3, on a GPU 30)")
    parser.add_argument("--rounds", type=harness.positive, default=7, help="of each row")
    parser.add_argument(
        "--loop", action="store_true", help="also measure the project's rows from packed samples"
    )
    parser.add_argument("--data-dir", type=Path, help="folder of these samples (default: temporary)")
    parser.add_argument("--samples", type=harness.positive, default=8, help="number of these samples")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--profile", type=Path, help="write a trace of the last row's steps here")
    options = parser.parse_args(argv)
    if options.loop and options.samples < max(options.batch_size):
        parser.error(
            f"--samples {options.samples}: must be at least the batch size {max(options.batch_size)}"
        )
    if "contiguous" in options.layout and "graph" in options.engine:
        parser.error(
            "--layout contiguous cannot be combined with --engine graph, which reads channels-last batches"
        )
    return options


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def _among(*known: str) -> Any:
    def parse(text: str) -> list[str]:
        return harness.among(text, known)

    return parse


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """Run the command line; return the result of each row."""
    options = _options(argv)
    device = World().device(options.device)
    with contextlib.ExitStack() as stack:
        data = None
        if options.loop:
            # Needs packages that resident data does not.
            from benchmarks.samples import make_splits

            folder = options.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            data = Path(make_splits(folder, ["packed"], options.samples, options.size)["packed"].root)
        started = time.localtime()
        for limits, results in run(options, device, data):
            record = {"limits": limits, "bars": TARGETS, **results}
            if options.output:
                path = harness.save("compute_bench", vars(options), record, options.output, started)
    show(options, device, limits, results)
    if options.output:
        title = f"{options.network} network, {options.size}^3"
        print("written to", path)
        draw({title: results}, path.with_suffix(".png"))
    return results


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
