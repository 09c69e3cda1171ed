"""What a filter is worth: right and wrong acceptances on held-out records, beside those of a confidence threshold."""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from dllm_jax import hosts
from dllm_jax.checkpoints.filters import Filter
from dllm_jax.training.filter.fit import examples, mean_loss
from dllm_jax.training.filter.records import Records

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.96, 0.98, 0.99)
BINS = 10


def quality(filter_: Filter, records: Records, *, positions: str) -> dict[str, Any]:
    """Measures a filter.

    Args:
        filter_: the filter.
        records: held out; at least one masked position.
        positions: which positions the loss counts, as `FitSettings.positions`. All else is about masked ones only.

    Returns:
        JSON: `loss` in nats; `records`, `prompts`, `masked_positions`: counts; `correct_share` of the masked positions;
        `filter`, and `threshold` for the plain confidence: each with `acceptances`, one per value of THRESHOLDS, and
        `calibration`. A share of nothing is None.

    Raises:
        UsageError: the loss counts no position.
    """
    counted = examples(records, positions=positions)
    loss = jax.jit(mean_loss)(filter_.graphdef, filter_.params, counted)
    probability_RQ = np.asarray(hosts.fetch(_probability(filter_.graphdef, filter_.params, counted.confidence_RQ)))
    right_M = records.correct_RQ[records.masked_RQ]
    scores = {"filter": probability_RQ[records.masked_RQ], "threshold": records.confidence_RQ[records.masked_RQ]}
    # The decoders' own rules: a filter accepts above tau, a confidence threshold from tau on.
    accepted = {
        "filter": [scores["filter"] > np.float32(tau) for tau in THRESHOLDS],
        "threshold": [scores["threshold"] >= np.float32(tau) for tau in THRESHOLDS],
    }
    return {
        "loss": float(loss),
        "records": records.size,
        "prompts": len(np.unique(records.prompt_R)),
        "masked_positions": len(right_M),
        "correct_share": _share(right_M.sum(), len(right_M)),
        **{
            name: {
                "acceptances": [
                    {"tau": tau, **acceptance(accepted_M, right_M)}
                    for tau, accepted_M in zip(THRESHOLDS, accepted[name], strict=True)
                ],
                "calibration": calibration(scores[name], right_M),
            }
            for name in scores
        },
    }


def acceptance(accepted_M: Bool[np.ndarray, "M"], right_M: Bool[np.ndarray, "M"]) -> dict[str, float | None]:
    """How good a choice of positions is.

    Args:
        accepted_M: the position is accepted.
        right_M: its token is right.

    Returns:
        `false_positive_rate`: accepted of the wrong; `error_rate`: wrong of the accepted; `coverage`: accepted of all;
        `recall`: accepted of the right. A share of nothing is None.
    """
    accepted, wrong = accepted_M.sum(), (~right_M).sum()
    accepted_wrong = (accepted_M & ~right_M).sum()
    return {
        "false_positive_rate": _share(accepted_wrong, wrong),
        "error_rate": _share(accepted_wrong, accepted),
        "coverage": _share(accepted, len(right_M)),
        "recall": _share(accepted - accepted_wrong, len(right_M) - wrong),
    }


def calibration(score_M: Float[np.ndarray, "M"], right_M: Bool[np.ndarray, "M"]) -> dict[str, Any]:
    """How far scores are the probabilities of being right that they claim to be.

    Args:
        score_M: 0 to 1.
        right_M: the token is right.

    Returns:
        `bins` of equal width, the last one closed: `low`, `high`, `count`, `mean_score`, `correct_share` (None in an
        empty bin); `expected_error`: |mean_score - correct_share| averaged over the positions.
    """
    bin_M = np.minimum((score_M.astype(np.float64) * BINS).astype(int), BINS - 1)
    count_N, score_N, right_N = (
        np.bincount(bin_M, weights, minlength=BINS) for weights in (None, score_M.astype(np.float64), right_M)
    )
    bins = [
        {
            "low": index / BINS,
            "high": (index + 1) / BINS,
            "count": int(count),
            "mean_score": _share(score, count),
            "correct_share": _share(right, count),
        }
        for index, (count, score, right) in enumerate(zip(count_N, score_N, right_N, strict=True))
    ]
    return {"bins": bins, "expected_error": _share(np.abs(score_N - right_N).sum(), len(right_M))}


@jax.jit
def _probability(graphdef: Any, params: nnx.State, confidence_RQ: Float[Array, "R Q"]) -> Float[Array, "R Q"]:
    return jax.nn.sigmoid(nnx.merge(graphdef, params)(confidence_RQ))


def _share(part: float, whole: float) -> float | None:
    return float(part) / float(whole) if whole else None
