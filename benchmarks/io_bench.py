"""The input stage alone: samples a second, and processor time a sample, from file to torch tensor.

    python benchmarks/io_bench.py

Each format through the project's loader takes turns with DALI's own numpy reader (the floor: what the
bytes cost at least) and with a torch DataLoader of two workers that does np.load and torch.log1p (the
plain way: what one would write first). All deliver (B, 4, size, size, size) float32 logarithms on the
CPU in a shuffled order. Files lie in the page cache; the network is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from pipelines.config import LoaderConfig
from pipelines.dataset import Split, open_split
from pipelines.formats import FORMATS
from pipelines.loader import Loader
from pipelines.plan import Shard, plan_epoch
from pipelines.sample import Sample

FLOOR, PLAIN, OURS = "DALI numpy reader", "DataLoader, 2 workers", "npy"
BARS = {"cpu_of_floor": 1.25, "speed_of_plain": 4.0}
"""What the project claims of npy samples of 128^3: at most so much of the floor's CPU time, and at least
so many times the plain way's speed."""

_LEAD = 8
"""Batches of a turn before the clock starts: more than any contestant holds ready."""

_GROWTH = (1.0, 0.77, 0.51, 0.32)
"""How rough the universe is at each redshift of a sample, of what it is today."""


@dataclass(frozen=True, slots=True)
class Result:
    """A contestant: its figures, and how it stands to the two that it is measured by.

    cpu_of_floor: its CPU time a sample over DALI's own reader's, so below 1 is less.
    speed_of_plain: its samples a second over the plain DataLoader's, so above 1 is faster.
    cpu_saving: the plain DataLoader's CPU time a sample over its own, so above 1 is less.
    """

    figures: harness.Summary
    cpu_of_floor: harness.Spread
    speed_of_plain: harness.Spread
    cpu_saving: harness.Spread


def synthetic_sample(index: int, size: int) -> Sample:
    """Sample `index`, always the same: Poisson counts of mean 1 in a lognormal field that grows rougher.

    At redshift 0, 55% of the voxels are empty, and gzip finds about as much to save as in simulated
    samples (5.4 times, where those give 5.7).
    """
    rng = np.random.default_rng(index)
    roughness = 1.2 * np.array(_GROWTH)
    field = rng.standard_normal((size, size, size, 1))
    counts = rng.poisson(np.exp(roughness * field - roughness**2 / 2)).astype(np.int16)
    return Sample(counts, rng.uniform(-1, 1, 4).astype(np.float32))


def make_splits(root: Path, forms: Sequence[str], samples: int, size: int) -> dict[str, Split]:
    """`samples` synthetic samples of `size`^3 in each of `forms`, in the page cache; made if missing."""
    folders = {form: root / f"{samples}x{size}" / form / "train" for form in forms}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(samples):
        stem = f"universe_{index:04d}"
        missing = [form for form in forms if not (folders[form] / f"{stem}{FORMATS[form].suffix}").exists()]
        if missing:
            sample = synthetic_sample(index, size)
        for form in missing:
            FORMATS[form].write(folders[form], stem, sample)
    for file in itertools.chain.from_iterable(folder.iterdir() for folder in folders.values()):
        file.read_bytes()
    return {form: open_split(folder.parent, folder.name) for form, folder in folders.items()}


def planned(split: Split, batch_size: int, epoch: int) -> list[int]:
    """The samples of `epoch`, one batch behind the other, in the order that all contestants keep."""
    plan = plan_epoch(len(split), global_batch=batch_size, seed=0, epoch=epoch, shuffle=True, ragged="drop")
    return plan.ravel().tolist()


def touch(volume: torch.Tensor) -> None:
    """Look at a delivered volume (B, 4, D, H, W), so that none is delivered in name only."""
    assert volume[0, 0, 0, 0, 0].item() >= 0.0


@contextlib.contextmanager
def ours(split: Split, batch_size: int, threads: int) -> Iterator[Iterator[int]]:
    """The project's loader, targets and all."""
    config = LoaderConfig(batch_size=batch_size, threads=threads)
    loader = Loader(
        split, config, shard=Shard(), seed=0, shuffle=True, ragged="drop", device=torch.device("cpu")
    )

    def deliver() -> Iterator[int]:
        for epoch in itertools.count():
            for batch in loader.batches(epoch):
                touch(batch.volume)
                yield len(batch.volume)

    with contextlib.closing(loader):
        yield deliver()


def dali_numpy(split: Split, batch_size: int, threads: int) -> Generator[int, None, None]:
    """DALI's own reader of the same .npy files, and the table of logarithms; without targets.

    Its list of files is fixed, so it repeats the order of the first epoch.
    """
    from nvidia.dali import fn, pipeline_def, types

    files = [str(split.path(index)) for index in planned(split, batch_size, epoch=0)]
    keys = np.arange(2**15)

    @pipeline_def(  # type: ignore[untyped-decorator]
        batch_size=batch_size,
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=2,
        exec_dynamic=False,
    )
    def samples() -> Any:
        counts = fn.readers.numpy(files=files)
        values = np.log1p(keys).astype(np.float32).tolist()
        return fn.lookup_table(counts, keys=keys.tolist(), values=values, dtype=types.FLOAT)

    pipeline = samples()
    pipeline.build()
    while True:
        (output,) = pipeline.run()
        touch(torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 4, 1, 2, 3))
        yield batch_size


