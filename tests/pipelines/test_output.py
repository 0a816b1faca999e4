"""Files that a user names: replaced as a whole, unless they are pipes or devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, environment

from pipelines.errors import DataError
from pipelines.output import write_output


def test_a_failed_write_keeps_the_earlier_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("earlier")
    (tmp_path / "link").symlink_to("a")

    def fail(file: object) -> None:
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        write_output(tmp_path / "link", fail)
    assert (tmp_path / "a").read_text() == "earlier"
    write_output(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_text() == "new" and (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["a", "link"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    for path in (tmp_path, tmp_path / "none" / "b", tmp_path / "a" / "b"):
        with pytest.raises(DataError) as raised:
            write_output(path, lambda file: file.write(b"new"))
        assert raised.value.path == str(path)


def test_devices_stay_devices() -> None:
    write_output(Path("/dev/null"), lambda file: file.write(b"new"))
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("mode", ["w", "a", "pipe"])
def test_standard_output_is_written_where_it_leads(mode: str, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from pipelines.output import write_output; print('before');"
        "write_output(Path('/dev/stdout'), lambda file: file.write(b'content\\n'))"
    )
    line, path = [sys.executable, "-c", code], tmp_path / "out"
    path.write_text("earlier\n")
    if mode == "pipe":
        done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
        assert done.stdout == "before\ncontent\n"
        return
    with open(path, mode) as file:
        subprocess.run(line, cwd=ROOT, env=environment(), stdout=file, check=True)
    assert path.read_text() == ("earlier\n" if mode == "a" else "") + "before\ncontent\n"
    assert Path("/dev/stdout").is_symlink()
