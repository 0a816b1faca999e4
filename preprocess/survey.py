"""Whose the files in a folder are, looked at before anything is written there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.errors import AccessError, DataError
from pipelines.formats import FORMATS
from pipelines.formats.packed import PackedFormat, member_stem, sample_members
from pipelines.manifest import Entry


def refuse_others(
    folder: Path,
    form: str,
    files: Sequence[str],
    found: Mapping[str, Entry],
    source: set[str],
    *,
    prune: bool,
) -> None:
    """DataError where one of the `files` in `folder` is not of a sample of the `source` as `form`.

    found: what is noted there, by stem; what is noted may be of other samples with `prune`, if some
        are the source's.
    """
    held: set[str] = set()
    for stem, names in by_stem(form, files).items():
        samples = _samples_in(folder, form, stem, names, found.get(stem))
        if samples is None or not (stem in found or source.issuperset(samples)):
            fault = f"holds {names[0]}, which is no sample of the source as {form}"
            raise DataError(folder, fault, "remove it, or choose another folder")
        held.update(samples)
    others = held - source
    if others and others == held:
        # Whoever named the wrong folder shall not lose what is in it.
        fault = f"holds {min(others)} and no sample of this source"
        raise DataError(folder, fault, "choose another folder")
    if others and not prune:
        fault = f"holds samples that are not in the source, {len(others)} in all, the first {min(others)}"
        remedy = "bring them back there, choose another folder, or have them removed here with --prune"
        raise DataError(folder, fault, remedy)


def by_stem(form: str, files: Sequence[str]) -> dict[str, list[str]]:
    """The names `files` of samples as `form` by their stems; of others, each by itself."""
    suffixes = FORMATS[form].parts + FORMATS[form].extras
    found: dict[str, list[str]] = defaultdict(list)
    for name in files:
        suffix = next((suffix for suffix in suffixes if name.endswith(suffix)), None)
        found[name.removesuffix(suffix) if suffix else name].append(name)
    return found


def _samples_in(
    folder: Path, form: str, stem: str, names: Sequence[str], noted: Entry | None
) -> Sequence[str] | None:
    """The stems of the samples in the files `names` of the stem; None if that cannot be told."""
    if not all(name.removeprefix(stem) in (*FORMATS[form].parts, *FORMATS[form].extras) for name in names):
        return None
    if form != PackedFormat.name:
        return [stem]
    # A shard's name does not tell what it holds; nor does a note, if the shard is another one by now.
    told = [member_stem(member.name) for part in noted.parts for member in part.members] if noted else None
    if noted and noted.parts and noted.is_whole_in(folder):
        return told
    shard = folder / (stem + PackedFormat.suffix)
    if shard.name not in names:
        return told
    try:
        return [member_stem(member.name) for member in sample_members(shard)]
    except AccessError:
        raise
    except DataError:
        return told
