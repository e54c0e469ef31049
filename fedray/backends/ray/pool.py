"""Server-side work in actors that hold something heavy, such as a generator, for as long as there are items."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayTaskError

from fedray.algorithm import Make, Pool
from fedray.backends.ray.cluster import carry_users_modules, connected
from fedray.backends.ray.crew import Crash, Crew
from fedray.backends.ray.resources import Resources, hired, nodes
from fedray.errors import ConfigError, FedrayError
from fedray.execution import ONE_BY_ONE


def stream(crew: Crew, make: Make, items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """What `fedray.algorithm.Backend.stream` yields, from these workers."""
    made = ray.put((secrets.token_hex(8), ray.cloudpickle.dumps(make)))

    def start(actor: Any, share: list[int], _attempt: int) -> list[ray.ObjectRef]:
        return [actor.call.remote(made, items[share[0]])]

    try:
        for [number], value, _ in crew.hand_out(start, [[number] for number in range(len(items))]):
            if isinstance(value, Crash):
                raise FedrayError(f"item {number} of {len(items)} {value}")
            yield number, value
    except RayTaskError as error:  # what went wrong there is what is raised here
        cause = getattr(error, "cause", None)
        raise (cause if isinstance(cause, FedrayError) else error) from None
    finally:
        for actor in crew.up:
            actor.release.remote()


def alone(
    make: Make,
    items: Sequence[Any],
    pool: Pool | None,
    resources: Resources,
    address: str,
    object_store_gb: float | None,
) -> Iterator[tuple[int, Any]]:
    """The same without an experiment, on a cluster of its own or another; without a pool, on all there is."""
    with connected(address, object_store_gb):
        carry_users_modules()
        whole = resources.resolve(nodes(resources.labels), max(1, len(items)), ray.available_resources())
        assert isinstance(whole.num_workers, int)
        assert not isinstance(whole.num_gpus, str)
        pool = pool or Pool(whole.num_workers, whole.num_cpus, whole.num_gpus)
        with pool_of(pool, whole) as crew:
            yield from stream(crew, make, items)


@contextmanager
def pool_of(pool: Pool, resources: Resources) -> Iterator[Crew]:
    """Actors of their own for a while.

    Raises:
        ConfigError: the cluster has no room for them beside the workers.
    """
    left = ray.available_resources()
    for name, each in (("CPU", pool.num_cpus), ("GPU", pool.num_gpus)):
        if each * pool.num_actors > left.get(name, 0.0) + 1e-6:
            raise ConfigError(
                f"{pool.num_actors} actors with {each:g} {name}s each do not fit beside the workers, who leave "
                f"{left.get(name, 0.0):g}; lower actors or backend.num_workers, or let the workers do it (actors=null)"
            )
    wanted = replace(
        resources, num_workers=pool.num_actors, num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, placement="spread"
    )
    with hired(wanted, ONE_BY_ONE) as actors:
        yield Crew(actors, lambda actor: actor.release.options(max_task_retries=-1).remote(), wanted.start_timeout)
