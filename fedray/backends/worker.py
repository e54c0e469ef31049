"""What one worker does with its share of a cohort, and what the driver does with the parts. Knows nothing of Ray."""

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from fedray.aggregators import Aggregator, mean
from fedray.algorithm import Client, ClientResult, ClientUpdate, Metrics
from fedray.errors import ClientError
from fedray.groups import Group, stack, unstack
from fedray.learner import Learner, seed_draws
from fedray.trees import Tree

Unit = list[Client]  # clients that one call trains: a group, or one


@dataclass(frozen=True)
class Job:
    """One ``map_reduce``, as it is sent to every worker once."""

    client_update: ClientUpdate
    broadcast: Any
    aggregator: Aggregator
    keeps_state: bool
    drop_failures: bool


@dataclass(frozen=True)
class Failure:
    """A client that raised: who, its own traceback, and whether it spoilt what the others share."""

    client: int
    round: int
    traceback: str
    fatal: bool = False


@dataclass(frozen=True)
class Partial:
    """What a share of the cohort comes to: two accumulators, who failed, and the slots of those who keep a state."""

    update: Any
    metrics: Any
    failures: tuple[Failure, ...] = ()
    keepers: frozenset[int] = frozenset()


def fold(learner: Learner, job: Job, share: Sequence[Unit]) -> tuple[Partial, list[Tree | None]]:
    """Run a share of the cohort: its partial sums, and what each of its clients keeps.

    A pure function of its arguments: a share may be run again, elsewhere.
    """
    metrics = mean()
    partial, totals = job.aggregator.zero(), metrics.zero()
    states: list[Tree | None] = []
    failures: list[Failure] = []
    job = replace(job, broadcast=_to(job.broadcast, learner.device))
    versions = _versions(job.broadcast)
    with torch.random.fork_rng():
        for unit in share:
            clients = [replace(client, state=_to(client.state, learner.device)) for client in unit]
            group = _update_group(learner, job, clients) if len(clients) > 1 else None
            together = list(unstack(group, len(clients))) if group else None
            if group and together and _versions(job.broadcast) == versions:
                added = _add_group(job, (partial, totals), clients, group, together)
                if added is not None:
                    partial, totals = added
                    states += [result.state for result in together]
                    continue
            for k, client in enumerate(clients):
                state = None
                try:
                    result = together[k] if together else _update_client(learner, job, client)
                    reported = {name: float(value) for name, value in result.metrics.items()}
                    counted = metrics.accumulate(totals, client, ClientResult(reported, result.weight))
                    # last, for it may write: a client that fails leaves nothing behind in the sums
                    partial, totals, state = job.aggregator.accumulate(partial, client, result), counted, result.state
                except Exception:
                    failures.append(Failure(client.id, client.round, traceback.format_exc()))
                if _versions(job.broadcast) != versions:
                    failures.append(Failure(client.id, client.round, _WROTE.format(client.id), fatal=True))
                if failures and (failures[-1].fatal or not job.drop_failures):
                    return Partial(partial, totals, tuple(failures)), states
                states.append(state)
    members = [client for unit in share for client in unit]
    keepers = frozenset(client.slot for client, state in zip(members, states, strict=True) if state is not None)
    return Partial(partial, totals, tuple(failures), keepers), states


def _update_client(learner: Learner, job: Job, client: Client) -> ClientResult:
    kept = _versions(client.state)
    seed_draws(client.seed, learner.device)  # what it draws does not depend on who went before
    result = job.client_update(learner, job.broadcast, client)
    _check(job, client, result, kept)
    return result


def _update_group(learner: Learner, job: Job, clients: list[Client]) -> ClientResult | None:
    """The stacked result of clients that train in one call; None if it fails: one by one shows whose fault it is."""
    states = [client.state for client in clients if client.state is not None]
    group = Group(tuple(clients), stack(states) if states else None)
    try:
        result = job.client_update(learner, job.broadcast, cast(Client, group))
        _check(job, clients[0], result, _versions(clients[0].state))
    except Exception:
        return None
    return result


def _add_group(
    job: Job, sums: tuple[Any, Any], clients: list[Client], group: ClientResult, results: list[ClientResult]
) -> tuple[Any, Any] | None:
    """The sums with a whole group; None if the aggregator cannot, or one of its clients is at fault."""
    if job.aggregator.accumulate_group is None:
        return None
    partial, totals = sums
    try:
        for client, result in zip(clients, results, strict=True):
            reported = {name: float(value) for name, value in result.metrics.items()}
            totals = mean().accumulate(totals, client, ClientResult(reported, result.weight))
        return job.aggregator.accumulate_group(partial, clients, group), totals
    except Exception:
        return None


def reduce(partials: Sequence[Partial], job: Job, num_clients: int) -> tuple[Any, Metrics]:
    """Merge the parts of a round.

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
    whole, totals = job.aggregator.zero(), metrics.zero()
    for partial in partials:
        if partial.metrics is None:  # its worker was lost with it
            continue
        whole, totals = job.aggregator.merge(whole, partial.update), metrics.merge(totals, partial.metrics)
    failed = {"clients_failed": float(len(failures))} if failures else {}
    return job.aggregator.report(whole), {**metrics.report(totals), **failed}


def balance(units: Sequence[Unit], num_shares: int) -> list[list[Unit]]:
    """Costliest first to the least loaded share (Graham's rule); shares may be empty."""
    shares: list[list[Unit]] = [[] for _ in range(num_shares)]
    loads = [0.0] * num_shares
    costs = [sum(client.cost for client in unit) for unit in units]
    for cost, unit in sorted(zip(costs, units, strict=True), key=lambda pair: -pair[0]):
        lightest = loads.index(min(loads))
        shares[lightest].append(unit)
        loads[lightest] += cost
    return shares


def map_items(learner: Learner, fn: Callable[[Learner, Any], Any], items: Sequence[Any]) -> list[Any]:
    """``[fn(learner, item) for item in items]`` without touching the caller's random generator."""
    with torch.random.fork_rng():
        return [fn(learner, item) for item in items]


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


def _to(tree: Tree, device: torch.device) -> Tree:
    if isinstance(tree, dict):
        return {name: _to(branch, device) for name, branch in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_to(branch, device) for branch in tree)
    return tree.to(device) if isinstance(tree, torch.Tensor) else tree


def _versions(tree: Tree) -> list[int]:
    # PyTorch counts the in-place writes to a tensor; reading the count costs nothing
    if isinstance(tree, dict | list | tuple):
        branches = tree.values() if isinstance(tree, dict) else tree
        return [version for branch in branches for version in _versions(branch)]
    return [tree._version] if isinstance(tree, torch.Tensor) else []
