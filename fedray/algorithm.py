"""The types that every federated algorithm is written with. Read this file first."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from fedray.trees import Number, Params, Tree

if TYPE_CHECKING:
    from fedray.aggregators import Aggregator
    from fedray.client_states import ClientStates
    from fedray.learner import Learner

Metrics = dict[str, float]


@dataclass(frozen=True)
class Client:
    """One member of a cohort, for one round.

    Attributes:
        id: Which client of the population, 0-based.
        seed: Its own seed, derived from the run's seed, the round and the id.
        round: The round, 1-based.
        slot: Its place in the cohort; results that are collected come back in this order.
        cost: Expected work, usually the number of examples; balances the workers.
        state: What it kept from the last round in which it took part, or None. Read only.
        staleness: How many rounds have ended since it was sent its model; more than 0 in asynchronous schedules only.
        horizon: How many rounds before the end of this one the oldest model is from which anybody still trains.
    """

    id: int
    seed: int
    round: int = 1
    slot: int = 0
    cost: float = 1.0
    state: Tree | None = None
    staleness: int = 0
    horizon: int = 0


EVERYONE = -1  # the id of the client that holds all training data: centralised baselines


@dataclass(frozen=True)
class ClientResult:
    """What one client sends (update, weight, metrics) and what it keeps (state).

    Attributes:
        update: A tree of tensors and numbers; its bytes are what the ledger counts as sent.
        weight: Its weight in every mean, usually the number of examples.
        metrics: Numbers to average over the cohort, such as the training loss.
        state: A tree of tensors and numbers that the client meets again the next time, or None.
    """

    update: Any
    weight: Number
    metrics: dict[str, Number] = field(default_factory=dict)
    state: Tree | None = None


ClientUpdate = Callable[["Learner", Any, Client], ClientResult]


Make = Callable[[str], Callable[[Any], Any]]  # of a device: a function of items


@dataclass(frozen=True)
class Pool:
    """Actors for server-side work, beside the workers.

    Attributes:
        num_actors: How many.
        num_cpus: CPUs that each reserves.
        num_gpus: GPUs that each reserves, fractions allowed.
    """

    num_actors: int
    num_cpus: float = 1.0
    num_gpus: float = 0.0


class Backend(Protocol):
    """Where clients run: in this process, or on a Ray cluster. Algorithms cannot tell."""

    def map_reduce(
        self,
        client_update: ClientUpdate,
        broadcast: Any,
        cohort: Sequence[Client],
        aggregator: "Aggregator",
        keeps_state: bool = False,
        metered: bool = True,
        grouped: bool = False,
        received: Callable[[Client], int] | None = None,
    ) -> tuple[Any, Metrics]:
        """Run ``client_update`` on the cohort; return the aggregate and the mean metrics.

        ``client_update`` must be a pure function of its arguments: it may be run again, elsewhere. With
        ``keeps_state`` a client meets the state that it returned the last time. States returned in a round are
        kept only when the whole round is done. ``metered=False`` says that a federation would not send any of
        this (an evaluation, a baseline without communication), so the ledger does not count it. ``grouped=True``
        says that ``client_update`` consists of local training and elementwise tree arithmetic, so that it may be
        called with a `fedray.groups.Group` for a client. ``received`` says how many bytes a federation would send to
        a client, if not the broadcast's.
        """
        ...

    def map(self, fn: Callable[["Learner", Any], Any], items: Sequence[Any]) -> list[Any]:
        """``[fn(learner, item) for item in items]``: server-side work that is worth spreading."""
        ...

    def stream(self, make: Make, items: Sequence[Any], pool: "Pool | None" = None) -> Iterator[tuple[int, Any]]:
        """Server-side work with something heavy that stays loaded: ``make(device)`` once for each of a pool's actors.

        Yields the position of each item with what the function that was made returns for it, as they come. Whoever
        dies loses nothing: its item is done again. Without a pool, the workers do it, which meanwhile have no clients.
        """
        ...

    @property
    def client_states(self) -> "ClientStates":
        """What clients keep; the loop commits it after every round."""
        ...


@dataclass(frozen=True)
class FederatedAlgorithm:
    """A pair of functions: ``init(params)`` and ``apply(state, cohort, backend)``.

    The server state is any frozen dataclass with a ``params`` field. It is the only thing passed from round to
    round, so it is the whole checkpoint of the server. An ``asynchronous`` algorithm minds its clients' staleness.
    """

    init: Callable[[Params], Any]
    apply: Callable[[Any, Sequence[Client], Backend], tuple[Any, Metrics]]
    asynchronous: bool = False
