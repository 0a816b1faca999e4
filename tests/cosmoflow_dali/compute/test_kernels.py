"""The choice of kernels, on a CPU with candidates that are right, slow, wrong and broken."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from cosmoflow_dali.compute import kernels
from cosmoflow_dali.compute.kernels import Shape, block_shapes, choose, choose_kernels, use_kernels
from cosmoflow_dali.compute.step import Precision
from cosmoflow_dali.models.blocks import pool_then_activate
from cosmoflow_dali.models.open import OpenConfig, OpenCosmoFlow
from cosmoflow_dali.models.reference import Block, CosmoFlow, ReferenceConfig
from cosmoflow_dali.models.triton_block import first_block
from cosmoflow_dali.models.triton_pool import pool_block
from pipelines.errors import ConfigError, UserError

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
"""Of Triton's kernels: their interpreter is in use without a GPU."""

FIRST, LATER = Shape(2, 4, 16, 8), Shape(2, 16, 32, 4)
Tensors = Sequence[torch.Tensor]


class Clock:
    """Seconds that pass only in candidates."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def during(self, block: Block, seconds: float) -> Block:
        def slowed(*inputs: torch.Tensor) -> torch.Tensor:
            self.now += seconds
            return block(*inputs)

        return slowed


def pick(
    blocks: dict[str, Block], shape: Shape = FIRST, clock: Clock | None = None, precision: Precision = "fp32"
) -> str:
    device = CPU if clock else DEVICE
    return choose("block 1", blocks, shape, precision, device, 0.1, clock or time.perf_counter)


def test_the_fastest_candidate_is_chosen() -> None:
    for order in itertools.permutations([("a", 3.0), ("b", 1.0), ("c", 2.0)]):
        clock = Clock()
        blocks = {name: clock.during(pool_then_activate, seconds) for name, seconds in order}
        assert pick(blocks, clock=clock) == "b"


def without_a_tap(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(kernel)
    mask[:, 0, 2, 1, 0] = 0
    return pool_then_activate(volume, kernel * mask, bias)


def without_bias(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return pool_then_activate(volume, kernel, 0 * bias)


def last_of_equals(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    flipped = pool_then_activate(volume.flip(2, 3, 4), kernel.flip(2, 3, 4), bias)
    return flipped.flip(2, 3, 4)


def with_a_nan(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    result = pool_then_activate(volume, kernel, bias).clone()
    result[0, 0, 0, 0, 0] = torch.nan
    return result


def doubled_gradient(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return pool_then_activate(volume, 2 * kernel - kernel.detach(), bias)


def broken(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of resource: shared memory\nRequired: 300000")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "bad", [without_a_tap, without_bias, last_of_equals, with_a_nan, doubled_gradient, broken]
)
def test_wrong_and_broken_candidates_are_named_and_left_out(
    bad: Block, precision: Precision, caplog: pytest.LogCaptureFixture
) -> None:
    for shape in (FIRST, LATER):
        caplog.clear()
        with caplog.at_level(logging.INFO, "cosmoflow_dali"):
            assert pick({"bad": bad, "torch": pool_then_activate}, shape, precision=precision) == "torch"
        (line,) = caplog.messages
        assert "bad left out" in line and "\n" not in line


def test_no_correct_candidate_is_an_error() -> None:
    with pytest.raises(UserError, match="torch left out"):
        pick({"torch": without_bias})


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16", "bf16"])
def test_the_project_s_own_candidates_agree(precision: Precision) -> None:
    # Triton's interpreter does not multiply bfloat16.
    blocks: dict[str, Block] = {"torch": pool_then_activate, "pool": pool_block}
    for name in blocks:
        assert pick({name: blocks[name]}, LATER, precision=precision) == name
    if precision == "fp16":
        assert pick({"block": first_block}, precision=precision) == "block"


@pytest.mark.parametrize(
    ("edge", "filters"),
    [
        *((2, 64), (4, 16), (4, 64), (6, 32), (8, 16)),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((8, 64), (16, 32), (18, 16))),
    ],
)
def test_triton_s_candidates_agree_at_all_shapes(edge: int, filters: int) -> None:
    for block, channels in ((first_block, 4), (pool_block, 8)):
        inputs, gradient = kernels._problem(
            Shape(3 if edge < 16 else 1, channels, filters, edge), "fp16", DEVICE
        )
        exact = [value.detach().double().requires_grad_(value.requires_grad) for value in inputs]
        found = kernels._solve(block, inputs, gradient, "fp16")
        expected = kernels._solve(pool_then_activate, exact, gradient, "fp32")
        assert kernels._disagreement(found, expected, 2**-10) is None


def test_blocks_have_even_edges() -> None:
    # The kernels have no code for others.
    for size, blocks in itertools.product(range(1, 65), range(1, 6)):
        try:
            config = ReferenceConfig(size=size, blocks=blocks, filters=1, dense=(1, 1))
        except ConfigError as error:
            assert error.key == "size" and size % 2**blocks
            continue
        assert all(shape.edge % 2 == 0 for shape in block_shapes(CosmoFlow(config), 1))


def test_a_gradient_of_zeros_can_agree() -> None:
    # The only cell's gradient is drawn as zero.
    assert pick({"torch": pool_then_activate}, Shape(1, 6, 1, 2)) == "torch"


def test_large_volumes_are_checked_in_part_and_timed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_CHECKED_EDGE", 4)
    seen = []

    def recording(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(volume.shape))
        return pool_then_activate(volume, kernel, bias)

    assert pick({"torch": recording}) == "torch"
    assert seen[0] == (1, 4, 4, 4, 4) and set(seen[1:]) == {(2, 4, 8, 8, 8)}


def test_gradients_are_computed_outside_of_autocast() -> None:
    # As in a step, where the loss is computed in it and differentiated behind it.
    enabled = []

    def recording(volume: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        result = pool_then_activate(volume, kernel, bias)
        result.register_hook(lambda gradient: enabled.append(torch.is_autocast_enabled(DEVICE.type)))
        enabled.append(torch.is_autocast_enabled(DEVICE.type))
        return result

    assert pick({"torch": recording}, precision="bf16") == "torch"
    assert set(enabled[::2]) == {True} and set(enabled[1::2]) == {False}


def test_shapes_follow_the_network() -> None:
    model = CosmoFlow(ReferenceConfig(size=16, blocks=3, filters=4, dense=(8, 8)))
    assert block_shapes(model, 2) == [(2, 4, 4, 16), (2, 4, 8, 8), (2, 8, 16, 4)]
    assert block_shapes(OpenCosmoFlow(OpenConfig(size=16)), 2) == []


@pytest.fixture
def gpu_shapes(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Choose kernels as on a GPU, without checks: the first candidate wins."""
    monkeypatch.setattr(kernels, "choose", lambda title, names, *rest: next(iter(names)))
    model = CosmoFlow(ReferenceConfig(size=16, blocks=2, filters=16, dense=(8, 8)))
    return lambda kind: choose_kernels(model, kind, "bf16", 1, torch.device("cuda", 0))  # type: ignore[arg-type]


