"""Clients on a Ray cluster: the only part of fedray that imports ray, and only when it is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedray.execution import ONE_BY_ONE, Execution

if TYPE_CHECKING:
    from fedray.backends.ray.backend import RayBackend
    from fedray.learner import Task


@contextmanager
def workers(
    task: "Task",
    cohort: int,
    address: str = "local",
    object_store_gb: float | None = None,
    execution: Execution = ONE_BY_ONE,
    **resources: Any,
) -> Iterator["RayBackend"]:
    """A Ray backend for one's own script, for a while.

    Args:
        task: What is learnt.
        cohort: The size of a cohort, for choosing the number of workers.
        address: An existing cluster, or ``local`` for one of our own.
        object_store_gb: Size of a local cluster's shared memory; None for Ray's default.
        execution: How clients are computed.
        resources: Fields of `fedray.backends.ray.resources.Resources`.
    """
    from fedray.backends.ray.environment import prepare

    prepare(address)  # before anything imports ray
    from fedray.backends.ray.backend import RayBackend
    from fedray.backends.ray.cluster import connected
    from fedray.backends.ray.resources import Resources

    with connected(address, object_store_gb):
        backend = RayBackend(task, cohort, Resources(**resources), execution)
        try:
            yield backend
        finally:
            backend.close()
