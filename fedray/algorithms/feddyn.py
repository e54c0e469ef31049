"""FedDyn (Acar et al., 2021, Algorithm 1): dynamic regularisation aligns the clients' optima with the server's.

Client i keeps ∇_i and minimises L_i(θ) − ⟨∇_i, θ⟩ + α/2·‖θ − θ^{t−1}‖²; the server keeps h.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedray.aggregators import mean
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.trees import Params, add, scale, subtract, zeros_like


@dataclass(frozen=True)
class ServerState:
    """The params θ, and the server's h."""

    params: Params
    h: Params


def feddyn(num_clients: int, /, *, local: LocalTraining, alpha: float = 0.01) -> FederatedAlgorithm:
    """Dynamic regularisation; clients keep state (Acar et al., 2021).

    Args:
        num_clients: m, the size of the population.
        local: How a client trains.
        alpha: α, strength of the regulariser, above 0.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; it must be > 0")

    def client_update(learner: Learner, theta: Params, client: Client) -> ClientResult:
        grad = zeros_like(theta) if client.state is None else client.state
        y = learner.train(theta, client, local, correction=scale(grad, -1.0), proximal=alpha)
        moved = subtract(y.params, theta)
        return ClientResult(moved, 1, {"train_loss": y.loss}, state=subtract(grad, scale(moved, alpha)))

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        moved, metrics = backend.map_reduce(client_update, state.params, cohort, mean(), keeps_state=True, grouped=True)
        size = len(cohort) - metrics.get("clients_failed", 0)
        h = subtract(state.h, scale(moved, alpha * size / num_clients))
        theta = subtract(add(state.params, moved), scale(h, 1 / alpha))
        return ServerState(theta, h), metrics

    return FederatedAlgorithm(lambda theta: ServerState(theta, zeros_like(theta)), apply)
