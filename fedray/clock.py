"""Seconds by what they went to."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

PHASES = ("broadcast", "load", "train", "accumulate", "merge", "evaluate", "idle")  # what a round's time goes to


class Clock:
    """Adds up seconds by name; what is measured within a measurement counts for the inner one only.

    >>> clock = Clock()
    >>> with clock("train"), clock("load"):
    ...     pass
    >>> sorted(clock.take()), clock.take()
    (['load', 'train'], {})
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._within = 0.0  # of the measurement in progress, what went to inner ones

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a block."""
        began, outer = time.perf_counter(), self._within
        self._within = 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.add({name: took - self._within})
            self._within = outer + took

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what was measured elsewhere."""
        for name, count in seconds.items():
            self._seconds[name] = self._seconds.get(name, 0.0) + count

    def take(self) -> dict[str, float]:
        """Everything since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken
