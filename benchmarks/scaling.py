"""Predict step time, staging, time to train and cost on N nodes from measured stages.

    python benchmarks/scaling.py --nodes 4 64 1250 --system h100

The model (scaling_model.py) is calibrated with one published run of each chip and software, and validated
with the other runs of that chip and software; see published.py. The result of one calibration per chip is
printed too. The same model then predicts N nodes. `--system measured` uses the latest results of this
project's compute benchmark instead of a published run, on H100 nodes; options replace single figures.

`--spatial 1 2 4 8` also compares groups of so many GPUs that share each sample (spatial_model.py), for
samples of `--size` voxels along an edge: minutes to the target for the batches that are known to converge at
128, or minutes of an epoch for those of `--batch`. `--plot` draws the gain of such groups for each size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks import scaling_model as model
from benchmarks.model_validation import (
    CUT_RUNS,
    TOLERANCE,
    Check,
    calibrated,
    calibration,
    check,
    gradients,
    predict_cut,
)
from benchmarks.scaling_model import Bottleneck, Forecast, Gradients, Job, Machine, Projection, Stages
from benchmarks.splits import SIZES, Split, draw, network_of, show_splits, splits
from cosmoflow_dali.mlperf.published import NVIDIA, ROWS, Row
from pipelines.errors import ConfigError, UserError

SYSTEMS = {"h100": ("H100", NVIDIA), "a100": ("A100", NVIDIA), "measured": ("H100", NVIDIA)}
"""Chip and software whose calibration each system uses."""

_FIGURES = {
    "compute-ms": "forward and backward of a sample on a GPU in ms; evaluation takes a third",
    "decode-ms": "CPU time of a sample from file to batch in ms",
    "disk": "rate of a node's disk in GB/s",
    "file-system": "rate of the shared file system to all nodes in GB/s",
    "network": "rate of a GPU to other nodes in GB/s",
    "latency": "latency to another node in us",
    "price": "of a GPU hour, in any currency",
}
"""Options that replace single figures."""


def kept(name: str) -> Iterator[Mapping[str, Any]]:
    """Yield the kept results of benchmark `name` at 128^3 with the reference network, latest first."""
    for path in sorted(harness.RESULTS.glob(f"*_{name}.json"), reverse=True):
        record = json.loads(path.read_text())
        options = record["options"]
        if options["size"] == 128 and options.get("network", "reference") == "reference":
            yield record["results"]


def own_compute() -> Stages:
    """Return the stages of the project's fastest row in the latest compute result."""
    for rows in kept("compute_bench"):
        own = [row for name, row in rows.items() if name.startswith(("fp32", "tf32", "fp16", "bf16"))]
        if own:
            best = max(own, key=lambda row: row["samples_per_s"]["median"])
            return Stages(1 / best["samples_per_s"]["median"], best["forward_ms"]["median"] / 1e3)
    remedy = "there is no result of compute_bench.py at 128^3: run it with --output, or give --compute-ms"
    raise ConfigError("--system", "measured", remedy)


def own_decode() -> float:
    """Return the CPU seconds per packed sample in the latest input result that has it."""
    for settings in kept("io_bench"):
        for name, rows in settings.items():
            if name.startswith("batch") and "packed" in rows:
                return rows["packed"]["figures"]["cpu_ms"]["median"] / 1e3
    remedy = "there is no packed row of io_bench.py at 128^3: run it with --output, or give this option"
    raise ConfigError("--decode-ms", None, remedy)


def system(options: argparse.Namespace, sent: Gradients) -> tuple[Machine, Stages]:
    """Return the machine and the stages of the options."""
    machine, stages = calibrated(calibration(*SYSTEMS[options.system]), sent)
    if options.compute_ms is not None:
        stages = Stages(options.compute_ms / 1e3, (1 - model.BACKWARD) * options.compute_ms / 1e3)
    elif options.system == "measured":
        stages = own_compute()
    decode = own_decode() if options.decode_ms is None else options.decode_ms / 1e3
    given = {
        "disk": (options.disk, 1e9),
        "file_system": (options.file_system, 1e9),
        "network": (options.network, 1e9),
        "latency": (options.latency, 1e-6),
    }
    changes = {name: value * unit for name, (value, unit) in given.items() if value is not None}
    return replace(machine, **changes), replace(stages, decode=decode, read=model.PACKED)


