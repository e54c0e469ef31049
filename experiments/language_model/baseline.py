"""Perplexities that need no training: of the frequencies of single bytes, and of pairs, in all training text.

python experiments/language_model/baseline.py
"""

import numpy as np

from fedray.data.text import sotu

ADDED = 0.01  # to every count, so that nothing is impossible


def perplexity(counts: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    """Of text where ``after`` follows ``before``; counts of what follows what, (256, 256)."""
    chances = (counts + ADDED) / (counts + ADDED).sum(1, keepdims=True)
    return float(np.exp(-np.log(chances[before, after]).mean()))


def main() -> None:
    data = sotu()
    pairs = np.zeros((256, 256))
    np.add.at(pairs, (data.train["x"][:, :-1], data.train["x"][:, 1:]), 1)
    before, after = data.test["x"][:, :-1], data.test["x"][:, 1:]
    singles = np.broadcast_to(pairs.sum(0), pairs.shape)
    print(f"single bytes {perplexity(singles, before, after):.2f}, pairs {perplexity(pairs, before, after):.2f}")


if __name__ == "__main__":
    main()
