"""Server optimizers of Reddi et al. 2021, "Adaptive Federated Optimization": a pair of functions each.

The server treats g = mean(x - y_i), the weighted mean of what the clients moved, as a gradient of the model x, so
that g is the paper's -Δ_t and every step is subtracted. These are not ``torch.optim``: FedAdam has no bias
correction, v starts at τ² instead of 0, and state is a value that is passed, not an attribute.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fedray.trees import Params, Tree, tree_map, zeros_like


@dataclass(frozen=True)
class ServerOptimizer:
    """A first-order method as two pure functions.

    Attributes:
        init: ``init(params) -> state``, a dict of trees of tensors, so that it can be checkpointed; ``{}`` if none.
        apply: ``apply(gradient, state, params) -> (params, state)``, one step; nothing is changed in place.
    """

    init: Callable[[Params], Tree]
    apply: Callable[[Params, Tree, Params], tuple[Params, Tree]]


def sgd(lr: float = 1.0) -> ServerOptimizer:
    """Gradient descent on the server; with lr 1 the new model is the clients' mean (FedAvg).

    x = x - lr g. McMahan et al. 2017; Reddi et al. 2021, Algorithm 1.

    Args:
        lr: server learning rate η, > 0.
    """
    _check_positive("lr", lr)

    def apply(g: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        return tree_map(lambda x, g: x - lr * g, params, g), state

    return ServerOptimizer(lambda _: {}, apply)


def momentum(lr: float = 1.0, beta: float = 0.9) -> ServerOptimizer:
    """Heavy-ball momentum on the server (FedAvgM).

    v = beta v + g, x = x - lr v, v = 0 at first. Hsu, Qi & Brown 2019, FedAvgM.

    Args:
        lr: server learning rate η, > 0.
        beta: how much of the last velocity is kept, in [0, 1); 0 is sgd.
    """
    _check_positive("lr", lr)
    _check_decay("beta", beta)

    def apply(g: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        v = tree_map(lambda v, g: beta * v + g, state["v"], g)
        return tree_map(lambda x, v: x - lr * v, params, v), {"v": v}

    return ServerOptimizer(lambda params: {"v": zeros_like(params)}, apply)


def adagrad(lr: float = 0.1, beta1: float = 0.0, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdagrad: steps shrink with the sum of all squared gradients.

    v = v + g². Reddi et al. 2021, Algorithm 2.

    Args:
        lr: server learning rate η, > 0; tune it with the clients' rate.
        beta1: decay of the first moment, in [0, 1).
        tau: degree of adaptivity τ, > 0; v starts at τ².
    """
    return _adaptive(lambda v, g: v + g**2, lr, beta1, tau)


def adam(lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdam: steps are scaled by a moving average of squared gradients, without bias correction.

    v = beta2 v + (1 - beta2) g². Reddi et al. 2021, Algorithm 2.

    Args:
        lr: server learning rate η, > 0; tune it with the clients' rate.
        beta1: decay of the first moment, in [0, 1).
        beta2: decay of the second moment, in [0, 1).
        tau: degree of adaptivity τ, > 0; v starts at τ².
    """
    _check_decay("beta2", beta2)
    return _adaptive(lambda v, g: beta2 * v + (1 - beta2) * g**2, lr, beta1, tau)


def yogi(lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """FedYogi: as FedAdam, but v moves towards g² by a step whose size does not depend on v.

    v = v - (1 - beta2) g² sign(v - g²). Reddi et al. 2021, Algorithm 2.

    Args:
        lr: server learning rate η, > 0; tune it with the clients' rate.
        beta1: decay of the first moment, in [0, 1).
        beta2: one minus the step of the second moment, in [0, 1).
        tau: degree of adaptivity τ, > 0; v starts at τ².
    """
    _check_decay("beta2", beta2)
    return _adaptive(lambda v, g: v - (1 - beta2) * g**2 * torch.sign(v - g**2), lr, beta1, tau)


def _adaptive(second_moment: Callable, lr: float, beta1: float, tau: float) -> ServerOptimizer:
    """Algorithm 2 of Reddi et al. 2021; the three methods differ in the line for v only."""
    _check_positive("lr", lr)
    _check_decay("beta1", beta1)
    _check_positive("tau", tau)

    def init(params: Params) -> Tree:
        return {"m": zeros_like(params), "v": tree_map(lambda x: torch.full_like(x, tau**2), params)}

    def apply(g: Params, state: Tree, params: Params) -> tuple[Params, Tree]:
        m = tree_map(lambda m, g: beta1 * m + (1 - beta1) * g, state["m"], g)
        v = tree_map(second_moment, state["v"], g)
        return tree_map(lambda x, m, v: x - lr * m / (v.sqrt() + tau), params, m, v), {"m": m, "v": v}

    return ServerOptimizer(init, apply)


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:  # also refuses nan
        raise ValueError(f"{name} is {value}; it must be > 0 and finite")


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must be >= 0 and < 1")


SERVER_OPTIMIZERS: Mapping[str, Callable[..., ServerOptimizer]] = {
    "sgd": sgd,
    "momentum": momentum,
    "adagrad": adagrad,
    "adam": adam,
    "yogi": yogi,
}
