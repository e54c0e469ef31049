"""MOON (Li et al., 2021, Algorithm 1): model-contrastive learning for classification.

A client pulls its representation z towards the global model's, and away from its own previous model's.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fedray.aggregators import mean
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.algorithms.fedavg import ServerState
from fedray.learner import Columns, Learner
from fedray.local_training import LocalTraining
from fedray.trees import Params, subtract


def moon(*, local: LocalTraining, mu: float = 1.0, temperature: float = 0.5) -> FederatedAlgorithm:
    """Contrast of local, global and previous representations; clients keep state (Li et al., 2021).

    The representations of the two fixed models are computed once a round, on the examples as stored.

    Args:
        local: How a client trains.
        mu: μ, weight of the contrastive loss, at least 0.
        temperature: τ of the contrastive loss, above 0.
    """
    if mu < 0:
        raise ValueError(f"mu is {mu}; it must be >= 0")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be > 0")

    def loss(model: torch.nn.Module, batch: Columns) -> torch.Tensor:
        z = model.features(batch["x"])  # type: ignore[operator]
        to_global = F.cosine_similarity(z, batch["z_global"]) / temperature
        to_previous = F.cosine_similarity(z, batch["z_previous"]) / temperature
        contrastive = F.softplus(to_previous - to_global).mean()  # −log(e^g / (e^g + e^p))
        return F.cross_entropy(model.head(z), batch["y"]) + mu * contrastive  # type: ignore[operator]

    def client_update(learner: Learner, x: Params, client: Client) -> ClientResult:
        previous = x if client.state is None else client.state
        examples = learner.task.examples(client.id)
        z = {"z_global": learner.features(x, examples), "z_previous": learner.features(previous, examples)}
        y = learner.train(x, client, local, loss=loss, examples={**examples, **z})
        return ClientResult(subtract(x, y.params), y.num_examples, {"train_loss": y.loss}, state=y.params)

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        gradient, metrics = backend.map_reduce(client_update, state.params, cohort, mean(), keeps_state=True)
        return ServerState(subtract(state.params, gradient), {}), metrics

    return FederatedAlgorithm(lambda x: ServerState(x, {}), apply)
