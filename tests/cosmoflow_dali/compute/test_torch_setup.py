"""The settings of a process that computes with torch: threads, float32 on GPUs, and malloc."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers import run

from cosmoflow_dali import evaluate, predict
from cosmoflow_dali.compute.step import Precision
from cosmoflow_dali.compute.torch_setup import configure_torch
from pipelines.distributed.world import World

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "rounds"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_threads_and_float32_rounding_are_set(
    precision: Precision, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    threads = torch.get_num_threads()
    try:
        configure_torch(CPU, threads + 1, precision)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == rounds


@pytest.mark.parametrize("program", [evaluate, predict])
def test_programs_configure_torch(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(program, "configure_torch", lambda *arguments: calls.append(arguments))
    arguments = [__file__] if program is predict else ["--data-dir", "nothing", "--device", "cpu"]
    with pytest.raises(SystemExit):
        program.main(["--weights", "nothing.pt", *arguments])
    assert calls == [(CPU, World.detect().cores)]


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SETTING = PAGES.read_text() if PAGES.exists() else "[never]"


def page_faults() -> dict[str, list[int]]:
    """Return the page faults of three tensors of 128 MB in turn, without and with `tune_malloc`.

    The process without it is a fork of the one that imported torch.
    """
    program = """
import os, resource, torch
from cosmoflow_dali.compute.torch_setup import tune_malloc
def measure():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(1 << 25)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, flush=True)
child = os.fork()
if child == 0:
    measure()
    os._exit(0)
os.waitpid(child, 0)
tune_malloc()
measure()
"""
    line = ["env", "-u", "THP_MEM_ALLOC_ENABLE", "OMP_NUM_THREADS=1", sys.executable, "-c", program]
    counts = [int(count) for count in run(line).out.split()]
    return {"default": counts[:3], "tuned": counts[3:]}


def test_large_tensors_reuse_memory_in_huge_pages() -> None:
    faults = page_faults()
    if "[always]" not in SETTING:
        assert min(faults["default"]) > 30_000
    assert max(faults["tuned"][1:]) < 1_000
    if "[never]" not in SETTING:
        # The kernel may run short of huge pages.
        assert faults["tuned"][0] < 15_000


def peak_of_steps(huge_pages: str) -> int:
    """Return the peak memory, in KB, of a process of 300 steps with that THP_MEM_ALLOC_ENABLE."""
    program = """
import resource, torch
from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.compute.torch_setup import configure_torch
configure_torch(torch.device("cpu"), 1)
model = build_model(OpenConfig(), seed=0).train()
volume = torch.rand(8, 32, 32, 32, 4).permute(0, 4, 1, 2, 3)
for _ in range(300):
    model(volume).square().mean().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    return int(run(["env", f"THP_MEM_ALLOC_ENABLE={huge_pages}", sys.executable, "-c", program]).out)


@pytest.mark.slow
def test_memory_of_tuned_steps_levels_off() -> None:
    # Up to 1.5 times was measured, depending on where the kernel puts the heap; a leak of a megabyte a step
    # would double it.
    assert peak_of_steps("1") < 1.8 * peak_of_steps("0")
