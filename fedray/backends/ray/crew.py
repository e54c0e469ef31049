"""The workers of a run, who come and go, and work handed out to them so that nothing is lost with one of them."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ray
from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError

from fedray.errors import FedrayError

logger = logging.getLogger(__name__)

Start = Callable[[Any, list[Any], int], list[ray.ObjectRef]]
Collect = Callable[[list[ray.ObjectRef]], Any]

ATTEMPTS = 3  # how often one client may take its worker down before it is the client's fault
_DEAD = (RayActorError, OutOfMemoryError, ObjectLostError)
QUIET = 600.0  # seconds without any result, after which somebody should be told


class Crash(str):
    """Why a share has no result: what it does to its worker, for a message."""


class Done(NamedTuple):
    """A share of the work, what came of it, and who did it."""

    share: list[Any]
    value: Any
    actor: Any


class Crew:
    """Actors by whether they can be given work: some are up, others still start, or wait for a node with room for them.

    Args:
        actors: Whom to begin with; nobody is up yet.
        welcome: An actor's first call, which tells that it is up; it is called again after each death.
        patience: Seconds to wait for somebody while nobody is up.
    """

    def __init__(self, actors: Sequence[Any], welcome: Callable[[Any], ray.ObjectRef], patience: float) -> None:
        self.up: dict[Any, Any] = {}  # each with the result of its first call
        self._coming: dict[ray.ObjectRef, Any] = {}
        self.deaths = 0
        self._welcome, self._patience = welcome, patience
        for actor in actors:
            self.expect(actor)

    def __len__(self) -> int:
        return len(self.up) + len(self._coming)

    def __iter__(self) -> Iterator[Any]:
        return iter([*self.up, *self._coming.values()])

    @property
    def whole(self) -> bool:
        """Whether everybody is up."""
        return not self._coming

    def expect(self, actor: Any) -> None:
        """Take in an actor that starts, or starts again."""
        self.up.pop(actor, None)
        self._coming[self._welcome(actor)] = actor

    def gather(self, least: int) -> bool:
        """Wait until so many are up; False if they are not within the crew's patience."""
        deadline = time.monotonic() + self._patience
        while len(self.up) < least:
            if (left := deadline - time.monotonic()) <= 0:
                return False
            self.wait((), left)
        return True

    def wait(self, refs: Sequence[ray.ObjectRef], timeout: float | None) -> list[ray.ObjectRef]:
        """Those of ``refs`` that are ready, as soon as one is, or somebody has come up, or the time is over.

        Raises:
            FedrayError: the last one was given up.
        """
        ready, _ = ray.wait([*refs, *self._coming], num_returns=1, timeout=timeout)
        for actor, ref in [(self._coming.pop(ref), ref) for ref in ready if ref in self._coming]:
            try:
                self.up[actor] = ray.get(ref)
            except _DEAD as error:
                logger.warning("a worker cannot be started again, and is given up: %s", first_line(error))
                if not len(self):
                    raise FedrayError(f"no worker is left; the last one could not be started: {error}") from None
        return [ref for ref in ready if ref in refs]

    def hand_out(
        self,
        start: Start,
        shares: Sequence[list[Any]],
        collect: Collect = lambda refs: ray.get(refs[0]),
        limit: float | None = None,
        attempt: int = 1,
    ) -> Iterator[Done]:
        """Hand the shares out to whoever is free, and yield each with its result as it is done.

        A share whose worker dies is cut and handed out again, so that what kills workers is found; what cannot be cut
        and has taken down ``ATTEMPTS`` workers has a `Crash` for its result.

        Args:
            start: Of an actor, a share and the number of the attempt: references, of which the first is waited for.
            shares: Lists of items.
            collect: The result, from the references.
            limit: Seconds after which an item's worker ends itself, for the message.
            attempt: Which attempt at these shares this is.

        Raises:
            FedrayError: nobody is left to work.
        """
        queue = deque((share, attempt) for share in shares)
        running: dict[ray.ObjectRef, tuple[Any, list[Any], int, list[ray.ObjectRef], float]] = {}
        told = False
        while queue or running:
            busy = {actor for actor, *_ in running.values()}
            for actor in [actor for actor in self.up if actor not in busy][: len(queue)]:
                share, attempt = queue.popleft()
                refs = start(actor, share, attempt)
                running[refs[0]] = actor, share, attempt, refs, time.monotonic()
            timeout, asked = QUIET if running else self._patience, time.monotonic()
            ready = self.wait(list(running), timeout)
            if not ready and not self.up and not running and time.monotonic() - asked >= timeout:
                raise FedrayError(f"no worker is left, and none came within {timeout:g} s; {free()}")
            if running and not ready and not told and time.monotonic() - asked >= timeout:
                tell_of_quiet()
                told = True
            for first in ready:
                actor, share, attempt, refs, began = running.pop(first)
                try:
                    value = collect(refs)
                except _DEAD as error:
                    if again := self.parts_of(share, actor, attempt):
                        queue.extend((part, attempt + 1) for part in again)
                        continue
                    hung = limit is not None and time.monotonic() - began >= limit
                    did = f"did not end within client_timeout = {limit:g} s" if hung else "took its worker down"
                    value = Crash(f"{did} {attempt} times: {first_line(error)}")
                yield Done(share, value, actor)

    def parts_of(self, share: list[Any], actor: Any, attempt: int = 1) -> list[list[Any]]:
        """What to hand out again of a share with which its actor died, who is expected back; nothing after too many."""
        self.deaths += 1
        self.expect(actor)
        parts = _parts(share, attempt)
        if parts:
            logger.warning("a worker died; the %d items that it had in hand are handed out again", len(share))
        return parts


def tell_of_quiet() -> None:
    """Say that there has been no result for a long time."""
    logger.warning("no result for %g s; backend.client_timeout ends clients that hang", QUIET)


def free() -> str:
    """What the cluster has, and what of it is free, for a message."""

    def short(resources: dict[str, float]) -> str:
        return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))

    return f"the cluster has {short(ray.cluster_resources())}, of which free: {short(ray.available_resources())}"


def first_line(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).strip().partition("\n")[0]


def _parts(share: list[Any], attempt: int) -> list[list[Any]]:
    """What to hand out again of a share that took its worker down; a group stays whole for as long as it may."""
    if len(share) > 1:
        return [share[: len(share) // 2], share[len(share) // 2 :]]
    if attempt < ATTEMPTS:
        return [share]
    [item] = share
    return [[[client]] for client in item] if isinstance(item, list) and len(item) > 1 else []
