"""Files on file systems that refuse an operation: FUSE, CIFS, NFS, 9p."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from helpers import program, read_sample, tiny_sample

from pipelines import filesystem
from pipelines.errors import AccessError, DataError, UnreadableError
from pipelines.filesystem import free_space, open_regular, provide_scratch, refuse_input
from pipelines.formats.npy import map_sample
from pipelines.formats.packed.format import sample_members
from pipelines.formats.packed.tar_shard import read_member
from pipelines.formats.registry import FORMATS
from pipelines.io import OpenFile, map_file, read_file, write_file
from pipelines.sample import SampleSpec
from pipelines.storage.local import clear_open_files
from pipelines.strict_yaml import read_yaml


def failing(number: int) -> Callable[..., Any]:
    """A function that fails with the error `number`."""

    def fail(*arguments: object) -> Any:
        del arguments  # They may be views of memory that is about to be freed.
        raise OSError(number, os.strerror(number))

    return fail


def fsync_refused_for(kind: Callable[[int], bool], number: int) -> Callable[[int], None]:
    """An `os.fsync` that fails with `number` for files of this `kind`."""
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if kind(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    return refuse


@pytest.fixture(autouse=True)
def _nothing_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "_reported", set())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, 524])
def test_a_folder_that_cannot_be_synced_is_no_fault(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", fsync_refused_for(stat.S_ISDIR, number))
    for format_name, format_ in FORMATS.items():
        format_.write(tmp_path, format_name, tiny_sample(1))
        found = read_sample(tmp_path / (format_name + format_.suffix))
        np.testing.assert_array_equal(found.counts, tiny_sample(1).counts)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and str(tmp_path) in record.getMessage()


def test_a_folder_that_may_not_be_read_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Path, *arguments: Any, **more: Any) -> int:
        if path == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    write_file(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS])
def test_a_file_that_cannot_be_synced_is_no_fault(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fsync_refused_for(stat.S_ISREG, number))
    write_file(tmp_path / "a", b"content")
    assert (tmp_path / "a").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space, or ask for a larger quota"),
        (errno.EIO, "check its disk or mount, or choose another place"),
    ],
)
def test_a_sync_that_fails_is_a_fault_with_its_remedy(
    number: int, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(AccessError) as raised:
        write_file(tmp_path / "a", b"content")
    assert raised.value.path == str(tmp_path / "a") and raised.value.remedy == remedy
    assert os.listdir(tmp_path) == []


def test_files_that_cannot_be_mapped_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sample = tiny_sample(1)
    FORMATS["npy"].write(tmp_path, "a", sample)

    class Refused(mmap.mmap):
        def __new__(cls, *_: Any, **__: Any) -> Refused:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", Refused)
    for _ in range(2):
        payload = map_sample(tmp_path / "a_data.npy", SampleSpec(16))
        assert payload.mapped is None
        np.testing.assert_array_equal(payload.counts, sample.counts)
    (record,) = caplog.records
    assert "a_data.npy" in record.getMessage()


def test_no_file_is_mapped_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # FUSE refuses shared maps of files that are opened with direct_io.
    (tmp_path / "a").write_bytes(b"content")
    theirs = mmap.mmap

    def refuse(descriptor: int, length: int, flags: int = mmap.MAP_SHARED, **more: Any) -> Any:
        if flags & mmap.MAP_SHARED:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return theirs(descriptor, length, flags, **more)

    monkeypatch.setattr(mmap, "mmap", refuse)
    mapped = map_file(tmp_path / "a")
    assert not isinstance(mapped, bytes) and mapped[:] == b"content"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
@pytest.mark.parametrize("operation", ["open", "preadv"])
def test_a_refused_direct_read_goes_through_the_page_cache(
    number: int, operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(bytes(range(256)) * 40)
    real = os.open

    def refuse_direct(path: Path, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *more)

    monkeypatch.setattr(os, operation, refuse_direct if operation == "open" else failing(number))
    assert read_file(tmp_path / "a", direct=True) == bytes(range(256)) * 40
    assert read_member(tmp_path / "a", "x", 257, 3, direct=True) == b"\x01\x02\x03"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOTSUP])
def test_a_refused_direct_write_goes_through_the_page_cache(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, write = os.urandom((3 << 20) + 5000), os.write

    def refuse_direct(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(number, os.strerror(number))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refuse_direct)
    # Some file systems cannot truncate either.
    monkeypatch.setattr(os, "ftruncate", failing(errno.ENOSYS))
    write_file(tmp_path / "a", content)
    assert (tmp_path / "a").read_bytes() == content


def test_a_file_that_nfs_has_replaced_is_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_bytes(b"content")
    clear_open_files()
    stale, read = [failing(errno.ESTALE)], OpenFile.read

    def read_once_stale(handle: OpenFile, offset: int, length: int) -> bytes:
        return stale.pop()() if stale else read(handle, offset, length)

    monkeypatch.setattr(OpenFile, "read", read_once_stale)
    assert read_member(tmp_path / "a", "x", 3, 2) == b"te"
    monkeypatch.setattr(OpenFile, "read", failing(errno.ESTALE))
    with pytest.raises(UnreadableError):
        read_member(tmp_path / "a", "x", 3, 2)
    clear_open_files()


def test_space_is_unknown_where_the_file_system_does_not_count_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = free_space(tmp_path)
    assert found is not None and found[0] > 0 and found[1] > 0
    # As libfuse answers for a file system without this operation: a block size and no blocks.
    empty = os.statvfs_result((512, 0, 0, 0, 0, 0, 0, 0, 0, 255))
    for answer in (lambda _: empty, failing(errno.ENOSYS)):
        monkeypatch.setattr(os, "statvfs", answer)
        assert free_space(tmp_path) is None


@pytest.mark.parametrize("kind", ["FIFO", "folder", "socket", "device"])
def test_what_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tfrecord"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    for read in (read_file, map_file, lambda path: read_file(path, direct=True), sample_members, OpenFile):
        with pytest.raises((DataError, OSError)) as raised:
            read(path)
        if kind != "socket":  # It cannot be opened at all.
            assert isinstance(raised.value, DataError) and raised.value.fault == f"is a {kind}, not a file"
    with pytest.raises((DataError, OSError)):
        open_regular(path)


def test_an_output_that_is_an_input_is_refused_by_any_name(tmp_path: Path) -> None:
    source = tmp_path / "a"
    source.write_bytes(b"content")
    (tmp_path / "hard").hardlink_to(source)
    (tmp_path / "soft").symlink_to("hard")
    (tmp_path / "folder").symlink_to(".")
    for name in ("a", "hard", "soft", "folder/a"):
        with pytest.raises(DataError) as raised:
            refuse_input(tmp_path / name, [tmp_path / "none", source])
        assert raised.value.path == str(tmp_path / name) and str(source) in raised.value.fault
    (tmp_path / "copy").write_bytes(b"content")
    for name in ("copy", "new"):
        refuse_input(tmp_path / name, [tmp_path / "none", source])


def test_scratch_is_provided_where_there_is_no_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "own"))
    # Set first, so that it is removed again after the test.
    monkeypatch.setenv("TRITON_CACHE_DIR", "x")
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "own").mkdir()
    provide_scratch(Path("run"))
    assert tempfile.gettempdir() == str(tmp_path / "own") and "TRITON_CACHE_DIR" not in os.environ
    # As in a container whose only writable folder is that of the run.
    refusal = FileNotFoundError(errno.ENOENT, "No usable temporary directory found")
    monkeypatch.setattr(tempfile, "gettempdir", mock.Mock(side_effect=refusal))
    monkeypatch.setattr("os.access", lambda *_: False)
    provide_scratch(Path("run"))
    assert tempfile.tempdir == os.environ["TMPDIR"] == str(tmp_path / "run")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "run" / "triton")


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("cosmoflow_dali.train", ["--config"]),
        ("cosmoflow_dali.launch", ["--nodes", "2", "--hostfile"]),
    ],
)
def test_a_fifo_as_a_text_file_is_refused_at_once(module: str, words: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    done = program(module, *words, tmp_path / "fifo")
    assert done.code == 1 and done.err == (
        f"error: {tmp_path}/fifo: is a FIFO, not a file; give a file, or remove it from its folder\n"
    )


def test_a_pipe_of_the_shell_is_read(tmp_path: Path) -> None:
    read, write = os.pipe()
    with open(read) as reader:
        with open(write, "w") as writer:
            writer.write("epochs: 3\n")
        assert read_yaml(Path(f"/dev/fd/{reader.fileno()}")) == {"epochs": 3}
