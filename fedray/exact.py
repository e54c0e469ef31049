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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isfinite, prod
from typing import Any

import numpy as np
import torch

from fedray.kernels import add_rows
from fedray.trees import Tree, tree_map

FRACTION_BITS = 36
_LARGEST_TERM = 2.0**15  # of the magic-number conversion below, with a bit to spare
_LARGEST_SUM = 2.0 ** (63 - FRACTION_BITS) - 1  # less 1, for the rounding of the bound itself
_LARGEST_WHOLE_SUM = 2.0**62
_MAGIC = 1.5 * 2.0 ** (52 - FRACTION_BITS)  # adding it leaves the fixed-point value in the low mantissa bits
_MAGIC_BITS = torch.tensor(_MAGIC, dtype=torch.float64).view(torch.int64).item()
_CHUNK = 1 << 17  # numbers at a time, so that the temporaries stay in a CPU's cache
_LARGE_CHUNK = 1 << 24  # on a GPU, where it is the number of kernels that costs


Number = Fraction | float  # a float only when it is NaN
Kind = tuple[Any, ...]  # (dtype, shape) of a tensor, or the name of another type
Layout = Any  # a tree of kinds


@dataclass(frozen=True)
class Vector:
    """The exact sum of all tensors of a sort, end to end: ``total`` × 2^-fraction_bits, and a bound on magnitudes.

    ``total`` still holds the magic number as often as ``lifted`` says; taking it off once, at the end, costs one pass
    less a term. That the sum goes round in 64 bits on the way changes nothing, for so does the subtraction.
    """

    total: torch.Tensor
    fraction_bits: int
    bound: float = 0.0
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


