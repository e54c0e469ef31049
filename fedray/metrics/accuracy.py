"""Accuracy under other shares of the classes than the test set's, such as a client's own."""

import numpy as np


def own_accuracy(confusion: np.ndarray, label_counts: np.ndarray) -> np.ndarray:
    """Accuracy as it would be if the test set had the classes in the shares of ``label_counts``: Σ_c p_c · recall_c.

    Classes without test examples are left out; who holds no other has no such accuracy (NaN).

    Args:
        confusion: Test examples by class and prediction, (classes, classes).
        label_counts: Examples of each class, of shape (..., classes).

    Returns:
        Of shape (...).

    >>> own_accuracy(np.array([[9, 1], [5, 5]]), np.array([[3, 0], [1, 1]]))
    array([0.9, 0.7])
    """
    support = confusion.sum(1)
    present = support > 0
    recall = confusion.diagonal()[present] / support[present]
    counts = np.asarray(label_counts, float)[..., present]
    with np.errstate(invalid="ignore"):
        return (counts * recall).sum(-1) / counts.sum(-1)
