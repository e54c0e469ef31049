"""What runs in one process share: a trial of a sweep takes the data that the one before it has read."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_ROOM = {
    "datasets": 4,
    "task": 1,
    "activations": 1,
    "statistics": 1,
}  # how many of a kind stay: a data set and those that it is made of


class Shared:
    """Values that are made once for all runs that are `open` in it, as long as they are among the last ones used."""

    def __init__(self) -> None:
        self._kept: dict[str, OrderedDict[Hashable, Any]] = {kind: OrderedDict() for kind in _ROOM}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Within, `once` keeps what it makes here; outside of it, nothing is kept."""
        token = _OPEN.set(self)
        try:
            yield
        finally:
            _OPEN.reset(token)

    def get(self, kind: str, key: Hashable, make: Callable[[], T]) -> T:
        """What was made for the key, or is made now."""
        kept = self._kept[kind]
        if key not in kept:
            made = make()
            kept[key] = made
        kept.move_to_end(key)
        while len(kept) > _ROOM[kind]:
            kept.popitem(last=False)
        return kept[key]


_OPEN: ContextVar[Shared | None] = ContextVar("fedray_shared", default=None)


def once(kind: str, key: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it made for the same key in an earlier run with which this one shares.

    Args:
        kind: datasets, task, activations or statistics.
        key: All that the value depends on.
        make: Makes a value that nobody changes, but for filling it further.
    """
    shared = _OPEN.get()
    return make() if shared is None else shared.get(kind, key, make)
