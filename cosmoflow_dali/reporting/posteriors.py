"""Posteriors of a run: the fit after its training, and scores on samples that nothing was fitted to."""

from __future__ import annotations

import io
import logging
import time
from typing import Any

import numpy as np
import torch

from cosmoflow_dali.models.build import build_model
from cosmoflow_dali.posterior.calibration import LEVELS
from cosmoflow_dali.posterior.fitted import (
    TITLES,
    Features,
    FittedPosteriors,
    PosteriorName,
    fit_posteriors,
    number_universes,
)
from cosmoflow_dali.posterior.scores import PosteriorScores, score_posterior
from cosmoflow_dali.posterior.summaries import num_basic_summaries
from cosmoflow_dali.reporting.read_features import Network, read_features
from cosmoflow_dali.training.posterior_file import save_posteriors
from cosmoflow_dali.training.run_dir import CHECKPOINTS, Run
from pipelines.dataset.dataset import SampleDataset
from pipelines.distributed.session import Session
from pipelines.io import write_file
from pipelines.loading.reader import Reader
from pipelines.sample import PARAMETERS

logger = logging.getLogger(__name__)

Scores = dict[PosteriorName, PosteriorScores]

SCORES = "posterior_scores.npz"
"""File in a run's folder with the scores of each sample, for pictures."""

_CORNERS, _CORNER_DRAWS = 3, 2000
"""Universes whose draws are kept for pictures, and draws of each."""


def fit_run(
    run: Run, weights: dict[str, Any], device: torch.device, session: Session
) -> dict[str, Any] | None:
    """Fit the posteriors of `run`, save them beside its checkpoints, and score them.

    All ranks take part. The network has not seen the samples of the fit, and neither fit nor training has
    seen those of the test split, if the data set has one.

    Args:
        weights: State dict of the trained network.
        device: Device on which the network computes its outputs.

    Returns:
        The entry of summary.json, on rank 0; None on the others.
    """
    config, start = run.config, time.perf_counter()
    assert config.posterior is not None and run.calibration is not None
    # As `load_model` would make it, without kernels chosen for training, reduced precision and exchange.
    model = build_model(config.model, run.seed)
    model.load_state_dict(weights)
    network, most = Network(model.eval().to(device), config.loader.apply_log), config.posterior.max_samples

    def read(split: SampleDataset, network: Network | None) -> Features | None:
        reader = Reader(split, config.loader.on_bad_sample, apply_log=config.loader.apply_log)
        index = np.linspace(0, len(split) - 1, min(len(split), most)).astype(np.int64)
        features = read_features(reader, network, session, index)
        for faults in session.gather_to_root(reader.skipped):
            for path in sorted(faults):
                logger.info("skipped %s", faults[path])
        return features

    scored = run.validation if run.test is None else run.test
    logger.info("fitting posteriors, to score them on %s", scored.root)
    rest, calibration, features = read(run.train, None), read(run.calibration, network), read(scored, network)
    if rest is None or calibration is None or features is None:
        return None
    seconds = {"features": time.perf_counter() - start}
    fitted = fit_posteriors(rest, calibration, num_basic_summaries(run.train.spec), run.seed)
    save_posteriors(run.folder / CHECKPOINTS, fitted, model)
    seconds["fit"] = time.perf_counter() - start - seconds["features"]
    scores = score_posteriors(fitted, features, run.seed)
    fit = [split.sample_id(index) for split in (run.train, run.calibration) for index in range(len(split))]
    universes = number_universes([*fit, *features.ids])
    known = int(np.isin(universes[len(fit) :], universes[: len(fit)]).sum())
    write_file(run.folder / SCORES, _scores_archive(fitted, features, scores, run.seed))
    return {
        "split": "validation" if run.test is None else "test",
        "best": fitted.best,
        "fit_samples": {"summaries": len(rest) + len(calibration), "network": len(calibration)},
        "samples_of_training_universes": known,
        **scores_to_json(scores, features),
        "seconds": seconds | {"score": time.perf_counter() - start - sum(seconds.values())},
    }


