"""A standing line between the driver and workers on its node: what a round of a small model costs by itself.

Ray's calls cost a round of two workers 9 ms, a socket to each of them less than 1. Tensors do not go through it: each
side writes its own into memory that the others read. A process that dies ends its sockets, so the other side knows at
once; the driver then goes on by calls.
"""

import mmap
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import accumulate
from multiprocessing.connection import Client, Connection, Listener, wait
from multiprocessing.reduction import recv_handle, send_handle
from typing import Any, cast

import ray

from fedray.backends.ray.crew import QUIET, tell_of_quiet

_JOIN = 30.0  # seconds for workers to join
_ALIGNED = 64  # bytes; where each tensor begins, so that vector instructions may read it

Found = tuple[bytes, list[int], list[int]]  # a value without its tensors; their sizes, where they start, and the end


class Outbox:
    """Memory that this process writes a value to, over the value before, and others read."""

    def __init__(self) -> None:
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("fedray")
        else:  # a file without a name, on other systems than Linux
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        self._grow(mmap.PAGESIZE)

    def _grow(self, size: int) -> None:
        os.ftruncate(self.descriptor, size)
        self._memory = mmap.mmap(self.descriptor, size)

    def put(self, value: Any) -> Found:
        """Write a value; returns what `Inbox.take` finds it by."""
        buffers: list[Any] = []
        rest = ray.cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        parts = [buffer.raw() for buffer in buffers]
        offsets = list(accumulate((-(-part.nbytes // _ALIGNED) * _ALIGNED for part in parts), initial=0))
        if offsets[-1] > len(self._memory):
            self._grow(offsets[-1])
        for start, part in zip(offsets, parts, strict=False):
            self._memory[start : start + part.nbytes] = part
        return rest, [part.nbytes for part in parts], offsets

    def close(self) -> None:
        """Let go of it; who reads it keeps it."""
        os.close(self.descriptor)


class Inbox:
    """The other end of an `Outbox`, by its descriptor."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map()

    def _map(self) -> None:
        self._memory = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)

    def take(self, found_by: Found) -> Any:
        """The value, which is the receiver's own: it stays as it is when another one is written."""
        rest, sizes, offsets = found_by
        if offsets[-1] > len(self._memory):
            self._map()
        own = memoryview(bytearray(memoryview(self._memory)[: offsets[-1]]))
        parts = [own[start : start + size] for start, size in zip(offsets, sizes, strict=False)]
        return ray.cloudpickle.loads(rest, buffers=parts)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._descriptor)


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
        self._outbox = Outbox()
        with Listener(family="AF_UNIX", backlog=len(self.workers)) as listener:
            ray.get([w.join.remote(listener.address, place) for place, w in enumerate(self.workers)], timeout=_JOIN)
            joined = [listener.accept() for _ in self.workers]  # they wait there already
        self._connections = dict(sorted((connection.recv(), connection) for connection in joined))
        self._inboxes = [Inbox(recv_handle(connection)) for connection in self._connections.values()]
        for connection in joined:
            send_handle(connection, self._outbox.descriptor, None)

    def ask(self, common: Any, own: Sequence[Any]) -> Iterator[tuple[int, Callable[[], Any] | None]]:
        """Say something to all workers, and something of its own to each of the first ones; their answers as they come.

        Returns:
            The place of each who was asked, and a function that reads its answer, which is there until the next
            question; None of one that died.
        """
        self.idle = False
        said = self._outbox.put(common)
        messages = [ray.cloudpickle.dumps((said, mine)) for mine in own]
        for place, message in enumerate(messages):  # one right after the other, or the last worker would begin late
            with suppress(OSError):  # it died, which its answer shows
                self._connections[place].send_bytes(message)
        return self._answers(len(own))

    def _answers(self, count: int) -> Iterator[tuple[int, Callable[[], Any] | None]]:
        asked = {self._connections[place]: place for place in range(count)}
        told = False
        while asked:
            ready = wait(list(asked), QUIET)
            if not ready and not told:
                tell_of_quiet()
                told = True
            for connection in cast(list[Connection], ready):
                place = asked.pop(connection)
                try:
                    answer = connection.recv()
                except (EOFError, OSError):
                    yield place, None
                else:
                    yield place, partial(self._inboxes[place].take, answer)
        self.idle = True

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections.values():
            connection.close()
        for inbox in self._inboxes:
            inbox.close()
        self._outbox.close()


def standing(workers: Mapping[Any, Mapping[str, Any]]) -> Line | None:
    """A line to workers, each with where it is; None if one is on another node, or it cannot be had."""
    node = ray.get_runtime_context().get_node_id()
    if any(place["node"] != node for place in workers.values()):
        return None
    with suppress(OSError, EOFError, ValueError, ray.exceptions.RayError):  # a ValueError is Windows'
        return Line(list(workers))
    return None


def serve(address: str, place: int, answer: Callable[[Any, Any], Any]) -> None:
    """Join a line, and answer what is asked in a thread of its own, until the other side hangs up.

    Args:
        address: The line's.
        place: Whose place in it this is.
        answer: Of what all are told, and of what this one is; if it raises, this side hangs up.
    """
    connection = Client(address)
    connection.send(place)
    outbox = Outbox()
    send_handle(connection, outbox.descriptor, None)

    def loop() -> None:
        with suppress(AttributeError, OSError):  # on Linux: who is asked does not push who asks off the core
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        with connection, closing(outbox), suppress(EOFError, OSError), closing(Inbox(recv_handle(connection))) as inbox:
            while True:
                said, own = ray.cloudpickle.loads(connection.recv_bytes())
                connection.send(outbox.put(answer(inbox.take(said), own)))

    threading.Thread(target=loop, daemon=True).start()