def show_checks(checks: Sequence[Check]) -> None:
    """Print each row with the errors of its prediction."""
    print(
        "errors in %: of samples/s if constant, and as predicted; of the minutes to train with the epochs of"
    )
    print("the row, and with MLPerf's mean for its batch; of staging alone")
    print(f"{'':47} samples/s   const   pred.     min     own    mean staging")
    for each in checks:
        row = each.row
        print(f"{_name(row):47} {row.rate:9.1f}", end=" ")
        if row.calibrates:
            alone = sum((other.chip, other.stack) == (row.chip, row.stack) for other in ROWS) == 1
            print("calibration" + ", without another row to validate it" * alone)
            continue
        print(_percent(each.flat_error, each.rate_error), f"{row.minutes:7.2f}", end=" ")
        print(_percent(each.train_error, each.table_error, each.staging_error))
        if row.beyond:
            print(f"    the model does not apply to its minutes: {row.beyond}")
    verdict = "met" if all(each.met for each in checks if not each.row.calibrates) else "missed"
    print("target for samples/s, and for minutes with the row's own epochs where the model applies:")
    print(f"error of at most {TOLERANCE:.0%}: {verdict}")
    show_strict(checks)


def show_cut_runs() -> None:
    """Print the epochs of the published runs with cut samples, and their predictions from the first."""
    print("\nFugaku, v0.7, from 512 nodes without cuts: seconds of a step and of an epoch, and errors in %")
    for run in CUT_RUNS:
        found = predict_cut(run)
        cuts = "x".join(map(str, run.cuts[:2]))
        figures = (
            f"{run.step:.4f} {run.epoch:7.2f}",
            _percent(found.step / run.step - 1, found.epoch / run.epoch - 1),
        )
        print(f"{run.nodes:6} nodes, batch {run.batch:4}, cut {cuts}:", *figures)


def compare_splits(machine: Machine, stages: Stages, options: argparse.Namespace) -> list[Split]:
    """Print and return the splits that the options ask for; `options.nodes` are those of a training."""
    show_cut_runs()
    every = []
    for size in options.size:
        network = network_of(options.model, size)
        # Epochs to the target are known at 128^3 alone; otherwise an epoch is compared.
        epochs = (
            model.EPOCHS if size == 128 and not options.batch else dict.fromkeys(options.batch or [64], 1.0)
        )
        counts = (
            splits(machine, stages, network, nodes=nodes, epochs=epochs, spatial=options.spatial)
            for nodes in options.nodes
        )
        found = [each for some in counts for each in some]
        print(f"\n{options.model} network, {size}^3, {network.weights:,} weights")
        show_splits(found)
        every += found
    if not every:
        shared = " ".join(map(str, options.spatial))
        remedy = "must divide the GPUs of a number of nodes into groups that divide the batch evenly"
        raise ConfigError("--spatial", shared, remedy)
    if options.plot:
        draw(machine, stages, options.model, options.spatial, options.plot)
    return every


def show_strict(checks: Sequence[Check]) -> None:
    """Print the result of one calibration per chip for all software."""
    known = {each.row.chip: calibration(each.row.chip) for each in checks}
    predicted = [each for each in checks if each.row is not known[each.row.chip]]
    missed = [each for each in predicted if not each.met_by_chip]
    print("with one calibration per chip for all software, the same target is missed by")
    print(f"{len(missed)} of {len(predicted)} rows; errors in % of samples/s, and of minutes:")
    for chip, row in known.items():
        print(f"{_name(row):47} calibrates {chip}")
    for each in missed:
        print(f"{_name(each.row):47}", _percent(each.chip_rate_error, each.chip_train_error))