class PlainDataset(Dataset[tuple[torch.Tensor, npt.NDArray[np.float32]]]):
    """What a torch user would write first for .npy pairs."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, npt.NDArray[np.float32]]:
        """Logarithms (D, H, W, 4) float32, and the target (4,) float32."""
        path = self._split.path(index)
        counts = torch.from_numpy(np.load(path))
        return torch.log1p(counts), np.load(path.with_name(self._split.stem(index) + "_label.npy"))


def plain_loader(split: Split, batch_size: int) -> Generator[int, None, None]:
    """A DataLoader of two workers, whose one epoch never ends: it too works ahead across epochs."""
    order = itertools.chain.from_iterable(planned(split, batch_size, epoch) for epoch in itertools.count())
    for volume, _ in DataLoader(PlainDataset(split), batch_size, sampler=order, num_workers=2):
        touch(volume.permute(0, 4, 1, 2, 3))
        yield len(volume)


def run(splits: dict[str, Split], options: argparse.Namespace) -> dict[str, Result]:
    """The contest of `options.formats`, the floor and the plain way over `splits`."""
    batch_size, threads = options.batch_size, options.threads
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(contextlib.closing(plain_loader(splits[OURS], batch_size)))
        # Its workers are forks, which are best made before there are threads.
        next(plain)
        contestants = {
            form: stack.enter_context(ours(splits[form], batch_size, threads)) for form in options.formats
        }
        contestants[FLOOR] = stack.enter_context(
            contextlib.closing(dali_numpy(splits[OURS], batch_size, threads))
        )
        contestants[PLAIN] = plain
        readings = harness.measure(
            contestants, rounds=options.rounds, lead=_LEAD, steps=max(options.samples // batch_size, 1)
        )
    return {
        name: Result(
            figures=harness.summarise(each, splits[OURS].spec.bytes),
            cpu_of_floor=harness.ratio(each, readings[FLOOR], "cpu"),
            speed_of_plain=harness.ratio(readings[PLAIN], each, "wall"),
            cpu_saving=harness.ratio(readings[PLAIN], each, "cpu"),
        )
        for name, each in readings.items()
    }


def show(results: dict[str, Result]) -> None:
    """Print the table, medians and 10th to 90th percentiles over the rounds, and how the bars are met."""
    print(
        f"{'':21} {'samples/s':>18} {'raw MB/s':>8} {'CPU ms/sample':>18}"
        f" {'CPU / floor':>17} {'speed / plain':>17} {'plain CPU / own':>17}"
    )
    for name, result in results.items():
        figures = result.figures
        print(
            f"{name:21} {_text(figures.samples_per_s, 1):>18} {figures.bytes_per_s.median / 1e6:8.0f}"
            f" {_text(figures.cpu_ms, 1):>18} {_text(result.cpu_of_floor, 2):>17}"
            f" {_text(result.speed_of_plain, 1):>17} {_text(result.cpu_saving, 1):>17}"
        )
    print(f"floor: {FLOOR}; plain: {PLAIN}; medians (10th to 90th percentile) over the rounds")
    if OURS in results:
        cost, speed = results[OURS].cpu_of_floor.median, results[OURS].speed_of_plain.median
        print(f"CPU, {OURS} / floor: {cost:.2f}; claimed of 128^3: at most {BARS['cpu_of_floor']}")
        print(f"speed, {OURS} / plain: {speed:.1f}; claimed of 128^3: at least {BARS['speed_of_plain']}")


def _text(spread: harness.Spread, digits: int) -> str:
    return f"{spread.median:.{digits}f} ({spread.p10:.{digits}f}-{spread.p90:.{digits}f})"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="where samples are kept (default: made, and removed)")
    parser.add_argument("--formats", type=_formats, default=list(FORMATS), help="of the loader, by commas")
    parser.add_argument("--samples", type=_positive, default=16, help="in the set, and timed a turn")
    parser.add_argument("--size", type=_positive, default=128, help="voxels along an edge")
    parser.add_argument("--batch-size", type=_positive, default=1)
    parser.add_argument("--threads", type=_positive, default=2, help="of the readers, and of DALI")
    parser.add_argument("--rounds", type=_positive, default=9, help="turns of each contestant")
    parser.add_argument(
        "--output", type=Path, nargs="?", const=harness.RESULTS, help="write JSON (to benchmarks/results)"
    )
    options = parser.parse_args(argv)
    if options.samples < options.batch_size:
        parser.error(f"--samples {options.samples} do not fill one batch of {options.batch_size}")
    return options


def _positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def _formats(text: str) -> list[str]:
    forms = text.split(",")
    if unknown := set(forms) - set(FORMATS):
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is none of {', '.join(FORMATS)}")
    return forms


def main(argv: Sequence[str] | None = None) -> dict[str, Result]:
    """The command line; what was measured, by contestant."""
    options = _options(argv)
    with contextlib.ExitStack() as stack:
        root = options.data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        # The floor and the plain way read npy, whichever formats are asked for.
        splits = make_splits(root, sorted({*options.formats, OURS}), options.samples, options.size)
        results = run(splits, options)
    show(results)
    if options.output:
        print(
            "written to", harness.save("io_bench", vars(options), {"bars": BARS, **results}, options.output)
        )
    return results


if __name__ == "__main__":
    main()
