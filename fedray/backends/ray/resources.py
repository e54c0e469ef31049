"""What workers reserve, how many fit where, and hiring them for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
from ray.util.placement_group import get_current_placement_group, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedray.backends.ray.worker_actor import WorkerActor
from fedray.errors import ConfigError
from fedray.execution import Execution


@dataclass(frozen=True)
class Resources:
    """What the workers of a run reserve; see `fedray.backends.on_ray` for each."""

    num_workers: int | Literal["auto"] = "auto"
    clients_per_worker: int | Literal["auto"] = "auto"
    min_workers: int | None = None
    num_cpus: float = 1.0
    num_gpus: float | Literal["auto"] = "auto"
    labels: tuple[str, ...] = ()
    placement: Literal["pack", "spread"] = "pack"
    device: str = "auto"
    threads: int = 1
    on_client_error: Literal["raise", "drop"] = "raise"
    client_timeout: float | None = None
    start_timeout: float = 120.0

    def resolve(
        self, nodes: Sequence[dict[str, float]], cohort: int, free: dict[str, float] | None = None
    ) -> "Resources":
        """The same with every ``auto`` replaced, for the resources of a cluster's nodes and the size of a cohort.

        With ``free``, ``auto`` does not count on what others (a job's driver, too) hold of the cluster.
        """
        gpus, cpus = (sum(node.get(name, 0.0) for node in nodes) for name in ("GPU", "CPU"))
        each = (1.0 if gpus else 0.0) if self.num_gpus == "auto" else float(self.num_gpus)
        room = sum(_room(node, self.num_cpus, each) for node in nodes)
        if self.clients_per_worker != "auto":
            count = -(-cohort // self.clients_per_worker)
        elif self.num_workers != "auto":
            count = self.num_workers
        else:
            now = room if free is None else min(room, _room(free, self.num_cpus, each))
            count = min(max(now, self.min_workers or 1), cohort)
        if count > room and self.min_workers is None:
            where = f"nodes with {', '.join(self.labels)} and their" if self.labels else "cluster's"
            raise ConfigError(
                f"backend: {count} workers with {self.num_cpus:g} CPUs and {each:g} GPUs each do not fit into the "
                f"{where} {cpus:g} CPUs and {gpus:g} GPUs; lower num_workers (at most {room}), num_cpus or num_gpus, "
                "or set min_workers to begin with fewer and let the others join when nodes do"
            )
        return replace(self, num_workers=count, clients_per_worker="auto", num_gpus=each)


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    each = [(cpus, node.get("CPU", 0.0)), (gpus, node.get("GPU", 0.0))]
    return int(min(has / wants + 1e-6 for wants, has in each if wants))


def nodes(labels: Sequence[str]) -> list[dict[str, float]]:
    """The resources of each node that is alive and has all of these labels (``key=value``)."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    wanted = _selector(labels).items()
    return [node["Resources"] for node in alive if wanted <= node.get("Labels", {}).items()]


def _selector(labels: Sequence[str]) -> dict[str, str]:
    return {key: value for key, _, value in (label.partition("=") for label in labels)}


def start_workers(count: int, resources: Resources, execution: Execution, strategy: Any = None) -> list[Any]:
    """So many worker actors with resources that are resolved; they come up while the caller goes on.

    Within a placement group, such as that of a Tune trial, they take what is reserved there.
    """
    if strategy is None and get_current_placement_group() is None:
        strategy = "SPREAD" if resources.placement == "spread" else "DEFAULT"
    actor: Any = ray.remote(WorkerActor).options(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        label_selector=_selector(resources.labels),
        scheduling_strategy=strategy,
        max_restarts=-1,
    )
    return [actor.remote(resources.device, resources.threads, execution) for _ in range(count)]


@contextmanager
def hired(resources: Resources, execution: Execution) -> Iterator[list[Any]]:
    """The worker actors of resources that are resolved, for a while.

    To be packed they need a placement group: Ray by itself fills a node to the half only before it goes on to the next.
    Within somebody else's group, such as a Tune trial's, they stay in that.
    """
    assert isinstance(resources.num_workers, int)
    bundle = {"CPU": resources.num_cpus, "GPU": float(resources.num_gpus)}
    packed = (
        resources.placement == "pack"
        and resources.min_workers is None
        and get_current_placement_group() is None
        and len(nodes(())) > 1
    )
    group = strategy = None
    if packed:
        bundles = [{name: amount for name, amount in bundle.items() if amount}] * resources.num_workers
        selectors = [_selector(resources.labels)] * resources.num_workers if resources.labels else None
        group = placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)
        strategy = PlacementGroupSchedulingStrategy(group)
    actors = start_workers(resources.num_workers, resources, execution, strategy)
    try:
        yield actors
    finally:
        for actor in actors:
            ray.kill(actor)
        if group is not None:
            remove_placement_group(group)
