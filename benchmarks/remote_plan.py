"""Simulate the requests of an epoch from an object store on many ranks, and print what they cost.

    python benchmarks/remote_plan.py
    python benchmarks/remote_plan.py --ranks 8,4096 --rate 1037 --output

The plan is that of training: `plan_epoch` and `RankSlice` say which rank asks for which sample in which step.
Every plan is checked: each sample is asked for exactly once, except that "drop" leaves out what does not fill
the last step. All ranks advance at the given rate, so the plan also has the requests to each shard in each
second, and those of the busiest of the key ranges that S3 needs for such a rate. docs/clouds.md explains the
figures.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from benchmarks.remote_cost import H100_RATE, LIMITS, S3, Prices, show_costs
from benchmarks.scaling_model import TRAIN
from pipelines.errors import UserError
from pipelines.plan import Indices, Ragged, RankSlice, plan_epoch
from pipelines.tables import format_table

SHARD = 64
"""Samples of a shard."""

_JOINED = 4
"""Packed samples that one request brings at most: 8 MiB, see pipelines/loading/fetch.py."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests of a job whose samples are ranges of shards.

    Attributes:
        asked, left: Samples of an epoch that ranks ask for, and that "drop" leaves out.
        joined: Requests of an epoch that are saved, because one brings several samples.
        rate: Requests per second of all ranks.
        shard_mean, shard_peak: Requests to a shard in one second: mean, and maximum over shards and seconds.
        ranges, range_peak: Key ranges that S3 needs, and requests in one second to the busiest one.
    """

    ranks: int
    shuffle: bool
    asked: int
    left: int
    joined: int
    rate: float
    shard_mean: float
    shard_peak: int
    ranges: int
    range_peak: int


def check_plan(plan: Indices, ranks: int, samples: int, ragged: Ragged) -> int:
    """Return the number of samples that the ranks ask for in an epoch with this `plan`.

    Raises:
        ValueError: A sample is asked for twice or is lost.
    """
    asked, count = np.zeros(samples, dtype=bool), 0
    for rank in range(ranks):
        indices = RankSlice(rank, ranks).select(plan).ravel()
        indices = indices[indices >= 0]
        asked[indices] = True
        count += len(indices)
    expected = samples - (samples % plan.shape[1] if ragged == "drop" else 0)
    if not count == asked.sum() == expected:
        raise ValueError(f"{ranks} ranks ask {count} times for {asked.sum()} samples, and {expected} are due")
    return count


def count_joined(plan: Indices, ranks: int) -> int:
    """Return the requests that are saved where samples of a shard follow each other in a rank's order."""
    saved = 0
    for rank in range(ranks):
        order = RankSlice(rank, ranks).select(plan).ravel()
        follows = (order[1:] - order[:-1] == 1) & (order[1:] % SHARD != 0)
        runs = np.diff(np.flatnonzero(np.concatenate(([True], ~follows, [True]))))
        saved += int((runs - -(-runs // _JOINED)).sum())
    return saved


def loads(plans: Sequence[Indices], seconds_of_step: float, shards: int) -> list[Indices]:
    """Return the requests to each shard in each full second of the epochs `plans`."""
    steps = np.concatenate(plans)
    seconds = int(len(steps) * seconds_of_step)
    ends = [math.ceil(second / seconds_of_step) for second in range(seconds + 1)]
    rows = (steps[start:end] for start, end in itertools.pairwise(ends))
    return [np.bincount(row[row >= 0] // SHARD, minlength=shards) for row in rows]


def simulate(samples: int, ranks: int, shuffle: bool, options: argparse.Namespace) -> Load:
    """Return the load of `ranks` that train on `samples`; see `Load`."""
    batch = ranks * options.batch_size
    step = options.batch_size / options.rate

    def planned(epoch: int, ragged: Ragged) -> Indices:
        return plan_epoch(samples, global_batch=batch, seed=0, epoch=epoch, shuffle=shuffle, ragged=ragged)

    check_plan(planned(0, "pad"), ranks, samples, "pad")
    plans = [planned(0, "drop")]
    asked = check_plan(plans[0], ranks, samples, "drop")
    while len(plans) * len(plans[0]) * step < 1:
        plans.append(planned(len(plans), "drop"))
    shards = math.ceil(samples / SHARD)
    rate = ranks * options.rate
    found = loads(plans, step, shards)
    ranges = min(shards, math.ceil(rate / S3.rate))
    starts = np.arange(ranges) * shards // ranges
    peak = max(int(np.add.reduceat(load, starts).max()) for load in found)
    mean = float(np.mean(found))
    joined = count_joined(plans[0], ranks)
    return Load(ranks, shuffle, asked, samples - asked, joined, rate, mean, int(np.max(found)), ranges, peak)


def show_loads(found: Sequence[Load]) -> None:
    """Print the load of each job."""
    table = [["ranks", "shuffle", "left out", "joined", "requests/s", *(limit.store for limit in LIMITS)]]
    table[0] += ["a shard: mean", "peak", "busiest range"]
    for load in found:
        times = [f"{math.ceil(load.rate / limit.rate):,}" for limit in LIMITS]
        words = [f"{load.ranks:,}", "on" if load.shuffle else "off", str(load.left), str(load.joined)]
        words += [f"{load.rate:,.0f}", *times, f"{load.shard_mean:.2f}", f"{load.shard_peak:,}"]
        table.append([*words, f"{load.range_peak:,}"])
    print(format_table(table))
    units = ", ".join(f"{limit.rate:,} a second and {limit.unit} of {limit.store}" for limit in LIMITS)
    print(f"prefixes, buckets and accounts needed, by published limits: {units}")
    for load in found:
        if load.shuffle and load.rate > S3.rate:
            share = S3.rate / load.rate
            print(
                f"{load.ranks:,} ranks: S3 must divide the shards into {load.ranges:,} key ranges, and serves"
                f" {share:.1%} of the requests before it has: stage, or fill the caches, before training"
            )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line; return the loads and the costs."""
    parser = harness.make_parser(__doc__)
    parser.add_argument(
        "--ranks", type=harness.numbers, default=[8, 64, 512, 4096, 5000, 65536], metavar="N,N"
    )
    parser.add_argument("--samples", type=harness.positive, default=TRAIN)
    parser.add_argument(
        "--rate", type=harness.positive, default=H100_RATE, help="samples per second of a rank"
    )
    parser.add_argument(
        "--batch-size", type=harness.positive, default=1, help="samples of a step on each rank"
    )
    parser.add_argument("--gpus", type=harness.positive, default=8, help="ranks of a node")
    parser.add_argument("--epochs", type=harness.positive, default=23)
    for name, price in asdict(Prices()).items():
        parser.add_argument(
            f"--{name}", type=float, default=price, metavar="DOLLARS", help="see remote_cost.py"
        )
    options = parser.parse_args(argv)
    found = [
        simulate(options.samples, ranks, shuffle, options)
        for ranks in options.ranks
        for shuffle in (True, False)
    ]
    shards = math.ceil(options.samples / SHARD)
    prefixes = ", ".join(f"{math.ceil(shards / 10**digits):,}" for digits in (3, 2, 1))
    print(f"{options.samples:,} samples in {shards:,} shards; none is asked for twice or lost")
    print(f"prefixes of the shards' names by their number without three, two and one digits: {prefixes}")
    show_loads(found)
    prices = Prices(options.get, options.egress, options.month)
    nodes = sorted({math.ceil(ranks / options.gpus) for ranks in options.ranks})
    figures = show_costs(options.samples, options.rate, options.gpus, nodes, options.epochs, prices)
    results = {"loads": [asdict(load) for load in found], "costs": figures}
    if options.output:
        print("written to", harness.save("remote_plan", vars(options), results, options.output))
    return results


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
