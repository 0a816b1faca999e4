"""Check a whole data set: files, checksums, shapes, dtypes, targets, duplicates and lists.

    python -m preprocess.verify DIR

DIR is a folder of samples, or one that holds the splits. Every file is read and decoded, and
compared with the manifest if the folder has one. Prints a table, and one line for each fault; the exit status
is 0 without faults. A sample without particles is noted, but not a fault. With --write, a folder without
faults and without a manifest gets one, and the list files.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

from pipelines.console import check_output, print_line
from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.file_lists import DATA_LIST, LABEL_LIST, read_list
from pipelines.dataset.manifest import MANIFEST, Entry, Manifest
from pipelines.dataset.open import list_folder, open_folder, split_dirs
from pipelines.distributed.cli import OneLineParser, location, report_errors
from pipelines.distributed.world import World, available_cores, available_memory
from pipelines.errors import ConfigError, DataError
from pipelines.filesystem import is_hidden
from pipelines.formats.registry import FORMATS
from pipelines.storage.location import Location
from pipelines.tables import format_table
from preprocess.conversion.progress import track
from preprocess.conversion.target import commit, is_unfinished, list_files
from preprocess.conversion.verify_task import VerifyTask
from preprocess.conversion.worker_pool import fit_workers, run_tasks

CHECKS = ("files", "sizes", "checksums", "content", "targets", "duplicates", "lists")
_MAX_LINES = 20
"""Printed faults of each check, and notes."""


@dataclass(slots=True)
class Report:
    """Result of the checks of one folder.

    dataset: The samples.
    manifest: The folder's manifest, if it has one.
    faults: One line for each fault, by check.
    entries: What the files of each readable entry are, by name.
    empty: Paths of the valid samples without particles.
    samples: IDs of the valid samples with the same counts and target, by digest and target.
    """

    dataset: SampleDataset
    manifest: Manifest | None
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    entries: dict[str, Entry] = field(default_factory=dict)
    empty: list[Location] = field(default_factory=list)
    samples: dict[tuple[str, tuple[float, ...]], list[str]] = field(default_factory=lambda: defaultdict(list))

    @property
    def targets(self) -> set[tuple[float, ...]]:
        """All targets."""
        return {target for _, target in self.samples}


def verify_folder(folder: Location, *, workers: int, shown: bool) -> Report:
    """Check the samples in `folder` with `workers` processes; DataError if there are none."""
    report = Report(open_folder(folder), Manifest.load(folder))
    records = {entry.name: entry for entry in report.manifest.entries} if report.manifest else {}
    names = report.dataset.entry_names
    _check_names(report, names)
    _check_lists(report, names)
    task = VerifyTask(folder, report.dataset.format_name, report.dataset.spec)
    # The program, and a sample with what it is made of.
    memory = 10**8 + 3 * report.dataset.spec.bytes
    workers = fit_workers(workers, memory, available_memory(), shown=shown)
    items = ((name, records.get(name)) for name in names)
    with contextlib.closing(run_tasks(task, items, workers)) as results:
        for (name, _), result in track(results, len(names), "checked", "file", shown=shown):
            for check, line in result.faults:
                report.faults[check].append(line)
            if result.entry is not None:
                report.entries[name] = result.entry
            report.empty += result.empty
            for sample in result.samples:
                report.samples[sample.digest, sample.target].append(sample.sample_id)
    for sample_ids in report.samples.values():
        if len(sample_ids) > 1:
            report.faults["duplicates"].append(f"{folder}: {' and '.join(sorted(sample_ids))} are the same")
    return report


def _check_names(report: Report, entries: Sequence[str]) -> None:
    """Report files that belong to no sample, and those that a killed writer left."""
    folder, format_ = report.dataset.root, report.dataset.format
    known = {name + suffix for name in entries for suffix in format_.written_suffixes}
    known |= {MANIFEST, DATA_LIST, LABEL_LIST}
    suffixes = tuple(suffix for other in FORMATS.values() for suffix in other.suffixes)
    # A web server has no lists of its files.
    for name in list_folder(folder) if report.dataset.storage.lists_folders else ():
        if is_unfinished(name):
            fault = f"{folder / name}: was left by a writer that was stopped; run it again"
            report.faults["files"].append(fault)
        elif name not in known and name.endswith(suffixes) and not is_hidden(name):
            where = "manifest" if report.manifest else DATA_LIST
            report.faults["files"].append(f"{folder / name}: is not in the {where}")


def _check_lists(report: Report, entries: Sequence[str]) -> None:
    """Compare the list files, if there are any, with the samples in their order."""
    folder = report.dataset.root
    faults = report.faults["lists"]
    for name, expected in list_files(report.dataset.format_name, entries).items():
        path = folder / name
        if not report.dataset.storage.is_present(path):
            if report.manifest:
                faults.append(f"{path}: is missing; convert again")
            continue
        try:
            listed = read_list(path)
        except DataError as error:
            faults.append(str(error))
            continue
        if [file.name for file in listed] != expected:
            faults.append(f"{path}: does not list the samples in their order")
        for file in listed:
            # What cannot be read is a fault of another check.
            with contextlib.suppress(DataError):
                if file.bytes not in (None, report.dataset.storage.state(folder / file.name).bytes):
                    fault = f"lists {file.name} with {file.bytes} bytes, which is not its length"
                    faults.append(f"{path}: {fault}")


def _column(report: Report) -> list[str]:
    """Return the cells of the table for `report`: what was found, and the result of each check."""
    dataset = report.dataset
    size = sum(file.bytes for entry in report.entries.values() for file in entry.files)
    numbers = [f"{number:,}" for number in (len(dataset), size, len(report.targets))]
    cells = [dataset.root.name, dataset.format_name, "x".join(map(str, dataset.spec.shape)), *numbers]
    for check in CHECKS:
        needs_manifest = check in ("sizes", "checksums") and report.manifest is None
        faults = len(report.faults[check])
        cells.append("no manifest" if needs_manifest else f"{faults} faults" if faults else "ok")
    return cells


def verify(root: Location, *, workers: int, write: bool) -> int:
    """Check the data set at `root` and print the result; return 0 without faults.

    With `write`, a folder without faults and without a manifest gets one.
    """
    reports = [verify_folder(root / split, workers=workers, shown=True) for split in split_dirs(root)]
    for earlier, later in combinations(reports, 2):
        # A score of such samples would measure memorization.
        for target in sorted(earlier.targets & later.targets):
            fault = f"the universe with the target {list(target)} is in {earlier.dataset.root} too"
            later.faults["duplicates"].append(f"{later.dataset.root}: {fault}")
    labels = ["", "format", "shape", "samples", "bytes", "universes", *CHECKS]
    print(format_table([*zip(labels, *map(_column, reports), strict=True)]))
    for report in reports:
        for check in CHECKS:
            faults = sorted(report.faults[check])
            for fault in faults[:_MAX_LINES]:
                print_line(f"{check}: {fault}", sys.stderr)
            if len(faults) > _MAX_LINES:
                more = len(faults) - _MAX_LINES
                print_line(f"{check}: {more} more of these in {report.dataset.root}", sys.stderr)
    for path in sorted(path for report in reports for path in report.empty)[:_MAX_LINES]:
        print_line(f"note: {path}: holds no particles; loader.apply_log: false cannot use it", sys.stderr)
    for report in reports:
        if write and report.manifest is None and not any(report.faults.values()):
            dataset = report.dataset
            entries = [report.entries[name] for name in dataset.entry_names]
            commit(dataset.root, dataset.format_name, dataset.spec, entries)
            print_line(f"wrote {dataset.root / MANIFEST}")
    return 1 if any(any(report.faults.values()) for report in reports) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 without faults."""
    parser = OneLineParser("preprocess.verify", "Check every file of a data set, and print a table.")
    text = "folder or URL of samples, or of the splits"
    parser.add_argument("dir", type=location, metavar="DIR", help=text)
    parser.add_argument("--workers", type=int, default=available_cores(), help="processes")
    parser.add_argument(
        "--write", action="store_true", help="give a folder without faults a manifest and lists"
    )
    arguments = parser.read(argv)
    with report_errors(World()):
        if arguments.workers < 1:
            raise ConfigError("--workers", arguments.workers, "expected at least one process")
        status = verify(arguments.dir, workers=arguments.workers, write=arguments.write)
        check_output()
    return status


if __name__ == "__main__":
    sys.exit(main())
