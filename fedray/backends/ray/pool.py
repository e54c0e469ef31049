"""Work handed out to actors that may die: whoever is free gets the next share, and nothing is lost."""

import logging
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from fedray.algorithm import Make, Pool
from fedray.backends.ray.cluster import carry_users_modules, connected
from fedray.errors import ConfigError, FedrayError
from fedray.execution import ONE_BY_ONE

if TYPE_CHECKING:
    from fedray.backends.ray.backend import Resources

logger = logging.getLogger(__name__)

Start = Callable[[Any, list[Any]], list[ray.ObjectRef]]
Revive = Callable[[Any], ray.ObjectRef]

ATTEMPTS = 3  # how often one client may take its worker down before it is the client's fault


class Crash(str):
    """Why a share has no result: what it does to its worker, for a message."""


def hand_out(
    actors: Sequence[Any], revive: Revive, start: Start, shares: Sequence[list[Any]]
) -> Iterator[tuple[list[Any], Any, list[ray.ObjectRef]]]:
    """Hand the shares out and yield each with its result and further references, as they are done.

    A share whose worker dies is cut and handed out again, so that what kills workers is found; what cannot be
    cut and has taken down ``ATTEMPTS`` workers has a `Crash` for its result.
    """
    queue = deque((share, 1) for share in shares)
    idle = deque(actors)
    running: dict[ray.ObjectRef, tuple[Any, list[Any], int, list[ray.ObjectRef]]] = {}
    while queue or running:
        while queue and idle:
            worker, (share, attempt) = idle.popleft(), queue.popleft()
            first, *others = start(worker, share)
            running[first] = worker, share, attempt, others
        [first], _ = ray.wait(list(running), num_returns=1)
        worker, share, attempt, others = running.pop(first)
        try:
            value = ray.get(first)
        except (RayActorError, OutOfMemoryError, ObjectLostError) as error:
            if not share:  # it was restarting, and died again
                raise FedrayError(f"a worker cannot be restarted: {error}") from None
            running[revive(worker)] = worker, [], 0, []
            parts = _parts(share, attempt)
            queue.extend((part, attempt + 1) for part in parts)
            if parts:
                logger.warning("a worker died; the %d items that it had in hand are handed out again", len(share))
            else:
                yield share, Crash(f"took its worker down {attempt} times: {_first_line(error)}"), []
            continue
        idle.append(worker)
        if share:
            yield share, value, others


def stream(actors: Sequence[Any], make: Make, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """What `fedray.algorithm.Backend.stream` yields, from these workers."""
    made = ray.put((secrets.token_hex(8), ray.cloudpickle.dumps(make)))

    def start(actor: Any, share: list[int]) -> list[ray.ObjectRef]:
        return [actor.call.remote(made, items[share[0]])]

    def revive(actor: Any) -> ray.ObjectRef:
        return actor.release.options(max_task_retries=-1).remote()

    try:
        for [number], value, _ in hand_out(actors, revive, start, [[number] for number in range(len(items))]):
            if isinstance(value, Crash):
                raise FedrayError(f"item {number} of {len(items)} {value}")
            yield number, value
    except RayTaskError as error:  # what went wrong there is what is raised here
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, FedrayError) else error) from None
    finally:
        for actor in actors:
            actor.release.remote()


def alone(
    make: Make,
    items: Sequence[Any],
    pool: Pool | None,
    resources: "Resources",
    address: str,
    object_store_gb: float | None,
) -> Iterator[tuple[int, Any]]:
    """The same without an experiment, on a cluster of its own or another; without a pool, on all there is."""
    with connected(address, object_store_gb):
        carry_users_modules()
        whole = resources.resolve(ray.cluster_resources(), max(1, len(items)))
        assert isinstance(whole.num_workers, int)
        assert not isinstance(whole.num_gpus, str)
        pool = pool or Pool(whole.num_workers, whole.num_cpus, whole.num_gpus)
        with pool_of(pool, whole) as actors:
            yield from stream(actors, make, items)


@contextmanager
def pool_of(pool: Pool, resources: "Resources") -> Iterator[list[Any]]:
    """Actors of their own for a while.

    Raises:
        ConfigError: the cluster has no room for them beside the workers.
    """
    from fedray.backends.ray.backend import start_workers

    free = ray.available_resources()
    for name, each in (("CPU", pool.num_cpus), ("GPU", pool.num_gpus)):
        if each * pool.num_actors > free.get(name, 0.0) + 1e-6:
            raise ConfigError(
                f"{pool.num_actors} actors with {each:g} {name}s each do not fit beside the workers, who leave "
                f"{free.get(name, 0.0):g}; lower actors or backend.num_workers, or let the workers do it (actors=null)"
            )
    wanted = replace(
        resources, num_workers=pool.num_actors, num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, placement="spread"
    )
    actors = start_workers(wanted, ONE_BY_ONE)
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)


def _parts(share: list[Any], attempt: int) -> list[list[Any]]:
    """What to hand out again of a share that took its worker down; a group stays whole for as long as it may."""
    if len(share) > 1:
        return [share[: len(share) // 2], share[len(share) // 2 :]]
    if attempt < ATTEMPTS:
        return [share]
    [item] = share
    return [[[client]] for client in item] if isinstance(item, list) and len(item) > 1 else []


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
