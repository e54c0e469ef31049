"""FedNova (Wang et al., 2020, equations 5 and 6): clients' updates are normalised by how far they could go.

a_i is the L1 norm of the weights that the local solver gives its gradients: τ_i, the number of steps, for SGD.
"""

from collections.abc import Sequence

from fedray.aggregators import mean
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.algorithms.fedavg import ServerState
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.trees import Params, scale, subtract


def fednova(*, local: LocalTraining, server_lr: float = 1.0) -> FederatedAlgorithm:
    """Normalised averaging for clients that make different numbers of steps (Wang et al., 2020).

    Args:
        local: How a client trains; SGD, with or without momentum.
        server_lr: Learning rate of the server.
    """
    if local.local_optimizer != "sgd":
        raise ValueError(f"local_optimizer is {local.local_optimizer}; fednova is defined for sgd only")
    if local.local_nesterov:
        raise ValueError("local_nesterov is true; fednova is defined for plain and heavy-ball momentum only")
    if not server_lr > 0:
        raise ValueError(f"server_lr is {server_lr}; it must be > 0")

    def client_update(learner: Learner, x: Params, client: Client) -> ClientResult:
        y = learner.train(x, client, local)
        a = gradient_weight(y.num_steps, local.local_momentum)
        update = {"d": scale(subtract(x, y.params), 1 / a), "a": a}
        return ClientResult(update, y.num_examples, {"train_loss": y.loss})

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        average, metrics = backend.map_reduce(client_update, state.params, cohort, mean(), grouped=True)
        x = subtract(state.params, scale(average["d"], server_lr * average["a"]))  # τ_eff = Σ p_i a_i
        return ServerState(x, {}), metrics

    return FederatedAlgorithm(lambda x: ServerState(x, {}), apply)


def gradient_weight(num_steps: int, momentum: float) -> float:
    """‖a_i‖₁ after ``num_steps`` of SGD with heavy-ball momentum ρ (Wang et al., 2020, section 4).

    >>> gradient_weight(5, 0.0)
    5.0
    >>> gradient_weight(2, 0.5)  # the first gradient counts 1 + 0.5, the second 1
    2.5
    """
    rho, tau = momentum, num_steps
    return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
