"""What one worker does with its share of a cohort, and what the driver does with the parts. Knows nothing of Ray."""

import ctypes
import faulthandler
import logging
import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, cast

import numpy as np
import torch

from fedray import exact, groups
from fedray.aggregators import Aggregator, mean
from fedray.algorithm import Client, ClientResult, ClientUpdate, Metrics
from fedray.errors import ClientError
from fedray.groups import Group, stack, unstack
from fedray.learner import Learner, seed_draws
from fedray.trees import Tree

logger = logging.getLogger(__name__)

Unit = list[Client]  # clients that one call trains: a group, or one


@dataclass(frozen=True)
class Job:
    """One ``map_reduce`` without its values: what to compute, the same from round to round."""

    client_update: ClientUpdate
    aggregator: Aggregator
    keeps_state: bool
    drop_failures: bool
    time_limit: float | None = None  # seconds for a client, after which its process ends


@dataclass(frozen=True)
class Failure:
    """A client that raised: who, its own traceback, and whether it spoilt what the others share."""

    client: int
    round: int
    traceback: str
    fatal: bool = False

    @property
    def why(self) -> str:
        """In a line."""
        return self.traceback.strip().splitlines()[-1]


@dataclass(frozen=True)
class Partial:
    """What a share of the cohort comes to, but for the accumulator of the updates, which goes a way of its own.

    Attributes:
        metrics: The accumulator of the metrics; None if the worker was lost with it.
        failures: Who failed.
        keepers: The slots of those who keep a state.
        took: Seconds of each unit of the share.
        size: Bytes of the accumulator's tensors.
        seconds: Seconds by what they went to.
    """

    metrics: Any
    failures: tuple[Failure, ...] = ()
    keepers: frozenset[int] = frozenset()
    took: tuple[float, ...] = ()
    size: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)


def fold(learner: Learner, job: Job, broadcast: Any, share: Sequence[Unit]) -> tuple[Partial, Any, list[Tree | None]]:
    """Run a share of the cohort: what it comes to, the accumulator, and what each of its clients keeps.

    A pure function of its arguments: a share may be run again, elsewhere.
    """
    clock, metrics = learner.clock, mean()
    clock.take()
    accumulator, totals = job.aggregator.zero(), metrics.zero()
    states: list[Tree | None] = []
    failures: list[Failure] = []
    took: list[float] = []
    broadcast = _to(broadcast, learner.device)
    versions = _versions(broadcast)
    with torch.random.fork_rng(), _time_limit(job.time_limit) as begin:
        for unit in share:
            began = time.perf_counter()
            begin(len(unit))
            clients = [_there(client, learner.device) for client in unit]
            group = added = None
            why, failed_before = "", len(failures)
            if len(clients) > 1:
                with clock("train"):
                    group, why = _update_group(learner, job, broadcast, clients)
            if group is not None and _versions(broadcast) == versions:
                with clock("accumulate"):
                    added = _add_group(job, (accumulator, totals), clients, group)
            if group is not None and added is not None:
                accumulator, totals = added
                states += groups.states(group, len(clients))
                took.append(time.perf_counter() - began)
                continue
            together = None if group is None else list(unstack(group, len(clients)))
            for k, client in enumerate(clients):
                state = None
                try:
                    with clock("train"):
                        result = together[k] if together else _update_client(learner, job, broadcast, client)
                    with clock("accumulate"):
                        reported = {name: float(value) for name, value in result.metrics.items()}
                        counted = metrics.accumulate(totals, client, ClientResult(reported, result.weight))
                        # last, for it may write: a client that fails leaves nothing behind in the sums
                        accumulator = job.aggregator.accumulate(accumulator, client, result)
                    totals, state = counted, result.state
                except Exception:
                    failures.append(Failure(client.id, client.round, traceback.format_exc()))
                if _versions(broadcast) != versions:
                    failures.append(Failure(client.id, client.round, _WROTE.format(client.id), fatal=True))
                if failures and (failures[-1].fatal or not job.drop_failures):
                    return Partial(totals, tuple(failures)), accumulator, states
                states.append(state)
            if why and len(failures) == failed_before:
                _tell_of_slowness(why)
            took.append(time.perf_counter() - began)
    keepers = frozenset(c.slot for c, state in zip(members(share), states, strict=True) if state is not None)
    partial = Partial(totals, tuple(failures), keepers, tuple(took), size_of(accumulator), clock.take())
    return (partial, accumulator, states) if learner.device == _CPU else (partial, *_to([accumulator, states], _CPU))


