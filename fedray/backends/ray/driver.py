"""The driver actor: it owns the server state and runs the training loop, wherever the submitting process is."""

import logging
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
import torch
from ray.exceptions import ObjectLostError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.backends import Stop
from fedray.backends.ray.backend import RayBackend
from fedray.backends.ray.cluster import carry_users_modules, connected
from fedray.backends.ray.crew import ATTEMPTS, first_line
from fedray.backends.ray.metrics import Meter
from fedray.backends.ray.resources import Resources, hired, nodes
from fedray.backends.ray.tensors import travel_as_arrays
from fedray.backends.ray.worker_actor import Sent, receive, send
from fedray.backends.worker import keep_freed_memory
from fedray.checkpoint import newest_round
from fedray.errors import FedrayError
from fedray.experiment import Experiment
from fedray.learner import Task
from fedray.report.read import read_metrics
from fedray.training import Record, train

logger = logging.getLogger(__name__)

_STOPS = 10.0  # seconds for the driver to say that it goes no further


class _Driver:
    def __init__(self, threads: int, folder: str) -> None:
        os.chdir(folder)  # so that relative paths mean what they mean to the command
        travel_as_arrays()
        keep_freed_memory()
        torch.set_num_threads(threads)
        self._stop = threading.Event()

    def run(
        self, experiment: Experiment, task: Sent, folder: str, resources: Resources, workers: list[Any]
    ) -> Iterator[Record | None]:
        experiment = replace(experiment, task=receive(task))
        backend = RayBackend(task, experiment.cohort, resources, experiment.execution, workers)
        meter, deaths = Meter(Path(folder).name), 0
        try:
            for record in train(experiment, Path(folder), backend, self._stop.is_set):
                meter.tell(record, backend.num_workers, backend.deaths - deaths)
                deaths = backend.deaths
                yield record
                if experiment.lockstep:
                    yield None  # is handed over, and the loop goes on, when the next record is asked for
                    if self._stop.is_set():
                        return
        finally:
            backend.close()

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
    """Run an experiment in a driver actor, and yield its records as they come.

    What the driver loses with its process, or with a node that held the states of clients, it goes on without: from
    the newest checkpoint.
    """
    with connected(address, object_store_gb):
        travel_as_arrays()
        carry_users_modules()
        fitting = resources.resolve(nodes(resources.labels), experiment.cohort, ray.available_resources())
        logger.info(
            "Ray: %s workers with %g CPUs and %g GPUs each", fitting.num_workers, fitting.num_cpus, fitting.num_gpus
        )
        task = send(experiment.task)
        with hired(fitting, experiment.execution) as workers:  # here, so that they come up beside the driver
            experiment = replace(experiment, task=cast(Task, None))  # it travels by reference; this process lets it go
            began, attempt = newest_round(folder), 1
            seen = began or -1
            while True:
                try:
                    with closing(_driven(experiment, task, folder, resources, workers, stop)) as records:
                        for record in records:
                            if record["round"] > seen + 1:  # the driver before kept some, and died
                                for earlier in read_metrics(folder / "metrics.jsonl"):
                                    if seen < earlier["round"] < record["round"]:
                                        yield earlier
                            if record["round"] > seen:
                                seen = record["round"]
                                yield record
                    return
                except (RayActorError, RayTaskError, ObjectLostError) as error:
                    lost = _lost(error)
                    if lost is None:
                        raise _cause(error) from None
                    reached = newest_round(folder)
                    attempt, began = (1 if reached > began else attempt + 1), reached
                    if attempt > ATTEMPTS:
                        what = f"{lost} {ATTEMPTS} times after round {began}: {first_line(error)}"
                        raise FedrayError(what) from None
                    logger.warning("%s; going on from the checkpoint of round %d", lost, reached)


def _driven(
    experiment: Experiment, task: Sent, folder: Path, resources: Resources, workers: list[Any], stop: Stop
) -> Generator[Record]:
    """What one driver actor reports; it is gone when this ends, so that another one can take its place."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(_Driver).options(num_cpus=0, max_concurrency=2, scheduling_strategy=here)
    driver = actor.remote(resources.threads, str(Path.cwd()))
    ahead = 1 if experiment.lockstep else -1  # results that may wait for being taken; -1: any number
    run = driver.run.options(num_returns="streaming", _generator_backpressure_num_objects=ahead)
    try:
        yield from _follow(run.remote(experiment, task, str(folder), resources, workers), driver, stop)
    finally:
        with suppress(RayError):
            ray.get(driver.stop.remote(), timeout=_STOPS)
        ray.kill(driver)  # it may be alive, even beyond our reach


def _follow(records: Any, driver: Any, stop: Stop) -> Iterator[Record]:
    told = False
    while True:
        ready, _ = ray.wait([records], timeout=0.2, fetch_local=False)
        if stop() and not told:
            driver.stop.remote()
            told = True
        if ready:
            try:
                record = next(records)
            except StopIteration:
                return
            if (taken := ray.get(record)) is not None:
                yield taken


def _lost(error: Exception) -> str | None:
    """What was lost that a checkpoint brings back; None if the error is another one."""
    if isinstance(error, RayActorError):
        return "the driver actor died"
    if isinstance(error, ObjectLostError) or isinstance(getattr(error, "cause", None), ObjectLostError):
        return "a node was lost, and with it what clients keep"
    return None


def _cause(error: Exception) -> BaseException:
    cause: Any = getattr(error, "cause", None)
    return cause if isinstance(cause, FedrayError) else FedrayError(str(error))
