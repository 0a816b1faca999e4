"""Tar shards: files of many samples, each a member that is read by its position.

A shard is a plain POSIX tar (ustar) as in WebDataset. The index beside it, `<shard>.idx`, is the one
of DALI's webdataset reader, as wds2idx writes it: a line `v1.2 <members>`, and for each member its
extension, offset, length and name. A file of many samples is one inode and one listing for a
parallel file system, instead of two million, and a sample is one read from it.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import crc32c

from pipelines.errors import DataError, reading
from pipelines.filesystem import is_hidden
from pipelines.formats.signatures import recognize_file
from pipelines.io import TarMember, WrittenFile
from pipelines.storage.base import Storage
from pipelines.storage.local import LOCAL
from pipelines.storage.location import Location
from pipelines.storage.select import storage_of

SHARD_SUFFIX, INDEX_SUFFIX = ".tar", ".idx"
_BLOCK = tarfile.BLOCKSIZE

FIRST_MEMBER_OFFSET = _BLOCK
"""Offset of the first member of a shard."""

_REMEDY = "convert the samples again"


def write_shard(
    path: Location,
    members: Iterable[tuple[str, Iterable[bytes]]],
    *,
    sparse: bool = False,
    before: Callable[[Sequence[WrittenFile]], object] | None = None,
) -> tuple[WrittenFile, WrittenFile]:
    """Write the index of the shard at `path`, and the shard, which appear in this order, each atomically.

    Args:
        members: name and pieces of each member, consumed one by one. An exception from them leaves no shard.
        sparse: see `write_stream`.
        before: called with what is returned when all is written, before the shard appears.

    Raises:
        DataError: a name does not fit into a tar header.
    """
    written: list[TarMember] = []
    storage, files = storage_of(path), []

    def blocks() -> Iterator[bytes]:
        offset = 0
        for name, pieces in members:
            content = list(pieces)
            length = sum(map(len, content))
            written.append(TarMember(name, offset + _BLOCK, length))
            yield _header(path, written[-1])
            yield from content
            yield bytes(-length % _BLOCK)
            offset += _BLOCK + length + -length % _BLOCK
        yield bytes(2 * _BLOCK)

    def content() -> Iterator[bytes]:
        length = checksum = 0
        for block in blocks():
            length, checksum = length + len(block), crc32c.crc32c(block, checksum)
            yield block
        # As DALI's wds2idx writes it. As in WebDataset, the extension is everything after the first dot.
        rows = (
            f"{name.rpartition('/')[2].partition('.')[2]} {at} {size} {name}\n" for name, at, size in written
        )
        index = path.with_name(path.name.removesuffix(SHARD_SUFFIX) + INDEX_SUFFIX)
        files.append(storage.write(index, f"v1.2 {len(written)}\n{''.join(rows)}".encode()))
        files.append(WrittenFile(path, length, checksum, tuple(written)))
        if before:
            before(files)

    storage.write_stream(path, content(), sparse=sparse)
    index, shard = files
    return index, shard


def read_members(path: Location) -> tuple[TarMember, ...]:
    """Return the regular files in the tar archive at `path` that are not hidden, by reading its headers.

    Raises:
        DataError: the archive is not complete, or has members that are neither files nor folders.
    """
    members, storage = [], storage_of(path)
    try:
        with (
            reading(path),
            storage.open(path) as file,
            tarfile.open(fileobj=file, mode="r:") as tar,
        ):
            for entry in tar:
                if is_hidden(entry.name) and entry.size >= 0:
                    continue
                if not entry.name.isprintable() or entry.size < 0:
                    # The name would go into messages, and into the manifest.
                    fault = f"has a member {entry.name!a} of {entry.size} bytes"
                    raise DataError(path, fault, _REMEDY)
                if entry.isreg() and not entry.issparse():
                    members.append(TarMember(entry.name, entry.offset_data, entry.size))
                elif not entry.isdir():
                    # A link stands for a sample elsewhere; the content of a sparse file is not contiguous.
                    fault = f"has {entry.name} of type {entry.type!a}"
                    raise DataError(path, fault, "make it with tar --format=ustar, of files alone")
            # tarfile takes a damaged or missing header for the end.
            file.seek(tar.offset)
            if file.read(_BLOCK) != bytes(_BLOCK):
                fault = f"is not a complete tar archive: no header at byte {tar.offset}"
                raise DataError(path, fault, _REMEDY)
    except (tarfile.TarError, ValueError) as error:
        kind = recognize_file(path)
        reason = f"it holds {kind}" if kind and kind != "a tar archive" else error
        raise DataError(path, f"is not a complete tar archive ({reason})", _REMEDY) from error
    return tuple(members)


def read_member(
    path: Location, name: str, offset: int, length: int, *, storage: Storage = LOCAL, direct: bool = False
) -> bytes:
    """Read the member `name` or a part of it, `length` bytes at `offset` of the shard at `path`.

    Args:
        storage: holds the shard.
        direct: bypass the page cache, where there is one and the file system supports it.

    Raises:
        DataError: the shard cannot be read, or ends before these bytes do.
    """
    content = storage.read_range(path, offset, length, direct=direct)
    if len(content) < length:
        fault = f"is cut off: the shard ends after {offset + len(content)} bytes"
        raise DataError(path / name, fault, _REMEDY)
    return content


def _header(path: Location, member: TarMember) -> bytes:
    entry = tarfile.TarInfo(member.name)
    entry.size = member.bytes
    try:
        return entry.tobuf(tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise DataError(path, f"cannot hold a member named {member.name} ({error})", "shorten it") from error
