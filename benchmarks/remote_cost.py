"""Formulas of what training from an object store costs: requests, bytes, money, and read-ahead.

Every node has a cache of its own, whose samples stay while a job uses the data set. `remote_plan.py` prints
tables of these figures, and docs/clouds.md explains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.scaling_model import RAW
from cosmoflow_dali.mlperf.published import ROWS
from pipelines.tables import format_table

H100_RATE = max(row.rate for row in ROWS if row.chip == "H100")
"""Samples per second of a GPU in the fastest published run on H100 GPUs."""

_LATENCIES = 0.03, 0.1, 0.2
_CACHES = 0.25, 0.5, 1.0
"""Sizes of a node's cache as shares of the data set."""


@dataclass(frozen=True, slots=True)
class Format:
    """A format as it lies in a store.

    Attributes:
        requests: GET requests of a sample, if none is joined with a neighbour's.
        bytes: Of a sample at 128^3.
    """

    name: str
    requests: int
    bytes: float


FORMATS = (
    # The preset fast, by codec_bench.py; a member of a shard is one range.
    Format("packed", 1, 1.87e6),
    Format("npy", 2, RAW + 128 + 144),
    # The mean of the published files.
    Format("tfrecord_gzip", 1, 2_828_486),
)


class Limit(NamedTuple):
    """A published limit of GET requests per second, and what it is a limit of."""

    store: str
    unit: str
    rate: int


S3 = Limit("S3", "prefix", 5_500)
"""At least so many, of a partitioned prefix:
docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html"""

LIMITS = (
    S3,
    # Before a bucket scales with its load: cloud.google.com/storage/docs/request-rate
    Limit("GCS", "bucket", 5_000),
    # 40,000 in the larger regions:
    # learn.microsoft.com/en-us/azure/storage/common/scalability-targets-standard-account
    Limit("Azure", "account", 20_000),
)

CONNECTION = 85e6
"""Bytes per second of a connection to S3 after the first byte:
docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance-design-patterns.html"""


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices in dollars; the defaults are those of S3 Standard in us-east-1, as listed in 2024.

    Attributes:
        get: Of 1,000 GET requests.
        egress: Of 1 GB that leaves the region; nothing within it.
        month: Of 1 GB stored for a month.
    """

    get: float = 0.0004
    egress: float = 0.09
    month: float = 0.023


def hit_rate(nodes: int, held: float, epoch: int) -> float:
    """Return the share of samples that a node finds in its cache in `epoch`, counted from 0, with shuffling.

    An epoch gives each sample to one of the nodes at random. So a node has met 1 - (1 - 1 / nodes)^epoch of
    the set before, and keeps no more than its cache has room for.

    Args:
        held: Size of a node's cache as a share of the data set.
    """
    return min(held, 1 - (1 - 1 / nodes) ** epoch)


def fetched(nodes: int, held: float, epochs: int) -> float:
    """Return how often a sample is fetched in `epochs`, by all nodes together; see `hit_rate`."""
    return sum(1 - hit_rate(nodes, held, epoch) for epoch in range(epochs))


def in_flight(rate: float, latency: float, form: Format) -> float:
    """Return the samples in flight that deliver `rate` samples per second, by Little's law.

    Args:
        latency: Seconds to the first byte of a request; those of a sample are sent one after the other.
    """
    return rate * (form.requests * latency + form.bytes / CONNECTION)


def show_costs(
    samples: int, rate: float, gpus: int, nodes: Sequence[int], epochs: int, prices: Prices
) -> dict[str, Any]:
    """Print the costs of an epoch, the read-ahead and the effect of caches; return the figures.

    Args:
        samples: Of the data set.
        rate: Samples per second of each rank.
        gpus: Ranks of a node.
        nodes: Numbers of nodes to compare.
        epochs: Of a training.
    """
    ahead = [f"in flight, {1e3 * latency:.0f} ms" for latency in _LATENCIES]
    table = [["", "requests", "TB", "$ requests", "$ out of region", "$ a month", "Gb/s a node", *ahead]]
    figures: dict[str, Any] = {}
    for form in FORMATS:
        requests, size = samples * form.requests, samples * form.bytes
        costs = [requests / 1e3 * prices.get, size / 1e9 * prices.egress, size / 1e9 * prices.month]
        flying = [in_flight(rate, latency, form) for latency in _LATENCIES]
        network = 8e-9 * gpus * rate * form.bytes
        figures[form.name] = {"requests": requests, "bytes": size, "dollars": costs, "in_flight": flying}
        words = [form.name, f"{requests:,}", f"{1e-12 * size:.2f}", *(f"{cost:,.2f}" for cost in costs)]
        table.append([*words, f"{network:.0f}", *(f"{each:.0f}" for each in flying)])
    print(f"\nan epoch without caches, and the samples in flight of a rank at {rate:g} samples/s")
    print(format_table(table))
    table = [["nodes", "cache", "hits in epoch 2", "5", str(epochs), "fetches of a sample", "of all"]]
    for number in nodes:
        for held in _CACHES:
            hits = [hit_rate(number, held, epoch - 1) for epoch in (2, 5, epochs)]
            times = fetched(number, held, epochs)
            figures[f"{number} nodes, cache of {held:.0%}"] = {"hits": hits, "fetches": times}
            words = [f"{number:,}", f"{held:.0%}", *(f"{hit:.1%}" for hit in hits)]
            table.append([*words, f"{times:.2f}", f"{times / epochs:.1%}"])
    print(f"\n{epochs} epochs with shuffling and caches that are empty at first")
    print(format_table(table))
    return figures
