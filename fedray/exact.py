"""Sums of tensors that do not depend on how the terms are grouped or ordered.

Floating-point addition is not associative, so a sum split over workers would depend on the split. Here every
term is rounded once to a multiple of 2^-36 and summed as a 64-bit integer, which *is* associative: any number
of workers, in any order, with any retries, gives the same bits. The price is 8 bytes an element in the
accumulator, a rounding error of at most 2^-37 a term, and a range: the weighted sum of magnitudes must stay
below 2^27 and every term below 2^15. Leaving the range is an error, never a silent wrap.

A whole weight multiplies the rounded term, so a mean with whole weights is exact to 2^-37 as well. Any other
weight multiplies the term before it is rounded, so such weights should not be much smaller than 1.
Tensors of whole numbers are summed exactly, up to 2^62.

Plain numbers are summed as exact fractions; one that is not finite makes the sum NaN.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isfinite
from typing import Any

import numpy as np
import torch

from fedray.trees import Tree, tree_map

FRACTION_BITS = 36
_LARGEST_TERM = 2.0**15  # of the magic-number conversion below, with a bit to spare
_LARGEST_SUM = 2.0 ** (63 - FRACTION_BITS) - 1  # less 1, for the rounding of the bound itself
_LARGEST_WHOLE_SUM = 2.0**62
_MAGIC = 1.5 * 2.0 ** (52 - FRACTION_BITS)  # adding it leaves the fixed-point value in the low mantissa bits
_MAGIC_BITS = torch.tensor(_MAGIC, dtype=torch.float64).view(torch.int64).item()
_CHUNK = 1 << 16  # elements at a time, so that the temporaries stay in a CPU's cache


Number = Fraction | float  # a float only when it is NaN


@dataclass(frozen=True)
class Sum:
    """The exact sum of one leaf: ``total`` × 2^-fraction_bits, and a bound on the sum of magnitudes.

    ``total`` still holds the magic number as often as ``lifted`` says; taking it off once, at the end, costs one pass
    less a term. That the sum goes round in 64 bits on the way changes nothing, for so does the subtraction.
    """

    total: torch.Tensor
    fraction_bits: int
    dtype: torch.dtype
    bound: float
    lifted: int = 0

    @property
    def fixed(self) -> torch.Tensor:
        """The sum as whole numbers, times 2^-fraction_bits."""
        offset = (self.lifted * _MAGIC_BITS + 2**63) % 2**64 - 2**63  # as a 64-bit integer
        return self.total - offset if offset else self.total

    @property
    def limit(self) -> float:
        """What the bound must stay below."""
        return _LARGEST_SUM if self.fraction_bits else _LARGEST_WHOLE_SUM


def add_term(total: Tree | None, term: Tree, weight: float) -> Tree:
    """Add ``weight * term`` to ``total`` (in place where it can), starting from ``None``.

    Raises:
        OverflowError: a tensor is not finite or leaves the range of the sum; ``total`` is as it was.
        ValueError: the term has other leaves, shapes or types than those before it; ``total`` is as it was.
    """
    if not isfinite(weight):
        raise OverflowError(f"a weight is {weight}")
    if total is None:
        total = tree_map(_zero, term)
    bounds = tree_map(lambda t, x: _bound(t, x, weight), total, term)  # all checks before the first write
    return tree_map(lambda t, x, bound: _add(t, x, weight, bound), total, term, bounds)


def add_stack(total: Tree | None, terms: Tree, weights: Sequence[float]) -> Tree:
    """``add_term`` for every row of stacked terms (a vector stands for every number), in one pass, with the same bits.

    Raises:
        OverflowError: as ``add_term``; ``total`` is as it was.
        ValueError: as ``add_term``, or a weight is not whole; ``total`` is as it was.
    """
    if not all(float(weight).is_integer() for weight in weights):
        raise ValueError(f"the weights are {list(weights)}; a stack needs whole ones")
    if total is None:
        total = tree_map(lambda x: _zero(_row(x, 0)), terms)
    bounds = tree_map(lambda t, x: _stack_bound(t, x, weights), total, terms)
    return tree_map(lambda t, x, bound: _add_stack(t, x, weights, bound), total, terms, bounds)


def merge(left: Tree | None, right: Tree | None) -> Tree | None:
    """The sum of two sums."""
    if left is None or right is None:
        return right if left is None else left
    return tree_map(_merge, left, right)


def value(total: Tree, divisor: Fraction = Fraction(1)) -> Tree:
    """The sum over ``divisor``, in the dtype of its terms (float32 for whole-number and boolean terms)."""

    def leaf(sum: Sum | Number) -> torch.Tensor | float:
        if not isinstance(sum, Sum):
            return float(sum / divisor)
        factor = float(Fraction(1, 2**sum.fraction_bits) / divisor)
        return (sum.fixed.double() * factor).to(sum.dtype if sum.dtype.is_floating_point else torch.float32)

    return tree_map(leaf, total)


def _zero(term: torch.Tensor | float) -> Sum | Fraction:
    if not isinstance(term, torch.Tensor):
        return Fraction(0)
    bits = FRACTION_BITS if term.dtype.is_floating_point else 0
    return Sum(torch.zeros(term.shape, dtype=torch.int64, device=term.device), bits, term.dtype, 0.0)


def _bound(total: Sum | Number, term: torch.Tensor | float, weight: float) -> float:
    _same_kind(total, term)
    if not isinstance(total, Sum) or not isinstance(term, torch.Tensor):
        return 0.0
    return _next_bound(total, term, weight)


def _stack_bound(total: Sum | Number, terms: Any, weights: Sequence[float]) -> float:
    _same_kind(total, _row(terms, 0))
    if not isinstance(total, Sum):
        return 0.0
    return _next_bound(total, terms, sum(abs(weight) for weight in weights))


def _next_bound(total: Sum, term: torch.Tensor, weight: float) -> float:
    """The sum's bound after ``term``, times ``weight``; an error if it leaves the range."""
    whole = float(weight).is_integer()
    if not whole and total.fraction_bits == 0:
        raise ValueError(f"a tensor of {term.dtype} was sent with weight {weight}; whole numbers need whole weights")
    if term.numel() == 0:
        return total.bound
    low, high = torch.aminmax(term.detach())
    largest = max(-float(low), float(high)) if isfinite(float(low)) else float("nan")
    size = abs(weight)
    rounding = max(1.0, size) * 2.0**-total.fraction_bits  # generous: twice what it can come to
    bound = total.bound + size * largest + rounding
    within = total.fraction_bits == 0 or largest * (1.0 if whole else max(1.0, size)) < _LARGEST_TERM
    if not (within and bound < total.limit):
        raise OverflowError(
            f"a sent tensor reaches {largest:g} with weight {weight:g}: training diverged (try a smaller local_lr), "
            f"or the update is too large for the exact sum (terms below {_LARGEST_TERM:g}, sums below {total.limit:g})"
        )
    return bound


