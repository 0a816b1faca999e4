"""The documentation names files and programs that exist."""

import importlib.util
import re
import subprocess
import sys

from helpers import ROOT

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/README.md"]
_FOLDERS = "benchmarks|configs|cosmoflow_dali|docs|pipelines|preprocess|tests"


def test_paths_in_the_documentation_exist() -> None:
    missing = [
        f"{page.name}: {path}"
        for page in PAGES
        for path in re.findall(rf"`((?:{_FOLDERS})/[\w./*-]*)`", page.read_text(encoding="utf-8"))
        if not any(ROOT.glob(path.rstrip("/")))
    ]
    assert missing == []


def test_programs_in_the_documentation_exist() -> None:
    programs = {
        match
        for page in PAGES
        for match in re.findall(r"-m ((?:cosmoflow_dali|preprocess)\.\w+)", page.read_text(encoding="utf-8"))
    }
    assert len(programs) > 8
    assert [name for name in sorted(programs) if importlib.util.find_spec(name) is None] == []


def test_the_picture_of_imports_is_the_same_for_the_same_sources() -> None:
    script = (
        "import sys; sys.path.insert(0, 'docs'); import import_graph as g; print(g.draw(*g.read_sources()))"
    )
    pictures = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(pictures) == 1
