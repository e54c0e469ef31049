"""FedBuff (Nguyen et al., 2022, arXiv:2106.06639, Algorithm 1): asynchronous FedAvg with a buffer of K updates.

Client i trains from the model x^(t−τ) that it was sent, τ server steps ago; the server steps by the mean of s(τ_i)·Δ_i
over the K updates of the buffer, with s(τ) = (1 + τ)^−a. K is the cohort; who is in the buffer, the schedule says.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedray.aggregators import Aggregator, mean
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.learner import Learner
from fedray.local_training import LocalTraining, Weighting
from fedray.server_optimizers import ServerOptimizer, sgd
from fedray.trees import Params, scale, subtract


@dataclass(frozen=True)
class ServerState:
    """The params x^t, the server optimizer's state, and by t the models from which somebody may still train."""

    params: Params
    opt_state: Any
    models: dict[str, Params]


def fedbuff(
    *,
    local: LocalTraining,
    server_optimizer: ServerOptimizer = sgd(1.0),
    aggregator: Aggregator = mean(),
    weighting: Weighting = "uniform",
    staleness_exponent: float = 0.5,
) -> FederatedAlgorithm:
    """Buffered asynchronous aggregation (FedBuff, Nguyen et al., 2022); without staleness it is FedAvg.

    Args:
        local: How a client trains.
        server_optimizer: What the server does with the mean update.
        aggregator: How updates become one.
        weighting: What a client weighs: its examples, these rounded up to whole batches (FedPEFT's code), or one.
        staleness_exponent: a of s(τ) = (1 + τ)^−a; 0.5 in the paper, 0 to ignore staleness.
    """
    if staleness_exponent < 0:
        raise ValueError(f"staleness_exponent is {staleness_exponent}; it must be >= 0")

    def client_update(learner: Learner, models: dict[str, Params], client: Client) -> ClientResult:
        x = models[sent_to(client)]
        y = learner.train(x, client, local)
        s = (1 + client.staleness) ** -staleness_exponent
        weight = local.weight(y.num_examples, weighting)
        return ClientResult(scale(subtract(x, y.params), s), weight, {"train_loss": y.loss})

    def init(params: Params) -> ServerState:
        return ServerState(params, server_optimizer.init(params), {"0": params})

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        t, horizon = cohort[0].round, cohort[0].horizon
        models = {sent_to(client): state.models[sent_to(client)] for client in cohort}
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.params.values())  # one of the models
        gradient, metrics = backend.map_reduce(client_update, models, cohort, aggregator, received=lambda _: size)
        params, opt_state = server_optimizer.apply(gradient, state.opt_state, state.params)
        kept = {key: x for key, x in state.models.items() if int(key) >= t - horizon}
        return ServerState(params, opt_state, {**kept, str(t): params}), metrics

    return FederatedAlgorithm(init, apply, asynchronous=True)


def sent_to(client: Client) -> str:
    """The key of the model from which a client trains."""
    return str(client.round - 1 - client.staleness)
