"""Tar shards: files of many samples, each a member that is read by its position.

A shard is a plain POSIX tar (ustar) as in WebDataset. The index beside it, `<shard>.idx`, is the one
of DALI's webdataset reader, as wds2idx writes it: a line `v1.2 <members>`, and for each member its
extension, offset, length and name. A file of many samples is one inode and one listing for a
parallel file system, instead of two million, and a sample is one read from it.
"""

from __future__ import annotations

import functools
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pipelines.errors import DataError, reading
from pipelines.filesystem import is_hidden, open_regular, raise_open_file_limit
from pipelines.formats.signatures import recognize_file
from pipelines.io import (
    OpenFile,
    TarMember,
    WrittenFile,
    read_direct,
    retry_stale,
    write_file,
    write_stream,
)

SHARD_SUFFIX, INDEX_SUFFIX = ".tar", ".idx"
_BLOCK = tarfile.BLOCKSIZE

FIRST_MEMBER_OFFSET = _BLOCK
"""Offset of the first member of a shard."""

_MAX_OPEN_SHARDS = 16384
"""Shards that a process keeps open, if the system allows it: more than the published set has."""

_FD_RESERVE = 512
"""Other files that the process may open."""

_REMEDY = "convert the samples again"


def write_shard(
    path: Path, members: Iterable[tuple[str, Iterable[bytes]]], *, sparse: bool = False
) -> tuple[WrittenFile, WrittenFile]:
    """Write the shard at `path` and then its index, each atomically.

    Args:
        members: name and pieces of each member, consumed one by one. An exception from them leaves no shard.
        sparse: see `write_stream`.

    Raises:
        DataError: a name does not fit into a tar header.
    """
    written: list[TarMember] = []

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

    shard = write_stream(path, blocks(), sparse=sparse)
    # As DALI's wds2idx writes it. As in WebDataset, the extension is everything after the first dot.
    rows = (f"{name.rpartition('/')[2].partition('.')[2]} {at} {size} {name}\n" for name, at, size in written)
    index = write_file(path.with_suffix(INDEX_SUFFIX), f"v1.2 {len(written)}\n{''.join(rows)}".encode())
    return index, shard._replace(members=tuple(written))


def read_members(path: Path) -> tuple[TarMember, ...]:
    """Return the regular files in the tar archive at `path` that are not hidden, by reading its headers.

    Raises:
        DataError: the archive is not complete, or has members that are neither files nor folders.
    """
    members = []
    try:
        with (
            reading(path),
            open(open_regular(path), "rb") as file,
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
            if os.pread(file.fileno(), _BLOCK, tar.offset) != bytes(_BLOCK):
                fault = f"is not a complete tar archive: no header at byte {tar.offset}"
                raise DataError(path, fault, _REMEDY)
    except (tarfile.TarError, ValueError) as error:
        kind = recognize_file(path)
        reason = f"it holds {kind}" if kind and kind != "a tar archive" else error
        raise DataError(path, f"is not a complete tar archive ({reason})", _REMEDY) from error
    return tuple(members)


def read_member(path: Path, name: str, offset: int, length: int, *, direct: bool = False) -> bytes:
    """Read the member `name` or a part of it, `length` bytes at `offset` of the shard at `path`.

    Args:
        direct: bypass the page cache, where the file system supports it.

    Raises:
        DataError: the shard cannot be read, or ends before these bytes do.
    """

    def read_cached() -> bytes:
        handle = _shard_handles()(path)
        try:
            return handle.read(offset, length)
        except OSError:
            clear_handle_cache()
            raise

    with reading(path):
        content = read_direct(path, offset, length) if direct else None
        if content is None:
            content = retry_stale(read_cached)
    if len(content) < length:
        fault = f"is cut off: the shard ends after {offset + len(content)} bytes"
        raise DataError(path / name, fault, _REMEDY)
    return content


def clear_handle_cache() -> None:
    """Close all shards; the files of these names may have been replaced."""
    _shard_handles().cache_clear()


@functools.cache
def _shard_handles() -> functools._lru_cache_wrapper[OpenFile]:
    """Return the cache of open shards: on a parallel file system, opening takes longer than reading a sample.

    A handle that the cache drops is closed when the last thread that reads from it is done.
    """
    limit = raise_open_file_limit(_MAX_OPEN_SHARDS + _FD_RESERVE) - _FD_RESERVE
    return functools.lru_cache(maxsize=max(limit, _FD_RESERVE // 2))(OpenFile)


def _header(path: Path, member: TarMember) -> bytes:
    entry = tarfile.TarInfo(member.name)
    entry.size = member.bytes
    try:
        return entry.tobuf(tarfile.USTAR_FORMAT)
    except ValueError as error:
        raise DataError(path, f"cannot hold a member named {member.name} ({error})", "shorten it") from error
