"""A standing line between the driver and workers on its node: what a round of a small model costs by itself.

Ray's calls cost a round of two workers 9 ms, a socket to each of them less than 1. A process that dies ends its
sockets, so the other side knows at once; the driver then goes on by calls.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any, cast

import ray

from fedray.backends.ray.crew import QUIET, tell_of_quiet

_JOIN = 30.0  # seconds for workers to join


class Line:
    """Sockets to workers, in a folder that only this user may open.

    Args:
        workers: Actors whose method ``join(address, place)`` calls `serve`, all of them up and on this node.

    Attributes:
        idle: Whether all answers to the last question were taken; else the next one would meet them.

    Raises:
        OSError: this system has no such sockets.
        RayError: a worker did not join.
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        self.workers, self.idle = list(workers), True
        with Listener(family="AF_UNIX", backlog=len(self.workers)) as listener:
            ray.get([w.join.remote(listener.address, place) for place, w in enumerate(self.workers)], timeout=_JOIN)
            joined = [listener.accept() for _ in self.workers]  # they wait there already
        self._connections = dict(sorted((int(connection.recv_bytes()), connection) for connection in joined))

    def ask(self, common: bytes, own: Sequence[bytes]) -> Iterator[tuple[int, bytes | None]]:
        """What each worker makes of a message for all of them and one of its own, as they come; None if it died.

        Args:
            common: For all.
            own: For each of the first ones.
        """
        self.idle = False
        asked = {self._connections[place]: place for place in range(len(own))}
        for connection, place in asked.items():
            with suppress(OSError):  # it died, which shows below
                connection.send_bytes(common)
                connection.send_bytes(own[place])
        told = False
        while asked:
            ready = wait(list(asked), QUIET)
            if not ready and not told:
                tell_of_quiet()
                told = True
            for connection in cast(list[Connection], ready):
                place = asked.pop(connection)
                try:
                    yield place, connection.recv_bytes()
                except (EOFError, OSError):
                    yield place, None
        self.idle = True

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections.values():
            connection.close()


def standing(workers: Mapping[Any, Mapping[str, Any]]) -> Line | None:
    """A line to workers, each with where it is; None if one is on another node, or it cannot be had."""
    node = ray.get_runtime_context().get_node_id()
    if any(place["node"] != node for place in workers.values()):
        return None
    with suppress(OSError, EOFError, ValueError, ray.exceptions.RayError):  # a ValueError is Windows'
        return Line(list(workers))
    return None


def serve(address: str, place: int, answer: Any) -> None:
    """Join a line, and answer what is asked in a thread of its own, until the other side hangs up.

    Args:
        address: The line's.
        place: Whose place in it this is.
        answer: Of two messages, the one that all get and one's own, as bytes; if it raises, this side hangs up.
    """
    connection = Client(address)
    connection.send_bytes(str(place).encode())

    def loop() -> None:
        with connection, suppress(EOFError, OSError):
            while True:
                connection.send_bytes(answer(connection.recv_bytes(), connection.recv_bytes()))

    threading.Thread(target=loop, daemon=True).start()
