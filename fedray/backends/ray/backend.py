"""Clients on a Ray cluster: resident worker actors, one message to and from each of them a round."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, Literal

import ray
import torch
from ray.exceptions import GetTimeoutError
from ray.util import get_current_placement_group

from fedray.aggregators import Aggregator
from fedray.algorithm import Client, ClientUpdate, Make, Metrics, Pool
from fedray.backends.ray.cluster import carry_users_modules
from fedray.backends.ray.pool import Crash, hand_out, pool_of, stream
from fedray.backends.ray.tensors import travel_as_arrays
from fedray.backends.worker import (
    Costs,
    Failure,
    Job,
    Partial,
    Unit,
    balance,
    fold,
    keep_freed_memory,
    map_items,
    members,
    reduce,
)
from fedray.client_states import ClientStates
from fedray.clock import Clock
from fedray.errors import ConfigError, FedrayError
from fedray.execution import ONE_BY_ONE, Execution
from fedray.groups import units
from fedray.learner import Learner, Task
from fedray.models import hugging_face

logger = logging.getLogger(__name__)

Sent = list[ray.ObjectRef]  # in a list, Ray hands over the references instead of what they stand for

_INLINE = 100_000  # bytes, up to which Ray sends an argument along with the call
_TREE = 1 << 28  # bytes of accumulators, beyond which the workers merge them pair by pair, and the driver gets one


@dataclass(frozen=True)
class Resources:
    """What the workers of a run reserve; see `fedray.backends.on_ray` for each."""

    num_workers: int | Literal["auto"] = "auto"
    clients_per_worker: int | Literal["auto"] = "auto"
    num_cpus: float = 1.0
    num_gpus: float | Literal["auto"] = "auto"
    placement: Literal["pack", "spread"] = "pack"
    device: str = "auto"
    threads: int = 1
    on_client_error: Literal["raise", "drop"] = "raise"
    start_timeout: float = 120.0

    def resolve(self, cluster: dict[str, float], cohort: int) -> "Resources":
        """The same with every ``auto`` replaced, for a cluster's total resources and the size of a cohort."""
        gpus, cpus = cluster.get("GPU", 0.0), cluster.get("CPU", 0.0)
        each = (1.0 if gpus else 0.0) if self.num_gpus == "auto" else float(self.num_gpus)
        room = int(min(gpus / each if each else float("inf"), cpus / self.num_cpus))
        if self.clients_per_worker != "auto":
            count = -(-cohort // self.clients_per_worker)
        elif self.num_workers != "auto":
            count = self.num_workers
        else:
            count = min(max(room, 1), cohort)
        if count > room:
            raise ConfigError(
                f"backend: {count} workers with {self.num_cpus:g} CPUs and {each:g} GPUs each do not fit into the "
                f"cluster's {cpus:g} CPUs and {gpus:g} GPUs; lower num_workers (at most {room}), num_cpus or num_gpus"
            )
        return replace(self, num_workers=count, clients_per_worker="auto", num_gpus=each)


def send(task: Task) -> Sent:
    """Put a task, and the pre-trained models that this process holds, into shared memory: once for every node."""
    held = hugging_face.held()
    return [ray.put(task), *([ray.put(held)] if held else [])]


def receive(sent: Sent) -> Task:
    """The task; pre-trained models that it asks for are those in shared memory from now on."""
    task, *held = ray.get(sent)
    for models in held:
        hugging_face.hold(models)
    return task


class _Worker:
    """An actor: one learner, and no other state, so that it can die and be replaced at any time."""

    def __init__(self, device: str, threads: int, execution: Execution) -> None:
        travel_as_arrays()
        keep_freed_memory()
        torch.set_num_threads(threads)
        self._device, self._execution = device, execution
        self._learner: Learner | None = None
        self._job: tuple[bytes, Job] | None = None
        self._made: tuple[str, Callable[[Any], Any]] | None = None

    def ready(self, task: Sent) -> dict[str, Any]:
        node, device = ray.get_runtime_context().get_node_id(), str(self._learn(task).device)
        return {"node": node, "pid": os.getpid(), "gpus": ray.get_gpu_ids(), "device": device}

    def fold(self, task: Sent, job: bytes, broadcast: Any, share: list[Unit], *states: Any) -> tuple[Any, ...]:
        if states:
            held = iter(states)
            share = [[replace(client, state=next(held)) for client in unit] for unit in share]
        partial, accumulator, kept = fold(self._learn(task), self._loaded(job), broadcast, share)
        kept += [None] * (len(states) - len(kept))
        return partial, accumulator, *kept[: len(states)]

    def merge(self, job: bytes, left: Any, right: Any) -> Any:
        return self._loaded(job).aggregator.merge(left, right)

    def map(self, task: Sent, fn: Callable[[Learner, Any], Any], items: list[Any]) -> list[Any]:
        return map_items(self._learn(task), fn, items)

    def call(self, made: tuple[str, bytes], item: Any) -> Any:
        if self._made is None or self._made[0] != made[0]:
            self._made = None  # one heavy thing at a time
            device = ("cuda" if torch.cuda.is_available() else "cpu") if self._device == "auto" else self._device
            self._made = made[0], ray.cloudpickle.loads(made[1])(device)
        with torch.random.fork_rng():
            return self._made[1](item)

    def release(self) -> None:
        self._made = None

    def _loaded(self, job: bytes) -> Job:
        if self._job is None or self._job[0] != job:  # mostly, a round has the job of the round before
            self._job = job, ray.cloudpickle.loads(job)
        return self._job[1]

    def _learn(self, task: Sent) -> Learner:
        # not the constructor's work: Ray would have to keep a constructor's arguments for a restart
        if self._learner is None:
            self._learner = Learner(receive(task), self._device, self._execution)
        return self._learner


def start_workers(resources: Resources, execution: Execution) -> list[Any]:
    """Worker actors with resources that are resolved; they come up while the caller goes on.

    Within a placement group, such as that of a Tune trial, they take what is reserved there.
    """
    strategy = "SPREAD" if resources.placement == "spread" else "DEFAULT"
    actor: Any = ray.remote(_Worker).options(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        scheduling_strategy=strategy if get_current_placement_group() is None else None,
        max_restarts=-1,
    )
    assert isinstance(resources.num_workers, int)
    return [actor.remote(resources.device, resources.threads, execution) for _ in range(resources.num_workers)]


class RayBackend:
    """Worker actors on the Ray cluster that this process is connected to.

    Args:
        task: What is learnt, or what `send` made of it; held in memory once a node.
        cohort: The size of a cohort, for choosing the number of workers.
        resources: What the workers reserve.
        execution: How clients are computed.
        actors: What `start_workers` made of the same resources; None to start them.

    Raises:
        ConfigError: the workers do not fit into the cluster.
        FedrayError: the workers did not come up in time.
    """

    def __init__(
        self,
        task: "Task | Sent",
        cohort: int,
        resources: Resources = Resources(),
        execution: Execution = ONE_BY_ONE,
        actors: list[Any] | None = None,
    ) -> None:
        travel_as_arrays()
        carry_users_modules()
        self.resources = resources = resources.resolve(ray.cluster_resources(), cohort)
        # held for as long as the workers live: one that is restarted asks for it again
        self._task = task if isinstance(task, list) else send(task)
        self._workers = start_workers(resources, execution) if actors is None else actors
        self._group = execution.size
        self._drop = resources.on_client_error == "drop"
        self._costs = Costs()
        self.client_states = ClientStates()
        self.clock = Clock()
        self.workers = self.probe()

    def probe(self) -> list[dict[str, Any]]:
        """Where each worker is (node, process, GPUs, device), once it is up."""
        asked = self.resources
        try:
            return ray.get(
                [worker.ready.options(max_task_retries=-1).remote(self._task) for worker in self._workers],
                timeout=asked.start_timeout,
            )
        except GetTimeoutError:
            raise FedrayError(
                f"{asked.num_workers} workers ({asked.num_cpus:g} CPUs, {asked.num_gpus:g} GPUs each) did not start "
                f"within {asked.start_timeout:g} s; the cluster has {_short(ray.cluster_resources())}, of which free: "
                f"{_short(ray.available_resources())}. Lower num_workers or what each reserves, or raise start_timeout"
            ) from None

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
        began = time.perf_counter()
        with self.clock("broadcast"):
            sent = ray.put(broadcast)  # once; Ray copies it to each node, not to each client
            told: Any = ray.cloudpickle.dumps(job)
            told = told if len(told) < _INLINE else ray.put(told)

        def start(worker: Any, share: list[Unit]) -> list[ray.ObjectRef]:
            # states are values of their own among the results, so that they outlive the worker and can go to another
            states = [self.client_states.of(client) for client in members(share)] if keeps_state else []
            call = worker.fold.options(num_returns=2 + len(states))
            return call.remote(self._task, told, sent, share, *states)

        costs = self._costs if metered else None  # the parts of an evaluation are no clients
        cut = units(cohort, self._group if grouped else 1, self.client_states.has)
        shares = [share for share in balance(cut, len(self._workers), costs) if share]
        whole, waiting = aggregator.zero(), list[ray.ObjectRef]()
        partials: list[Partial] = []
        kept: list[tuple[Client, ray.ObjectRef]] = []
        busy = 0.0
        for share, partial, refs in hand_out(self._workers, self._revive, start, shares):
            if isinstance(partial, Crash):
                partials.append(_lost(share, partial))
                continue
            partials.append(partial)
            self.clock.add(partial.seconds)
            busy += sum(partial.seconds.values())
            if costs is not None:
                for unit, seconds in zip(share, partial.took, strict=False):
                    costs.learn(unit, seconds)
            kept += [pair for pair in zip(members(share), refs[1:], strict=False) if pair[0].slot in partial.keepers]
            if len(shares) > 3 and not aggregator.grows and partial.size * len(shares) > _TREE:
                waiting.append(refs[0])
                continue
            with self.clock("merge"):  # as they come: whoever is first does not wait for the others
                whole = aggregator.merge(whole, ray.get(refs[0]))
        with self.clock("merge"):
            for ref in self._merged(told, waiting):
                whole = aggregator.merge(whole, ray.get(ref))
            result = reduce(partials, whole, job, len(cohort))
        self.clock.add({"idle": len(self._workers) * (time.perf_counter() - began) - busy})
        self.client_states.stage(kept)
        return result

    def _merged(self, job: Any, parts: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
        """The parts merged by the workers, pair by pair, to one at most."""
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            merged = [w.merge.remote(job, *pair) for w, pair in zip(cycle(self._workers), pairs, strict=False)]
            parts = merged + parts[len(parts) - len(parts) % 2 :]
        return parts

    def map(self, fn: Callable[[Learner, Any], Any], items: Sequence[Any]) -> list[Any]:
        """``[fn(learner, item) for item in items]``, each item wherever a worker is free."""

        def start(worker: Any, share: list[int]) -> list[ray.ObjectRef]:
            return [worker.map.remote(self._task, fn, [items[i] for i in share])]

        results: dict[int, Any] = {}
        for [i], value, _ in hand_out(self._workers, self._revive, start, [[i] for i in range(len(items))]):
            if isinstance(value, Crash):
                raise FedrayError(f"item {i} of a map {value}")
            [results[i]] = value
        return [results[i] for i in range(len(items))]

    def stream(self, make: Make, items: Sequence[Any], pool: Pool | None = None) -> Iterator[tuple[int, Any]]:
        """Items to whoever is free, results as they come; see `fedray.algorithm.Backend`."""
        if pool is not None:
            with pool_of(pool, self.resources) as actors:
                yield from stream(actors, make, items)
        else:
            yield from stream(self._workers, make, items)

    def fetch(self, handle: Any) -> Any:
        """A client state, from its handle."""
        return ray.get(handle)

    def store(self, state: Any) -> Any:
        """A handle for a client state."""
        return ray.put(state)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            ray.kill(worker)

    def _revive(self, worker: Any) -> ray.ObjectRef:
        # with retries this call waits until Ray has restarted the worker
        return worker.ready.options(max_task_retries=-1).remote(self._task)


def _lost(share: list[Unit], crash: Crash) -> Partial:
    return Partial(None, tuple(Failure(client.id, client.round, f"it {crash}") for client in members(share)))


def _short(resources: dict[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
