"""inflate_bench, and the speed of decoding packed samples on a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import inflate_bench, samples
from pipelines.loading.config import LoaderConfig
from pipelines.loading.loader import Loader
from pipelines.loading.packed_decoders import PackedGpuDecoder
from pipelines.plan import RankSlice


@pytest.mark.gpu
def test_chunks_and_batches_are_measured(tmp_path: Path) -> None:
    flags = ["--size", "32", "--samples", "2", "--chunk-kib", "1,8,32", "--batch-size", "1,4"]
    results = inflate_bench.main([*flags, "--steps", "3", "--rounds", "2", "--output", str(tmp_path)])
    kinds = ("1 KiB", "8 KiB", "32 KiB", "host")
    assert list(results) == [f"{kind}, batch {batch}" for kind in kinds for batch in (1, 4)]
    assert all(rate.p10 > 0 for rate in results.values())
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["results"].keys() == results.keys()


def event() -> torch.cuda.Event:
    """Return an event that is recorded after all work so far."""
    made = torch.cuda.Event(enable_timing=True)
    made.record()
    return made


@pytest.mark.gpu
def test_steps_of_a_thousand_samples_per_second_do_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (split,) = samples.make_splits(tmp_path, ["packed"], samples=4, size=128).values()
    torch.cuda._sleep(10**6)
    start = event()
    torch.cuda._sleep(10**8)
    end = event()
    torch.cuda.synchronize()
    cycles_of_4_ms = int(4 * 10**8 / start.elapsed_time(end))
    loader = Loader(
        split,
        LoaderConfig(batch_size=4, threads=8, prefetch=3),
        rank_slice=RankSlice(),
        seed=0,
        shuffle=True,
        ragged="drop",
        device=torch.device("cuda:0"),
    )
    assert isinstance(loader._decoder, PackedGpuDecoder)
    run, ready, done = loader._decoder._pipeline.run, [], []

    def watched() -> object:
        blocks = run()
        ready.append(event())
        return blocks

    monkeypatch.setattr(loader._decoder._pipeline, "run", watched)
    for epoch in range(520):
        for _ in loader.batches(epoch):
            torch.cuda._sleep(cycles_of_4_ms)
            done.append(event())
    torch.cuda.synchronize()
    loader.close()
    # Idle time of the GPU between a step and the data of the next one, after warm-up.
    idle = sum(before.elapsed_time(there) for before, there in zip(done[19:-1], ready[20:], strict=True))
    assert idle < 0.02 * done[19].elapsed_time(done[-1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inflate_bench.main([])
    assert "no CUDA GPU" in capsys.readouterr().err
