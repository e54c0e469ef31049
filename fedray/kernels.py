"""What numba compiles: one pass over memory where PyTorch and numpy need one for each operation.

Without numba (or for what a kernel is not made for) the caller does the same with those, with the same bits.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

_BLOCK = 4096  # numbers at a time, so that a part of the total stays in the cache while all rows are added to it

AddRows = Callable[[np.ndarray, np.ndarray, np.ndarray, int, np.ndarray], None]


@cache
def add_rows() -> AddRows | None:
    """A function that adds rows to a vector in fixed point, or None where numba is missing.

    ``add(rows, scales, times, offset, total)`` is ``total += times[r] * (round(rows[r] * scales[r]) + offset)`` for
    every row r, rounding to even: rows float32 (r, n), scales float64 (r,), times int64 (r,), total int64 (n,).
    """
    try:
        import numba
    except ImportError:
        return None
    signature = "void(f4[:, ::1], f8[::1], i8[::1], i8, i8[::1])"
    compiled: AddRows
    try:  # making it takes a second, so it is kept beside this file, or in the user's cache
        compiled = numba.njit(signature, cache=True)(_add_rows)
    except RuntimeError:  # neither can be written to
        compiled = numba.njit(signature)(_add_rows)
    return compiled


def _add_rows(rows: np.ndarray, scales: np.ndarray, times: np.ndarray, offset: int, total: np.ndarray) -> None:
    for start in range(0, total.size, _BLOCK):
        part = total[start : start + _BLOCK]
        for r in range(len(rows)):
            row, scale, weight = rows[r, start : start + _BLOCK], scales[r], times[r]
            for k in range(part.size):
                part[k] += (np.int64(np.rint(np.float64(row[k]) * scale)) + offset) * weight
