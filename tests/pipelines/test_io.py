"""Atomic writes."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO

import crc32c
import pytest

from pipelines.io import write_atomically, write_file, write_stream


def test_the_last_writer_of_a_file_wins(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        write_file(tmp_path / "a", b"inner")
        assert (tmp_path / "a").read_bytes() == b"inner"
        file.write(b"outer")

    write_atomically(tmp_path / "a", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"outer"


@pytest.mark.parametrize("accepted", [0, 1 << 20])
def test_a_large_file_is_written_where_direct_writes_are_refused(
    accepted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, write = os.urandom((3 << 20) + 5), os.write

    def refuse_direct(descriptor: int, data: memoryview) -> int:
        direct = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT
        if direct and os.lseek(descriptor, 0, os.SEEK_CUR) >= accepted:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refuse_direct)
    written = write_file(tmp_path / "a", content[:7], content[7:])
    assert written[1:3] == (len(content), crc32c.crc32c(content))
    assert (tmp_path / "a").read_bytes() == content


def test_zeros_become_holes_of_the_same_content(tmp_path: Path) -> None:
    page, zeros = os.urandom(4096), bytes(1 << 20)
    for pieces in ([page, zeros], [zeros, page[:100]], [page[:512], zeros, page, zeros[:5000]], [b""], []):
        content = b"".join(pieces)
        written = write_stream(tmp_path / "a", pieces, sparse=True)
        assert written == (tmp_path / "a", len(content), crc32c.crc32c(content), ())
        assert (tmp_path / "a").read_bytes() == content
        assert (tmp_path / "a").stat().st_blocks * 512 <= 5 * 4096
