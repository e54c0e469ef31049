"""Dense layers, in one client's model or in a group's, whose weights plain SGD can step within the backward pass.

With a small batch it takes longer to write a weight's gradient, which is as large as the weight, and to read it again
for the step, than to compute it. The backward pass can add it straight to the weight, which it has just read.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

_LEAST = 1 << 16  # numbers of a single client's weight, below which its gradient is written in no time


class StepInBackward:
    """The steps that the backward pass of one batch makes itself; their weights then have no gradient.

    A weight that is multiplied by more than once waits for its whole gradient.
    """

    def __init__(self) -> None:
        self._lr: float | None = None
        self._uses: Counter[int] = Counter()  # how often each weight has been multiplied by

    def uses(self, weight: torch.Tensor) -> None:
        """Take note of a product with this weight."""
        self._uses[id(weight)] += 1

    def make(self, weight: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> bool:
        """Make the step of a weight whose gradient is dyᵀ x; or not, and return False."""
        if self._lr is None or self._uses[id(weight)] != 1:
            return False
        (weight.addmm_ if weight.dim() == 2 else weight.baddbmm_)(dy.mT, x, alpha=-self._lr)
        return True

    def grad(self, loss: torch.Tensor, params: Sequence[torch.Tensor], lr: float | None) -> tuple[Any, ...]:
        """The gradients of a loss, and the steps on the way to them.

        Args:
            loss: What the noted products led to.
            params: What to return the gradients of: zeros for what has none, or None where there may have been a step.
            lr: Learning rate of the steps; None for no steps.
        """
        self._lr = lr  # only now: a loss may compute gradients of its own
        return torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=lr is None)


def dense(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, early: StepInBackward) -> torch.Tensor:
    """x Wᵀ + b.

    Args:
        x: (n, in), or (clients, n, in).
        weight: (out, in), or (clients, out, in).
        bias: (out,), or each client's own (clients, out); or None.
        early: What the backward pass may make of the weight's step.
    """
    # autocast casts what PyTorch's own operations get and their gradients, but knows nothing of ours
    mixed = torch.is_autocast_enabled(x.device.type)
    y: torch.Tensor = _product(x, weight, bias) if mixed else _Dense.apply(x, weight, bias, early)
    return y


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, early: StepInBackward
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.early = early
        early.uses(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (dy,), (x, weight) = outputs, ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None  # before the weight's step
        dw = db = None
        if ctx.needs_input_grad[1] and not ctx.early.make(weight, dy, x):
            dw = dy.mT @ x  # in the weight's own layout, which makes the step cheaper
        if ctx.needs_input_grad[2]:
            db = dy.sum(-2)
        return dx, dw, db, None


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if bias is None:
        return x @ weight.mT
    if weight.dim() == 2:
        return torch.addmm(bias, x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(-2), x, weight.mT)


def dense_layers(model: nn.Module, params: Sequence[torch.Tensor]) -> list[nn.Linear]:
    """The dense layers of a model whose weights, among these params, the backward pass can step to advantage."""
    trained = {id(p) for p in params}
    return [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and id(layer.weight) in trained
        and layer.weight.numel() >= _LEAST
        # whoever changes a weight's gradient, or how a layer computes, is not passed by
        and not (layer.weight._backward_hooks or "forward" in layer.__dict__)
    ]


@contextmanager
def stepping(layers: Sequence[nn.Linear], early: StepInBackward) -> Iterator[None]:
    """Within, what these layers compute has a backward pass that may step their weights."""
    for layer in layers:
        layer.__dict__["forward"] = partial(_forward, layer, early)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _forward(layer: nn.Linear, early: StepInBackward, x: torch.Tensor) -> torch.Tensor:
    return dense(x.reshape(-1, x.shape[-1]), layer.weight, layer.bias, early).view(*x.shape[:-1], -1)
