"""Tar files of many samples, each a member, to be read by where they lie: the container of packed samples.

A shard is a plain POSIX tar (ustar), as WebDataset has it, and beside it lies the index that DALI's
own webdataset reader wants, `<shard>.idx`, as its wds2idx writes it: a line `v1.2 <members>`, and
for each member its extension, where its bytes start, how many there are, and its name. A file of
many samples is one inode and one listing for a parallel file system, where two million would be as
many; a sample in it is one read of so many bytes.
"""

from __future__ import annotations

import functools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from pipelines.errors import AccessError, DataError
from pipelines.io import (
    TarMember,
    WrittenFile,
    raise_open_file_limit,
    read_direct,
    write_chunks,
    write_stream,
)

SHARD_SUFFIX, INDEX_SUFFIX = ".tar", ".idx"
_BLOCK = tarfile.BLOCKSIZE
_OVERRIDING_PAX_KEYS = re.compile(rb" (path|size|linkpath|GNU\.sparse[^=]*)=")
"""What records behind a pax header may say of where a member is, or what it is called."""

FIRST_MEMBER_OFFSET = _BLOCK
"""Where the first member of a shard starts."""

_MAX_OPEN_SHARDS = 16384
"""Shards that a process keeps open, if the system lets it: more than the published set has."""

_FD_RESERVE = 512
"""What it may have open beside them."""

_REMEDY = "convert the samples again"


def write_shard(
    path: Path, contents: Iterable[tuple[str, Iterable[bytes]]]
) -> tuple[WrittenFile, WrittenFile]:
    """Write the shard at `path` and then its index, each whole or not at all.

    contents: each member's name and its bytes in pieces, asked for one after the other. Whatever
    they raise leaves no shard. DataError for a name that a tar cannot hold.
    """
    members: list[TarMember] = []

    def pieces() -> Iterator[bytes]:
        at = 0
        for name, parts in contents:
            content = b"".join(parts)
            members.append(TarMember(name, at + _BLOCK, len(content)))
            yield _header(path, members[-1])
            yield content
            yield bytes(-len(content) % _BLOCK)
            at += _BLOCK + len(content) + -len(content) % _BLOCK
        yield bytes(2 * _BLOCK)

    shard = write_stream(path, pieces())
    index = write_chunks(path.with_suffix(INDEX_SUFFIX), _index(members).encode())
    return index, shard._replace(members=tuple(members))


def read_members(path: Path) -> tuple[TarMember, ...]:
    """The members of the shard at `path`, by its headers; DataError where it is no whole tar."""
    members = []
    try:
        with open(path, "rb") as file:
            length, at = os.fstat(file.fileno()).st_size, 0
            while (header := os.pread(file.fileno(), _BLOCK, at)) != bytes(_BLOCK):
                try:
                    entry = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
                except tarfile.HeaderError as error:
                    fault = f"is no whole tar: at byte {at}, {error}"
                    raise DataError(path, fault, _REMEDY) from error
                # What a folder says of its length is not in the file; POSIX, ustar interchange format.
                size = 0 if entry.isdir() else entry.size
                end = at + _BLOCK + size
                if not entry.name.isprintable():
                    # It would stand in messages, and in the manifest.
                    fault = f"is no whole tar: at byte {at}, the name {entry.name!a}"
                    raise DataError(path, fault, _REMEDY)
                if entry.size < 0:
                    fault = f"is no whole tar: at byte {at}, a member of {entry.size} bytes"
                    raise DataError(path, fault, _REMEDY)
                if end > length:
                    raise DataError(path, f"is cut off in {entry.name}", _REMEDY)
                if entry.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                    members.append(TarMember(entry.name, at + _BLOCK, size))
                elif entry.type in (tarfile.XHDTYPE, tarfile.XGLTYPE) and not _OVERRIDING_PAX_KEYS.search(
                    os.pread(file.fileno(), size, at + _BLOCK)
                ):
                    # A finer time of change, an owner: nothing that is asked for here.
                    pass
                elif not entry.isdir():
                    # A longer name for the member behind it, a link to another one: a sample would be lost.
                    fault = f"has {entry.name} of type {entry.type!a}, which a shard has not"
                    raise DataError(path, fault, "make it with tar --format=ustar, of files alone")
                at = end + -end % _BLOCK
    except OSError as error:
        raise AccessError.reading(path, error) from error
    return tuple(members)


def read_member(path: Path, name: str, offset: int, length: int, *, direct: bool = False) -> bytes:
    """The `length` bytes at `offset` of the shard at `path`, those of its member `name`.

    With `direct` past the page cache, where the file system lets it. DataError where the shard ends
    before.
    """
    try:
        content = read_direct(path, offset, length) if direct else None
        if content is None:
            content = _opened_shards()(path).read(offset, length)
    except OSError as error:
        raise AccessError.reading(path, error) from error
    if len(content) < length:
        fault = f"is cut off: the shard ends after {len(content)} of its {length} bytes"
        raise DataError(path / name, fault, _REMEDY)
    return content


def clear_handle_cache() -> None:
    """Open every shard anew when it is read next: it may be another one by the same name."""
    _opened_shards().cache_clear()


class ShardHandle:
    """A file that is open as long as somebody holds this."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset`, fewer only at the file's end."""
        parts: list[bytes] = []
        while length and (part := os.pread(self._descriptor, length, offset)):
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


@functools.cache
def _opened_shards() -> functools._lru_cache_wrapper[ShardHandle]:
    """Opens the shard at a path once: a parallel file system takes longer for that than for a sample.

    What falls out is closed once the last thread that reads from it is done.
    """
    room = raise_open_file_limit(_MAX_OPEN_SHARDS + _FD_RESERVE) - _FD_RESERVE
    return functools.lru_cache(maxsize=max(room, _FD_RESERVE // 2))(ShardHandle)


def _header(path: Path, member: TarMember) -> bytes:
    entry = tarfile.TarInfo(member.name)
    entry.size = member.bytes
    try:
        return entry.tobuf(tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise DataError(path, f"cannot hold a member named {member.name} ({error})", "shorten it") from error


def _index(members: Sequence[TarMember]) -> str:
    """What DALI's wds2idx would write of `members`."""
    lines = [f"v1.2 {len(members)}"]
    for member in members:
        # The extension is all behind the first dot, as WebDataset has it.
        extension = member.name.rpartition("/")[2].partition(".")[2]
        lines.append(f"{extension} {member.offset} {member.bytes} {member.name}")
    return "\n".join([*lines, ""])