def score_posteriors(fitted: FittedPosteriors, features: Features, seed: int) -> Scores:
    """Score each posterior of `fitted` on the samples of `features`."""
    targets, universes = features.targets, features.num_universes

    def score(name: PosteriorName) -> PosteriorScores:
        posterior, estimates = fitted.conditioned(name, features)
        return score_posterior(posterior, estimates, targets, estimates, universes, seed)

    return {name: score(name) for name in fitted.names}


def _scores_archive(fitted: FittedPosteriors, features: Features, scores: Scores, seed: int) -> memoryview:
    """Return an .npz archive of `scores`, with draws of the best posterior for the first samples.

    Arrays: `targets` (n, 4); for each posterior NAME `NAME/means`, `NAME/deviations` (n, 4), `NAME/below`
    (n, 4) and `NAME/nearer` (n,), which are those of `PosteriorScores` and `Ranks`; `draws` (3, d, 4). All
    are in units of the target.
    """
    arrays = {"targets": features.targets}
    for name, each in scores.items():
        arrays |= {
            f"{name}/means": each.means,
            f"{name}/deviations": each.deviations,
            f"{name}/below": each.ranks.below,
            f"{name}/nearer": each.ranks.nearer,
        }
    posterior, numbers = fitted.conditioned(fitted.best, features)
    arrays["draws"] = posterior.sample(numbers[:_CORNERS], _CORNER_DRAWS, seed)
    buffer = io.BytesIO()
    single: dict[str, Any] = {key: array.astype(np.float32) for key, array in arrays.items()}
    np.savez_compressed(buffer, **single)
    return buffer.getbuffer()


def scores_to_json(scores: Scores, features: Features) -> dict[str, Any]:
    """Return `scores` on the samples of `features` for programs."""
    result: dict[str, Any] = {
        "samples": len(features),
        "universes": features.num_universes,
        "scores": {name: each.to_json() for name, each in scores.items()},
    }
    if "joined" in scores:
        difference, error = scores["joined"].nll_difference(scores["summaries"])
        result["joined_less_summaries"] = {"nll": difference, "nll_standard_error": error}
    return result


def score_table(scores: dict[str, Any]) -> list[list[str]]:
    """Return a table of "scores" of `scores_to_json`: titles, then a row for each posterior."""
    names = [parameter.name for parameter in PARAMETERS]
    rows = [["MAE", "all", *names, "NLL", *(f"in {level:.0%}" for level in LEVELS)]]
    for name, title in TITLES.items():
        if name not in scores:
            continue
        each = scores[name]
        # The extremes of the four parameters: an average would hide a bad one.
        shares = [[each["coverage"][f"{level:.0%}"][parameter] for parameter in names] for level in LEVELS]
        coverage = [f"{min(row):.1%}..{max(row):.1%}" for row in shares]
        errors = [f"{value:.3f}" for value in (each["mae"], *each["mae_per_parameter"].values())]
        rows.append([title, *errors, f"{each['nll']:.3f}", *coverage])
    return rows


def verdicts(result: dict[str, Any]) -> list[str]:
    """Return what `result` of `scores_to_json` means, in words: calibration, and the network's part in it."""
    scores = result["scores"]
    lines = [f"{title}: {scores[name]['verdict']}" for name, title in TITLES.items() if name in scores]
    if known := result.get("samples_of_training_universes"):
        share = f"{known} of the {result['samples']} samples"
        lines.append(f"not independent: by their names, {share} are of universes in train")
    if joined := result.get("joined_less_summaries"):
        gain, error = -joined["nll"], joined["nll_standard_error"]
        adds = "adds" if gain > 2 * error else "does not measurably add"
        lines.append(f"the network {adds} to the summaries: {gain:+.3f} ± {error:.3f} nats")
    return lines
