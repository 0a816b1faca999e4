"""The input stage alone: samples a second, and processor time a sample, from file to torch tensor.

    python benchmarks/io_bench.py

Each format through the project's loader takes turns with DALI's own numpy reader (what the bytes cost
at least, in an order that DALI chooses) and with a torch DataLoader of two workers that does np.load
and torch.log1p (what one would write first). Files lie in the page cache; the network is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

# Also run as a file, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness
from pipelines.dataset import Split, open_split
from pipelines.formats import FORMATS
from pipelines.loader import Loader, LoaderConfig
from pipelines.plan import Shard, plan_epoch
from preprocess.simulate import make_dataset
from preprocess.universe import SimulateConfig

FLOOR, PLAIN, OURS = "DALI numpy reader", "DataLoader, 2 workers", "npy"


def make_samples(root: Path, samples: int, size: int) -> dict[str, Split]:
    """`samples` simulated samples of `size`^3 in every format, by format; made if they are not there."""
    source = root / f"{size}" / "tfrecord_gzip"
    config = SimulateConfig(train=samples, validation=0, size=size, voxel=1.0, steps=8)
    make_dataset(config, source, workers=2, progress=True)
    published = open_split(source, "train")
    for name, form in FORMATS.items():
        folder = root / f"{size}" / name / "train"
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(samples):
            if not (folder / f"{published.stem(index)}{form.suffix}").exists():
                form.write(folder, published.stem(index), published.read(index))
    return {name: open_split(root / f"{size}" / name, "train") for name in FORMATS}


def touch(volume: torch.Tensor) -> None:
    """Look at a delivered volume, so that none is delivered in name only."""
    assert volume[0, 0, 0, 0, 0].item() >= 0.0


@contextlib.contextmanager
def ours(split: Split, batch_size: int, threads: int) -> Iterator[Callable[[], int]]:
    """The project's loader: planned order, targets and all."""
    config = LoaderConfig(batch_size=batch_size, threads=threads)
    loader = Loader(
        split, config, shard=Shard(), seed=0, shuffle=True, ragged="drop", device=torch.device("cpu")
    )
    epoch = 0

    def deliver() -> int:
        nonlocal epoch
        samples = 0
        for batch in loader.batches(epoch):
            touch(batch.volume)
            samples += batch.real
        epoch += 1
        return samples

    try:
        yield deliver
    finally:
        loader.close()


@contextlib.contextmanager
def dali_numpy(split: Split, batch_size: int, threads: int) -> Iterator[Callable[[], int]]:
    """DALI's own reader of the same .npy files, and the table of logarithms; without targets."""
    from nvidia.dali import fn, pipeline_def, types

    steps = len(split) // batch_size
    plan = plan_epoch(
        len(split), global_batch=batch_size, seed=0, epoch=0, shuffle=True, ragged="drop"
    ).ravel()
    files = [str(split.path(index)) for index in plan.tolist()]
    keys = np.arange(2**15)

    @pipeline_def(batch_size=batch_size, num_threads=threads, device_id=None, exec_dynamic=False)  # type: ignore[untyped-decorator]
    def samples() -> Any:
        counts = fn.readers.numpy(files=files)
        values = np.log1p(keys).astype(np.float32).tolist()
        return fn.lookup_table(counts, keys=keys.tolist(), values=values, dtype=types.FLOAT)

    pipeline = samples()
    pipeline.build()

    def deliver() -> int:
        for _ in range(steps):
            (output,) = pipeline.run()
            touch(torch.utils.dlpack.from_dlpack(output.as_tensor()).permute(0, 4, 1, 2, 3))
        return steps * batch_size

    yield deliver


class PlainDataset(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """What a torch user would write first for .npy pairs."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path = self._split.path(index)
        counts = torch.from_numpy(np.load(path))
        target = np.load(path.with_name(self._split.stem(index) + "_label.npy"))
        return torch.log1p(counts.float()), torch.from_numpy(target)


@contextlib.contextmanager
def plain_loader(split: Split, batch_size: int) -> Iterator[Callable[[], int]]:
    """A DataLoader of two workers that stay."""
    loader = DataLoader(
        PlainDataset(split),
        batch_size=batch_size,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        drop_last=True,
    )

    def deliver() -> int:
        samples = 0
        for counts, _ in loader:
            touch(counts.permute(0, 4, 1, 2, 3))
            samples += len(counts)
        return samples

    yield deliver


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """The command line; what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--data-dir", type=Path, default=Path("data/benchmark"), help="where samples are kept"
    )
    parser.add_argument("--samples", type=int, default=16, help="samples an epoch")
    parser.add_argument("--size", type=int, default=128, help="voxels along an edge")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="of the reader and of DALI")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="folder for a dated JSON file")
    options = parser.parse_args(argv)
    splits = make_samples(options.data_dir, options.samples, options.size)
    with contextlib.ExitStack() as stack:
        contestants = {
            name: stack.enter_context(ours(split, options.batch_size, options.threads))
            for name, split in splits.items()
        }
        contestants[FLOOR] = stack.enter_context(
            dali_numpy(splits["npy"], options.batch_size, options.threads)
        )
        contestants[PLAIN] = stack.enter_context(plain_loader(splits["npy"], options.batch_size))
        readings = harness.take_turns(contestants, options.rounds)
    results: dict[str, Any] = {name: harness.summarise(each) for name, each in readings.items()}
    results["cpu, npy / DALI numpy reader"] = harness.ratios(readings[OURS], readings[FLOOR], "cpu")
    results["cpu, DataLoader / npy"] = harness.ratios(readings[PLAIN], readings[OURS], "cpu")
    results["time, DataLoader / npy"] = harness.ratios(readings[PLAIN], readings[OURS], "wall")
    show(results, splits["npy"].spec.bytes)
    if options.output:
        shown = {key: str(value) for key, value in vars(options).items()}
        print("\nwritten to", harness.save("io_bench", shown, results, options.output))
    return results


def show(results: dict[str, Any], sample_bytes: int) -> None:
    """Print the table: contestants, then ratios."""
    print(f"\n{'':>24} {'samples/s':>10} {'raw MB/s':>9} {'CPU ms/sample':>14} {'(lowest, highest)':>20}")
    for name, value in results.items():
        if isinstance(value, harness.Summary):
            low, high = value.cpu_ms_range
            rate = value.samples_per_s
            spread = f"({low:.1f}, {high:.1f})"
            print(
                f"{name:>24} {rate:10.1f} {rate * sample_bytes / 1e6:9.0f} {value.cpu_ms:14.1f} {spread:>20}"
            )
    for name, value in results.items():
        if isinstance(value, tuple):
            middle, low, high = value
            print(f"{name:>40}: {middle:.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
