"""Aggregation as a fold that can be split: zero, accumulate, merge, report.

``accumulate`` runs on a worker once per client, ``merge`` on the driver once per worker, ``report`` once per
round. The law that makes the split invisible: folding any partition of a cohort, in any order, and merging the
parts equals folding the cohort, to the bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from fedray import exact
from fedray.algorithm import Client, ClientResult
from fedray.errors import ConfigError
from fedray.trees import flatten, scale, squared_norm, tree_map


@dataclass(frozen=True)
class Aggregator:
    """A fold; the accumulator is whatever its functions agree on, and belongs to the fold (it may be written to).

    Attributes:
        zero: The empty accumulator.
        accumulate: ``(accumulator, client, result)`` to the next accumulator.
        merge: Two accumulators to one.
        report: The accumulator of the whole cohort to the aggregate.
        together: ``accumulate`` for a group's clients at once; None for one by one.
        grows: Whether merging makes an accumulator larger, so that nothing is gained by merging on the way.
    """

    zero: Callable[[], Any]
    accumulate: Callable[[Any, Client, ClientResult], Any]
    merge: Callable[[Any, Any], Any]
    report: Callable[[Any], Any]
    together: "Together | None" = None
    grows: bool = False

    @property
    def accumulate_group(self) -> "Callable[[Any, Sequence[Client], ClientResult], Any] | None":
        """The function in ``together``, unless ``accumulate`` was replaced by another than it stands for."""
        return self.together.group if self.together and self.together.one is self.accumulate else None


@dataclass(frozen=True)
class Together:
    """A way to accumulate many clients at once.

    Attributes:
        one: The ``accumulate`` that it stands for.
        group: ``(accumulator, clients, stacked result)`` to what ``one`` comes to, client by client, to the bit;
            it writes nothing if it raises.
    """

    one: Callable[[Any, Client, ClientResult], Any]
    group: Callable[[Any, Sequence[Client], ClientResult], Any]


def total() -> Aggregator:
    """The weighted sum, with the sum of the weights: ``(sum, weight)``."""
    return _EXACT_SUM


def mean() -> Aggregator:
    """Weighted mean (McMahan et al., 2017); a worker sends one sum however many clients it ran."""
    return replace(_EXACT_SUM, report=_over_weight)


# Functions of the module and no closures, for an aggregator travels with each round: a name is pickled in microseconds,
# a closure in up to a millisecond.


def _nothing() -> Any:
    return None, Fraction(0)


def _add(acc: Any, client: Client, result: ClientResult) -> Any:
    return exact.add_term(acc[0], result.update, result.weight), acc[1] + Fraction(result.weight)


def _add_group(acc: Any, clients: Sequence[Client], result: ClientResult) -> Any:
    weights = np.broadcast_to(result.weight, len(clients)).tolist()
    return exact.add_stack(acc[0], result.update, weights), acc[1] + sum(map(Fraction, weights))


def _merge(left: Any, right: Any) -> Any:
    return exact.merge(left[0], right[0]), left[1] + right[1]


def _with_weight(acc: Any) -> Any:
    return exact.value(acc[0]), float(acc[1])


def _over_weight(acc: Any) -> Any:
    if not acc[1] > 0:
        raise ValueError(f"the weights of the cohort sum to {float(acc[1])}; a mean needs a positive sum")
    return exact.value(*acc)


_EXACT_SUM = Aggregator(_nothing, _add, _merge, _with_weight, Together(_add, _add_group))


def collect(report: Callable[[list[Any]], Any] = list) -> Aggregator:
    """Every update, in the order of the cohort: one message a worker, but as many bytes as clients."""

    def accumulate(acc: dict[int, Any], client: Client, result: ClientResult) -> dict[int, Any]:
        return {**acc, client.slot: result.update}

    return Aggregator(
        dict, accumulate, lambda a, b: {**a, **b}, lambda acc: report([acc[slot] for slot in sorted(acc)]), grows=True
    )


@dataclass(frozen=True)
class Rows:
    """A tensor with a row for each example; more of them are put behind, where other tensors are added up."""

    values: torch.Tensor

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(torch.cat([self.values, other.values]))


def total_with_rows() -> Aggregator:
    """`total` of updates that are mappings, whose `Rows` are put behind each other in the order of the cohort."""
    added, kept = total(), collect()

    def accumulate(acc: Any, client: Client, result: ClientResult) -> Any:
        rows = {name: value.values.cpu() for name, value in result.update.items() if isinstance(value, Rows)}
        sums = {name: value for name, value in result.update.items() if name not in rows}
        return (
            added.accumulate(acc[0], client, replace(result, update=sums)),
            kept.accumulate(acc[1], client, replace(result, update=rows)),
        )

    def report(acc: Any) -> Any:
        sums, weight = added.report(acc[0])
        pieces = kept.report(acc[1])
        names = pieces[0] if pieces else ()
        return {**(sums or {}), **{name: Rows(torch.cat([piece[name] for piece in pieces])) for name in names}}, weight

    return Aggregator(
        lambda: (added.zero(), kept.zero()),
        accumulate,
        lambda a, b: (added.merge(a[0], b[0]), kept.merge(a[1], b[1])),
        report,
        grows=True,
    )


def with_members(inner: Aggregator) -> Aggregator:
    """Another aggregation, beside the clients that are in it, in the order of the cohort: ``(aggregate, clients)``."""

    def named(clients: Sequence[Client]) -> dict[int, Client]:
        return {client.slot: replace(client, state=None) for client in clients}

    def accumulate(acc: Any, client: Client, result: ClientResult) -> Any:
        return inner.accumulate(acc[0], client, result), acc[1] | named([client])

    def accumulate_group(acc: Any, clients: Sequence[Client], result: ClientResult) -> Any:
        assert inner.accumulate_group is not None
        return inner.accumulate_group(acc[0], clients, result), acc[1] | named(clients)

    return replace(
        inner,
        zero=lambda: (inner.zero(), {}),
        accumulate=accumulate,
        merge=lambda a, b: (inner.merge(a[0], b[0]), a[1] | b[1]),
        report=lambda acc: (inner.report(acc[0]), [acc[1][slot] for slot in sorted(acc[1])]),
        together=Together(accumulate, accumulate_group) if inner.accumulate_group else None,
    )


def median() -> Aggregator:
    """Coordinate-wise median (Yin et al., 2018, Option I); the mean of the middle two for an even cohort."""

    def middle(*leaves: torch.Tensor) -> torch.Tensor:
        ordered = torch.stack(leaves).sort(0).values
        return (ordered[(len(leaves) - 1) // 2] + ordered[len(leaves) // 2]) / 2

    return collect(lambda updates: tree_map(middle, *updates))


def trimmed_mean(trim: float = 0.1) -> Aggregator:
    """Coordinate-wise trimmed mean (Yin et al., 2018, Option II).

    Args:
        trim: Fraction of the cohort cut off at each end of every coordinate, in [0, 0.5).
    """
    _require(0 <= trim < 0.5, "trim", trim, "at least 0 and below 0.5")

    def inner(*leaves: torch.Tensor) -> torch.Tensor:
        cut = int(Fraction(str(trim)) * len(leaves))  # 0.29 of 100 is 29, which floats miss
        return torch.stack(leaves).sort(0).values[cut : len(leaves) - cut].mean(0)

    return collect(lambda updates: tree_map(inner, *updates))


def krum(num_byzantine: int = 1) -> Aggregator:
    """The update closest to its neighbours (Blanchard et al., 2017, section 4).

    Args:
        num_byzantine: How many clients of a cohort may lie; the cohort needs at least this times 2, plus 3.
    """
    return multi_krum(num_byzantine, 1)


def multi_krum(num_byzantine: int = 1, num_selected: int = 2) -> Aggregator:
    """The mean of the updates with the best Krum scores (Blanchard et al., 2017, Multi-Krum).

    Args:
        num_byzantine: How many clients of a cohort may lie; the cohort needs at least this times 2, plus 3.
        num_selected: How many updates are averaged.
    """
    _require(num_byzantine >= 0, "num_byzantine", num_byzantine, "at least 0")
    _require(num_selected >= 1, "num_selected", num_selected, "at least 1")

    def report(updates: list[Any]) -> Any:
        neighbours = len(updates) - num_byzantine - 2
        if neighbours <= num_byzantine:
            raise ConfigError(
                f"num_byzantine is {num_byzantine} in a cohort of {len(updates)}; Krum needs at least "
                f"{2 * num_byzantine + 3} clients a round"
            )
        vectors = torch.stack([flatten(update).double() for update in updates])
        # exact differences rather than cdist's matrix product, whose rounding could reorder near ties
        distances = torch.stack([(vectors - vector).square().sum(1) for vector in vectors])
        scores = distances.sort(1).values[:, 1 : neighbours + 1].sum(1)
        chosen = sorted(scores.argsort(stable=True)[:num_selected].tolist())
        return tree_map(lambda *leaves: torch.stack(leaves).mean(0), *(updates[i] for i in chosen))

    return collect(report)


def norm_bound(max_norm: float = 1.0) -> Aggregator:
    """Weighted mean of updates scaled down to a largest Euclidean norm (Sun et al., 2019, section 4).

    Args:
        max_norm: The largest norm of an update.
    """
    _require(max_norm > 0, "max_norm", max_norm, "> 0")
    inner = mean()

    def accumulate(acc: Any, client: Client, result: ClientResult) -> Any:
        norm = squared_norm(result.update) ** 0.5
        bounded = scale(result.update, min(1.0, max_norm / norm) if norm > 0 else 1.0)
        return inner.accumulate(acc, client, ClientResult(bounded, result.weight))

    return Aggregator(inner.zero, accumulate, inner.merge, inner.report)


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {allowed}")


AGGREGATORS: dict[str, Callable[..., Aggregator]] = {
    "mean": mean,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "multi_krum": multi_krum,
    "norm_bound": norm_bound,
}