def show_projections(projections: Sequence[Projection], price: float | None) -> None:
    """Print the forecasts of each number of nodes."""
    print("one model, as fast as possible")
    print(" nodes  GPUs batch epochs  step ms all-reduce samples/s stage s  train min   GPU h  bound by")
    for each in projections:
        one, job = each.one, each.one_job
        print(
            f"{each.nodes:6} {one.gpus:5} {job.batch:5} {job.epochs:6.1f} {1e3 * one.step:8.2f}"
            f" {1e3 * one.exposed:10.2f} {one.rate:9.1f} {one.staging:7.0f} {one.train / 60:10.2f}"
            f" {one.gpu_hours:7.1f}  {one.bound}{_cost(one.gpu_hours, price)}"
        )
    print("models side by side, with the batch that takes the fewest epochs")
    print(" nodes models  GPUs stage s  train min   models/h GPU h each")
    for each in projections:
        many, models = each.many, each.many_job.models
        hourly = 3600 * models / (many.staging + many.train)
        print(
            f"{each.nodes:6} {models:6} {many.gpus:5} {many.staging:7.0f} {many.train / 60:10.2f}"
            f" {hourly:10.1f} {many.gpu_hours:10.1f}{_cost(many.gpu_hours, price)}"
        )


def show_bottlenecks(found: Sequence[Bottleneck], widest: Forecast) -> None:
    """Print the limits of scaling below and above the number of GPUs of `widest`."""
    print(
        f"\none model on {widest.gpus:,} GPUs, if such batches converged: {widest.steps:,} steps per epoch of"
        f" {1e3 * widest.step:.2f} ms, {widest.exposed / widest.step:.0%} of it the all-reduce"
    )
    print(f"limits on the way to {widest.gpus:,} GPUs:")
    for each in found:
        yet = "not yet: " if each.gpus >= widest.gpus else ""
        print(f"  {yet}{each.name}, beyond {each.gpus:,.0f} GPUs: {each.why}")


def _name(row: Row) -> str:
    return f"{row.version} {row.stack}, {row.site}: {row.accelerators}"


def _percent(*errors: float) -> str:
    return " ".join(f"{100 * error:+7.1f}" for error in errors)


def _cost(hours: float, price: float | None) -> str:
    return "" if price is None else f", cost {hours * price:,.2f}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__)
    default = [1, 4, 16, 64, 256, 1250]
    parser.add_argument("--nodes", type=harness.positive, nargs="+", default=default, metavar="N")
    parser.add_argument("--system", choices=SYSTEMS, default="h100")
    parser.add_argument(
        "--spatial", type=harness.positive, nargs="+", metavar="S", help="GPUs that share a sample"
    )
    parser.add_argument(
        "--size", type=int, nargs="+", choices=SIZES, default=[128], help="of samples, with --spatial"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="picture of the gain by groups, with --spatial"
    )
    parser.add_argument("--model", choices=("reference", "open"), default="reference", help="with --spatial")
    parser.add_argument(
        "--batch", type=harness.positive, nargs="+", metavar="B", help="global, with --spatial"
    )
    for name, text in _FIGURES.items():
        parser.add_argument(f"--{name}", type=float, help=text)
    options = parser.parse_args(argv)
    for name in _FIGURES:
        value = getattr(options, name.replace("-", "_"))
        if value is not None and not value > 0:
            raise ConfigError(f"--{name}", value, "must be above 0; omit it for the system's figure")
    return options


def main(argv: Sequence[str] | None = None) -> tuple[list[Check], list[Projection], list[Bottleneck]]:
    """Run the command line; return the validation, the projections and the bottlenecks."""
    options = _options(argv)
    sent = gradients()
    checks = [check(row, sent) for row in ROWS]
    machine, stages = system(options, sent)
    projections = [model.project(machine, stages, sent, nodes) for nodes in options.nodes]
    found = model.bottlenecks(machine, stages, sent)
    show_checks(checks)
    print(
        f"\n{options.system}: a sample takes {1e3 * stages.compute:.2f} ms of a GPU for training,"
        f" {1e3 * stages.forward:.2f} ms for evaluation, and {1e3 * stages.decode:.1f} ms of a CPU to decode"
    )
    show_projections(projections, options.price)
    nodes = max(options.nodes)
    alone = Job(nodes, nodes * machine.gpus, max(model.EPOCHS.values()))
    show_bottlenecks(found, model.forecast(machine, stages, sent, alone))
    compared = compare_splits(machine, stages, options) if options.spatial else []
    if options.output:
        figures = {"machine": machine, "stages": stages}
        record = {"checks": checks, **figures, "outlooks": projections, "breaks": found, "splits": compared}
        path = harness.save("scaling", vars(options), record, options.output)
        print("written to", path)
    return checks, projections, found


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