@dataclass(frozen=True)
class Sum:
    """The exact sum of trees that are alike, their leaves in the order of their names.

    A tree's tensors are summed as one vector, so that what a term costs is its numbers, not its number of tensors.
    """

    layout: Layout
    floats: Vector
    wholes: Vector
    numbers: tuple[Number, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its vectors."""
        return self.floats.total.nbytes + self.wholes.total.nbytes


def add_term(total: Sum | None, term: Tree, weight: float) -> Sum:
    """Add ``weight * term`` to ``total`` (in place), starting from ``None``.

    Raises:
        OverflowError: a tensor is not finite or leaves the range of the sum; ``total`` is as it was.
        ValueError: the term has other leaves, shapes or types than those before it; ``total`` is as it was.
    """
    if not isfinite(weight):
        raise OverflowError(f"a weight is {weight}")
    return _add(total, tree_map(lambda x: x[None] if isinstance(x, torch.Tensor) else [x], term), [weight])


def add_stack(total: Sum | None, terms: Tree, weights: Sequence[float]) -> Sum:
    """``add_term`` for every row of stacked terms (a vector stands for every number), in one pass, with the same bits.

    Raises:
        OverflowError: as ``add_term``; ``total`` is as it was.
        ValueError: as ``add_term``, or a weight is not whole; ``total`` is as it was.
    """
    if not _are_whole(weights):
        raise ValueError(f"the weights are {list(weights)}; a stack needs whole ones")
    return _add(total, terms, weights)


def merge(left: Sum | None, right: Sum | None) -> Sum | None:
    """The sum of two sums."""
    if left is None or right is None:
        return right if left is None else left
    for expected, kind in zip(_leaves(left.layout, left.layout), _leaves(left.layout, right.layout), strict=True):
        _same_kind(expected, kind)
    floats, wholes = _merge(left.floats, right.floats), _merge(left.wholes, right.wholes)
    return Sum(left.layout, floats, wholes, tuple(map(_add_numbers, left.numbers, right.numbers)))


def value(total: Sum, divisor: Fraction = Fraction(1)) -> Tree:
    """The sum over ``divisor``, in the dtype of its terms (float32 for whole-number and boolean terms)."""
    vectors = [
        vector.fixed.double().mul_(float(Fraction(1, 2**vector.fraction_bits) / divisor))
        for vector in (total.floats, total.wholes)
    ]
    ends, numbers = [0, 0], iter(total.numbers)

    def leaf(kind: Kind) -> torch.Tensor | float:
        if not _is_tensor(kind):
            return float(next(numbers) / divisor)
        (dtype, shape), whole = kind, _is_whole(kind)
        start, ends[whole] = ends[whole], ends[whole] + prod(shape)
        return vectors[whole][start : ends[whole]].view(shape).to(torch.float32 if whole else dtype, copy=True)

    return _rebuilt(total.layout, map(leaf, _leaves(total.layout, total.layout)))


def _add(total: Sum | None, terms: Tree, weights: Sequence[float]) -> Sum:
    """Add the rows of stacked terms, each times its weight."""
    layout = tree_map(lambda rows: _kind(rows, first=True), terms) if total is None else total.layout
    kinds, leaves = _leaves(layout, layout), _leaves(layout, terms)
    for kind, rows in zip(kinds, leaves, strict=True):
        _same_kind(kind, _kind(rows))
    sorts: tuple[list[Any], ...] = [], [], []  # floating, whole, and plain numbers
    for kind, rows in zip(kinds, leaves, strict=True):
        if _is_tensor(kind):
            rows, sort = rows.detach(), sorts[_is_whole(kind)]
            rows = rows.flatten(1) if rows.dim() > 1 else rows[:, None]
            sort.append(rows.to(sort[0].device) if sort else rows)  # a user's update may lie on a GPU and beside it
        else:
            sorts[2].append(rows)
    if total is None:
        total = Sum(layout, _zero(sorts[0], FRACTION_BITS), _zero(sorts[1], 0), (Fraction(0),) * len(sorts[2]))
    floats, wholes = _chunks(sorts[0], len(weights)), _chunks(sorts[1], len(weights))
    bounds = _bound(total.floats, floats, weights), _bound(total.wholes, wholes, weights)  # before the first write
    return Sum(
        layout,
        _add_chunks(total.floats, floats, weights, bounds[0]),
        _add_chunks(total.wholes, wholes, weights, bounds[1]),
        tuple(_add_rows(*pair, weights) for pair in zip(total.numbers, sorts[2], strict=True)),
    )


def _zero(tensors: list[torch.Tensor], fraction_bits: int) -> Vector:
    device = tensors[0].device if tensors else None
    return Vector(torch.zeros(sum(x.shape[1] for x in tensors), dtype=torch.int64, device=device), fraction_bits)


Chunk = tuple[int, torch.Tensor]  # where it starts, and its rows


def _chunks(tensors: list[torch.Tensor], rows: int) -> list[Chunk]:
    """The tensors end to end, in parts: small ones are put together, large ones cut; what is large is not copied."""
    if not tensors:
        return []
    width = max(1, (_CHUNK if tensors[0].device.type == "cpu" else _LARGE_CHUNK) // rows)
    chunks: list[tuple[int, list[torch.Tensor]]] = []
    end = room = 0
    for tensor in tensors:
        for at in range(0, tensor.shape[1], width):
            piece = tensor[:, at : at + width]
            size = piece.shape[1]
            if size > room or size > width // 8:
                chunks.append((end, []))
                room = width if size <= width // 8 else size
            chunks[-1][1].append(piece)
            end, room = end + size, room - size
    return [(start, pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)) for start, pieces in chunks]


def _bound(vector: Vector, chunks: list[Chunk], weights: Sequence[float]) -> float:
    """The vector's bound after the chunks, times the weights; an error if it leaves the range."""
    if not chunks:
        return vector.bound
    whole, size = _are_whole(weights), sum(abs(weight) for weight in weights)
    if not whole and vector.fraction_bits == 0:
        kind = chunks[0][1].dtype
        raise ValueError(f"a tensor of {kind} was sent with weight {weights[0]}; whole numbers need whole weights")
    extremes = [torch.aminmax(rows) for _, rows in chunks]
    lows, highs = (torch.stack(each) for each in zip(*extremes, strict=True))
    low, high = torch.stack([lows.amin(), highs.amax()]).tolist()  # a GPU is waited for once
    largest = max(-low, high) if isfinite(low) else float("nan")
    rounding = max(1.0, size) * 2.0**-vector.fraction_bits  # generous: twice what it can come to
    bound = vector.bound + size * largest + rounding
    within = vector.fraction_bits == 0 or largest * (1.0 if whole else max(1.0, size)) < _LARGEST_TERM
    if not (within and bound < vector.limit):
        raise OverflowError(
            f"a sent tensor reaches {largest:g} with weight {size:g}: training diverged (try a smaller local_lr), "
            f"or the update is too large for the exact sum (terms below {_LARGEST_TERM:g}, sums below {vector.limit:g})"
        )
    return bound


def _add_chunks(vector: Vector, chunks: list[Chunk], weights: Sequence[float], bound: float) -> Vector:
    if not chunks:
        return vector
    whole = _are_whole(weights)
    # what a row is multiplied by before it is rounded, and after
    scales, times = ([1.0] * len(weights), [int(w) for w in weights]) if whole else (list(weights), [1] * len(weights))
    before, after = torch.tensor(scales, dtype=torch.float64), torch.tensor(times)
    dtype = torch.float64 if vector.fraction_bits else torch.int64
    memory = torch.empty(max(rows.numel() for _, rows in chunks), dtype=dtype, device=vector.total.device)
    for start, rows in chunks:
        total = vector.total[start : start + rows.shape[1]]
        in_one_pass = add_rows() if rows.dtype == torch.float32 and rows.device.type == "cpu" else None
        if in_one_pass is not None:
            in_one_pass(rows, before, after, _MAGIC, total)
        else:
            _add_in_passes(total, rows, vector.fraction_bits, scales, times, memory)
    lifted = sum(times) if vector.fraction_bits else 0
    return replace(vector, bound=bound, lifted=vector.lifted + lifted)


def _add_in_passes(
    total: torch.Tensor,
    rows: torch.Tensor,
    fraction_bits: int,
    scales: Sequence[float],
    times: Sequence[int],
    memory: torch.Tensor,
) -> None:
    # the same memory again and again, which stays in the cache
    fixed = memory[: rows.numel()].view(rows.shape).copy_(rows)
    if fraction_bits:
        fixed = (fixed if scales[0] == 1 else fixed.mul_(scales[0])).add_(_MAGIC).view(torch.int64)
    alike = len(set(times)) == 1  # as mostly; then one factor does for the sum of the rows
    if not alike:
        fixed *= torch.tensor(times, device=fixed.device)[:, None]
    _add_into(total, fixed[0] if len(fixed) == 1 else fixed.sum(0), times[0] if alike else 1)


def _add_into(total: torch.Tensor, fixed: torch.Tensor, times: int) -> None:
    """Add ``times * fixed`` to ``total``; both are written to."""
    if total.device.type != "cpu":
        total.add_(fixed, alpha=times)
        return
    left, right = total.numpy(), fixed.numpy()  # numpy adds whole numbers twice as fast as PyTorch
    if times != 1:
        np.multiply(right, times, out=right)
    np.add(left, right, out=left)


def _add_rows(total: Number, rows: Sequence[float], weights: Sequence[float]) -> Number:
    for number, weight in zip(map(float, rows), weights, strict=True):
        term = Fraction(number) * Fraction(weight) if isfinite(number) else float("nan")
        total = _add_numbers(total, term)
    return total


def _add_numbers(left: Number, right: Number) -> Number:
    if isinstance(left, Fraction) and isinstance(right, Fraction):
        return left + right
    return float("nan")  # once a number was not finite, the sum stays so


def _merge(left: Vector, right: Vector) -> Vector:
    bound = left.bound + right.bound
    if len(left.total) and not bound < left.limit:
        raise OverflowError(f"the sum of what the clients sent reaches {bound:g}; it must stay below {left.limit:g}")
    return replace(left, total=left.total + right.total, bound=bound, lifted=left.lifted + right.lifted)


def _are_whole(weights: Sequence[float]) -> bool:
    return all(float(weight).is_integer() for weight in weights)


# A tree's leaves, by their names: two trees with the same names have the same order, whatever was inserted first


def _leaves(layout: Layout, tree: Tree) -> list[Any]:
    if not isinstance(layout, dict):
        return [tree]
    if not isinstance(tree, dict) or tree.keys() != layout.keys():
        odd = sorted(set(tree) ^ set(layout)) if isinstance(tree, dict) else sorted(layout)
        raise ValueError(f"the trees differ in {odd}; both must have the same keys")
    return [leaf for name in sorted(layout) for leaf in _leaves(layout[name], tree[name])]


def _rebuilt(layout: Layout, leaves: Iterator[Any]) -> Tree:
    if not isinstance(layout, dict):
        return next(leaves)
    made = {name: _rebuilt(layout[name], leaves) for name in sorted(layout)}
    return {name: made[name] for name in layout}


def _kind(rows: Any, first: bool = False) -> Kind:
    """Of what each row is; the first one to come decides: a tensor or a number."""
    if isinstance(rows, torch.Tensor):
        return rows.dtype, tuple(rows.shape[1:])
    is_number = first or isinstance(rows, np.ndarray) or isinstance(rows[0], int | float | Fraction)
    return ("number" if is_number else type(rows[0]).__name__,)


def _is_tensor(kind: Kind) -> bool:
    return len(kind) == 2


def _is_whole(kind: Kind) -> bool:
    return not kind[0].is_floating_point


def _same_kind(expected: Kind, kind: Kind) -> None:
    # PyTorch would broadcast another shape, and truncate fractions, without a word
    if kind != expected:
        raise ValueError(f"a client sent {_words(kind)} where {_words(expected)} belongs")


def _words(kind: Kind) -> str:
    return f"a tensor of {kind[0]} with shape {kind[1]}" if _is_tensor(kind) else f"a {kind[0]}"
