"""What papers compare federated learning with, through the same code: no federation, and no privacy."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedray.aggregators import collect
from fedray.algorithm import EVERYONE, Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.algorithms.fedavg import ServerState
from fedray.learner import Learner, LocalResult
from fedray.local_training import LocalTraining
from fedray.metrics.accuracy import own_accuracy
from fedray.trees import Params


def local_only(*, local: LocalTraining) -> FederatedAlgorithm:
    """Every client trains alone on its own examples and goes on from there the next time; nothing is sent.

    The test metrics of a round are the means over the cohort's own models, with the worst client's accuracy if any.
    Of a classification, ``own_accuracy`` is that under the client's own shares of the classes.

    Args:
        local: How a client trains.
    """

    def client_update(learner: Learner, start: Params, client: Client) -> ClientResult:
        y = learner.train(start if client.state is None else client.state, client, local)
        sums = learner.evaluate(y.params, learner.task.test_examples(0, learner.task.num_test_examples))
        metrics = learner.task.summarize(sums)[0]
        if "confusion" in sums:
            counts = np.bincount(learner.task.examples(client.id)["y"], minlength=len(sums["confusion"]))
            metrics["own_accuracy"] = float(own_accuracy(sums["confusion"].numpy(), counts))
        return ClientResult(metrics, 1, {"train_loss": y.loss, **metrics}, state=y.params)

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        tests, metrics = backend.map_reduce(
            client_update, state.params, cohort, collect(), keeps_state=True, metered=False
        )
        worst = {
            f"worst_{name}": min(test[name] for test in tests)
            for name in tests[0].keys() & {"test_accuracy", "own_accuracy"}
        }
        return state, {**metrics, **worst}

    return FederatedAlgorithm(lambda params: ServerState(params, {}), apply)


def centralized(*, local: LocalTraining) -> FederatedAlgorithm:
    """Training on all clients' examples in one place, one call of the local training a round.

    Args:
        local: How the one place trains.
    """

    def train(learner: Learner, item: tuple[Params, Client]) -> LocalResult:
        return learner.train(*item, local)

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        everyone = replace(cohort[0], id=EVERYONE)
        [result] = backend.map(train, [(state.params, everyone)])
        return ServerState(result.params, {}), {"train_loss": result.loss}

    return FederatedAlgorithm(lambda params: ServerState(params, {}), apply)
