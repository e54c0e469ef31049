"""FedAvg under differential privacy: of clients (McMahan et al., 2018, Algorithm 1), or examples (Abadi et al., 2016).

For clients, w ← w − 1/m·(Σ Δ_k·min(1, S/‖Δ_k‖) + N(0, z²S²)), with Δ_k = w − w_k of the m clients of a cohort.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedray.aggregators import mean, norm_bound, with_members
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.learner import Learner, LossFunction
from fedray.local_training import LocalTraining, Weighting
from fedray.privacy import Mechanism, accounting, dp_client, noisy
from fedray.seeds import seed_for
from fedray.server_optimizers import ServerOptimizer, sgd
from fedray.trees import Params, subtract


@dataclass(frozen=True)
class ServerState:
    """The params, the server optimizer's state, and what the accountant has to know.

    Attributes:
        taken: Rounds in which each client took part, shape (num_clients,).
        largest: How many took part in a round, at most.
        epsilon: The largest ε of anybody.
    """

    params: Params
    opt_state: Any
    taken: torch.Tensor
    largest: int = 0
    epsilon: float = 0.0


def dp_fedavg(
    num_clients: int,
    /,
    *,
    local: LocalTraining,
    privacy: Mechanism = dp_client(),
    server_optimizer: ServerOptimizer = sgd(1.0),
    weighting: Weighting = "uniform",
) -> FederatedAlgorithm:
    """Federated averaging under differential privacy, of clients or of examples; ε is a metric (McMahan et al., 2018).

    Args:
        num_clients: The size of the population.
        local: How a client trains.
        privacy: Who clips, and who adds noise.
        server_optimizer: What the server does with the mean update.
        weighting: What a client weighs: one, as `dp_client` must have it; its examples; or these in whole batches.
    """
    return privately(num_clients, local, privacy, server_optimizer, weighting)


def privately(
    num_clients: int,
    local: LocalTraining,
    privacy: Mechanism,
    server_optimizer: ServerOptimizer,
    weighting: Weighting = "uniform",
    loss: LossFunction | None = None,
    part: Callable[[Params], Params] | None = None,
) -> FederatedAlgorithm:
    """The same, of a ``part`` of the params, by another ``loss`` than the task's."""
    of_clients, own = privacy.unit == "client", part or dict
    if of_clients and weighting != "uniform":
        raise ValueError(
            f"weighting is {weighting}; dp_client needs uniform, or a client could weigh more than another"
        )
    if privacy.unit is not None:
        accounting()
    grouped = of_clients and loss is None
    aggregator = with_members(norm_bound(privacy.max_norm) if of_clients else mean())

    def client_update(learner: Learner, w: Params, client: Client) -> ClientResult:
        noise, only = None if of_clients else privacy, own(w) if part else None
        y = learner.train(w, client, local, privacy=noise, loss=loss, only=only)
        weight = local.weight(y.num_examples, weighting)
        return ClientResult(subtract(own(w), own(y.params)), weight, {"train_loss": y.loss})

    def init(params: Params) -> ServerState:
        return ServerState(params, server_optimizer.init(own(params)), torch.zeros(num_clients, dtype=torch.int64))

    def spent(state: ServerState, sizes: np.ndarray, members: Sequence[Client]) -> float:
        """The largest ε of anybody, after the round that ``state`` has counted."""
        if of_clients:
            return privacy.epsilon_of_clients(state.largest, num_clients, members[0].round)
        each = {(int(sizes[client.id]), int(state.taken[client.id])) for client in members}
        now = [privacy.epsilon_of_examples(local.rate(n), rounds * local.num_steps(n)) for n, rounds in each]
        return max(state.epsilon, *now)

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        [sizes] = backend.map(lambda learner, _: learner.task.sizes, [None])
        (g, members), metrics = backend.map_reduce(client_update, state.params, cohort, aggregator, grouped=grouped)
        if of_clients:
            generator = torch.Generator().manual_seed(seed_for("noise", *(client.seed for client in members)))
            g = noisy(g, privacy.std / len(members), generator)
        taken = state.taken + torch.bincount(torch.tensor([c.id for c in members]), minlength=num_clients)
        params, opt_state = server_optimizer.apply(g, state.opt_state, own(state.params))
        new = ServerState(state.params | params, opt_state, taken, max(state.largest, len(members)), state.epsilon)
        epsilon: dict[str, Any] = {"epsilon": spent(new, sizes, members)} if privacy.unit else {}  # or no guarantee
        return replace(new, **epsilon), {**metrics, **epsilon}

    return FederatedAlgorithm(init, apply)
