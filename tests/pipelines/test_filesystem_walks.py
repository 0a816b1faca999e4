"""Walks through folders: links are followed, nothing is found twice, and nothing is passed over silently."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import AccessError
from pipelines.filesystem import find_files, is_hidden, is_present


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(path.name)
    return path


def found(root: Path, *suffixes: str) -> list[str]:
    files, errors = find_files(root, suffixes or (".log",))
    assert not errors
    return [str(path.relative_to(root)) for path in files]


def test_links_to_files_and_folders_are_followed(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write(root / "a" / "1.log")
    write(elsewhere / "deep" / "2.log")
    write(elsewhere / "other.txt")
    (root / "link").symlink_to("../elsewhere")
    (root / "3.log").symlink_to(write(tmp_path / "no_suffix"))
    (root / "same.txt").symlink_to(elsewhere / "other.txt")
    assert found(root) == ["3.log", "a/1.log", "link/deep/2.log"]
    (tmp_path / "root_link").symlink_to(root)
    assert len(found(tmp_path / "root_link")) == 3


def test_loops_end_and_a_file_is_found_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    real = write(tmp_path / "z" / "1.log")
    (tmp_path / "z" / "up").symlink_to("..")
    (tmp_path / "z" / "self").symlink_to(".")
    # By its path without links, even if that is the last by name.
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "a.log").symlink_to(real)
    assert found(tmp_path) == ["z/1.log"]
    assert {record.args[0] for record in caplog.records if isinstance(record.args, tuple)} == {
        tmp_path / "z" / "up", tmp_path / "z" / "self", tmp_path / "a", tmp_path / "a.log",
    }  # fmt: skip
    os.link(real, tmp_path / "b.log")
    assert len(found(tmp_path)) == 1


def test_what_cannot_be_followed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a" / "1.log")
    write(tmp_path / "shut" / "2.log")
    (tmp_path / "gone").symlink_to("/nowhere/at/all")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe.log")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", refuse)
        files, errors = find_files(tmp_path, (".log",))
    assert files == [tmp_path / "a" / "1.log"]
    assert [Path(error.path).name for error in errors] == ["gone", "loop", "pipe.log", "shut"]
    assert "/nowhere/at/all" in errors[0].remedy


def test_a_wanted_link_to_nowhere_is_left_to_its_reader(tmp_path: Path) -> None:
    (tmp_path / "1.log").symlink_to("nowhere")
    assert found(tmp_path) == ["1.log"]


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    for name in ("._1.log", ".snapshot/daily/1.log", "a/.Trash-0/1.log", "a/.nfs00c0ffee.log", ".x/../1.log"):
        assert is_hidden(name)
        if ".." not in name:
            write(tmp_path / name)
    write(tmp_path / "a" / "1.log")
    (tmp_path / ".gone").symlink_to("nowhere")
    assert found(tmp_path) == ["a/1.log"]
    # The folder itself may be in one.
    assert found(tmp_path / ".snapshot") == ["daily/1.log"]
    assert not is_hidden("./a/../1.log")


def test_a_folder_that_may_not_be_searched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        is_present(tmp_path)
        and not is_present(tmp_path / "a")
        and not is_present(write(tmp_path / "b") / "c")
    )
    (tmp_path / "link").symlink_to("nowhere")
    assert is_present(tmp_path / "link")

    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(AccessError) as raised:
        is_present(tmp_path / "a")
    assert raised.value.path == str(tmp_path / "a")