@contextmanager
def _time_limit(seconds: float | None) -> Iterator[Callable[[int], None]]:
    """A function that gives so many clients the time that they may take; after it, this process ends with a traceback.

    A thread in C watches it, so that even a client that hangs in C is ended.
    """

    def begin(clients: int) -> None:
        if seconds is not None:
            faulthandler.dump_traceback_later(seconds * clients, exit=True, file=2)

    try:
        yield begin
    finally:
        if seconds is not None:
            faulthandler.cancel_dump_traceback_later()


def members(share: Sequence[Unit]) -> list[Client]:
    """The clients of a share, in order."""
    return [client for unit in share for client in unit]


def _there(client: Client, device: torch.device) -> Client:
    return client if client.state is None else replace(client, state=_to(client.state, device))


def _update_client(learner: Learner, job: Job, broadcast: Any, client: Client) -> ClientResult:
    kept = _versions(client.state)
    seed_draws(client.seed, learner.device)  # what it draws does not depend on who went before
    result = job.client_update(learner, broadcast, client)
    _check(job, client, result, kept)
    return result


def _update_group(learner: Learner, job: Job, broadcast: Any, clients: list[Client]) -> tuple[ClientResult | None, str]:
    """The stacked result of clients that train in one call; None, and why, if it fails: one by one shows whose fault it
    is."""
    states = [client.state for client in clients if client.state is not None]
    group = Group(tuple(clients), stack(states) if states else None)
    seed_draws(clients[0].seed, learner.device)
    try:
        result = job.client_update(learner, broadcast, cast(Client, group))
        _check(job, clients[0], result, _versions(clients[0].state))
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return result, ""


@cache
def _tell_of_slowness(why: str) -> None:
    logger.warning(
        "clients that train one by one cannot train together, which is tried again and again: set group=1 (%s)", why
    )


def _add_group(job: Job, sums: tuple[Any, Any], clients: list[Client], group: ClientResult) -> tuple[Any, Any] | None:
    """The sums with a whole group; None if the aggregator cannot, or one of its clients is at fault."""
    accumulate, count = job.aggregator.accumulate_group, mean().accumulate_group
    if accumulate is None or count is None:
        return None
    partial, totals = sums
    try:
        reported = {name: np.broadcast_to(value, len(clients)).astype(float) for name, value in group.metrics.items()}
        totals = count(totals, clients, ClientResult(reported, group.weight))
        return accumulate(partial, clients, group), totals
    except Exception:
        return None


def reduce(
    partials: Sequence[Partial], accumulator: Any, job: Job, num_clients: int
) -> tuple[Any, Metrics, list[Failure]]:
    """What a round comes to, from its parts and their merged accumulators, and who was dropped from it.

    Raises:
        ClientError: a client raised and failures are not dropped, or every client failed, or one wrote into the
            broadcast.
    """
    failures = sorted((f for partial in partials for f in partial.failures), key=lambda f: (not f.fatal, f.client))
    if failures and (failures[0].fatal or not job.drop_failures or len(failures) == num_clients):
        first = failures[0]
        raise ClientError(
            f"client {first.client} failed in round {first.round}"
            + (f", as did all {num_clients} of the cohort" if len(failures) == num_clients > 1 else "")
            + f":\n{first.traceback}"
        )
    metrics = mean()
    totals = metrics.zero()
    for partial in partials:
        if partial.metrics is not None:
            totals = metrics.merge(totals, partial.metrics)
    failed = {"clients_failed": float(len(failures))} if failures else {}
    return job.aggregator.report(accumulator), {**metrics.report(totals), **failed}, failures