def test_kinds_force_candidates(gpu_shapes: Callable[[str], list[str]]) -> None:
    assert gpu_shapes("torch") == ["torch", "torch"]
    assert gpu_shapes("triton") == ["triton block", "triton pool"]
    assert gpu_shapes("auto") == ["torch", "torch"]


def test_single_precision_is_not_computed_by_the_fused_block() -> None:
    shape = Shape(1, 4, 32, 128)
    assert "triton block" in kernels.candidates(0, shape, "bf16")
    assert "triton block" not in kernels.candidates(0, shape, "fp32")
    assert "triton block" not in kernels.candidates(0, shape, "tf32")


def test_triton_is_refused_without_a_gpu() -> None:
    model = CosmoFlow(ReferenceConfig(size=16, blocks=2, filters=16, dense=(8, 8)))
    for network in (model, OpenCosmoFlow(OpenConfig(size=16))):
        with pytest.raises(ConfigError) as error:
            choose_kernels(network, "triton", "bf16", 1, CPU)
        assert error.value.key == "compute.kernels"
        assert choose_kernels(network, "auto", "bf16", 1, CPU) == []


def test_a_run_s_kernels_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CosmoFlow(ReferenceConfig(size=16, blocks=2, filters=16, dense=(8, 8)))
    use_kernels(model, ["triton block", "torch"], "bf16", 1)
    assert model.blocks == [first_block, pool_then_activate]
    monkeypatch.setattr(kernels, "candidates", lambda *_: {"torch": pool_then_activate})
    with pytest.raises(ConfigError) as error:
        use_kernels(model, ["triton block", "torch"], "bf16", 1)
    assert error.value.key == "compute.kernels"
