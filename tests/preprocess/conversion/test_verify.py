"""Verification finds every kind of fault, and names its check."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import inline_workers, program, tiny_sample, write_tiny

from pipelines.dataset.manifest import MANIFEST, Manifest
from pipelines.dataset.open import open_folder
from pipelines.formats.registry import FORMATS
from pipelines.sample import Sample
from preprocess.verify import CHECKS, main, verify_folder

pytestmark = pytest.mark.usefixtures("inline_workers")


@pytest.fixture(scope="module", params=sorted(FORMATS))
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return five training and two validation samples with manifests and lists, as converted."""
    folder = tmp_path_factory.mktemp(request.param)
    source = write_tiny(folder / "source", train=5, validation=2, format_name="npy")
    to = ["--to", request.param, "--samples-per-shard", 1]
    with inline_workers():
        done = program("preprocess.convert", "-i", source, "-o", folder / "data", *to)
    assert done.code == 0, done.err
    return folder / "data"


def test_converted_folder_has_no_faults(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(sound)]) == 0
    out, err = capsys.readouterr()
    for check in CHECKS:
        (line,) = (line for line in out.splitlines() if line.startswith(check))
        assert line.split() == [check, "ok", "ok"]
    assert err == ""


def test_hidden_files_are_no_faults(sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = shutil.copytree(sound, tmp_path / "data")
    for path in list((data / "train").iterdir()):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    (data / "train" / ".DS_Store").write_bytes(b"Bud1")
    assert main([str(data)]) == 0 and capsys.readouterr().err == ""
    # A new manifest and new lists do not name them.
    for split in ("train", "validation"):
        for record in (data / split).glob("[fm]*.*l*"):
            record.unlink()
    assert main([str(data), "--write"]) == 0
    assert (
        "._" not in (data / "train" / MANIFEST).read_text() + (data / "train" / "files_data.lst").read_text()
    )


def test_a_link_to_nowhere_is_not_called_missing(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(sound, tmp_path / "data")
    path = _data(data / "train")
    path.unlink()
    path.symlink_to("/nowhere/sample")
    assert main([str(data)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(path) in line and "/nowhere/sample" in line


def _flip(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _data(folder: Path, index: int = 2) -> Path:
    return Path(open_folder(folder).files(index)[-1])


def _rewrite(folder: Path, sample: Sample, *, index: int = 2) -> None:
    """Replace a sample by `sample`, and remove manifest and lists, so that only the content shows it."""
    split, manifest = open_folder(folder), Manifest.load(folder)
    assert manifest is not None
    split.format.write(folder, _data(folder, index).name.removesuffix(split.format.suffix), sample)
    for name in (MANIFEST, "files_data.lst", "files_label.lst"):
        (folder / name).unlink(missing_ok=True)


FAULTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a flipped bit": ("checksums", lambda folder: _flip(_data(folder))),
    "a byte too few": ("sizes", lambda folder: _data(folder).write_bytes(_data(folder).read_bytes()[:-1])),
    "a lost file": ("files", lambda folder: _data(folder).unlink()),
    "a file too many": (
        "files",
        lambda folder: shutil.copy(_data(folder), folder / _data(folder).name.replace("0002", "0009")),
    ),
    "what a writer left": ("files", lambda folder: (folder / ".x_data.npy.77.tmp").write_text("x")),
    "a journal": ("files", lambda folder: (folder / ".journal.npy.1.jsonl").write_text("x")),
    "a target beyond 1": (
        "targets",
        lambda folder: _rewrite(folder, Sample(tiny_sample(2).counts, np.full(4, 1.1, np.float32))),
    ),
    "a target that is none": (
        "content",
        lambda folder: _rewrite(
            folder, Sample(tiny_sample(2).counts, np.array([0, 0, np.nan, 0], np.float32))
        ),
    ),
    "a count below zero": (
        "content",
        lambda folder: _rewrite(folder, Sample(tiny_sample(2).counts - np.int16(1), tiny_sample(2).target)),
    ),
    "another shape": ("content", lambda folder: _rewrite(folder, tiny_sample(2, size=8))),
    "the same sample twice": ("duplicates", lambda folder: _rewrite(folder, tiny_sample(1))),
    "a list in another order": (
        "lists",
        lambda folder: (folder / "files_data.lst").write_text(
            "\n".join(reversed((folder / "files_data.lst").read_text().splitlines()))
        ),
    ),
    "a list that is gone": ("lists", lambda folder: (folder / "files_data.lst").unlink()),
}


def test_each_fault_is_found(sound: Path, tmp_path: Path) -> None:
    for fault, (check, make) in FAULTS.items():
        folder = tmp_path / fault
        shutil.copytree(sound / "train", folder)
        make(folder)
        report = verify_folder(folder, workers=1, shown=False)
        found = {name for name, lines in report.faults.items() if lines}
        # The list of gzip files has their lengths too.
        assert found == {check} or (fault == "a byte too few" and found == {check, "lists"}), fault
        lines = report.faults[check]
        assert all(str(folder) in line and "\n" not in line for line in lines)


def test_universe_in_both_splits_is_found(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sound, data)
    other = Sample(tiny_sample(50).counts, tiny_sample(3).target)
    _rewrite(data / "validation", other, index=1)
    assert main([str(data)]) == 1
    assert "in" in (err := capsys.readouterr().err) and str(data / "train") in err
    shutil.rmtree(data / "validation")
    shutil.copytree(sound / "validation", data / "validation")
    shutil.copytree(sound / "validation", data / "test")
    assert main([str(data)]) == 1
    err = capsys.readouterr().err
    assert str(data / "validation") in err and str(data / "test") in err


def test_folder_without_faults_gets_a_manifest(sound: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(sound, data)
    expected = Manifest.load(data / "train")
    assert expected is not None
    for split in ("train", "validation"):
        for name in (MANIFEST, "files_data.lst"):
            (data / split / name).unlink()
        (data / split / "files_label.lst").unlink(missing_ok=True)
    assert main([str(data)]) == 0
    assert not (data / "train" / MANIFEST).exists()
    assert main([str(data), "--write"]) == 0
    found = Manifest.load(data / "train")
    assert found is not None
    assert [entry[:2] for entry in found.entries] == [entry[:2] for entry in expected.entries]
    assert main([str(data)]) == 0


def test_missing_folder_is_one_line(tmp_path: Path) -> None:
    done = program("preprocess.verify", tmp_path / "none")
    assert done.code == 1
    assert done.err.startswith("error:") and "Traceback" not in done.err and "none" in done.err
