"""Clients on a Ray cluster: resident worker actors, one message to and from each of them a round."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import cache
from itertools import cycle
from typing import Any

import ray

from fedray.aggregators import Aggregator
from fedray.algorithm import Client, ClientUpdate, Make, Metrics, Pool
from fedray.backends.ray.cluster import carry_users_modules
from fedray.backends.ray.crew import Crash, Crew, Done, free
from fedray.backends.ray.line import Line, standing
from fedray.backends.ray.pool import pool_of, stream
from fedray.backends.ray.resources import Resources, hired, nodes, start_workers
from fedray.backends.ray.tensors import travel_as_arrays
from fedray.backends.ray.worker_actor import Sent, send
from fedray.backends.worker import Costs, Failure, Job, Partial, Speeds, Unit, balance, learn, members, reduce, size_of
from fedray.client_states import ClientStates
from fedray.clock import Clock
from fedray.errors import FedrayError
from fedray.execution import ONE_BY_ONE, Execution
from fedray.groups import units
from fedray.learner import Learner, Task

_SMALL = 1 << 24  # bytes of a message to all workers, up to which it goes over a standing line
_INLINE = 100_000  # bytes, up to which Ray sends an argument along with the call
_TREE = 1 << 28  # bytes of accumulators, beyond which the workers merge them pair by pair, and the driver gets one
_LOOK = 5.0  # seconds between two looks at whether nodes have joined


class RayBackend:
    """Worker actors on the Ray cluster that this process is connected to.

    Workers come and go: one that dies is started again, on another node if need be, and meanwhile the others do its
    work. With ``num_workers: auto`` there are more of them as soon as nodes join.

    Args:
        task: What is learnt, or what `send` made of it; held in memory once a node.
        cohort: The size of a cohort, for choosing the number of workers.
        resources: What the workers reserve.
        execution: How clients are computed.
        actors: Those whom somebody else has `hired` already; None to hire them.

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
        self._asked, self._cohort, self._execution = resources, cohort, execution
        # held for as long as the workers live: one that is restarted asks for it again
        self._task = task if isinstance(task, list) else send(task)
        self._hired = ExitStack()
        if actors is None:
            fitting = resources.resolve(nodes(resources.labels), cohort)
            actors = self._hired.enter_context(hired(fitting, execution))
        self._crew = Crew(actors, self._welcome, resources.start_timeout)
        self._next_look = time.monotonic() + _LOOK
        self._group = execution.size
        self._costs, self._speeds = Costs(), Speeds()
        self.client_states = ClientStates()
        self.clock = Clock()
        self.dropped: list[Failure] = []
        self.line: Line | None = None
        self._may_have_line = True
        self.probe()

    def _welcome(self, worker: Any) -> ray.ObjectRef:
        # with retries this call waits until Ray has started the worker, wherever and whenever there is room
        return worker.ready.options(max_task_retries=-1).remote(self._task)

    def probe(self) -> list[dict[str, Any]]:
        """Where each worker is (node, process, GPUs, device), once it is up, or as many as are needed to begin."""
        asked, started = self._asked, len(self._crew)
        for worker in list(self._crew.up):
            self._crew.expect(worker)
        if not self._crew.gather(asked.min_workers or started):
            raise FedrayError(
                f"of {started} workers ({asked.num_cpus:g} CPUs, {asked.num_gpus} GPUs each) {len(self._crew.up)} "
                f"started within {asked.start_timeout:g} s; {free()}. Lower num_workers or what each reserves, set "
                "min_workers, or raise start_timeout"
            )
        return list(self._crew.up.values())

    @property
    def num_workers(self) -> int:
        """How many are up."""
        return len(self._crew.up)

    @property
    def deaths(self) -> int:
        """How often a worker has died."""
        return self._crew.deaths

    def _look_for_nodes(self) -> None:
        """With as many workers as fit, start those that have got room since."""
        if self._asked.num_workers != "auto" or self._asked.clients_per_worker != "auto":
            return
        if time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + _LOOK
        fitting = self._asked.resolve(nodes(self._asked.labels), self._cohort)
        assert isinstance(fitting.num_workers, int)
        for worker in start_workers(fitting.num_workers - len(self._crew), fitting, self._execution):
            self._crew.expect(worker)
            self._hired.callback(ray.kill, worker)

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
        asked, began = self._asked, time.perf_counter()
        limit = asked.client_timeout if metered else None  # the parts of an evaluation are no clients
        job = Job(client_update, aggregator, keeps_state, asked.on_client_error == "drop", limit)
        self._look_for_nodes()
        told = ray.cloudpickle.dumps(job)

        @cache
        def sent() -> tuple[Any, ray.ObjectRef]:
            with self.clock("broadcast"):  # once; Ray copies it to each node, not to each client
                return told if len(told) < _INLINE else ray.put(told), ray.put(broadcast)

        def start(worker: Any, share: list[Unit], attempt: int) -> list[ray.ObjectRef]:
            # states are values of their own among the results, so that they outlive the worker and can go to another
            states = [self.client_states.of(client) for client in members(share)] if keeps_state else []
            if attempt > 1:
                # those that were lost with a node are nobody's fault here: it is raised as it is
                ray.get([state for state in states if state is not None])
            call = worker.fold.options(num_returns=2 + len(states))
            return call.remote(self._task, *sent(), share, *states)

        def collect(refs: list[ray.ObjectRef]) -> tuple[Partial, Any, list[ray.ObjectRef]]:
            partial = ray.get(refs[0])
            if len(shares) > 3 and not aggregator.grows and partial.size * len(shares) > _TREE:
                return partial, None, refs[1:]
            with self.clock("merge"):
                return partial, ray.get(refs[1]), refs[1:]

        workers = list(self._crew)  # those who are still to come, too: until they do, the others take their shares
        cut = units(cohort, self._group if grouped else 1, self.client_states.has)
        dealt = balance(cut, len(workers), self._costs if metered else None, self._speeds.of(workers))
        shares = [share for share in dealt if share]
        whole, waiting = aggregator.zero(), list[ray.ObjectRef]()
        partials: list[Partial] = []
        kept: list[tuple[Client, ray.ObjectRef]] = []
        took: list[tuple[Any, Sequence[Unit], Sequence[float]]] = []
        busy = 0.0

        def call(shares: list[list[Unit]], attempt: int) -> Iterator[Done]:
            return self._crew.hand_out(start, shares, collect, limit, attempt)

        work = call(shares, 1) if keeps_state else self._work(shares, told, broadcast, call)
        for share, value, worker in work:
            if isinstance(value, Crash):
                partials.append(_lost(share, value))
                continue
            partial, accumulator, refs = value
            partials.append(partial)
            self.clock.add(partial.seconds)
            busy += sum(partial.seconds.values())
            took.append((worker, share, partial.took))
            kept += [pair for pair in zip(members(share), refs[1:], strict=False) if pair[0].slot in partial.keepers]
            if accumulator is None:
                waiting.append(refs[0])
                continue
            with self.clock("merge"):  # as they come: whoever is first does not wait for the others
                whole = aggregator.merge(whole, accumulator)
        if metered:
            learn(self._costs, self._speeds, took)
        with self.clock("merge"):
            for ref in self._merged(sent()[0], waiting) if waiting else ():
                whole = aggregator.merge(whole, ray.get(ref))
            result, metrics, failures = reduce(partials, whole, job, len(cohort))
        self.dropped += failures
        self.clock.add({"idle": len(workers) * (time.perf_counter() - began) - busy})
        self.client_states.stage(kept)
        return result, metrics

    def _work(
        self,
        shares: list[list[Unit]],
        told: bytes,
        broadcast: Any,
        call: Callable[[list[list[Unit]], int], Iterator[Done]],
    ) -> Iterator[Done]:
        """Each share with what came of it: over the standing line, or by calls, which bring what a worker died with."""
        line = self._line_for(size_of(broadcast) + len(told))
        if line is None:
            yield from call(shares, 1)
            return
        with self.clock("broadcast"):
            answers = line.ask((told, broadcast), shares)
        lost: list[list[Unit]] = []
        for place, answer in answers:
            share, worker = shares[place], line.workers[place]
            if answer is None:
                lost += self._crew.parts_of(share, worker)
                continue
            with self.clock("merge"):
                result = (*answer(), [])
            yield Done(share, result, worker)
        if lost:
            self._end_line()
            yield from call(lost, 2)

    def _line_for(self, size: int) -> Line | None:
        """The standing line to all workers for a message of so many bytes, if any; it is made at the first chance."""
        if self.line is not None and not (self.line.idle and self.line.workers == list(self._crew)):
            self._end_line()
        if not self._may_have_line or len(self._crew) * size > _SMALL:
            return None
        if self.line is None and self._crew.whole:
            self.line = standing(self._crew.up)
            self._may_have_line = self.line is not None
        return self.line

    def _end_line(self) -> None:
        if self.line is not None:
            self.line.close()
            self.line = None

    def _merged(self, job: Any, parts: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
        """The parts merged by the workers, pair by pair, to one at most."""
        while len(parts) > 1:
            pairs = zip(parts[::2], parts[1::2], strict=False)
            merged = [w.merge.remote(job, *pair) for w, pair in zip(cycle(self._crew.up), pairs, strict=False)]
            parts = merged + parts[len(parts) - len(parts) % 2 :]
        return parts

    def map(self, fn: Callable[[Learner, Any], Any], items: Sequence[Any]) -> list[Any]:
        """``[fn(learner, item) for item in items]``, each item wherever a worker is free."""

        def start(worker: Any, share: list[int], _attempt: int) -> list[ray.ObjectRef]:
            return [worker.map.remote(self._task, fn, [items[i] for i in share])]

        results: dict[int, Any] = {}
        for [i], value, _ in self._crew.hand_out(start, [[i] for i in range(len(items))]):
            if isinstance(value, Crash):
                raise FedrayError(f"item {i} of a map {value}")
            [results[i]] = value
        return [results[i] for i in range(len(items))]

    def stream(self, make: Make, items: Sequence[Any], pool: Pool | None = None) -> Iterator[tuple[int, Any]]:
        """Items to whoever is free, results as they come; see `fedray.algorithm.Backend`."""
        if pool is not None:
            with pool_of(pool, self._asked) as crew:
                yield from stream(crew, make, items)
        else:
            yield from stream(self._crew, make, items)

    def fetch(self, handle: Any) -> Any:
        """A client state, from its handle."""
        return ray.get(handle)

    def store(self, state: Any) -> Any:
        """A handle for a client state."""
        return ray.put(state)

    def close(self) -> None:
        """End the workers."""
        self._end_line()
        self._hired.close()


def _lost(share: list[Unit], crash: Crash) -> Partial:
    return Partial(None, tuple(Failure(client.id, client.round, f"it {crash}") for client in members(share)))
