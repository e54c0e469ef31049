"""The training loop, as a generator: the caller's ``for`` body is the callback."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedray.algorithm import Backend, Client, FederatedAlgorithm, Metrics
from fedray.samplers import Population, Selection, uniform
from fedray.seeds import seed_for

Sampler = Callable[[Population, int, np.random.Generator, int], Selection]
Select = Callable[[int], Selection]  # the cohort of a round; rounds are asked for in their order


@dataclass(frozen=True)
class Round:
    """One finished round: its number (1-based), the new server state, and what it cost.

    ``phases`` are seconds by name.
    """

    number: int
    state: Any
    metrics: Metrics
    selection: Selection
    phases: dict[str, float]


def draw(population: Population, cohort: int, sampler: Sampler, seed: int, round: int) -> Selection:
    """The cohort of a round: it depends on the seed and the round only, never on the backend."""
    return sampler(population, cohort, np.random.default_rng(seed_for(seed, "cohort", round)), round)


def clients(selection: Selection, population: Population, seed: int, round: int) -> list[Client]:
    """The members of a cohort, each with its own seed: of the round in which it started."""
    staleness = selection.staleness or (0,) * len(selection.clients)
    return [
        Client(
            id,
            seed_for(seed, "client", round - late, id),
            round,
            slot,
            float(population.sizes[id]),
            staleness=late,
            horizon=selection.horizon,
        )
        for slot, (id, late) in enumerate(zip(selection.clients, staleness, strict=True))
    ]


def rounds(
    algorithm: FederatedAlgorithm,
    state: Any,
    backend: Backend,
    population: Population,
    cohort: int,
    sampler: Sampler = uniform,
    seed: int = 0,
    start: int = 0,
    select: Select | None = None,
) -> Iterator[Round]:
    """Train without end, one round at a time; ``state`` is what was reached after round ``start``.

    ``select`` says who takes part; without it, ``sampler`` does.

    From the start, clients keep nothing from an earlier training on the same backend.
    """
    if start == 0:
        backend.client_states.clear()

    def drawn(round: int) -> tuple[Selection, list[Client]]:
        selection = select(round) if select else draw(population, cohort, sampler, seed, round)
        return selection, clients(selection, population, seed, round)

    with ThreadPoolExecutor(1, "cohort") as aside:  # a cohort is drawn while the one before it trains
        number, coming = start, aside.submit(drawn, start + 1)
        while True:
            number += 1
            began = time.perf_counter()
            selection, members = coming.result()
            coming = aside.submit(drawn, number + 1)
            ready = time.perf_counter()
            try:
                state, metrics = algorithm.apply(state, members, backend)
            except BaseException:
                backend.client_states.discard()
                raise
            backend.client_states.commit()
            phases = {"sample": ready - began, "train": time.perf_counter() - ready}
            yield Round(number, state, metrics, selection, phases)
