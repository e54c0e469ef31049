"""The actor that stands for many clients."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
import torch

from fedray.backends.ray.line import serve
from fedray.backends.ray.tensors import travel_as_arrays
from fedray.backends.worker import Job, Partial, Unit, fold, keep_freed_memory, map_items
from fedray.execution import Execution
from fedray.hardware import device_of
from fedray.learner import Learner, Task
from fedray.models import hugging_face

Sent = list[ray.ObjectRef]  # in a list, Ray hands over the references instead of what they stand for


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


class WorkerActor:
    """One learner, and no other state, so that it can die and be replaced at any time."""

    def __init__(self, device: str, threads: int, execution: Execution) -> None:
        travel_as_arrays()
        keep_freed_memory()
        torch.set_num_threads(threads)
        self._device, self._threads, self._execution = device, threads, execution
        self._busy = threading.Lock()  # there is one scratch model, and a standing line has a thread of its own
        self._learner: Learner | None = None
        self._job: tuple[bytes, Job] | None = None
        self._made: tuple[str, Callable[[Any], Any]] | None = None

    def ready(self, task: Sent) -> dict[str, Any]:
        """Where this worker is: node, process, GPUs, device."""
        node, device = ray.get_runtime_context().get_node_id(), str(self._learn(task).device)
        return {"node": node, "pid": os.getpid(), "gpus": ray.get_gpu_ids(), "device": device}

    def fold(self, task: Sent, job: bytes, broadcast: Any, share: list[Unit], *states: Any) -> tuple[Any, ...]:
        """A share of a cohort, with the states of its clients if they keep any; see `fedray.backends.worker.fold`."""
        if states:
            held = iter(states)
            share = [[replace(client, state=next(held)) for client in unit] for unit in share]
        with self._busy:
            partial, accumulator, kept = fold(self._learn(task), self._loaded(job), broadcast, share)
        kept += [None] * (len(states) - len(kept))
        return partial, accumulator, *kept[: len(states)]

    def join(self, address: str, place: int) -> None:
        """Be on a standing line (`fedray.backends.ray.line`), too: it asks for what `fold` does without states."""
        learner = self._learner
        assert learner is not None  # only those who are up are asked to join

        def answer(common: tuple[bytes, Any], share: list[Unit]) -> tuple[Partial, Any]:
            torch.set_num_threads(self._threads)  # of this thread
            job, broadcast = common
            with self._busy:
                partial, accumulator, _ = fold(learner, self._loaded(job), broadcast, share)
            return partial, accumulator

        serve(address, place, answer)

    def merge(self, job: bytes, left: Any, right: Any) -> Any:
        """Two accumulators as one."""
        return self._loaded(job).aggregator.merge(left, right)

    def map(self, task: Sent, fn: Callable[[Learner, Any], Any], items: list[Any]) -> list[Any]:
        """``fn`` of the learner and each item."""
        with self._busy:
            return map_items(self._learn(task), fn, items)

    def call(self, made: tuple[str, bytes], item: Any) -> Any:
        """What the function that was made returns for an item; it is made at the first call, and stays."""
        if self._made is None or self._made[0] != made[0]:
            self._made = None  # one heavy thing at a time
            self._made = made[0], ray.cloudpickle.loads(made[1])(str(device_of(self._device)))
        with torch.random.fork_rng():
            return self._made[1](item)

    def release(self) -> None:
        """Let go of what was made."""
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
