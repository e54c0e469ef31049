"""What a federation would have sent, counted where it is sent: exact bytes, never read off the simulator's wire.

A client receives the broadcast and sends its update; both are counted as the bytes of their tensors and eight for
every number. The weight and the metrics that come with an update are bookkeeping and are not counted, as in the
papers' tables.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fedray.aggregators import Aggregator, Together
from fedray.algorithm import Backend, Client, ClientResult, ClientUpdate, Make, Metrics, Pool
from fedray.client_states import ClientStates
from fedray.groups import member
from fedray.metrics.diversity import with_squares


def payload_bytes(tree: Any) -> int:
    """Bytes of a tree on a federation's wire; of text in UTF-8, of lists and tuples those of their items.

    >>> payload_bytes({"w": torch.zeros(10), "steps": 3})
    48

    Raises:
        TypeError: it holds something whose size is not defined.
    """
    match tree:
        case None:
            return 0
        case torch.Tensor():
            return tree.numel() * tree.element_size()
        case int() | float():
            return 8
        case str():
            return len(tree.encode())
        case dict():
            return sum(map(payload_bytes, tree.values()))
        case list() | tuple():
            return sum(map(payload_bytes, tree))
    raise TypeError(f"a {type(tree).__name__} cannot be sent; send tensors, numbers, text, and dicts or lists of them")


@dataclass
class Ledger:
    """Bytes sent up (by clients) and down (to them): of the round in flight, and in total."""

    up_total: int = 0
    down_total: int = 0
    up: int = 0
    down: int = 0
    down_each: int = 0

    def open_round(self) -> None:
        """Start counting a round."""
        self.up = self.down = self.down_each = 0

    def book(self, up: int, down: Sequence[int]) -> None:
        """Count one exchange of the cohort: ``up`` bytes in all, ``down`` for each client."""
        self.up += up
        self.up_total += up
        self.down_each += max(down, default=0)
        self._book_down(sum(down))

    def book_dropped(self, num_clients: int) -> None:
        """Count clients that sent nothing, and received as much in this round as any other."""
        self._book_down(self.down_each * num_clients)

    def _book_down(self, count: int) -> None:
        self.down += count
        self.down_total += count

    def entry(self) -> dict[str, int]:
        """The round's share of a line in ``metrics.jsonl``."""
        return {
            "bytes_up": self.up,
            "bytes_down": self.down,
            "bytes_up_total": self.up_total,
            "bytes_down_total": self.down_total,
        }


@dataclass(frozen=True)
class MeteredBackend:
    """A backend that writes what its clients send and receive into a ledger, and may measure the updates' diversity."""

    backend: Backend
    ledger: Ledger
    diversity: bool = False

    def map_reduce(
        self,
        client_update: ClientUpdate,
        broadcast: Any,
        cohort: Sequence[Client],
        aggregator: Aggregator,
        keeps_state: bool = False,
        metered: bool = True,
        grouped: bool = False,
        received: Callable[[Client], int] | None = None,
    ) -> tuple[Any, Metrics]:
        """Run the cohort; see `fedray.algorithm.Backend`."""
        if not metered:
            return self.backend.map_reduce(client_update, broadcast, cohort, aggregator, keeps_state, grouped=grouped)
        size = payload_bytes(broadcast) if received is None else 0
        down = [size if received is None else received(client) for client in cohort]
        measured = _weighing(with_squares(aggregator) if self.diversity else aggregator)
        (aggregate, sent), metrics = self.backend.map_reduce(
            client_update, broadcast, cohort, measured, keeps_state, grouped=grouped
        )
        self.ledger.book(sent, down)
        if not self.diversity:
            return aggregate, metrics
        aggregate, diversity = aggregate
        return aggregate, {**metrics, **diversity}

    def map(self, fn: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
        """Server-side work: nothing is sent."""
        return self.backend.map(fn, items)

    def stream(self, make: Make, items: Sequence[Any], pool: Pool | None = None) -> Iterator[tuple[int, Any]]:
        """Server-side work: nothing is sent."""
        return self.backend.stream(make, items, pool)

    @property
    def client_states(self) -> ClientStates:
        """What clients keep never leaves them."""
        return self.backend.client_states


def _weighing(aggregator: Aggregator) -> Aggregator:
    """The same aggregation, beside the bytes of the updates; partials, which are quicker to pickle than closures."""
    accumulate = partial(_accumulate, aggregator)
    return replace(
        aggregator,
        zero=partial(_zero, aggregator),
        accumulate=accumulate,
        merge=partial(_merge, aggregator),
        report=partial(_report, aggregator),
        together=Together(accumulate, partial(_accumulate_group, aggregator)) if aggregator.accumulate_group else None,
    )


def _zero(of: Aggregator) -> Any:
    return of.zero(), 0


def _accumulate(of: Aggregator, acc: Any, client: Client, result: ClientResult) -> Any:
    return of.accumulate(acc[0], client, result), acc[1] + payload_bytes(result.update)


def _accumulate_group(of: Aggregator, acc: Any, clients: Sequence[Client], result: ClientResult) -> Any:
    assert of.accumulate_group is not None
    each = payload_bytes(member(result.update, 0))
    return of.accumulate_group(acc[0], clients, result), acc[1] + len(clients) * each


def _merge(of: Aggregator, left: Any, right: Any) -> Any:
    return of.merge(left[0], right[0]), left[1] + right[1]


def _report(of: Aggregator, acc: Any) -> Any:
    return of.report(acc[0]), acc[1]
