"""Choice between the gathers of packed samples on a GPU."""

from __future__ import annotations

import logging

import torch

from pipelines.formats.packed.gather_cpu import ESCAPE
from pipelines.formats.packed.gather_gpu import Gather, gather

logger = logging.getLogger(__name__)


def choose_gather(device: torch.device) -> Gather:
    """Return Triton's gather if it equals torch's on `device`, otherwise torch's, and log the reason."""
    try:
        from pipelines.formats.packed import gather_triton

        if _equals(gather_triton.gather, device):
            return gather_triton.gather
        reason = "it writes other values than torch's"
    except Exception as error:  # an import, or a compiler, which raises many types
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    logger.warning(
        "packed samples are gathered by torch, more slowly: Triton's kernel is left out (%s)", reason
    )
    return gather


def _equals(candidate: Gather, device: torch.device) -> bool:
    """Return True if `candidate` writes the same bits as `gather`, for intact and for damaged samples."""
    generator = torch.Generator().manual_seed(1)
    symbols = torch.randint(0, 256, (15000,), dtype=torch.uint8, generator=generator)
    count = int((symbols == ESCAPE).sum())
    escapes = torch.randint(0, 2, (2, count + 1), dtype=torch.uint8, generator=generator)
    table = torch.randn(800, 4, generator=generator)
    # Rows of some escapes are beyond this one.
    short = table[:300].clone()
    few = table[:200].clone()
    table[-1] = short[-1] = few[-1] = torch.nan
    byte_sum = int(symbols.sum())
    symbols, escapes = symbols.to(device), escapes.to(device)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for values, given, found in (
            (table, escapes, byte_sum),
            (short, escapes, byte_sum),
            (few, escapes, byte_sum),
            (table, escapes, byte_sum + 1),
            (table, escapes, None),
            (table, escapes[:, 1:].contiguous(), byte_sum),
        ):
            results = []
            for function in (gather, candidate):
                out = torch.zeros(15000, 4, dtype=dtype, device=device)
                function(symbols, given, values.to(device), out, byte_sum=found, by_mean=False)
                results.append(out.view(torch.int16))
            if not torch.equal(*results):
                return False
    return True
