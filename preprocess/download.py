"""Download the small published set: 32 training and 32 validation samples, 179 MB.

    python -m preprocess.download --small -o data/small

Resumes an interrupted download, unpacks the archive, and verifies every sample (see `preprocess.verify`).
For the full set of 1.7 TB see docs/data-set.md.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from pipelines.console import print_line
from pipelines.dataset.manifest import MANIFEST
from pipelines.dataset.open import list_folder
from pipelines.distributed.cli import OneLineParser, report_errors
from pipelines.distributed.world import World, available_cores
from pipelines.errors import AccessError, ConfigError, DataError, writing
from pipelines.filesystem import is_hidden, is_present
from pipelines.formats.signatures import recognize_file
from pipelines.formats.tfrecord import TFRECORD_SUFFIX
from pipelines.sample import SPLITS
from preprocess.conversion.progress import STOPPED, lock_target
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
    parser = OneLineParser("preprocess.download", "Download the small published set and check it.")
    parser.add_argument("--small", action="store_true", help="32 + 32 samples, 179 MB; required")
    text = "folder of the data set"
    parser.add_argument("-o", "--output-dir", type=Path, default=Path("data/small"), help=text)
    parser.add_argument("--url", default=URL, help="address of the archive, a tar of train/ and validation/")
    parser.add_argument("--sha256", help="SHA-256 of the archive; its own CRCs are checked in any case")
    arguments = parser.read(argv)
    with report_errors(World(), STOPPED):
        if not arguments.small:
            raise ConfigError(
                "--small", False, "only the small set can be downloaded; for all 1.7 TB see docs/data-set.md"
            )
        if not arguments.url.startswith(("http://", "https://")):
            raise ConfigError("--url", arguments.url, "expected an http or https address")
        return download(arguments.url, arguments.output_dir, arguments.sha256)
    return 1


if __name__ == "__main__":
    sys.exit(main())