class Costs:
    """What clients cost: their expected work, corrected by the seconds that they took before."""

    def __init__(self) -> None:
        self._pace: dict[int, float] = {}  # seconds of a client for one unit of expected work
        self._seconds = self._work = 0.0

    def of(self, unit: Unit) -> float:
        """Expected seconds of a unit; its expected work, as long as nothing was learnt."""
        mean = self._seconds / self._work if self._work else 1.0
        return sum(client.cost * self._pace.get(client.id, mean) for client in unit)

    def learn(self, unit: Unit, seconds: float) -> None:
        """Take note of what a unit took; the clients of a group share it by their expected work."""
        work = sum(client.cost for client in unit)
        if not work:
            return
        for client in unit:  # the mean of the last ones, which smooths over what else the machine did
            self._pace[client.id] = (self._pace.get(client.id, seconds / work) + seconds / work) / 2
        self._seconds, self._work = self._seconds + seconds, self._work + work


class Speeds:
    """How fast workers are beside each other, by the seconds that they took for the same expected work."""

    def __init__(self) -> None:
        self._speed: dict[Any, float] = {}

    def of(self, workers: Iterable[Any]) -> list[float]:
        """Their speeds; 1 for one who is new, or differs no more than equal machines do from round to round."""
        speeds = (self._speed.get(worker, 1.0) for worker in workers)
        return [1.0 if abs(math.log(speed)) < _NOISE else speed for speed in speeds]

    def knows(self, worker: Any) -> bool:
        """Whether the worker has worked in an earlier round."""
        return worker in self._speed

    def learn(self, took: Mapping[Any, tuple[float, float]]) -> None:
        """Take note of each worker's expected work and seconds in a round; only their proportions count.

        A worker's first round is left out, in which it warms up. Of whom nothing is known this time, since it had too
        little to do or nothing at all, the speed goes back towards the others': else one bad moment would be for ever.
        """
        pace = {worker: work / seconds for worker, (work, seconds) in took.items() if work and seconds > _INSTANT}
        pace = {worker: found for worker, found in pace.items() if self.knows(worker)}
        self._speed |= {worker: 1.0 for worker in took if not self.knows(worker)}
        known = [self._speed[worker] for worker in pace]
        ratios = [math.log(found / speed) for found, speed in zip(pace.values(), known, strict=True)]
        scale = math.exp(sum(ratios) / len(ratios)) if ratios else 1.0
        for (worker, found), speed in zip(pace.items(), known, strict=True):
            self._speed[worker] = speed ** (3 / 4) * (found / scale) ** (1 / 4)
        others = math.prod(self._speed[worker] ** (1 / len(pace)) for worker in pace)
        for worker in self._speed.keys() - pace.keys():
            self._speed[worker] = self._speed[worker] ** (3 / 4) * others ** (1 / 4)


def learn(costs: Costs, speeds: Speeds, took: Sequence[tuple[Any, Sequence[Unit], Sequence[float]]]) -> None:
    """Take note of a round.

    Args:
        costs: What clients cost.
        speeds: How fast workers are.
        took: Workers, their shares, and the seconds of each unit.
    """
    # before the costs change, whose unit is another once they are known
    paces = {worker: (sum(map(costs.of, share)), sum(seconds)) for worker, share, seconds in took}
    for worker, share, seconds in took:
        if speeds.knows(worker):  # else it has warmed up
            [speed] = speeds.of([worker])
            for unit, each in zip(share, seconds, strict=False):
                costs.learn(unit, each * speed)
    speeds.learn(paces)


