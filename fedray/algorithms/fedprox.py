"""FedProx (Li et al., 2020, Algorithm 2): FedAvg whose local loss is pulled towards the server's params."""

from fedray.aggregators import Aggregator, mean
from fedray.algorithm import FederatedAlgorithm
from fedray.algorithms.fedavg import fedavg
from fedray.local_training import LocalTraining, Weighting


def fedprox(
    *,
    local: LocalTraining,
    mu: float = 0.01,
    aggregator: Aggregator = mean(),
    weighting: Weighting = "examples",
) -> FederatedAlgorithm:
    """FedAvg with a proximal term μ/2·‖w − x‖² in the clients' loss (Li et al., 2020).

    Args:
        local: How a client trains.
        mu: μ, at least 0; with 0 this is FedAvg.
        aggregator: How updates become one.
        weighting: What a client weighs: its examples, these rounded up to whole batches (FedPEFT's code), or one.
    """
    if mu < 0:
        raise ValueError(f"mu is {mu}; it must be >= 0")
    return fedavg(local=local, aggregator=aggregator, weighting=weighting, proximal=mu)
