"""SCAFFOLD (Karimireddy et al., 2020, Algorithm 1, option II).

Client i keeps a control variate c_i and descends along g_i(y) − c_i + c; c is the mean of all c_i.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fedray.aggregators import Aggregator, mean
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.trees import Params, add, scale, subtract, zeros_like


@dataclass(frozen=True)
class ServerState:
    """The params x, and the server's control variate c."""

    params: Params
    c: Params


def scaffold(
    num_clients: int, /, *, local: LocalTraining, server_lr: float = 1.0, aggregator: Aggregator = mean()
) -> FederatedAlgorithm:
    """Control variates against client drift; clients keep state (Karimireddy et al., 2020).

    Args:
        num_clients: N, the size of the population.
        local: How a client trains; plain SGD.
        server_lr: η_g, learning rate of the server.
        aggregator: How updates become one.
    """
    require_plain_sgd("scaffold", local)
    if not server_lr > 0:
        raise ValueError(f"server_lr is {server_lr}; it must be > 0")

    def client_update(learner: Learner, broadcast: dict[str, Params], client: Client) -> ClientResult:
        x, c = broadcast["x"], broadcast["c"]
        c_i = zeros_like(x) if client.state is None else client.state
        y = learner.train(x, client, local, correction=subtract(c, c_i))
        drift = subtract(x, y.params)
        new_c_i = add(subtract(c_i, c), scale(drift, 1 / (y.num_steps * local.lr(client.round))))
        update = {"x": drift, "c": subtract(new_c_i, c_i)}
        return ClientResult(update, 1, {"train_loss": y.loss}, state=new_c_i)

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        broadcast = {"x": state.params, "c": state.c}
        average, metrics = backend.map_reduce(
            client_update, broadcast, cohort, aggregator, keeps_state=True, grouped=True
        )
        x = subtract(state.params, scale(average["x"], server_lr))
        size = len(cohort) - metrics.get("clients_failed", 0)
        return ServerState(x, add(state.c, scale(average["c"], size / num_clients))), metrics

    return FederatedAlgorithm(lambda x: ServerState(x, zeros_like(x)), apply)


def require_plain_sgd(algorithm: str, local: LocalTraining) -> None:
    """An error unless the drift of a client is its learning rate times the sum of its gradients."""
    if not local.is_plain_sgd:
        raise ValueError(
            f"local_optimizer is {local.local_optimizer} with local_momentum {local.local_momentum}, weight_decay "
            f"{local.weight_decay}, max_grad_norm {local.max_grad_norm}; {algorithm} is defined for plain SGD only"
        )
