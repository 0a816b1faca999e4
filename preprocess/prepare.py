"""Cut HDF5 universes into samples, TFRecords unless --to says otherwise: the reference's prepare step.

    python -m preprocess.prepare -i DIR -o DIR --gzip
    mpirun -n 64 python -m preprocess.prepare -i DIR -o DIR --gzip
    python -m preprocess.prepare -i DIR -o DIR --sample-size 512 --to packed

Every *.hdf5 file below the input folder, also behind symbolic links, is a universe (see
`preprocess.conversion.hdf5_task`); names that begin with a dot are skipped. Its samples are named
`<parent folder>_<file name>_<crop>`, and all of them go to `train` or all to `validation`; packed ones are
in one shard. A run that was stopped resumes when the same command is started again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from pipelines.dataset.open import first_valid
from pipelines.distributed.cli import OneLineParser, target_location
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World
from pipelines.errors import ConfigError, DataError
from pipelines.filesystem import find_files
from pipelines.formats.packed.format import PackedFormat
from pipelines.formats.registry import FORMATS
from pipelines.plan import derive_seed
from pipelines.sample import SPLITS, SampleSpec
from pipelines.storage.location import Location
from preprocess.conversion.engine import ConversionPlan, run
from preprocess.conversion.hdf5_task import CropTask, universe_shape
from preprocess.conversion.task_result import WorkItem

_SUFFIX = ".hdf5"


def find_universes(root: Path) -> dict[str, Path]:
    """Return the universes below `root` by name, in the order of their paths.

    Raises:
        DataError: There are none, two have the same name, or a folder or link cannot be followed.
    """
    paths, errors = find_files(root, (_SUFFIX,))
    if errors:
        raise errors[0]
    found: dict[str, Path] = {}
    for path in paths:
        # `root` may be given as ".". A folder that is a link has the name of the link.
        folder = path.parent.resolve() if path.parent == root else path.parent
        key = f"{folder.name}_{path.name.removesuffix(_SUFFIX)}"
        if key in found:
            fault = f"would give samples the same names as {found[key]}"
            raise DataError(path, fault, "rename one of their folders")
        found[key] = path
    if not found:
        raise DataError(root, "holds no universes", f"expected *{_SUFFIX} files in it or below")
    return found


def split_universes(names: Sequence[str], validation: float, seed: int) -> tuple[list[str], list[str]]:
    """Draw the fraction `validation` of `names` for validation; return the names for training and those.

    The draw orders the names by a hash of each with `seed`, so it does not depend on the order of `names`.

    Raises:
        ConfigError: A split would be empty.
    """
    count = round(validation * len(names))
    if not 0 < count < len(names):
        raise ConfigError("--validation", validation, f"of {len(names)} universes leaves a split empty")
    drawn = set(sorted(names, key=lambda name: derive_seed(seed, "split", name))[:count])
    return [name for name in names if name not in drawn], [name for name in names if name in drawn]


def plan_preparation(
    source: Path, target: Location, *, size: int, format_name: str, validation: float, seed: int
) -> list[ConversionPlan]:
    """Plan to cut the universes below `source` into samples of `size`^3 in the splits in `target`."""
    universes = find_universes(source)
    for name, path in universes.items():
        if not name.isprintable():
            fault = "would give samples a name that lists cannot hold"
            raise DataError(path, fault, "rename it or its folder, in UTF-8 without control characters")
    first, shape = first_valid(universes.values(), lambda path: (path, universe_shape(path)))
    if size < 1 or shape[0] % size:
        raise ConfigError("--sample-size", size, f"does not divide the universe {first} of shape {shape}")
    count = (shape[0] // size) ** 3
    plans = []
    sharded = format_name == PackedFormat.name
    for split, names in zip(SPLITS, split_universes(list(universes), validation, seed), strict=True):
        crops = {name: [f"{name}_{crop:03d}" for crop in range(count)] for name in names}
        items = [
            WorkItem((universes[name], samples), [name] if sharded else samples)
            for name, samples in crops.items()
        ]
        task = CropTask(shape, size, target / split, format_name)
        spec, all_samples = SampleSpec(size, shape[3]), list(chain.from_iterable(crops.values()))
        # The program, the planes of a universe that are cut, and a sample with what is made of it.
        memory = 10**8 + spec.bytes * shape[0] ** 2 // size**2 + 2 * spec.bytes
        plan = ConversionPlan(target / split, format_name, spec, task, memory, items, all_samples)
        plans.append(replace(plan, samples_per_shard=count if sharded else None))
    return plans


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if every universe has been cut."""
    text = "Cut HDF5 universes into samples, or take them whole, and write them in any format."
    parser = OneLineParser("preprocess.prepare", text)
    parser.add_argument("-i", "--input-dir", type=Path, required=True, help="folder with universes below")
    text = "folder or URL of the data set"
    parser.add_argument("-o", "--output-dir", type=target_location, required=True, help=text)
    parser.add_argument("--sample-size", type=int, default=128, help="voxels along each edge of a sample")
    parser.add_argument("--to", choices=sorted(FORMATS), help="format (default: tfrecord)")
    parser.add_argument("--gzip", action="store_true", help="--to tfrecord_gzip, as the published set is")
    parser.add_argument("--validation", type=float, default=1 / 9, help="fraction of the universes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw of those")
    parser.add_argument("--workers", type=int, help="processes of each rank (default: two a core)")
    arguments = parser.read(argv)

    def make_plans() -> list[ConversionPlan]:
        if arguments.gzip and arguments.to not in (None, "tfrecord_gzip"):
            raise ConfigError(
                "--to", arguments.to, "--gzip stands for tfrecord_gzip: leave one of the two out"
            )
        return plan_preparation(
            arguments.input_dir,
            arguments.output_dir,
            size=arguments.sample_size,
            format_name="tfrecord_gzip" if arguments.gzip else arguments.to or "tfrecord",
            validation=arguments.validation,
            seed=arguments.seed,
        )

    return run(make_plans, arguments.workers, "universe", arguments.output_dir)


if __name__ == "__main__":
    exit_now(main(), World.detect())