def _add(total: Sum | Number, term: torch.Tensor | float, weight: float, bound: float) -> Sum | Number:
    if not isinstance(term, torch.Tensor):
        return _add_numbers(total, Fraction(term) * Fraction(weight) if isfinite(term) else float("nan"))
    assert isinstance(total, Sum)  # as `_bound` has made sure
    term = term.detach()
    if total.fraction_bits == 0:
        total.total.add_(term.to(torch.int64), alpha=int(weight))
        return replace(total, bound=bound)
    whole = float(weight).is_integer()
    times = int(weight) if whole else 1
    flat_total, flat_term = total.total.view(-1), term.reshape(-1)
    chunk = _CHUNK if term.device.type == "cpu" else max(1, flat_term.numel())
    buffer = torch.empty(min(chunk, flat_term.numel()), dtype=torch.float64, device=term.device)
    for start in range(0, flat_term.numel(), chunk):
        piece = flat_term[start : start + chunk]
        fixed = buffer[: piece.numel()].copy_(piece)
        if not whole:
            fixed.mul_(weight)
        _plus(flat_total[start : start + chunk], fixed.add_(_MAGIC).view(torch.int64), times)
    return replace(total, bound=bound, lifted=total.lifted + times)


def _add_stack(total: Sum | Number, terms: Any, weights: Sequence[float], bound: float) -> Sum | Number:
    if not isinstance(total, Sum):
        for row, weight in enumerate(weights):
            total = _add(total, _row(terms, row), weight, bound)
        return total
    factors = [int(weight) for weight in weights]
    same = len(set(factors)) == 1  # as mostly; then one factor does for the sum of the rows
    column = None if same else torch.tensor(factors, device=terms.device).view(-1, 1)
    times = factors[0] if same else 1
    flat_total, rows = total.total.view(-1), terms.detach().flatten(1) if terms.dim() > 1 else terms.detach()[:, None]
    chunk = max(1, _CHUNK // len(rows)) if terms.device.type == "cpu" else max(1, rows.shape[1])
    for start in range(0, rows.shape[1], chunk):
        piece = rows[:, start : start + chunk]
        if total.fraction_bits:
            fixed = piece.to(torch.float64, copy=True).add_(_MAGIC).view(torch.int64)
        else:
            fixed = piece.to(torch.int64, copy=True)
        summed = (fixed if column is None else fixed.mul_(column)).sum(0)
        _plus(flat_total[start : start + chunk], summed, times)
    return replace(total, bound=bound, lifted=total.lifted + (sum(factors) if total.fraction_bits else 0))


def _plus(total: torch.Tensor, fixed: torch.Tensor, times: int) -> None:
    """Add ``times * fixed`` to ``total``; both are written to."""
    if total.device.type != "cpu":
        total.add_(fixed, alpha=times)
        return
    left, right = total.numpy(), fixed.numpy()  # numpy adds whole numbers twice as fast as PyTorch
    if times != 1:
        np.multiply(right, times, out=right)
    np.add(left, right, out=left)


def _row(terms: Any, row: int) -> Any:
    return terms[row] if isinstance(terms, torch.Tensor) else float(terms[row])


def _add_numbers(left: object, right: object) -> Number:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left + right
    return float("nan")  # once a number was not finite, the sum stays so


def _merge(left: Sum | Number, right: Sum | Number) -> Sum | Number:
    _same_kind(left, right)
    if not isinstance(left, Sum) or not isinstance(right, Sum):
        return _add_numbers(left, right)
    bound = left.bound + right.bound
    if not bound < left.limit:
        raise OverflowError(f"the sum of what the clients sent reaches {bound:g}; it must stay below {left.limit:g}")
    return replace(left, total=left.total + right.total, bound=bound, lifted=left.lifted + right.lifted)


def _same_kind(one: Any, other: Any) -> None:
    # PyTorch would broadcast another shape, and truncate fractions, without a word
    expected, kind = _kind(one), _kind(other)
    if kind != expected:
        raise ValueError(f"a client sent {_words(kind)} where {_words(expected)} belongs")


def _kind(leaf: Any) -> tuple[Any, ...]:
    if isinstance(leaf, Sum):
        return leaf.dtype, leaf.total.shape
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, leaf.shape
    return ("number" if isinstance(leaf, int | float | Fraction) else type(leaf).__name__,)


def _words(kind: tuple[Any, ...]) -> str:
    return f"a tensor of {kind[0]} with shape {tuple(kind[1])}" if len(kind) == 2 else f"a {kind[0]}"
