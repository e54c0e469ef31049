"""FedAvg (McMahan et al., 2017) in the FedOpt form (Reddi et al., 2021, Algorithm 1).

Each client trains from x to y_i; the mean of x − y_i is a pseudo-gradient for the server optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedray.aggregators import Aggregator, mean
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.learner import Learner
from fedray.local_training import LocalTraining, Weighting
from fedray.server_optimizers import ServerOptimizer, sgd
from fedray.trees import Params, subtract


@dataclass(frozen=True)
class ServerState:
    """The params x, and the server optimizer's state."""

    params: Params
    opt_state: Any


def fedavg(
    *,
    local: LocalTraining,
    server_optimizer: ServerOptimizer = sgd(1.0),
    aggregator: Aggregator = mean(),
    weighting: Weighting = "examples",
    proximal: float = 0.0,
) -> FederatedAlgorithm:
    """Federated averaging (McMahan et al., 2017).

    Args:
        local: How a client trains.
        server_optimizer: What the server does with the mean update.
        aggregator: How updates become one; another than the mean makes the rule robust.
        weighting: What a client weighs: its examples, these rounded up to whole batches (FedPEFT's code), or one.
        proximal: μ of FedProx's term μ/2·‖w − x‖².
    """
    if proximal < 0:
        raise ValueError(f"proximal is {proximal}; it must be >= 0")

    def client_update(learner: Learner, params: Params, client: Client) -> ClientResult:
        y = learner.train(params, client, local, proximal=proximal)
        weight = local.weight(y.num_examples, weighting)
        return ClientResult(subtract(params, y.params), weight, {"train_loss": y.loss})

    def init(params: Params) -> ServerState:
        return ServerState(params, server_optimizer.init(params))

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        gradient, metrics = backend.map_reduce(client_update, state.params, cohort, aggregator, grouped=True)
        return ServerState(*server_optimizer.apply(gradient, state.opt_state, state.params)), metrics

    return FederatedAlgorithm(init, apply)
