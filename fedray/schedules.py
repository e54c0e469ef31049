"""Virtual time: who delivers an update in which round, when, and from which model; by events, not by the wall clock.

How long a client takes depends on its device, its examples and the bytes that it moves, never on what is learnt. So the
whole course of events is a function of the configuration and the seed: a run that is resumed, or computed elsewhere,
meets the same.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from fedray.devices import Devices, DevicesBuilder, uniform
from fedray.rounds import Sampler, Select
from fedray.samplers import Population, Selection
from fedray.seeds import seed_for

_TRIES = 1000  # of a round in which nobody is done in time


@dataclass(frozen=True)
class Scene:
    """What a schedule starts from.

    Attributes:
        population: Whom cohorts are drawn from.
        cohort: Updates that make a round.
        sampler: How clients are drawn.
        seed: The run's.
        payload: Bytes of the params that are trained.
        asynchronous: Whether the algorithm knows about staleness.
    """

    population: Population
    cohort: int
    sampler: Sampler
    seed: int
    payload: int
    asynchronous: bool = False


@dataclass(frozen=True)
class Timing:
    """What takes time.

    Args:
        devices: What clients compute and send with.
        passes: Passes over a client's examples in a round; the algorithm's local_epochs.
        bytes_up: What a client sends in a round; null for the size of the trained params.
        bytes_down: What a client receives in a round; null for the size of the trained params.
    """

    devices: DevicesBuilder = uniform
    passes: float = 1.0
    bytes_up: int | None = None
    bytes_down: int | None = None

    def __post_init__(self) -> None:
        if not self.passes >= 0:
            raise ValueError(f"passes is {self.passes}; it must be >= 0")
        for name, value in (("bytes_up", self.bytes_up), ("bytes_down", self.bytes_down)):
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be >= 0")


Schedule = Callable[[Scene], Select]


def synchronous(scene: Scene, /, *, timing: Timing, deadline: float | None = None, over_select: float = 1.0) -> Select:
    """A round ends when its cohort is complete, or at a deadline; whoever is late, or leaves, is dropped.

    With more clients selected than needed, the first to be done make the cohort (Bonawitz et al., 2019, section 9:
    130 % are selected).

    Args:
        scene: The run.
        timing: What takes time.
        deadline: Virtual seconds after which a round goes on with whoever is done; null for none.
        over_select: Clients selected for each that is needed.
    """
    if deadline is not None and not deadline > 0:
        raise ValueError(f"deadline is {deadline}; it must be > 0, or null for none")
    if not 1 <= over_select < math.inf:
        raise ValueError(f"over_select is {over_select}; it must be >= 1")
    world = _World.of(scene, timing)
    wanted = math.ceil(round(over_select * scene.cohort, 9))  # so that 1.1 * 10 is not 12
    limit = math.inf if deadline is None else deadline

    def round_at(now: float, number: int) -> Selection:
        began, dropped, late, left = now, list[int](), 0, 0
        for attempt in range(_TRIES):
            there = world.devices.there(now)
            if not len(there):
                now = world.devices.next_arrival(now)
                continue
            drawn = world.draw(there, wanted, number, attempt)
            ids = np.array(drawn.clients)
            ends, leaves = now + world.durations[ids], world.devices.leave(ids, now)
            stays, in_time = ends <= leaves, ends - now <= limit
            first = sorted(np.flatnonzero(stays & in_time), key=lambda place: (ends[place], place))[: scene.cohort]
            counted = np.zeros(len(ids), dtype=bool)
            counted[first] = True
            late, left = late + int((stays & ~counted).sum()), left + int((~stays).sum())
            dropped += [*ids[~counted].tolist(), *drawn.dropped]
            complete = len(first) == min(scene.cohort, len(ids))
            # somebody who leaves is missed at once, somebody who is late at the deadline
            over = ends[first].max() if complete else min(now + limit, np.where(stays, ends, leaves).max())
            if counted.any():
                chosen = tuple(ids[counted].tolist())
                told = {"clients_late": late, "clients_left": left}
                return Selection(chosen, tuple(dropped), finished=float(over), told=told, traffic=world.traffic)
            now = float(over)
        raise ValueError(
            f"deadline is {deadline}; from {began:g} s on, {_TRIES} times no client of round {number} was done in time "
            f"and still there; the fastest one takes {world.durations.min():.3g} s"
        )

    return _in_order(round_at)


def buffered(scene: Scene, /, *, timing: Timing, concurrency: int) -> Select:
    """Asynchronous: so many clients train at all times, and a round is done when ``cohort`` updates have come in.

    Whoever is done, or leaves, is replaced at once by somebody who starts from the newest model; nobody starts from the
    same model twice. For algorithms that know about staleness, such as `fedbuff` (Nguyen et al., 2022).

    Args:
        scene: The run.
        timing: What takes time.
        concurrency: Clients that train at the same time.
    """
    if not scene.asynchronous:
        raise ValueError(
            "schedule buffered mixes updates from several models, which this algorithm would take for updates of the "
            "newest one; choose algorithm.name=fedbuff, or schedule.name=synchronous"
        )
    if concurrency < 1:
        raise ValueError(f"concurrency is {concurrency}; it must be >= 1")
    for name, count in (("concurrency", concurrency), ("cohort", scene.cohort)):
        if count > scene.population.num_clients:
            raise ValueError(f"{name} is {count}; there are only {scene.population.num_clients} clients")
    world = _World.of(scene, timing)
    training: list[_Event] = []  # a heap, whose first is the next to end
    busy: dict[int, int] = {}  # client: the version from which it trains
    newest: dict[int, int] = {}  # client: the newest version from which it has started
    order = itertools.count()

    def fill(now: float, version: int, again: int) -> None:
        idle = [id for id in world.devices.there(now).tolist() if id not in busy and newest.get(id, -1) < version]
        if not idle or len(training) == concurrency:
            return
        drawn = world.draw(np.array(idle), concurrency - len(training), version + 1, again)
        ids = np.array(drawn.clients)
        ends, leaves = now + world.durations[ids], world.devices.leave(ids, now)
        for id, end, leave in zip(ids.tolist(), ends.tolist(), leaves.tolist(), strict=True):
            busy[id] = newest[id] = version
            heapq.heappush(training, _Event(min(end, leave), next(order), id, version, end <= leave))

    def round_at(now: float, number: int) -> Selection:
        buffer: list[_Event] = []
        left: list[int] = []
        for again in range(_TRIES * scene.cohort):
            fill(now, number - 1, again)
            if not training:
                now = world.devices.next_arrival(now)
                continue
            now = training[0].time
            # all that happens at a moment, before anybody starts in it
            while training and training[0].time == now and len(buffer) < scene.cohort:
                event = heapq.heappop(training)
                del busy[event.client]
                if event.done:
                    buffer.append(event)
                else:
                    left.append(event.client)
                    newest[event.client] = -1  # it has sent nothing, and may start again
            if len(buffer) == scene.cohort:
                break
        else:
            raise ValueError(
                f"cohort is {scene.cohort}; round {number} comes to {len(buffer)} updates only: clients leave too early"
            )
        return Selection(
            tuple(event.client for event in buffer),
            tuple(left),
            staleness=tuple(number - 1 - event.version for event in buffer),
            horizon=number - min(busy.values(), default=number),
            finished=now,
            told={"clients_left": len(left)},
            traffic=world.traffic,
        )

    return _in_order(round_at)


@dataclass(frozen=True, order=True)
class _Event:
    """A client is done, or leaves before it is; of the same moment, whoever started first comes first."""

    time: float
    order: int
    client: int = field(compare=False)
    version: int = field(compare=False)
    done: bool = field(compare=False)


@dataclass(frozen=True)
class _World:
    scene: Scene
    devices: Devices
    traffic: tuple[int, int]  # bytes that a client sends, and receives
    durations: np.ndarray  # seconds of each client for a round

    @classmethod
    def of(cls, scene: Scene, timing: Timing) -> "_World":
        everybody = np.arange(scene.population.num_clients)
        devices = timing.devices(len(everybody), np.random.default_rng(seed_for(scene.seed, "devices")))
        up = scene.payload if timing.bytes_up is None else timing.bytes_up
        down = scene.payload if timing.bytes_down is None else timing.bytes_down
        durations = devices.seconds(everybody, timing.passes * scene.population.sizes, up, down)
        return cls(scene, devices, (up, down), durations)

    def draw(self, ids: np.ndarray, count: int, round: int, again: int) -> Selection:
        """So many of these clients, or all of them; the first draw of a round is the one without a schedule."""
        place = ("cohort", round) if again == 0 else ("cohort", round, again)
        rng = np.random.default_rng(seed_for(self.scene.seed, *place))
        within = Population(self.scene.population.sizes[ids])
        drawn = self.scene.sampler(within, min(count, len(ids)), rng, round)
        return Selection(tuple(ids[list(drawn.clients)].tolist()), tuple(ids[list(drawn.dropped)].tolist()))


def _in_order(round_at: Callable[[float, int], Selection]) -> Select:
    """Rounds by their number, from a function that plays one after the other."""
    played: list[Selection] = []

    def select(number: int) -> Selection:
        while len(played) < number:
            now = played[-1].finished if played else 0.0
            assert now is not None
            played.append(round_at(now, len(played) + 1))
        return played[number - 1]

    return select


SCHEDULES: dict[str, Callable[..., Select]] = {"synchronous": synchronous, "buffered": buffered}
