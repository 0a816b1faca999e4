"""The posteriors of one data set, fitted side by side so that each stands beside the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from cosmoflow_dali.posterior.densities import Posterior, ResidualGaussian, UniformPrior
from cosmoflow_dali.posterior.flow import FlowPosterior, fit_flow
from cosmoflow_dali.posterior.ridge import Ridge, Universes, fit_ridge

Array = npt.NDArray[np.float64]

_CROP = re.compile(r"_\d{3,}$")

PosteriorName: TypeAlias = Literal["prior", "ridge", "summaries", "network", "joined"]

TITLES: dict[PosteriorName, str] = {
    "prior": "prior",
    "ridge": "ridge, Gaussian",
    "summaries": "summaries",
    "network": "network",
    "joined": "summaries and network",
}
"""Titles of the posteriors in tables, in order; each uses more of a universe than the one before."""


@dataclass(frozen=True, slots=True)
class Features:
    """Numbers that posteriors are conditioned on, of n samples.

    Attributes:
        ids: Name of each sample.
        summaries: (n, f); see `posterior.summaries`.
        outputs: `features` of a network that has not seen the samples, (n, k); None without a network.
        targets: True parameters, (n, 4) in [-1, 1]; NaN where they are not known.
    """

    ids: tuple[str, ...]
    summaries: Array
    outputs: Array | None
    targets: Array

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def universes(self) -> Universes:
        """Number of each sample's universe, (n,)."""
        return number_universes(self.ids)

    @property
    def num_universes(self) -> int:
        """Number of independent universes."""
        return len(np.unique(self.universes))


@dataclass(frozen=True, slots=True)
class FittedPosteriors:
    """Posteriors from summaries, from the outputs of a network, and from both.

    Each is a density of the parameters given 4 estimates of them, which a regression makes of all numbers:
    given more numbers, a flow needs many more universes.

    Attributes:
        ridges: Regression of each posterior; that of "joined" corrects the estimates of "summaries".
        covariance: That of the residuals of "ridge", (4, 4).
        flows: Flow of "summaries", and with a network those of "network" and "joined".
    """

    ridges: dict[PosteriorName, Ridge]
    covariance: Array
    flows: dict[PosteriorName, FlowPosterior]

    @property
    def names(self) -> list[PosteriorName]:
        """The posteriors, in the order of `TITLES`."""
        return [name for name in TITLES if name in ("prior", "ridge", *self.flows)]

    @property
    def best(self) -> PosteriorName:
        """The posterior that uses most of a universe."""
        return self.names[-1]

    def conditioned(self, name: PosteriorName, features: Features) -> tuple[Posterior, Array]:
        """Return the posterior `name`, and the `estimates` that it is conditioned on, (n, 4)."""
        densities: dict[PosteriorName, Posterior] = {
            "prior": UniformPrior(len(self.covariance)),
            "ridge": ResidualGaussian(self.covariance),
            **self.flows,
        }
        return densities[name], self.estimates(name, features)

    def estimates(self, name: PosteriorName, features: Features) -> Array:
        """Return the estimates of the regression of `name`, (n, 4); the prior has those of "summaries"."""
        if name == "joined":
            estimates = self.estimates("summaries", features)
            return estimates + self.ridges[name].predict(_join(estimates, features))
        ridge = self.ridges["summaries" if name == "prior" else name]
        if name == "network":
            return ridge.predict(_outputs(features))
        return ridge.predict(features.summaries[:, : len(ridge.mean)])

    def state(self) -> dict[str, Any]:
        """Return the fit as tensors and plain values, for `from_state`."""
        return {
            "ridges": {name: ridge.state() for name, ridge in self.ridges.items()},
            "covariance": torch.from_numpy(self.covariance),
            "flows": {name: flow.state_dict() for name, flow in self.flows.items()},
        }

    @staticmethod
    def from_state(state: dict[str, Any]) -> FittedPosteriors:
        """Return the fit whose `state` this is."""
        ridges = {name: Ridge.from_state(ridge) for name, ridge in state["ridges"].items()}
        flows = {}
        for name, weights in state["flows"].items():
            flows[name] = FlowPosterior(len(weights["mean"]), len(state["covariance"]))
            flows[name].load_state_dict(weights)
            flows[name].eval()
        return FittedPosteriors(ridges, state["covariance"].numpy(), flows)


def fit_posteriors(rest: Features | None, calibration: Features, basic: int, seed: int) -> FittedPosteriors:
    """Fit all posteriors.

    Args:
        rest: Samples whose summaries are used alone, such as those that the network was trained on: its
            outputs for them are too good.
        calibration: Samples of other universes, with the outputs of the network if there is one.
        basic: Number of the summaries that the plain regression uses.
        seed: Seed of the flows.
    """
    every = calibration if rest is None else join_features([rest, calibration])
    targets, universes = every.targets, every.universes
    ridges: dict[PosteriorName, Ridge] = {}
    ridges["ridge"], held_out = fit_ridge(every.summaries[:, :basic], targets, universes)
    covariance = (held_out - targets).T @ (held_out - targets) / len(targets)
    ridges["summaries"], held_out = fit_ridge(every.summaries, targets, universes)
    flows: dict[PosteriorName, FlowPosterior] = {"summaries": fit_flow(held_out, targets, universes, seed)}
    if calibration.outputs is not None:
        targets, universes = calibration.targets, calibration.universes
        estimates = held_out[-len(calibration) :]
        ridges["network"], held_out = fit_ridge(calibration.outputs, targets, universes)
        start = flows["summaries"]
        flows["network"] = fit_flow(held_out, targets, universes, seed, start)
        # A correction of the summaries' estimates: where it finds nothing, its penalty keeps them.
        ridges["joined"], held_out = fit_ridge(_join(estimates, calibration), targets - estimates, universes)
        flows["joined"] = fit_flow(estimates + held_out, targets, universes, seed, start)
    return FittedPosteriors(ridges, covariance, flows)


def join_features(parts: Sequence[Features]) -> Features:
    """Return the samples of all `parts`, in order."""
    outputs = [part.outputs for part in parts if part.outputs is not None]
    return Features(
        tuple(name for part in parts for name in part.ids),
        np.concatenate([part.summaries for part in parts]),
        np.concatenate(outputs) if len(outputs) == len(parts) else None,
        np.concatenate([part.targets for part in parts]),
    )


def number_universes(sample_ids: Sequence[str]) -> Universes:
    """Return the number of each sample's universe: of `<universe>_<crop>`, as in the published set.

    If that is one universe, the names mean something else: each sample then counts as a universe of its own.
    """
    names, numbers = np.unique([_CROP.sub("", name) for name in sample_ids], return_inverse=True)
    return numbers if len(names) > 1 else np.arange(len(sample_ids))


def _outputs(features: Features) -> Array:
    assert features.outputs is not None
    return features.outputs


def _join(estimates: Array, features: Features) -> Array:
    return np.hstack([estimates, _outputs(features)])
