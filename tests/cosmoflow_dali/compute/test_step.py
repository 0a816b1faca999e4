"""A step's arithmetic at every precision, in parts and scaled; and its engines."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import config_file, program, run
from left_behind import metrics

from cosmoflow_dali import evaluate, predict
from cosmoflow_dali.compute import optim
from cosmoflow_dali.compute.engines import ComputeConfig
from cosmoflow_dali.compute.optim import AdamConfig, SGDConfig, build_optimizer, restore_optimizer, set_lr
from cosmoflow_dali.compute.step import Precision, configure_float32, forward_backward, make_scaler
from cosmoflow_dali.compute.torch_setup import configure_torch
from cosmoflow_dali.config import resolve
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.dataset.open import open_split
from pipelines.distributed.session import World, available_cores
from pipelines.errors import ConfigError
from pipelines.sample import Batch
from preprocess.simulate import SimulateConfig, make_dataset

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Implementation = Literal["fused", "foreach"]


def network() -> CosmoFlow:
    return CosmoFlow(ReferenceConfig(size=16, blocks=3, filters=4, dense=(16, 8), dropout=0.0), seed=1)


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    volume = torch.rand(size, 16, 16, 16, 4, generator=generator).permute(0, 4, 1, 2, 3)
    return Batch(volume, torch.rand(size, 4, generator=generator), np.arange(size))


def gradients(precision: Precision, **how: Any) -> tuple[float, torch.Tensor]:
    """The loss, and all gradients in one line."""
    model = network()
    loss = forward_backward(model, batch(), precision, **how)
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


@pytest.mark.parametrize(("precision", "close"), [("tf32", 0.0), ("bf16", 0.1), ("fp16", 0.05)])
def test_a_lower_precision_has_about_the_gradients_of_fp32(precision: Precision, close: float) -> None:
    (loss, found), (exact_loss, exact) = gradients(precision), gradients("fp32")
    # A CPU has no TF32, so there it is float32.
    assert loss == pytest.approx(exact_loss, rel=close, abs=0)
    assert ((found - exact).norm() / exact.norm()).item() <= close
    assert found.dtype == torch.float32 and (precision == "tf32" or not torch.equal(found, exact))


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(micro_batch: int) -> None:
    (loss, found), (whole_loss, whole) = gradients("fp32", micro_batch=micro_batch), gradients("fp32")
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-7)


Universes: TypeAlias = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def universes(tmp_path_factory: pytest.TempPathFactory) -> Universes:
    """1600 embedded universes: log counts (n, 4, 32, 32, 32), channels-last, and targets (n, 4)."""
    root = tmp_path_factory.mktemp("universes")
    config = SimulateConfig(train=1600, validation=1, size=32, voxel=4.0, steps=4)
    make_dataset(config, root, workers=available_cores(), shown=False)
    split = open_split(root, "train")
    samples = [split.read(index) for index in range(len(split))]
    counts, targets = (np.stack(each) for each in zip(*((s.counts, s.target) for s in samples), strict=True))
    volume = torch.from_numpy(np.log1p(counts, dtype=np.float32)).permute(0, 4, 1, 2, 3)
    return volume.to(DEVICE), torch.from_numpy(targets).to(DEVICE)


def curve(precision: Precision, universes: Universes) -> npt.NDArray[np.float64]:
    """A running mean of 20 of 200 steps' losses, `reference_embedded.yaml`'s network at a rate of 0.004."""
    configure_float32(precision)
    model = CosmoFlow(ReferenceConfig(size=32, blocks=4, filters=8, dropout=0.0), seed=1).to(DEVICE)
    optimizer, scaler = build_optimizer(SGDConfig(), model), make_scaler(precision, DEVICE)
    rng, losses = np.random.default_rng(4), []
    set_lr(optimizer, 0.004)
    for _ in range(200):
        index = rng.choice(len(universes[1]), 16, replace=False)
        volume, target = (each[torch.from_numpy(index)] for each in universes)
        optimizer.zero_grad()
        losses.append(forward_backward(model, Batch(volume, target, index), precision, scaler).item())
        scaler.step(optimizer)
        scaler.update()
    return np.convolve(losses, np.full(20, 1 / 20), "valid")


@pytest.fixture(scope="module")
def exact_curve(universes: Universes) -> npt.NDArray[np.float64]:
    return curve("fp32", universes)


# Processors have no fp16 of their own, and no bf16 either without AVX-512: 200 steps take ten minutes there.
# Where there is a GPU, bf16 is its own too.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("bf16", marks=[pytest.mark.gpu] if DEVICE.type == "cuda" else []),
        *(pytest.param(each, marks=pytest.mark.gpu) for each in ("fp16", "tf32")),
    ],
)
def test_a_lower_precision_keeps_to_the_loss_curve_of_fp32(
    precision: Precision, universes: Universes, exact_curve: npt.NDArray[np.float64]
) -> None:
    assert exact_curve[-1] < 0.95 * exact_curve[0]
    parted = np.abs(curve(precision, universes) / exact_curve - 1).max()
    assert 0 < parted < 0.02, f"{precision} parts by {parted:.1%}"


def test_the_scaler_scales_gradients_and_not_the_loss() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (loss, found), (exact_loss, exact) = gradients("fp32", scaler=scaler), gradients("fp32")
    assert loss == exact_loss
    torch.testing.assert_close(found / 1024.0, exact, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
@pytest.mark.parametrize("overflows", [0, 2])
def test_a_step_that_the_scaler_skips_leaves_no_trace(implementation: Implementation, overflows: int) -> None:
    # Against a run in which that step was never tried. torch's fused SGD goes wrong at the first.
    weights = []
    for tries_it in (True, False):
        model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=8.0, backoff_factor=0.999999)
        optimizer = build_optimizer(SGDConfig(implementation=implementation), model)
        for step in range(4):
            if step == overflows and not tries_it:
                continue
            set_lr(optimizer, 0.01)
            optimizer.zero_grad()
            forward_backward(model, batch(), "fp32", scaler)
            if step == overflows:
                model.convs[0].get_parameter("weight").grad[0, 0] = float("inf")  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert weights[0].isfinite().all()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_rate_of_0_holds_still_what_has_no_momentum_and_lets_the_rest_roll(
    implementation: Implementation,
) -> None:
    model = network()
    optimizer = build_optimizer(SGDConfig(momentum=0.9, implementation=implementation), model)
    parameter = model.denses[0].get_parameter("weight")
    generator = np.random.default_rng(2)
    velocity, expected = np.zeros(parameter.shape), parameter.detach().numpy().astype(np.float64)
    for rate in (0.0, 0.0, 0.01, 0.02, 0.0, 0.0, 0.005, 0.005):
        gradient = generator.standard_normal(parameter.shape).astype(np.float32)
        set_lr(optimizer, rate)
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
        # Keras's rule.
        velocity = 0.9 * velocity - rate * gradient
        expected = expected + velocity
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=0, atol=1e-6)


def test_only_fp16_scales() -> None:
    assert [make_scaler(each, CPU).is_enabled() for each in ("fp32", "tf32", "bf16", "fp16")] == [
        False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize(("before", "after"), [("fused", "foreach"), ("foreach", "fused")])
def test_another_implementation_goes_on_with_the_momentum(
    before: Implementation, after: Implementation
) -> None:
    models, optimizers = (network(), network()), []
    for model in models:
        optimizers.append(build_optimizer(SGDConfig(implementation=before), model))
        set_lr(optimizers[-1], 0.01)
        forward_backward(model, batch(), "fp32")
        optimizers[-1].step()
    other = build_optimizer(SGDConfig(implementation=after), models[1])
    restore_optimizer(other, copy.deepcopy(optimizers[1].state_dict()))
    assert bool(other.param_groups[0]["foreach"]) == (after == "foreach")
    for optimizer in (optimizers[0], other):
        set_lr(optimizer, 0.02)
        optimizer.step()
    for one, two in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, two)


def test_where_apex_is_not_to_be_had_it_is_refused_or_the_run_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="apex works on GPUs alone"):
        build_optimizer(SGDConfig(implementation="apex"), network())
    gpu = torch.device("cuda")
    assert "(apex is not installed" in optim.describe(
        build_optimizer(SGDConfig(), network()), SGDConfig(), gpu
    )
    # What `pip install apex` brings has the name alone.
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    optimizer = build_optimizer(SGDConfig(), network())
    said = optim.describe(optimizer, SGDConfig(), gpu)
    sys.modules.pop("apex", None)
    assert said.startswith("torch fused SGD (the apex that is installed is not NVIDIA's")
    for config, device in ((SGDConfig(), CPU), (SGDConfig(implementation="fused"), gpu), (AdamConfig(), gpu)):
        assert optim.describe(optimizer, config, device) == "torch fused SGD"


@pytest.mark.parametrize("engine", ["graph", "compile"])
def test_engines_that_need_a_gpu_are_refused_without(engine: Literal["graph", "compile"]) -> None:
    with pytest.raises(ConfigError, match=f"compute.engine = '{engine}'.*needs a GPU"):
        ComputeConfig(engine=engine).engine_on(CPU)
    assert ComputeConfig().engine_on(CPU) == "eager"
    with pytest.raises(ConfigError, match=r"compute.nvtx = True.*is for GPUs"):
        ComputeConfig(nvtx=True).engine_on(CPU)


def test_a_profiler_sees_the_steps_parts() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        forward_backward(network(), batch(), "fp32", micro_batch=2)
    counts = {event.key: event.count for event in trace.key_averages()}
    assert (counts["forward"], counts["backward"]) == (2, 2)


@pytest.mark.parametrize(("precision", "rounds"), [("fp32", False), ("tf32", True), ("bf16", True)])
def test_a_process_settles_its_threads_and_what_float32_is(
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
def test_programs_settle_their_process(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[object] = []
    monkeypatch.setattr(program, "configure_torch", lambda *how: settled.append(how))
    arguments = ["nothing"] if program is predict else ["--data-dir", "nothing", "--device", "cpu"]
    with pytest.raises(SystemExit):
        program.main(["--weights", "nothing.pt", *arguments])
    assert settled == [(CPU, World.detect().cores)]


PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def faults(*, kept: bool) -> list[int]:
    """How many pages the kernel has to find for each of three tensors of 128 MB, one after the other."""
    program = """
