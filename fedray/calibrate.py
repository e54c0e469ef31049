"""Which way of computing clients is the fastest on this machine: measured here, and proposed, never chosen.

A timing must not change the bytes of a run, so a run reads its settings from its configuration; this finds the
settings that are worth writing there.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedray import groups
from fedray.backends.serial import SerialBackend
from fedray.backends.worker import keep_freed_memory
from fedray.execution import Execution
from fedray.experiment import Experiment, plan
from fedray.hardware import device_of
from fedray.learner import Learner
from fedray.rounds import clients, draw

_GROUPS = (4, 8, 16, 32)
_MOST = 64  # clients of a timed round
_REPEATS = 5
_WORTH = 0.97  # of the configured time, above which nothing else is proposed


@dataclass(frozen=True)
class Timing:
    """What a way of computing clients takes.

    Attributes:
        execution: The way.
        settings: It as ``key=value``.
        seconds: Of one worker for one client: the median over rounds.
        first: Seconds of the first round, with whatever is made only once.
    """

    execution: Execution
    settings: str
    seconds: float
    first: float


@dataclass(frozen=True)
class Calibration:
    """Timings of all ways, fastest first, and the one that is configured."""

    timings: tuple[Timing, ...]
    configured: Timing

    @property
    def proposal(self) -> Timing:
        """The fastest way; the configured one if that is about as fast."""
        fastest = self.timings[0]
        return fastest if fastest.seconds < _WORTH * self.configured.seconds else self.configured

    def table(self) -> str:
        """The timings, a line each."""
        width = max(len(timing.settings) for timing in self.timings)
        lines = [f"{'':{width}}  ms a client  first round, s"]
        for timing in self.timings:
            mark = "  as configured" if timing == self.configured else ""
            lines.append(f"{timing.settings:{width}}  {1e3 * timing.seconds:11.2f}  {timing.first:14.1f}{mark}")
        return "\n".join(lines)


def calibrate(values: Mapping[str, Any], tell: Callable[[str], None] = lambda _: None) -> Calibration:
    """Time one worker on a configuration's clients, in every way that its task allows.

    Args:
        values: The configuration.
        tell: Told what is about to be timed.
    """
    made = plan(values).experiment
    options = values.get("backend")
    device = options.get("device", "auto") if isinstance(options, Mapping) else "auto"
    threads = options.get("threads", 1) if isinstance(options, Mapping) else 1
    keep_freed_memory()
    found: list[tuple[Execution, Callable[[], float], float]] = []
    for way in _ways(made, device):
        tell(_written(way))
        a_round = _round(made, SerialBackend(made.task, 1, device, threads, execution=way))
        found.append((way, a_round, a_round()))
    taken: dict[Execution, list[float]] = {way: [] for way, _, _ in found}
    count = min(made.cohort, _MOST)
    for _ in range(_REPEATS):  # in turn, so that what else the machine does meets all of them
        for way, a_round, _ in found:
            taken[way].append(a_round() / count)
    timings = [Timing(way, _written(way), statistics.median(taken[way]), first) for way, _, first in found]
    return Calibration(tuple(sorted(timings, key=lambda timing: timing.seconds)), timings[0])


def _ways(made: Experiment, device: str) -> Iterator[Execution]:
    """The configured way first, then what else the task allows."""
    learner = Learner(made.task, "cpu")
    ways = [made.execution.with_format(learner.model, str(device_of(device)))]
    sizes = [1]
    if groups.obstacle(learner.task, learner.task.model()) is None:
        sizes += [size for size in _GROUPS if size <= -(-made.cohort // 2)]
    convolves = any(isinstance(module, torch.nn.Conv2d) for module in learner.model.modules())
    for size in sizes:
        for compiles in (False, True):
            if compiles and (size > 1 or groups.dependence(learner.task, learner.model) is not None):
                continue
            ways += [Execution(size, compiles, last) for last in ((False, True) if convolves else (False,))]
    yield from dict.fromkeys(ways)


def _round(made: Experiment, backend: SerialBackend) -> Callable[[], float]:
    """A function that trains the first cohort and returns the seconds it took."""
    selection = draw(made.population, made.cohort, made.sampler, made.seed, 1)
    members = clients(replace(selection, clients=selection.clients[:_MOST]), made.population, made.seed, 1)
    state = made.algorithm.init({name: p.cpu() for name, p in Learner(made.task, "cpu").params().items()})

    def a_round() -> float:
        began = time.perf_counter()
        made.algorithm.apply(state, members, backend)
        backend.client_states.discard()
        return time.perf_counter() - began

    return a_round


def _written(way: Execution) -> str:
    return f"group={way.group} compile={str(way.compile).lower()} channels_last={str(way.channels_last).lower()}"
