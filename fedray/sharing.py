"""What runs in one process share: a trial of a sweep takes the data that the one before it has read."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

# how many of a kind stay: of data sets, one and those that it is made of
_ROOM = {"datasets": 4, "task": 1, "activations": 1, "statistics": 1}


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

    def get(self, kind: str, key: Hashable, make: Callable[[], T], of: Any) -> T:
        """What was made for the key, or is made now."""
        kept, key = self._kept[kind], (key, id(of))
        if key not in kept:
            kept[key] = make(), of  # with what it is of, so that nothing else is at that address meanwhile
        kept.move_to_end(key)
        while len(kept) > _ROOM[kind]:
            kept.popitem(last=False)
        made: T = kept[key][0]
        return made


_OPEN: ContextVar[Shared | None] = ContextVar("fedray_shared", default=None)


def once(kind: str, key: Hashable, make: Callable[[], T], of: Any = None) -> T:
    """``make()``, or what it made for the same key in an earlier run with which this one shares.

    Args:
        kind: datasets, task, activations or statistics.
        key: All that the value depends on, besides ``of``.
        make: Makes a value that nobody changes, but for filling it further.
        of: An object that it is made from, and that has no other name.
    """
    shared = _OPEN.get()
    return make() if shared is None else shared.get(kind, key, make, of)
