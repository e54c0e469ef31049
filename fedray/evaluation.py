"""Evaluation on the test set, in shards of a fixed size, so that the sums do not depend on the workers."""

from typing import Any

from fedray.aggregators import total_with_rows
from fedray.algorithm import Backend, Client, ClientResult, Metrics
from fedray.errors import FedrayError
from fedray.learner import Learner, Task
from fedray.trees import Params

SHARD = 512  # test examples


def evaluate(task: Task, params: Params, backend: Backend) -> tuple[Metrics, dict[str, Any]]:
    """The task's metrics of ``params`` over the whole test set, and details for the report.

    Raises:
        FedrayError: a part of the test set could not be evaluated.
    """
    count = task.num_test_examples
    shards = [Client(id=i, seed=0, slot=i) for i in range(-(-count // SHARD))]
    (sums, done), _ = backend.map_reduce(_evaluate_shard, params, shards, total_with_rows(), metered=False)
    if done != len(shards):
        raise FedrayError(
            f"{len(shards) - done:.0f} of {len(shards)} parts of the test set could not be evaluated, and "
            "on_client_error=drop left them out; backend.on_client_error=raise shows why"
        )
    return task.summarize(sums)


def _evaluate_shard(learner: Learner, params: Params, shard: Client) -> ClientResult:
    start = shard.id * SHARD
    examples = learner.task.test_examples(start, min(start + SHARD, learner.task.num_test_examples))
    return ClientResult(learner.evaluate(params, examples), 1)