def balance(
    units: Sequence[Unit], num_shares: int, costs: Costs | None = None, speeds: Sequence[float] | None = None
) -> list[list[Unit]]:
    """Costliest first to the share that is through with it first (Graham's rule); shares may be empty."""
    shares: list[list[Unit]] = [[] for _ in range(num_shares)]
    loads = [0.0] * num_shares
    speeds = speeds or [1.0] * num_shares
    expected = [(costs or Costs()).of(unit) for unit in units]
    for cost, unit in sorted(zip(expected, units, strict=True), key=lambda pair: -pair[0]):
        ends = [(load + cost) / speed for load, speed in zip(loads, speeds, strict=True)]
        first = ends.index(min(ends))
        shares[first].append(unit)
        loads[first] += cost
    return shares


def map_items(learner: Learner, fn: Callable[[Learner, Any], Any], items: Sequence[Any]) -> list[Any]:
    """``[fn(learner, item) for item in items]`` without touching the caller's random generator."""
    with torch.random.fork_rng():
        if learner.device == _CPU:
            return [fn(learner, item) for item in items]
        return [_to(fn(learner, _to(item, learner.device)), _CPU) for item in items]


_CPU = torch.device("cpu")
_NOISE = 0.15  # of the logarithm of a worker's speed
_INSTANT = 0.02  # seconds, below which a share says nothing about its worker's speed
_WROTE = (
    "client {} wrote into the broadcast, which all clients share; write `a + b` instead of `a.add_(b)`, or clone first"
)


def _check(job: Job, client: Client, result: ClientResult, kept: list[int]) -> None:
    if result.state is not None and not job.keeps_state:
        raise ValueError(
            f"client {client.id} returned state, which would be lost; "
            "call map_reduce(..., keeps_state=True) to have it back next time"
        )
    if _versions(client.state) != kept:
        raise ValueError(
            f"client {client.id} wrote into the state that it had kept, which a failed round must leave as it is; "
            "write `a + b` instead of `a.add_(b)`, or clone first"
        )


def size_of(tree: Any) -> int:
    """Bytes of the tensors in an accumulator or a broadcast."""
    if isinstance(tree, exact.Sum | torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict | list | tuple):
        return sum(map(size_of, tree.values() if isinstance(tree, dict) else tree))
    if is_dataclass(tree) and not isinstance(tree, type):
        return sum(size_of(getattr(tree, f.name)) for f in fields(tree))
    return 0


def _to(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, dict):
        return {name: _to(branch, device) for name, branch in tree.items()}
    if isinstance(tree, list | tuple):
        moved = (_to(branch, device) for branch in tree)
        return type(tree)(*moved) if hasattr(tree, "_fields") else type(tree)(moved)
    if is_dataclass(tree) and not isinstance(tree, type):
        return replace(tree, **{f.name: _to(getattr(tree, f.name), device) for f in fields(tree) if f.init})
    return tree.to(device) if isinstance(tree, torch.Tensor) else tree


def _versions(tree: Tree) -> list[int]:
    # PyTorch counts the in-place writes to a tensor; reading the count costs nothing
    if isinstance(tree, dict | list | tuple):
        branches = tree.values() if isinstance(tree, dict) else tree
        return [version for branch in branches for version in _versions(branch)]
    return [tree._version] if isinstance(tree, torch.Tensor) else []


def keep_freed_memory() -> None:
    """Tell glibc's allocator to keep up to 256 MB that this process has freed, instead of handing it back at once.

    Every step of a training frees and allocates the same megabytes again. Given back to the system each time, they come
    back as page faults, which took half of a small model's training. Other C libraries are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    with suppress(OSError, AttributeError):
        allocator = ctypes.CDLL("libc.so.6")
        allocator.mallopt(mmap_threshold, 1 << 28)
        allocator.mallopt(trim_threshold, 1 << 28)
