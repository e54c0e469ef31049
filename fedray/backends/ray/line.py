"""A standing line between the driver and its workers: what a round costs by itself, as long as nothing goes wrong.

Ray's calls cost a round of two workers 8.7 ms, a compiled graph of Ray, whose channels are shared memory, 1.2 ms. But
it is nothing that survives: with a worker, the graph is gone. So the line is for what is small and mostly goes well,
and whoever uses it has calls to go on with.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.dag import InputNode, MultiOutputNode
from ray.exceptions import RayTaskError

from fedray.backends.ray.crew import QUIET, first_line, tell_of_quiet

logger = logging.getLogger(__name__)
logging.getLogger("ray.dag.compiled_dag_node").setLevel(logging.WARNING)  # it tells of every beginning and end

_FOREVER = -1


class BrokenError(Exception):
    """The line is of no use any more; whatever was asked may or may not have been done."""


class Line:
    """Takes a message to all workers at once, and their answers back.

    Args:
        workers: Worker actors, all of them up and on this node.

    Raises:
        BrokenError: Ray cannot make a graph of them.
    """

    def __init__(self, workers: Sequence[Any]) -> None:
        self.workers = list(workers)
        try:
            with InputNode() as message:
                answers = [worker.answer.bind(message, place) for place, worker in enumerate(self.workers)]
            self._graph: Any = MultiOutputNode(answers).experimental_compile()
        except Exception as error:  # of many kinds
            raise BrokenError(first_line(error)) from error

    def ask(self, message: bytes) -> list[bytes]:
        """What each worker's ``answer(message, place)`` returns.

        Args:
            message: For all of them.

        Raises:
            BrokenError: a worker died, or the message did not get through.
            RayTaskError: an ``answer`` raised.
        """
        timer = threading.Timer(QUIET, tell_of_quiet)
        timer.daemon = True
        timer.start()
        try:
            return [answer.get(timeout=_FOREVER) for answer in self._graph.execute(message)]
        except RayTaskError:
            raise
        except Exception as error:  # of a channel, of an actor, of the object store
            raise BrokenError(first_line(error)) from error
        finally:
            timer.cancel()

    def close(self) -> None:
        """Let the workers go, once they are done with what they have in hand."""
        self._graph.teardown()


def standing(workers: Mapping[Any, Mapping[str, Any]]) -> Line | None:
    """A line to workers, each with where it is; None if one is on another node, or Ray cannot make it."""
    node = ray.get_runtime_context().get_node_id()
    if any(place["node"] != node for place in workers.values()):
        return None
    try:
        return Line(list(workers))
    except BrokenError as error:
        logger.info("rounds go by Ray's calls: %s", error)
        return None
