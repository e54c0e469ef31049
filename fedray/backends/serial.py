"""All clients in this process: the twin of the Ray backend, equal to the bit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from fedray.aggregators import Aggregator
from fedray.algorithm import Client, ClientUpdate, Make, Metrics, Pool
from fedray.backends.worker import Failure, Job, Partial, balance, fold, map_items, members, reduce
from fedray.client_states import ClientStates
from fedray.clock import Clock
from fedray.execution import ONE_BY_ONE, Execution
from fedray.groups import units
from fedray.learner import Learner, Task


def in_turn(make: Make, items: Sequence[Any], device: str) -> Iterator[tuple[int, Any]]:
    """What `fedray.algorithm.Backend.stream` yields, in this process."""
    function = None
    for number, item in enumerate(items):
        with torch.random.fork_rng():
            function = function or make(device)
            result = function(item)
        yield number, result


class SerialBackend:
    """Every client in turn in this process.

    With ``num_shares`` above 1 the cohort is split and merged as a cluster would do it.
    """

    def __init__(
        self,
        task: Task,
        num_shares: int = 1,
        device: str = "auto",
        threads: int = 1,
        on_client_error: Literal["raise", "drop"] = "raise",
        execution: Execution = ONE_BY_ONE,
    ) -> None:
        torch.set_num_threads(threads)  # kernels split their sums by the number of threads
        self._learner = Learner(task, device, execution)
        self._num_shares, self._drop = num_shares, on_client_error == "drop"
        self._group = execution.size
        self.client_states = ClientStates()
        self.clock = Clock()
        self.dropped: list[Failure] = []

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
        job = Job(client_update, aggregator, keeps_state, self._drop)
        partials: list[Partial] = []
        kept: list[tuple[Client, Any]] = []
        cut = units(cohort, self._group if grouped else 1, self.client_states.has)
        whole = aggregator.zero()
        for share in balance(cut, self._num_shares):
            of = self.client_states.of if keeps_state else lambda _: None
            loaded = [[replace(client, state=of(client)) for client in unit] for unit in share]
            partial, accumulator, states = fold(self._learner, job, broadcast, loaded)
            with self.clock("merge"):
                whole = aggregator.merge(whole, accumulator)
            partials.append(partial)
            self.clock.add(partial.seconds)
            kept += [(c, state) for c, state in zip(members(share), states, strict=False) if state is not None]
        result, metrics, failures = reduce(partials, whole, job, len(cohort))
        self.dropped += failures
        self.client_states.stage(kept)
        return result, metrics

    def map(self, fn: Callable[[Learner, Any], Any], items: Sequence[Any]) -> list[Any]:
        """``[fn(learner, item) for item in items]``."""
        return map_items(self._learner, fn, items)

    def stream(self, make: Make, items: Sequence[Any], pool: Pool | None = None) -> Iterator[tuple[int, Any]]:
        """Items in turn; see `fedray.algorithm.Backend`."""
        yield from in_turn(make, items, str(self._learner.device))

    def fetch(self, handle: Any) -> Any:
        """A client state, from its handle."""
        return handle

    def store(self, state: Any) -> Any:
        """A handle for a client state."""
        return state
