"""One training step: precisions, micro-batches, loss scaling, engines, and resuming on a CUDA graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers import config_file, program
from run_artifacts import metrics

from cosmoflow_dali.compute.config import ComputeConfig
from cosmoflow_dali.compute.optim import SGDConfig, build_optimizer, set_lr
from cosmoflow_dali.compute.step import Precision, configure_float32, forward_backward, make_scaler
from cosmoflow_dali.config import resolve
from cosmoflow_dali.models.reference import CosmoFlow, ReferenceConfig
from pipelines.dataset.open import open_folder
from pipelines.distributed.world import available_cores
from pipelines.errors import ConfigError
from pipelines.sample import Batch
from preprocess.simulate import SimulateConfig, make_dataset

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network() -> CosmoFlow:
    return CosmoFlow(ReferenceConfig(size=16, blocks=3, filters=4, dense=(16, 8), dropout=0.0), seed=1)


def batch(size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(3)
    volume = torch.rand(size, 16, 16, 16, 4, generator=generator).permute(0, 4, 1, 2, 3)
    return Batch(volume, torch.rand(size, 4, generator=generator), np.arange(size))


def gradients(precision: Precision, **options: Any) -> tuple[float, torch.Tensor]:
    """Return the loss and the concatenated gradients of one step."""
    model = network()
    loss = forward_backward(model, batch(), precision, **options)
    return loss.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])  # type: ignore[union-attr]


@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 0.0), ("bf16", 0.1), ("fp16", 0.05)])
def test_lower_precision_gradients_are_close_to_fp32(precision: Precision, tolerance: float) -> None:
    (loss, found), (exact_loss, exact) = gradients(precision), gradients("fp32")
    # A CPU has no TF32: there it is float32.
    assert loss == pytest.approx(exact_loss, rel=tolerance, abs=0)
    assert ((found - exact).norm() / exact.norm()).item() <= tolerance
    assert found.dtype == torch.float32 and (precision == "tf32" or not torch.equal(found, exact))


def test_micro_batches_have_the_gradients_of_the_whole_batch() -> None:
    whole_loss, whole = gradients("fp32")
    for micro_batch in (1, 2, 4):
        loss, found = gradients("fp32", micro_batch=micro_batch)
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-7)


Universes: TypeAlias = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def universes(tmp_path_factory: pytest.TempPathFactory) -> Universes:
    """1600 embedded universes: log counts (n, 4, 32, 32, 32), channels-last, and targets (n, 4)."""
    root = tmp_path_factory.mktemp("universes")
    config = SimulateConfig(train=1600, validation=1, size=32, voxel=4.0, steps=4)
    make_dataset(config, root, workers=available_cores(), shown=False)
    split = open_folder(root / "train")
    samples = [split.read(index) for index in range(len(split))]
    counts, targets = (np.stack(each) for each in zip(*((s.counts, s.target) for s in samples), strict=True))
    volume = torch.from_numpy(np.log1p(counts, dtype=np.float32)).permute(0, 4, 1, 2, 3)
    return volume.to(DEVICE), torch.from_numpy(targets).to(DEVICE)


def loss_curve(precision: Precision, universes: Universes) -> npt.NDArray[np.float64]:
    """Return the running mean over 20 of 200 steps' losses at a rate of 0.004.

    The network is that of `reference_embedded.yaml`.
    """
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
def fp32_curve(universes: Universes) -> npt.NDArray[np.float64]:
    return loss_curve("fp32", universes)


# CPUs emulate fp16, and without AVX-512 bf16 too: 200 steps take ten minutes there.
# On a machine with a GPU, bf16 runs on the GPU.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("bf16", marks=[pytest.mark.gpu] if DEVICE.type == "cuda" else []),
        *(pytest.param(each, marks=pytest.mark.gpu) for each in ("fp16", "tf32")),
    ],
)
def test_lower_precision_follows_the_loss_curve_of_fp32(
    precision: Precision, universes: Universes, fp32_curve: npt.NDArray[np.float64]
) -> None:
    assert fp32_curve[-1] < 0.95 * fp32_curve[0]
    deviation = np.abs(loss_curve(precision, universes) / fp32_curve - 1).max()
    assert 0 < deviation < 0.02, f"{precision} deviates by {deviation:.1%}"


def test_scaler_scales_gradients_but_not_the_loss() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (loss, found), (exact_loss, exact) = gradients("fp32", scaler=scaler), gradients("fp32")
    assert loss == exact_loss
    torch.testing.assert_close(found / 1024.0, exact, rtol=1e-4, atol=1e-7)


def test_only_fp16_scales_the_loss() -> None:
    assert [make_scaler(each, CPU).is_enabled() for each in ("fp32", "tf32", "bf16", "fp16")] == [
        False, False, False, True,
    ]  # fmt: skip


@pytest.mark.parametrize("engine", ["graph", "compile"])
def test_gpu_engines_are_refused_on_a_cpu(engine: Literal["graph", "compile"]) -> None:
    with pytest.raises(ConfigError) as error:
        ComputeConfig(engine=engine).engine_on(CPU)
    assert (error.value.key, error.value.value) == ("compute.engine", engine)
    assert ComputeConfig().engine_on(CPU) == "eager"
    with pytest.raises(ConfigError) as error:
        ComputeConfig(nvtx=True).engine_on(CPU)
    assert error.value.key == "compute.nvtx"


def test_profiler_records_forward_and_backward() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        forward_backward(network(), batch(), "fp32", micro_batch=2)
    counts = {event.key: event.count for event in trace.key_averages()}
    assert (counts["forward"], counts["backward"]) == (2, 2)


def test_invalid_compute_settings_are_refused_by_key() -> None:
    for key, tree in (
        ("compute.micro_batch", {"compute": {"micro_batch": 0}}),
        ("compute.micro_batch", {"compute": {"micro_batch": 3}, "loader": {"batch_size": 4}}),
        ("compute.micro_batch", {"compute": {"micro_batch": 1}, "model": {"kind": "open"}}),
        ("compute.precision", {"compute": {"precision": "fp8"}}),
        ("compute.checkpoint_blocks", {"compute": {"checkpoint_blocks": -1}}),
        ("compute.checkpoint_blocks", {"compute": {"checkpoint_blocks": 6}}),
        ("compute.checkpoint_blocks", {"compute": {"checkpoint_blocks": 5}, "model": {"kind": "open"}}),
        ("compute.checkpoint_blocks", {"compute": {"checkpoint_blocks": 1, "engine": "compile"}}),
    ):
        with pytest.raises(ConfigError) as error:
            resolve(tree)
        assert error.value.key == key


@pytest.mark.gpu
def test_run_with_a_cuda_graph_resumes(tiny: Path, tmp_path: Path) -> None:
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
def test_two_ranks_reduce_in_bf16_and_with_micro_batches(tiny: Path, tmp_path: Path) -> None:
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
