"""The formulas of memory, against what processes hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, environment, write_tiny

from pipelines.dataset.dataset import Extents, SampleDataset
from pipelines.dataset.open import open_split
from pipelines.loading.config import LoaderConfig
from pipelines.loading.footprint import device_bytes, host_bytes
from pipelines.sample import SampleSpec

PROGRAM = """
import sys
from pathlib import Path
import nvidia.dali.fn
import torch
from pipelines.loading.config import LoaderConfig
from pipelines.dataset.open import open_split
from pipelines.loading.loader import Loader
from pipelines.plan import Shard

def held():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return 1024 * int(lines["RssAnon"].split()[0])

split = open_split(Path(sys.argv[1]), "train")
before = held()
loader = Loader(split, LoaderConfig(batch_size=4), shard=Shard(), seed=0, shuffle=False, ragged="drop",
                device=torch.device("cpu"))
print(max(held() for epoch in range(8) for _ in loader.batches(epoch)) - before)
loader.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("format_name", ["packed", "npy", "tfrecord_gzip"])
def test_a_loader_holds_what_the_formula_says(format_name: str, tmp_path: Path) -> None:
    root = write_tiny(tmp_path, train=4, validation=1, format_name=format_name, size=64)
    line = [sys.executable, "-c", PROGRAM, str(root)]
    done = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True)
    said = host_bytes(open_split(root, "train"), LoaderConfig(batch_size=4))
    assert 0.5 * said < int(done.stdout) < 1.3 * said


def split_of(format_name: str) -> SampleDataset:
    """One of 128^3 samples, packed ones in 2.4 MB."""
    extents = Extents(np.zeros(1, np.int64), np.full(1, 2_400_000)) if format_name == "packed" else None
    return SampleDataset(Path("data"), format_name, ("a",), SampleSpec(128), extents)


@pytest.mark.parametrize(
    ("format_name", "options", "host", "device", "host_of_device"),
    [
        ("packed", {}, 189, 83, 14),
        ("npy", {}, 101, 134, 0),
        ("npy", {"on_bad_sample": "skip"}, 201, 134, 101),
        ("tfrecord", {"batch_size": 2}, 403, 268, 201),
    ],
)
def test_the_figures_of_the_documentation(
    format_name: str, options: dict[str, object], host: int, device: int, host_of_device: int
) -> None:
    split, config = split_of(format_name), LoaderConfig(**options)  # type: ignore[arg-type]
    found = (host_bytes(split, config), device_bytes(split, config), host_bytes(split, config, "cuda"))
    assert [round(each / 1e6) for each in found] == [host, device, host_of_device]
