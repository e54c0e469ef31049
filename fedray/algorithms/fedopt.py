"""FedOpt (Reddi et al., 2021, Algorithm 2; FedAvgM: Hsu et al., 2019): FedAvg with an adaptive server."""

from fedray import server_optimizers
from fedray.algorithm import FederatedAlgorithm
from fedray.algorithms.fedavg import fedavg
from fedray.local_training import LocalTraining


def fedavgm(*, local: LocalTraining, server_lr: float = 1.0, beta: float = 0.9) -> FederatedAlgorithm:
    """FedAvg with momentum on the server (Hsu et al., 2019).

    Args:
        local: How a client trains.
        server_lr: Learning rate of the server.
        beta: Decay of the momentum.
    """
    return fedavg(local=local, server_optimizer=server_optimizers.momentum(server_lr, beta))


def fedadagrad(
    *, local: LocalTraining, server_lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3
) -> FederatedAlgorithm:
    """FedAvg with Adagrad on the server (Reddi et al., 2021).

    Args:
        local: How a client trains.
        server_lr: Learning rate of the server.
        beta1: Decay of the first moment.
        tau: Degree of adaptivity τ.
    """
    return fedavg(local=local, server_optimizer=server_optimizers.adagrad(server_lr, beta1, tau))


def fedadam(
    *, local: LocalTraining, server_lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> FederatedAlgorithm:
    """FedAvg with Adam on the server, without bias correction (Reddi et al., 2021).

    Args:
        local: How a client trains.
        server_lr: Learning rate of the server.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        tau: Degree of adaptivity τ.
    """
    return fedavg(local=local, server_optimizer=server_optimizers.adam(server_lr, beta1, beta2, tau))


def fedyogi(
    *, local: LocalTraining, server_lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> FederatedAlgorithm:
    """FedAvg with Yogi on the server (Reddi et al., 2021).

    Args:
        local: How a client trains.
        server_lr: Learning rate of the server.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        tau: Degree of adaptivity τ.
    """
    return fedavg(local=local, server_optimizer=server_optimizers.yogi(server_lr, beta1, beta2, tau))
