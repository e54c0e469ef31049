"""Membership inference by likelihood ratios: LiRA (Carlini et al., 2022).

Was an example in a model's training set? Shadow models, each trained on about half of the examples, show how sure a
model is of an example that it has seen and of one that it has not: φ = log(p_y / (1 − p_y)). Both are normal; the score
of an example is the log-likelihood ratio of the target's φ (online), or how far it lies above unseen ones (offline).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import norm  # type: ignore[import-untyped]

_LEAST_STD = 1e-3


def confidence(logits: np.ndarray, y: np.ndarray) -> np.ndarray:
    """φ = log(p_y / (1 − p_y)) of logits (n, classes), which is stable where p_y is near 1.

    >>> confidence(np.log([[0.9, 0.1]]), np.array([0])).round(4)
    array([2.1972])
    """
    logits = np.asarray(logits, np.float64)
    rows = np.arange(len(y))
    others = logits.copy()
    others[rows, y] = -np.inf
    top = others.max(1)
    return logits[rows, y] - (top + np.log(np.exp(others - top[:, None]).sum(1)))


def halves(shadows: int, examples: int, draw: np.random.Generator) -> np.ndarray:
    """Which shadow model is trained on which example: bool of shape (shadows, examples).

    Every example is seen by half of the models (Carlini et al., 2022, section 4.1): with halves drawn for each model on
    its own, some example is soon seen by all or by none, and has no ratio.
    """
    return draw.permuted(np.tile(np.arange(shadows) < shadows // 2, (examples, 1)), axis=1).T


def scores(
    target: np.ndarray, shadows: np.ndarray, seen: np.ndarray, kind: Literal["online", "offline"] = "online"
) -> np.ndarray:
    """How much an example looks like a member, shape (n,); larger is likelier.

    Args:
        target: φ of the attacked model, (n,).
        shadows: φ of each shadow model, (models, n).
        seen: Whether a shadow model was trained on an example, (models, n).
        kind: The ratio to unseen ones, or the distance from them alone.

    Raises:
        ValueError: an example was never seen, or always.
    """
    counts = seen.sum(0)
    if counts.min() < 1 or counts.max() >= len(seen):
        raise ValueError(f"{len(seen)} shadow models are too few: some example was seen by none of them, or by all")
    unseen = norm.logpdf(target, *_fitted(shadows, ~seen))
    if kind == "online":
        return norm.logpdf(target, *_fitted(shadows, seen)) - unseen
    return norm.logcdf(target, *_fitted(shadows, ~seen))


def _fitted(values: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of each column over the rows that count, and one deviation for all, which few shadow models allow."""
    count = which.sum(0)
    mean = np.where(which, values, 0).sum(0) / count
    spread = np.where(which, (values - mean) ** 2, 0).sum() / max(1, which.sum() - len(mean))
    return mean, np.full(len(mean), max(np.sqrt(spread), _LEAST_STD))


@dataclass(frozen=True)
class Attack:
    """What an attack comes to.

    Attributes:
        auc: Area under the ROC curve; 0.5 is chance.
        auc_error: Its standard error, over the choice of examples (DeLong et al., 1988).
        balanced_accuracy: The best over thresholds; 0.5 is chance.
        tpr_at: True-positive rate at false-positive rates, by the rate.
        fpr: The ROC curve's false-positive rates.
        tpr: Its true-positive rates.
    """

    auc: float
    auc_error: float
    balanced_accuracy: float
    tpr_at: dict[float, float]
    fpr: Sequence[float]
    tpr: Sequence[float]


def judge(score: np.ndarray, member: np.ndarray, rates: Sequence[float] = (0.001, 0.01, 0.1)) -> Attack:
    """The ROC curve of scores (n,) against the truth (n,), which is to be read at low false-positive rates."""
    from sklearn.metrics import roc_curve

    fpr, tpr, _ = roc_curve(member, score, drop_intermediate=False)
    at = {rate: float(tpr[fpr <= rate].max()) for rate in rates}
    error, best = _standard_error(score[member], score[~member]), float((1 + (tpr - fpr).max()) / 2)
    return Attack(float(np.trapezoid(tpr, fpr)), error, best, at, fpr.tolist(), tpr.tolist())


def _standard_error(inside: np.ndarray, outside: np.ndarray) -> float:
    """Of the area: the share of the others that lie below an example varies so much from example to example."""

    def below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
        others = np.sort(others)  # ties count half
        return (np.searchsorted(others, values) + np.searchsorted(others, values, "right")) / (2 * len(others))

    return float(np.sqrt(sum(below(a, b).var(ddof=1) / len(a) for a, b in ((inside, outside), (outside, inside)))))
