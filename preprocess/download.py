"""Download samples: the small published set, or any part of a data set in an object store or on a web server.

    python -m preprocess.download --small -o data/small
    python -m preprocess.download --from s3://BUCKET/DIR --split train --samples 0:1000 -o data/some

The small set is 32 training and 32 validation samples, 179 MB: the archive is unpacked, and every sample is
verified (see `preprocess.verify`). For the full set of 1.7 TB see docs/data-set.md.

With --from, files are copied as they are, compared with the checksums of the manifest, and become a data set
with a manifest of its own. Of a shard whose samples are not all wanted, the others are left out. The ranks of
mpirun or srun share the work.

A run that was stopped resumes when the same command is started again; a larger part keeps what is there.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from pipelines.console import print_line
from pipelines.dataset.manifest import MANIFEST, Manifest
from pipelines.dataset.open import list_folder, open_folder, split_dirs
from pipelines.distributed.cli import OneLineParser, launched, local_path, location, report_errors
from pipelines.distributed.session import exit_now
from pipelines.distributed.world import World, available_cores
from pipelines.errors import AccessError, ConfigError, DataError, UserError, writing
from pipelines.filesystem import is_hidden, is_present
from pipelines.formats.signatures import recognize_file
from pipelines.formats.tfrecord import TFRECORD_SUFFIX
from pipelines.sample import ALL_SPLITS, SPLITS
from pipelines.storage.location import Location
from preprocess.conversion.copy_task import CALLS, PIECE_BYTES, CopyTask
from preprocess.conversion.engine import ConversionPlan, run
from preprocess.conversion.progress import STOPPED, lock_target
from preprocess.conversion.task_result import WorkItem
from preprocess.fetch import fetch
from preprocess.verify import verify

URL = "https://portal.nersc.gov/project/dasrepo/cosmoflow-benchmark/cosmoUniverse_2019_05_4parE_tf_small.tgz"


_ARCHIVES = ("gzip data", "bzip2 data", "xz data", "a tar archive")
"""Kinds that tarfile reads."""


def unpack(archive: Path, root: Path) -> int:
    """Unpack the samples in the tar file `archive` into `root`/train and `root`/validation.

    A member is a sample if its folder has the name of a split; other files, and hidden ones, are skipped.

    Returns:
        Number of samples.

    Raises:
        DataError: The archive is damaged, has no samples, or would write elsewhere. Then `root` is unchanged.
    """
    partial, complete = root / ".unpacking", root / ".unpacked"
    try:
        if not complete.exists():
            _unpack(archive, partial)
            partial.rename(complete)
        # A run that was killed from here on resumes here.
        for split in list(complete.iterdir()):
            split.rename(root / split.name)
        complete.rmdir()
    except FileExistsError as error:
        raise DataError(archive, f"holds {Path(error.filename).name} twice", "fetch it again") from error
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        # gzip raises OSError without a number for a file that is not gzipped, and for a wrong CRC.
        if isinstance(error, OSError) and error.errno is not None:
            raise AccessError.writing(root, error) from error
        kind = recognize_file(archive)
        if kind and kind not in _ARCHIVES:
            remedy = "check the address, and whether it asks for a login"
            raise DataError(archive, f"holds {kind} instead of an archive", remedy) from error
        reason = str(error).partition("\n")[0].rstrip(":") if archive.stat().st_size else "it is empty"
        raise DataError(archive, f"is not a valid archive ({reason})", "fetch it again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sum(len(list_folder(root / split)) for split in SPLITS if is_present(root / split))


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the samples in `archive` into the splits in `folder`, whose earlier content is removed."""
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(archive, "r:*") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            regular = member.isfile() or member.isdir()
            if path.is_absolute() or ".." in path.parts or not regular:
                kind = "a path outside the folder" if regular else "a link or device"
                raise DataError(archive, f"holds {member.name}, {kind}", "do not trust its origin")
            split = path.parent.name
            sample = split in SPLITS and path.name.endswith(TFRECORD_SUFFIX) and not is_hidden(member.name)
            if member.isfile() and sample:
                source = tar.extractfile(member)
                assert source is not None, "a regular file has content"
                (folder / split).mkdir(parents=True, exist_ok=True)
                with open(folder / split / path.name, "xb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
        # tarfile takes a missing header for the end.
        assert tar.fileobj is not None, "it is open"
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(archive, f"is cut off: no header at byte {tar.offset}", "fetch it again")
    if not folder.exists():
        expected = " and ".join(f"{split}/*{TFRECORD_SUFFIX}" for split in SPLITS)
        raise DataError(archive, "holds no samples", f"expected {expected}")


def plan_download(
    source: Location, target: Path, samples: slice | None = None, shards: slice | None = None
) -> ConversionPlan:
    """Plan to copy samples of the folder `source` to `target`.

    Args:
        source: Folder of samples.
        target: Folder that they are copied to.
        samples: Which of the samples, in their order; None for all.
        shards: Which of the shards; None for all.

    Raises:
        ConfigError: There are none of these, or `shards` is given and `source` has no shards.
    """
    dataset, manifest = open_folder(source), Manifest.load(source)
    if shards is not None and not dataset.sharded:
        fault = f"{source} holds {dataset.format_name} samples, which are in files of their own"
        raise ConfigError("--shards", _text(shards), f"{fault}: use --samples")
    entries: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(dataset.names):
        entries[name.partition("/")[0].removesuffix(dataset.format.suffix)].append(index)
    wanted = set(range(len(dataset))[samples or slice(None)])
    records = {entry.name: entry for entry in manifest.entries} if manifest else {}
    items = []
    for name in list(entries)[shards or slice(None)]:
        if indices := [index for index in entries[name] if index in wanted]:
            whole = len(indices) == len(entries[name])
            part = dataset.subset(np.array(indices))
            items.append(WorkItem((part, records.get(name) if whole else None), [name]))
    if not items:
        key, value = ("--samples", samples) if samples is not None else ("--shards", shards)
        held = f"{len(dataset)} samples" + (f" in {len(entries)} shards" if dataset.sharded else "")
        raise ConfigError(key, _text(value), f"{source} holds {held}")
    parts = [item.source[0] for item in items]
    sample_ids = [part.sample_id(index) for part in parts for index in range(len(part))]
    task, shard_size = CopyTask(target), len(parts[0]) if dataset.sharded else None
    memory = 10**8 + CALLS * max(PIECE_BYTES, 2 * dataset.spec.bytes)
    return ConversionPlan(
        target, dataset.format_name, dataset.spec, task, memory, items, sample_ids, shard_size
    )


def _text(part: slice | None) -> str:
    """Return `part` as a command line has it."""
    return "" if part is None else f"{part.start or ''}:{'' if part.stop is None else part.stop}"


def _part(text: str) -> slice:
    """Parse what `--samples` and `--shards` take: `START:STOP`, either may be missing, or a number."""
    found = re.fullmatch(r"(\d*):(\d*)|(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: expected START:STOP, or the number of the first ones")
    start, stop, count = (int(group) if group else None for group in found.groups())
    return slice(start, count if stop is None else stop)


def download_part(
    source: Location,
    root: Path,
    splits: Sequence[str],
    samples: slice | None,
    shards: slice | None,
    workers: int | None,
) -> int:
    """Copy samples of the data set `source` to `root`; return the exit status.

    Args:
        source: Folder of samples, or of the splits.
        root: Folder that becomes the same.
        splits: Which splits; none for all.
        samples, shards: See `plan_download`.
        workers: Processes of each rank; None for two a core.
    """

    def make_plans() -> list[ConversionPlan]:
        found = split_dirs(source)
        if missing := [split for split in splits if split not in found]:
            raise ConfigError("--split", missing[0], f"{source} has no such folder")
        return [
            plan_download(source / split, root / split, samples, shards)
            for split in found
            if split in (splits or found)
        ]

    return run(make_plans, workers, "file", root, done="copied")


def download(url: str, root: Path, sha256: str | None) -> int:
    """Download the data set at `url` to `root` and verify it; return the exit status."""
    if all((root / split / MANIFEST).exists() for split in SPLITS):
        print_line(f"{root}: complete")
        return 0
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    with lock_target(root):
        return _download(url, root, sha256)


def _download(url: str, root: Path, sha256: str | None) -> int:
    if not all((root / split).is_dir() for split in SPLITS):
        archive = root / PurePosixPath(url).name
        fetch(url, archive, sha256=sha256, shown=True)
        try:
            print_line(f"{root}: {unpack(archive, root)} samples")
        except AccessError:
            raise
        except DataError:
            archive.unlink()
            raise
        with writing(archive):
            archive.unlink()
    status = verify(root, workers=available_cores(), write=True)
    if status != 0:
        splits = " and ".join(SPLITS)
        remedy = f"remove {splits} there and run the same command again"
        print_line(f"error: {root}: has the faults above; {remedy}", sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if the data set is there and has no faults."""
    text = "Download the small published set, or a part of a data set in an object store or on a web server."
    parser = OneLineParser("preprocess.download", text)
    source = parser.add_mutually_exclusive_group(required=True)
    text = "the small published set, 32 + 32 samples, 179 MB"
    source.add_argument("--small", action="store_true", help=text)
    text = "folder or URL of samples, or of the splits"
    source.add_argument("--from", dest="source", type=location, metavar="URL", help=text)
    text = "folder of the data set (default with --small: data/small)"
    parser.add_argument("-o", "--output-dir", type=local_path, help=text)
    small = parser.add_argument_group("of --small")
    small.add_argument("--url", default=URL, help="address of the archive, a tar of train/ and validation/")
    small.add_argument("--sha256", help="SHA-256 of the archive; its own CRCs are checked in any case")
    rest = parser.add_argument_group("of --from")
    rest.add_argument("--split", nargs="+", choices=ALL_SPLITS, help="these splits alone")
    which = rest.add_mutually_exclusive_group()
    text = "of each split, START:STOP or the number of the first ones"
    which.add_argument("--samples", type=_part, metavar="PART", help=f"samples {text}")
    which.add_argument("--shards", type=_part, metavar="PART", help=f"shards {text}")
    rest.add_argument("--workers", type=int, help="processes of each rank (default: two a core)")
    arguments = parser.read(argv)
    with report_errors(launched()):
        of_other = ("split", "samples", "shards", "workers") if arguments.small else ("url", "sha256")
        for name in of_other:
            if getattr(arguments, name) != parser.get_default(name):
                raise UserError(f"--{name} is not an option of --{'small' if arguments.small else 'from'}")
        if arguments.source is not None and arguments.output_dir is None:
            raise UserError("--from needs the folder of the data set: -o DIR")
    if arguments.source is not None:
        return download_part(
            arguments.source,
            arguments.output_dir,
            arguments.split or (),
            arguments.samples,
            arguments.shards,
            arguments.workers,
        )
    with report_errors(World(), STOPPED):
        if not arguments.url.startswith(("http://", "https://")):
            raise ConfigError("--url", arguments.url, "expected an http or https address")
        return download(arguments.url, arguments.output_dir or Path("data/small"), arguments.sha256)
    return 1


if __name__ == "__main__":
    exit_now(main(), World.detect())
