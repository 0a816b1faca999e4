"""Neural posterior: an average of neural spline flows, conditioned on features of a universe.

The flows live in z = Phi^-1((u + 1) / 2) for targets u in [-1, 1], where Phi is the cumulative distribution
function of the standard normal: the uniform prior of u becomes a standard normal, unbounded, and no draw can
leave the prior's box. Neural spline flows: Durkan et al. 2019, arXiv:1906.04032. Averaging several makes a
posterior less overconfident: Hermans et al. 2022, arXiv:2110.06581.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
import zuko
from torch import nn

from cosmoflow_dali.posterior.ridge import Universes, split_universes
from pipelines.plan import derive_seed

Array = npt.NDArray[np.float64]

_FLOWS = 4
_HELD_OUT = 10
"""Each flow is stopped by its likelihood for one in so many universes."""

_EPOCHS, _RATE = 20, 5e-3
_LEAST_BATCH, _MOST_STEPS = 128, 32
"""Least samples of a batch, and most steps of an epoch: larger sets have larger batches, not more steps."""

_MAX_NORM = 5.0
_INSIDE = 1 - 1e-6
"""Largest target in magnitude; z is then within the splines' domain, [-5, 5]."""

_DRAWS_AT_ONCE = 2**16


class FlowPosterior(nn.Module):
    """Posterior of `targets` parameters, given `features` numbers.

    Attributes:
        mean: Means of the features in the training set, (features,).
        scale: Their standard deviations, (features,).
        flows: The averaged flows, of equal weight.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, features: int, targets: int) -> None:
        super().__init__()
        self._targets = targets
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(features, dtype=torch.float64))
        self.flows = nn.ModuleList(
            zuko.flows.NSF(targets, features, transforms=3, hidden_features=(48, 48), bins=6)
            for _ in range(_FLOWS)
        )

    @torch.no_grad()
    def log_density(self, features: Array, targets: Array) -> Array:
        """Return the log-density of `targets` (n, p) given `features` (n, f), (n,), in nats per unit of u."""
        x, z = self.standardize(features), _to_normal(targets)
        each = torch.stack([flow(x).log_prob(z.float()).double() for flow in self.flows])
        # dz/du = 1 / (2 phi(z)), with the density phi of the standard normal.
        jacobian = (z.square() / 2 + math.log(2 * math.pi) / 2 - math.log(2)).sum(dim=1)
        return (each.logsumexp(dim=0) - math.log(len(self.flows)) + jacobian).numpy()

    def sample(self, features: Array, draws: int, seed: int) -> Array:
        """Return targets drawn from the posterior given `features` (n, f), (n, draws, p), within [-1, 1]."""
        generator = torch.Generator().manual_seed(seed)
        parts = self.standardize(features).split(max(1, _DRAWS_AT_ONCE // draws))
        noise, chosen = [], []
        for x in parts:
            noise.append(torch.randn(len(x), draws, self._targets, generator=generator))
            chosen.append(torch.randint(len(self.flows), (len(x), draws), generator=generator))
        cores = torch.get_num_threads()
        with one_thread_each(), ThreadPoolExecutor(cores) as pool:
            return torch.cat([*pool.map(self._transform, parts, noise, chosen)]).numpy()

    @torch.no_grad()
    def sample_each(self, features: Array, draws: int, seeds: Sequence[int]) -> Array:
        """Return targets drawn as in `sample`, with a seed for each row of `features`.

        Up to the rounding of float32, draws do not depend on the other rows.
        """
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = torch.stack([torch.randn(draws, self._targets, generator=each) for each in generators])
        flows = len(self.flows)
        chosen = torch.stack([torch.randint(flows, (draws,), generator=each) for each in generators])
        return self._transform(self.standardize(features), noise, chosen).numpy()

    @torch.no_grad()
    def _transform(self, x: torch.Tensor, noise: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the targets (n, draws, p) that the `chosen` flows (n, draws) make of normal `noise`."""
        z = torch.empty_like(noise)
        for at, flow in enumerate(self.flows):
            row, draw = torch.nonzero(chosen == at, as_tuple=True)
            z[row, draw] = flow(x[row]).transform.inv(noise[row, draw])
        return 2 * torch.special.ndtr(z.double()) - 1

    def standardize(self, features: Array) -> torch.Tensor:
        """Return `features` (n, f), of mean 0 and variance 1 over the training set, as float32."""
        return ((torch.from_numpy(features) - self.mean) / self.scale).float()


def fit_flow(
    features: Array,
    targets: Array,
    universes: Universes,
    seed: int,
    start: FlowPosterior | None = None,
) -> FlowPosterior:
    """Fit a posterior to `features` (n, f) and `targets` (n, p) in [-1, 1], by maximum likelihood.

    The same seed gives the same posterior on the same machine.

    Args:
        universes: Universe of each sample, (n,). Samples of one universe are held out together.
        start: Posterior given similar features, fitted to more samples, to continue from: that reaches a
            greater likelihood than a fit from random weights.
    """
    if start is None:
        # zuko draws initial weights from the global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "flow"))
            posterior = FlowPosterior(features.shape[1], targets.shape[1])
        deviation = features.std(axis=0)
        posterior.mean.copy_(torch.from_numpy(features.mean(axis=0)))
        posterior.scale.copy_(torch.from_numpy(np.where(deviation > 0, deviation, 1.0)))
    else:
        posterior = copy.deepcopy(start)
    x, z = posterior.standardize(features), _to_normal(targets).float()
    parts = split_universes(universes, _HELD_OUT)
    # Threads of one operation gain nothing on matrices this small, and lose much where others use the cores.
    with one_thread_each():
        for at, flow in enumerate(posterior.flows):
            held_out = torch.zeros(len(x), dtype=torch.bool)
            held_out[parts[at % len(parts)]] = True
            _train(flow, x, z, held_out, derive_seed(seed, "batches", at))
    return posterior.eval()


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Have torch use one thread for an operation in the body."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(flow: nn.Module, x: torch.Tensor, z: torch.Tensor, held_out: torch.Tensor, seed: int) -> None:
    """Train `flow`; keep the weights of the epoch with the greatest likelihood of the rows in `held_out`."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nonzero(~held_out).flatten()
    optimizer = torch.optim.AdamW(flow.parameters(), lr=_RATE)
    size = max(_LEAST_BATCH, math.ceil(len(rows) / _MOST_STEPS))
    steps = _EPOCHS * math.ceil(len(rows) / size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    least, best = math.inf, flow.state_dict()
    for _ in range(_EPOCHS):
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(size):
            optimizer.zero_grad()
            (-flow(x[batch]).log_prob(z[batch]).mean()).backward()
            nn.utils.clip_grad_norm_(flow.parameters(), _MAX_NORM)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            loss = -float(flow(x[held_out]).log_prob(z[held_out]).mean())
        if loss < least:
            least, best = loss, copy.deepcopy(flow.state_dict())
    flow.load_state_dict(best)


def _to_normal(targets: Array) -> torch.Tensor:
    """Return z of `targets`, float64."""
    return torch.special.ndtri((torch.from_numpy(targets).double().clamp(-_INSIDE, _INSIDE) + 1) / 2)
