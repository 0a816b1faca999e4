"""The model of samples cut over ranks: operations and bytes by count, limits, and published runs."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import model_validation
from benchmarks import scaling_model as model
from benchmarks.model_validation import CUT_RUNS, CutRun
from benchmarks.scaling_model import Stages
from benchmarks.spatial_model import (
    REFERENCE,
    Block,
    Cost,
    Network,
    Part,
    cost,
    halo_bytes,
    operations,
    passes,
    read_share,
)
from cosmoflow_dali.models import halo
from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.models.open import OpenConfig
from cosmoflow_dali.models.reference import ReferenceConfig
from pipelines.errors import ConfigError
from pipelines.formats.packed.decode import open_packed, open_slab
from pipelines.formats.packed.encode import encode
from pipelines.sample import Sample, SampleSpec
from pipelines.slab import Slab

MACHINE = model_validation.NODES["H100"]
STAGES = Stages(compute=0.004, forward=0.003)
CONFIGS = [
    ReferenceConfig(),
    ReferenceConfig(size=32, blocks=3, filters=8),
    OpenConfig(),
    OpenConfig(size=16, widths=(8, 24), multiscale=True),
]


def _cost(group: int, network: Network = REFERENCE, **arguments: float) -> Cost:
    return cost(MACHINE, STAGES, network, (group, 1, 1), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", CONFIGS)
def test_operations_and_weights_are_those_of_the_network(config: ReferenceConfig | OpenConfig) -> None:
    built = build_model(config, seed=0).to("meta")
    network = Network.of(config)
    assert network.weights == sum(weight.numel() for weight in built.parameters())
    with FlopCounterMode(display=False) as counter:
        built(torch.empty(1, 4, config.size, config.size, config.size, device="meta")).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    convolved = sum(count for operation, count in counts.items() if "convolution" in str(operation))
    assert operations(network, (1, 1, 1)) == convolved


def test_gradients_of_the_reference_network_are_those_of_the_scaling_model() -> None:
    assert REFERENCE.gradients == model_validation.gradients()


def test_group_gathers_once_when_a_slab_becomes_odd() -> None:
    cut, whole = (8, 1, 1), (1, 1, 1)
    extents = [(16, 128, 128), (8, 64, 64), (4, 32, 32), (2, 16, 16), (8, 8, 8)]
    parts = REFERENCE.parts(cut)
    assert [part.extent for part in parts] == extents
    assert [part.cuts for part in parts] == [cut, cut, cut, cut, whole]
    assert [part.cuts for part in Network.of(ReferenceConfig(size=96)).parts(cut)] == [cut] * 2 + [whole] * 3
    # Cut along two axes, no slab of five blocks becomes odd.
    assert all(part.cuts == (4, 4, 1) for part in REFERENCE.parts((4, 4, 1)))


def test_operations_of_a_slab_are_counted_by_hand() -> None:
    part = Part(Block(3, 5, 8), (4, 8, 8), (2, 1, 1))
    # 27 products and sums for each pair of channels; the data's gradient has two planes more.
    product = 2 * 27 * 3 * 5
    assert passes(part, 0, first=False) == (256 * product, 384 * product, 256 * product)
    assert passes(part, 0, first=True) == (256 * product, 0, 256 * product)
    # A device that 5,000 outputs keep busy takes as long for 1,280, and for 1,152 of the data.
    assert passes(part, 5000, first=False) == pytest.approx(
        (1000 * product, 5000 / 3 * product, 256 * product)
    )


@pytest.mark.parametrize("width", [2, 4])
def test_bytes_of_planes_are_those_that_halos_exchange(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def swap(first: torch.Tensor, last: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
        sent.append(first.nbytes + last.nbytes)
        return torch.zeros_like(first), torch.zeros_like(last)

    monkeypatch.setattr(halo, "_swap", swap)
    part = Part(Block(3, 5, 8), (4, 8, 8), (2, 1, 1))
    dtype = {2: torch.bfloat16, 4: torch.float32}[width]
    slab = torch.zeros(1, 3, 4, 8, 8, dtype=dtype, requires_grad=True)
    halo.add_halos(slab, None, periodic=True).sum().backward()
    assert sent == [halo_bytes(part, width, periodic=True)] * 2
    # With zeros at the ends, one of two ranks has one neighbour, and the second of four has two.
    assert halo_bytes(part, width, periodic=False) == sent[0] / 2
    assert halo_bytes(part._replace(cuts=(4, 1, 1)), width, periodic=False) == sent[0]
    assert halo_bytes(part._replace(cuts=(1, 1, 1)), width, periodic=True) == 0


def test_plane_of_a_second_axis_includes_the_received_planes() -> None:
    part = Part(Block(1, 1, 8), (4, 4, 8), (2, 2, 1))
    assert halo_bytes(part, 1, periodic=True) == 2 * 4 * 8 + 2 * (4 + 2) * 8


def test_time_of_halos_and_gather_is_counted_by_hand() -> None:
    machine = replace(MACHINE, memory=math.inf)
    network = Network(REFERENCE.blocks[:2], 0, 0, is_open=False)
    found = cost(machine, STAGES, network, (2, 1, 1), samples=3)
    plane, volume = 3 * 64 * 64 * 32 * 2, 3 * 32**3 * 64 * 2
    assert found.halos == pytest.approx(2 * (8.4e-6 + 1.9e-6 + plane / 450e9))
    # Each of two ranks sends half in the all-gather, and twice half in the all-reduce of gradients.
    assert found.gather == pytest.approx(2 * 8.4e-6 + 1.5 * volume / 450e9 + 3 * 1.9e-6)
    assert found.copies == found.norms == found.symmetry == 0
    # Sixteen ranks need two nodes: a plane goes over the network, and gradients of planes return.
    wide = cost(machine, STAGES, network, (16, 1, 1), samples=3)
    assert wide.halos == pytest.approx(2 * (8.4e-6 + 8.5e-6 + plane / 50e9))


def test_whole_samples_cost_what_they_did() -> None:
    for stages in (STAGES, Stages(0.001, 0.001 / 3)):
        found = cost(MACHINE, stages, REFERENCE, (1, 1, 1), samples=4)
        assert found.compute == pytest.approx(stages.compute, rel=1e-12)
        assert found.exchange == found.saved == 0


def test_more_ranks_compute_less_until_they_repeat_too_much() -> None:
    network = Network.of(ReferenceConfig(size=512, blocks=7))
    groups = [1, 2, 4, 8, 16]
    counts = [operations(network, (group, 1, 1)) for group in groups]
    for (group, count), (_, fewer) in pairwise(zip(groups, counts, strict=True)):
        assert fewer < count and count >= counts[0] / group
    # A plane a rank: all is repeated.
    assert operations(REFERENCE, (128, 1, 1)) == operations(REFERENCE, (1, 1, 1))
    costs = [_cost(group, network) for group in groups]
    assert all(narrow.compute < wide.compute for wide, narrow in pairwise(costs))
    assert all(0 < each.saved < each.halos + each.copies for each in costs[1:])
    # An idle device does not make a step faster.
    assert all(
        operations(network, (group, 1, 1), MACHINE.fill) >= n for group, n in zip(groups, counts, strict=True)
    )


def test_group_within_a_node_does_not_need_the_network() -> None:
    slow = replace(MACHINE, network=1.0, latency=1e3)
    for group in (2, 4, 8):
        assert cost(slow, STAGES, REFERENCE, (group, 1, 1)) == _cost(group)
    assert cost(slow, STAGES, REFERENCE, (16, 1, 1)).halos > 1e3


def test_open_network_averages_over_all_ranks_and_exchanges_turned_slabs() -> None:
    network = Network.of(OpenConfig(size=128, widths=(8, 16, 32)))
    whole, cut = (cost(MACHINE, STAGES, network, (group, 1, 1), nodes=4) for group in (1, 4))
    expected = 2 * sum(model.allreduce(MACHINE, 4, 8 * width) + MACHINE.call for width in (8, 16, 32))
    assert whole.norms == cut.norms == pytest.approx(expected)
    assert whole.symmetry == 0
    slab = 32 * 128 * 128 * 4 * 2
    assert cut.symmetry == pytest.approx(0.75 * slab / 450e9 + 8.5e-6 + 8.4e-6)
    assert _cost(4).norms == _cost(4).symmetry == 0


@pytest.mark.parametrize(
    ("size", "group", "chunks"), [(128, 1, 32), (128, 2, 18), (128, 8, 6), (256, 4, 66), (512, 8, 66 * 4)]
)
def test_rank_reads_the_chunks_of_its_slab(size: int, group: int, chunks: int) -> None:
    table = 0.025
    assert read_share(size, group) == pytest.approx(table + (1 - table) * chunks / (size**3 / 65_536))
    assert read_share(size, group) >= 1 / group + 2 * (group > 1) / size


@pytest.mark.parametrize("group", [4, 8])
def test_share_of_chunks_is_that_of_the_reader(group: int) -> None:
    counts = np.random.default_rng(0).poisson(1.0, (64, 64, 64, 4)).astype(np.int16)
    content = b"".join(encode(Sample(counts, np.zeros(4, np.float32))))
    spec, path = SampleSpec(64, 4), Path("sample")
    chunks = [
        len(open_slab(path, lambda at, size: content[at : at + size], len(content), spec, slab).chunks)
        for slab in (Slab(index, group, periodic=True) for index in range(group))
    ]
    whole = len(open_packed(path, content).chunks)
    assert read_share(64, group) == pytest.approx(0.025 + 0.975 * max(chunks) / whole)


def test_compute_must_exceed_what_a_step_does_once() -> None:
    with pytest.raises(ConfigError) as error:
        cost(MACHINE, Stages(0.0004, 0.0001), REFERENCE, (1, 1, 1))
    assert error.value.key == "--compute-ms"


def test_run_without_cuts_is_reproduced() -> None:
    found = model_validation.predict_cut(CUT_RUNS[0])
    assert (found.step, found.evaluation) == pytest.approx((CUT_RUNS[0].step, CUT_RUNS[0].evaluation))


@pytest.mark.parametrize("run", CUT_RUNS[1:], ids=lambda run: str(run.cuts))
def test_published_runs_with_cut_samples_are_predicted(run: CutRun) -> None:
    found = model_validation.predict_cut(run)
    assert found.epoch == pytest.approx(run.epoch, rel=0.3)
    # Much better than if all of a step were divided, which would be several times too fast.
    divided = CUT_RUNS[0].step / math.prod(run.cuts)
    assert abs(found.step - run.step) < abs(divided - run.step) and found.step == pytest.approx(
        run.step, rel=0.4
    )
