"""Whose the files in a folder are, looked at before anything is written there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pipelines.dataset.manifest import Entry
from pipelines.errors import AccessError, DataError
from pipelines.formats.packed.format import MEMBER_SUFFIX, PackedFormat, sample_members
from pipelines.formats.registry import FORMATS


def refuse_others(
    folder: Path,
    format_name: str,
    files: Mapping[str, Sequence[str]],
    noted: Mapping[str, Entry],
    source: set[str],
    *,
    prune: bool,
) -> None:
    """DataError where a file in `folder` is of no sample of the source as `format_name`.

    files: their names by stem. noted: what is noted there, by stem. source: the stems of its samples.
    prune: whether what is noted may be of other samples, if some are the source's.
    """
    held: set[str] = set()
    for stem, names in files.items():
        samples = _samples_in(folder, format_name, stem, names, noted.get(stem))
        if samples is None or not (stem in noted or source.issuperset(samples)):
            fault = f"holds {names[-1]}, which is no sample of the source as {format_name}"
            raise DataError(folder, fault, "remove it, or choose another folder")
        held.update(samples)
    foreign = held - source
    if foreign and foreign == held:
        # Whoever named the wrong folder shall not lose what is in it.
        fault = f"holds {min(foreign)} and no sample of this source"
        raise DataError(folder, fault, "choose another folder")
    if foreign and not prune:
        fault = f"holds samples that are not in the source, {len(foreign)} in all, the first {min(foreign)}"
        remedy = "bring them back to the source, choose another folder, or have them removed with --prune"
        raise DataError(folder, fault, remedy)


def by_stem(format_name: str, files: Iterable[str]) -> dict[str, list[str]]:
    """The names `files` of samples as `format_name` by stem, the index first; others by themselves."""
    suffixes = FORMATS[format_name].suffixes + FORMATS[format_name].extra_suffixes
    found: dict[str, list[str]] = defaultdict(list)
    for name in files:
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        found[name.removesuffix(suffix) if suffix else name].append(name)
    return found


def _samples_in(
    folder: Path, format_name: str, stem: str, names: Sequence[str], noted: Entry | None
) -> Sequence[str] | None:
    """The stems of the samples in the files `names` of the stem; None if that cannot be told."""
    if not all(
        name.removeprefix(stem) in (*FORMATS[format_name].suffixes, *FORMATS[format_name].extra_suffixes)
        for name in names
    ):
        return None
    if format_name != PackedFormat.name:
        # Half a sample that a killed run had begun is none.
        begun = noted and not noted.files
        half = begun and not {stem + part for part in FORMATS[format_name].suffixes} <= set(names)
        return [] if half else [stem]
    # A shard's name does not tell what it holds; nor does a note, if the shard is another one by now.
    told = list(map(_sample_id, noted.members)) if noted else None
    if noted and noted.is_complete_in(folder):
        return told
    shard = folder / (stem + PackedFormat.suffix)
    if shard.name not in names:
        return told
    try:
        return [_sample_id(member.name) for member in sample_members(shard)]
    except AccessError:
        raise
    except DataError:
        return told


def _sample_id(member: str) -> str:
    return member.rpartition("/")[2].removesuffix(MEMBER_SUFFIX)
