"""Check a data set, whole: files, checksums, shapes, dtypes, targets, duplicates and lists.

    python -m preprocess.verify DIR

DIR is a folder of samples, or one that holds `train` and `validation`. Every file is read and
decoded, and compared with the manifest if the folder has one. Prints a table, and each fault as a
line of its own; exits with 0 if there are none. With --write, a sound folder without a manifest is
given one, and the list files.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.dataset.dataset import SampleDataset
from pipelines.dataset.file_lists import DATA_LIST, LABEL_LIST, read_list
from pipelines.dataset.manifest import MANIFEST, Entry, Manifest
from pipelines.dataset.open import list_folder, open_folder, split_dirs
from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.world import World, available_cores
from pipelines.errors import ConfigError, DataError
from pipelines.formats.registry import FORMATS
from pipelines.sample import SPLITS
from pipelines.tables import format_table
from preprocess.conversion.journal import finish, is_unfinished, list_files
from preprocess.conversion.progress import progress
from preprocess.conversion.verify_task import Check
from preprocess.conversion.worker_pool import run_jobs

CHECKS = ("files", "sizes", "checksums", "content", "targets", "duplicates", "lists")
_SHOWN = 20
"""Lines of faults printed of each check."""


@dataclass(slots=True)
class Report:
    """What was found in one folder.

    split: the samples.
    manifest: the folder's manifest, if it has one.
    faults: by check, a line each.
    entries: what the files of each sound sample are, by stem.
    same: the stems of samples that share their counts and targets, by what they share.
    targets: all targets.
    """

    split: SampleDataset
    manifest: Manifest | None
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    entries: dict[str, Entry] = field(default_factory=dict)
    same: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    targets: set[tuple[float, ...]] = field(default_factory=set)

    @property
    def bytes(self) -> int:
        """Of all files of samples that could be read."""
        return sum(part.bytes for entry in self.entries.values() for part in entry.files)


def verify_folder(folder: Path, *, workers: int, shown: bool) -> Report:
    """Check the samples in `folder` with `workers` processes; DataError where there are none."""
    split, manifest = open_folder(folder), Manifest.load(folder)
    report = Report(split, manifest)
    noted = {entry.name: entry.to_json() for entry in manifest.entries} if manifest else {}
    stems = split.entry_names
    _check_names(report, set(stems))
    _check_lists(report)
    task = Check(str(folder), split.format_name, split.spec.size, split.spec.channels)
    jobs = ([stem, noted.get(stem)] for stem in stems)
    with (
        progress(len(stems), "checked", "file", shown=shown) as advance,
        contextlib.closing(run_jobs(task, jobs, workers)) as answers,
    ):
        for (stem, _), answer in answers:
            _take(report, stem, answer)
            advance()
    for stems_alike in report.same.values():
        if len(stems_alike) > 1:
            report.faults["duplicates"].append(f"{folder}: {' and '.join(sorted(stems_alike))} are the same")
    return report


def check_apart(train: Report, validation: Report) -> list[str]:
    """A line for each universe in both splits, of which a score would measure memory."""
    shared = train.targets & validation.targets
    return [
        f"{validation.split.root}: the universe with the target {list(target)} is in {train.split.root} too"
        for target in sorted(shared)
    ]


def _take(report: Report, stem: str, answer: dict[str, Any]) -> None:
    for check, line in answer["faults"]:
        report.faults[check].append(line)
    if answer["entry"] is not None:
        report.entries[stem] = Entry.from_json(answer["entry"])
    for name, content, target in answer["samples"]:
        report.same[f"{content}{target}"].append(name)
        report.targets.add(tuple(target))


def _check_names(report: Report, stems: set[str]) -> None:
    """Files in the folder that belong to no sample, and what writers have left."""
    folder, format_name = report.split.root, report.split.format
    known = {stem + part for stem in stems for part in (*format_name.suffixes, *format_name.extra_suffixes)}
    known |= {MANIFEST, DATA_LIST, LABEL_LIST}
    for name in list_folder(folder):
        if is_unfinished(name):
            report.faults["files"].append(
                f"{folder / name}: was left by a writer that was stopped; run it again"
            )
        elif name not in known and name.endswith(
            tuple(part for f in FORMATS.values() for part in f.suffixes)
        ):
            where = "manifest" if report.manifest else DATA_LIST
            report.faults["files"].append(f"{folder / name}: is not in the {where}")


def _check_lists(report: Report) -> None:
    """The list files, if there are any, against the samples in their order."""
    folder, split = report.split.root, report.split
    stems = split.entry_names
    present = set(list_folder(folder))
    for name, expected in list_files(split.format_name, stems).items():
        if name not in present:
            if report.manifest:
                report.faults["lists"].append(f"{folder / name}: is missing; convert again")
            continue
        try:
            listed = read_list(folder / name)
        except DataError as error:
            report.faults["lists"].append(str(error))
            continue
        if [entry.name for entry in listed] != expected:
            report.faults["lists"].append(f"{folder / name}: does not list the samples in their order")
        for entry in listed:
            path = folder / entry.name
            if entry.bytes is not None and path.exists() and path.stat().st_size != entry.bytes:
                report.faults["lists"].append(
                    f"{folder / name}: gives {entry.name} {entry.bytes} bytes, not its own"
                )


def _table(reports: Sequence[Report]) -> str:
    rows: list[tuple[str, ...]] = [
        ("", *(report.split.root.name for report in reports)),
        ("format", *(report.split.format_name for report in reports)),
        ("shape", *("x".join(map(str, report.split.spec.shape)) for report in reports)),
        ("samples", *(f"{len(report.split):,}" for report in reports)),
        ("bytes", *(f"{report.bytes:,}" for report in reports)),
        ("universes", *(f"{len(report.targets):,}" for report in reports)),
    ]
    for check in CHECKS:
        verdicts = []
        for report in reports:
            needs_manifest = check in ("sizes", "checksums") and report.manifest is None
            faults = len(report.faults[check])
            verdicts.append("no manifest" if needs_manifest else f"{faults} faults" if faults else "ok")
        rows.append((check, *verdicts))
    return format_table(rows)


def verify(root: Path, *, workers: int, write: bool) -> int:
    """Check the data set at `root` and print what was found; 0 if nothing is wrong.

    With `write`, a sound folder that has no manifest gets one.
    """
    reports = [verify_folder(root / part, workers=workers, shown=True) for part in split_dirs(root)]
    if len(reports) == len(SPLITS):
        reports[1].faults["duplicates"] += check_apart(*reports)
    print(_table(reports))
    faults = [line for report in reports for line in _lines(report)]
    for line in faults:
        print(line, file=sys.stderr)
    for report in reports:
        if write and report.manifest is None and not any(report.faults.values()):
            split = report.split
            entries = [report.entries[stem] for stem in split.entry_names]
            finish(split.root, split.format_name, split.spec, entries)
            print(f"wrote {split.root / MANIFEST}")
    return 1 if faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and verify; 0 if nothing is wrong."""
    parser = OneLineParser(
        prog="python -m preprocess.verify",
        description="Check a data set, every file of it, and print a table.",
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="samples, or train and validation")
    parser.add_argument("--workers", type=int, help="processes (default: cores)")
    parser.add_argument("--write", action="store_true", help="give a sound folder a manifest and lists")
    arguments = parser.read(argv)
    with report_errors(World()):
        if arguments.workers is not None and arguments.workers < 1:
            raise ConfigError("--workers", arguments.workers, "expected at least one process")
        workers = arguments.workers or available_cores()
        return verify(arguments.dir, workers=workers, write=arguments.write)
    return 1


def _lines(report: Report) -> list[str]:
    """The faults of `report`, the first few of each check."""
    lines = []
    for check in CHECKS:
        faults = sorted(report.faults[check])
        lines += [f"{check}: {fault}" for fault in faults[:_SHOWN]]
        if len(faults) > _SHOWN:
            lines.append(f"{check}: {len(faults) - _SHOWN} more of these in {report.split.root}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