import resource, sys, torch
from cosmoflow_dali.compute.torch_setup import tune_malloc
if sys.argv[1] == "True":
    tune_malloc()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 25)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    pages = ["env", "-u", "THP_MEM_ALLOC_ENABLE", sys.executable, "-c", program, str(kept)]
    return [int(count) for count in run(pages).out.split()]


@pytest.mark.skipif(PAGES.exists() and "[always]" in PAGES.read_text(), reason="all pages are huge")
def test_what_large_tensors_leave_is_kept() -> None:
    assert min(faults(kept=False)) > 30_000
    assert max(faults(kept=True)[1:]) < 1_000


def peak_of_steps(huge_pages: str) -> int:
    """The most memory, in KB, that a process of 300 steps has held, with that THP_MEM_ALLOC_ENABLE."""
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
def test_steps_that_keep_their_memory_come_to_an_end_of_it() -> None:
    # Half as much again is what was seen at most, by where the kernel happens to put the heap; a megabyte
    # that each step left behind would be twice as much.
    assert peak_of_steps("1") < 1.8 * peak_of_steps("0")


@pytest.mark.skipif(
    not PAGES.exists() or "[never]" in PAGES.read_text(), reason="the kernel has no transparent huge pages"
)
def test_large_tensors_lie_in_huge_pages() -> None:
    # The kernel may run short of them.
    assert faults(kept=True)[0] < 15_000


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"compute": {"micro_batch": 0}}, "must be at least 1"),
        ({"compute": {"micro_batch": 3}, "loader": {"batch_size": 4}}, "must divide loader.batch_size = 4"),
        ({"compute": {"micro_batch": 1}, "model": {"kind": "open"}}, "normalises over its batch"),
        ({"compute": {"precision": "fp8"}}, "must be one of fp32, tf32, fp16, bf16"),
    ],
)
def test_what_does_not_fit_is_refused(tree: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resolve(tree)


@pytest.mark.gpu
def test_a_run_on_a_graph_is_resumed(tiny: Path, tmp_path: Path) -> None:
    compute = {"precision": "bf16", "engine": "graph"}
    config = config_file(tmp_path / "config.yaml", tiny, compute=compute, device="cuda")
    line = ("cosmoflow_dali.train", "--config", config, "--run-dir")
    for name, *more in (("whole",), ("run", "--epochs", 2), ("run", "--resume")):
        done = program(*line, tmp_path / name, *more)
        assert done.code == 0, done.err
    whole, resumed = (
        [line["loss"] for line in metrics(tmp_path / run) if line["kind"] == "step"]
        for run in ("whole", "run")
    )
    assert resumed == pytest.approx(whole, rel=1e-2)


@pytest.mark.slow
def test_two_ranks_exchange_in_bf16_and_in_parts(tiny: Path, tmp_path: Path) -> None:
    losses = {}
    for name, compute in {"fp32": {}, "bf16": {"exchange": "bf16"}, "parts": {"micro_batch": 1}}.items():
        config = config_file(
            tmp_path / f"{name}.yaml", tiny, loader={"batch_size": 2}, compute=compute, epochs=2
        )
        done = program("cosmoflow_dali.train", "--config", config, "--run-dir", tmp_path / name, ranks=2)
        assert done.code == 0, done.err
        losses[name] = [line["loss"] for line in metrics(tmp_path / name) if line["kind"] == "step"]
    assert losses["parts"] == pytest.approx(losses["fp32"], rel=1e-5)
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=1e-2) and losses["bf16"] != losses["fp32"]
