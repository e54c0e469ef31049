"""The quality of synthetic pictures, from features of real and of synthetic ones, arrays of shape (n, d).

Every figure depends on the extractor that made the features, and is comparable under the same one only.
"""

from collections.abc import Iterator

import numpy as np
from scipy import linalg  # type: ignore[import-untyped]


def frechet_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Fréchet distance of two normal distributions fitted to features: FID (Heusel et al., 2017) on Inception's.

    ‖μ_r − μ_f‖² + tr(C_r + C_f − 2 (C_r C_f)^{1/2}); the last trace is the sum of the roots of the eigenvalues of
    C_r^{1/2} C_f C_r^{1/2}, which are real and not negative whatever the rank of the covariances.
    """
    return frechet_of(*_moments(real), *_moments(fake))


def frechet_of(mean_r: np.ndarray, cov_r: np.ndarray, mean_f: np.ndarray, cov_f: np.ndarray) -> float:
    """The same from means, shape (d,), and covariances, shape (d, d)."""
    root = _root(cov_r)
    cross = np.sqrt(np.clip(linalg.eigvalsh(root @ cov_f @ root), 0, None)).sum()
    return max(0.0, float(np.square(mean_r - mean_f).sum() + np.trace(cov_r) + np.trace(cov_f) - 2 * cross))


def kernel_distance(real: np.ndarray, fake: np.ndarray) -> float:
    """Unbiased squared MMD under the kernel (xᵀy/d + 1)³: KID (Bińkowski et al., 2018) on Inception's features.

    It may be slightly negative.
    """
    real, fake = _checked(real, fake)
    kernels = [_cubic_sum(a, b) for a, b in ((real, real), (fake, fake), (real, fake))]
    own = []
    for features, total in ((real, kernels[0]), (fake, kernels[1])):
        diagonal = ((np.square(features).sum(1) / features.shape[1] + 1) ** 3).sum()
        own.append((total - diagonal) / (len(features) * (len(features) - 1)))
    return float(own[0] + own[1] - 2 * kernels[2] / (len(real) * len(fake)))


def prdc(real: np.ndarray, fake: np.ndarray, k: int = 5) -> dict[str, float]:
    """Precision and recall (Kynkäänniemi et al., 2019), density and coverage (Naeem et al., 2020).

    Args:
        real: Features of real pictures.
        fake: Features of synthetic ones.
        k: Neighbours that make the radius around a point.
    """
    real, fake = _checked(real, fake)
    for name, features in (("real", real), ("fake", fake)):
        if not 1 <= k < len(features):
            raise ValueError(
                f"k is {k}; it must be between 1 and {len(features) - 1}, as there are few {name} features"
            )
    radius_real, radius_fake = (
        np.concatenate([np.partition(rows, k, axis=1)[:, k] for _, rows in _distances(features, features)])
        for features in (real, fake)
    )
    hits = np.zeros(len(fake))  # balls of real points that a synthetic one lies in
    covered = np.zeros(len(real), bool)
    reached = np.zeros(len(real), bool)
    for block, distance in _distances(real, fake):
        inside = distance <= radius_real[block, None]
        hits += inside.sum(0)
        covered[block] = inside.any(1)
        reached[block] = (distance <= radius_fake[None]).any(1)
    return {
        "precision": float((hits > 0).mean()),
        "recall": float(reached.mean()),
        "density": float(hits.mean() / k),
        "coverage": float(covered.mean()),
    }


_BLOCK = 512  # rows of a distance matrix at a time


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features, _ = _checked(features, features)
    if len(features) < 2:
        raise ValueError("a covariance needs at least two features")
    return features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))


def _checked(real: np.ndarray, fake: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    real, fake = (np.asarray(features, np.float64) for features in (real, fake))
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(f"features have shapes {real.shape} and {fake.shape}; they must be (n, d) with the same d")
    return real, fake


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _distances(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Euclidean distances of every row of ``a`` to all of ``b``, a block of rows at a time."""
    for start in range(0, len(a), _BLOCK):
        block = slice(start, start + _BLOCK)
        squares = np.square(a[block]).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a[block] @ b.T
        yield block, np.sqrt(np.maximum(squares, 0))


def _cubic_sum(a: np.ndarray, b: np.ndarray) -> float:
    starts = range(0, len(a), _BLOCK)
    return float(sum(((a[start : start + _BLOCK] @ b.T / a.shape[1] + 1) ** 3).sum() for start in starts))
