"""The driver actor: it owns the server state and runs the training loop, wherever the submitting process is."""

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.backends import Stop
from fedray.backends.ray.backend import RayBackend, Resources, Sent, receive, send, start_workers
from fedray.backends.ray.cluster import carry_users_modules, connected
from fedray.backends.ray.tensors import travel_as_arrays
from fedray.errors import FedrayError
from fedray.experiment import Experiment
from fedray.learner import Task
from fedray.training import Record, train

logger = logging.getLogger(__name__)

_STOPS = 10.0  # seconds for the driver to say that it goes no further


class _Driver:
    def __init__(self, threads: int) -> None:
        travel_as_arrays()
        torch.set_num_threads(threads)
        self._stop = threading.Event()

    def run(
        self, experiment: Experiment, task: Sent, folder: str, resources: Resources, workers: list[Any]
    ) -> Iterator[Record | None]:
        experiment = replace(experiment, task=receive(task))
        backend = RayBackend(task, experiment.cohort, resources, experiment.execution, workers)
        logger.info("%d workers: %s", len(backend.workers), backend.workers)
        for record in train(experiment, Path(folder), backend, self._stop.is_set):
            yield record
            if experiment.lockstep:
                yield None  # is handed over, and the loop goes on, when the next record is asked for
                if self._stop.is_set():
                    return

    def stop(self) -> None:
        self._stop.set()


def drive(
    experiment: Experiment,
    folder: Path,
    stop: Stop,
    resources: Resources,
    address: str,
    object_store_gb: float | None,
) -> Iterator[Record]:
    """Run an experiment in a driver actor, and yield its records as they come."""
    with connected(address, object_store_gb):
        travel_as_arrays()
        carry_users_modules()
        resources = resources.resolve(ray.cluster_resources(), experiment.cohort)
        logger.info(
            "Ray: %s workers with %g CPUs and %g GPUs each",
            resources.num_workers,
            resources.num_cpus,
            resources.num_gpus,
        )
        task = send(experiment.task)
        workers = start_workers(resources, experiment.execution)  # here, so that they come up beside the driver
        experiment = replace(experiment, task=cast(Task, None))  # it travels by reference; this process lets go of it
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor: Any = ray.remote(_Driver).options(num_cpus=0, max_concurrency=2, scheduling_strategy=here)
        driver = actor.remote(resources.threads)
        ahead = 1 if experiment.lockstep else -1  # results that may wait for being taken; -1: any number
        run = driver.run.options(num_returns="streaming", _generator_backpressure_num_objects=ahead)
        records = run.remote(experiment, task, str(folder), resources, workers)
        told = False
        try:
            while True:
                ready, _ = ray.wait([records], timeout=0.2, fetch_local=False)
                if stop() and not told:
                    driver.stop.remote()
                    told = True
                if ready and (record := ray.get(next(records))) is not None:
                    yield record
        except StopIteration:
            return
        except RayTaskError as error:
            raise _cause(error) from None
        except RayActorError as error:
            raise FedrayError(f"the driver actor died: {' '.join(str(error).split())}") from None
        finally:  # whoever closes this generator may start another in its place
            with suppress(RayError):
                ray.get(driver.stop.remote(), timeout=_STOPS)
            for actor in (driver, *workers):
                ray.kill(actor)


def _cause(error: RayTaskError) -> BaseException:
    cause: Any = getattr(error, "cause", None)
    return cause if isinstance(cause, FedrayError) else FedrayError(str(error))
