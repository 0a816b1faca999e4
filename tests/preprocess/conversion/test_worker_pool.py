"""Worker processes and their parent."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from helpers import ROOT


def test_a_worker_whose_parent_has_gone_says_nothing() -> None:
    listening, answering = os.pipe()
    line = [sys.executable, "-m", "preprocess.conversion.worker"]
    worker = subprocess.Popen(
        line, cwd=ROOT, stdin=subprocess.PIPE, stdout=answering, stderr=subprocess.PIPE, text=True
    )
    os.close(answering)
    os.close(listening)
    # Something that can be called, made of settings.
    header = {
        "module": "unittest.mock",
        "task": "Mock",
        "settings": {"return_value": "made"},
        "parent": os.getpid(),
    }
    _, err = worker.communicate(json.dumps(header) + "\n1\n", timeout=60)
    assert (worker.returncode, err) == (1, "")
