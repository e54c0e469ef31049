"""Every example's own gradient, which differential privacy clips, and the noisy gradients made of them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fedray.local_training import Gradients
from fedray.privacy import Mechanism, clipped_sum, noisy
from fedray.seeds import seed_for
from fedray.stacked import StackedModel
from fedray.trees import Params

if TYPE_CHECKING:
    from fedray.learner import Columns, LossFunction

_AT_ONCE = 1 << 25  # elements of examples' gradients in memory at a time

BatchOf = Callable[[torch.Tensor], "Columns"]
GradientsOf = Callable[[BatchOf, torch.Tensor], tuple[torch.Tensor, Gradients]]  # of rows: mean loss, and gradients


def one_by_one(gradients_of: GradientsOf, batch_of: BatchOf, rows: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
    """The loss of each row, shape (n,), and gradients, each (n, ...): a backward pass for every row."""
    found = [gradients_of(batch_of, row) for row in rows.split(1)]
    losses, gradients = zip(*found, strict=True)
    return torch.stack(losses), [torch.stack(each) for each in zip(*gradients, strict=True)]


def together(
    model: StackedModel,
    trained: Params,
    params: Params,
    losses: "LossFunction",
    batch_of: BatchOf,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, Gradients]:
    """The same in one backward pass: a group in which every example is a client, and all have the same params.

    ``params`` are those among the ``trained`` whose gradients are asked for.
    """
    # views of the params: only their gradients take the memory of so many copies
    stacked = {
        name: p.detach().expand(len(rows), *p.shape).requires_grad_(name in params) for name, p in trained.items()
    }
    each = model.run(stacked, losses, batch_of(rows))
    gradients = torch.autograd.grad(each.sum(), [stacked[name] for name in params], materialize_grads=True)
    return each.detach(), gradients


def private(
    gradients_of: GradientsOf,
    examples_gradients_of: GradientsOf,
    params: Params,
    mechanism: Mechanism,
    expected: float,
    seed: int,
) -> GradientsOf:
    """Gradients as a mechanism makes them (of a batch without rows, too).

    Args:
        gradients_of: Of rows, the mean loss and its gradients.
        examples_gradients_of: Of rows, each one's loss and gradients.
        params: What is trained.
        mechanism: One with noise at every local step.
        expected: Expected rows of a batch.
        seed: The client's; the noise's own seed is derived from it.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "noise"))
    at_once = max(1, _AT_ONCE // sum(p.numel() for p in params.values()))

    def batch_noise(batch_of: BatchOf, rows: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
        loss, gradients = gradients_of(batch_of, rows)
        return loss, [noisy(g, mechanism.std, generator) for g in gradients]

    def dp_sgd(batch_of: BatchOf, rows: torch.Tensor) -> tuple[torch.Tensor, Gradients]:
        total = [torch.zeros_like(p) for p in params.values()]
        loss = torch.zeros((), device=total[0].device)
        for part in rows.split(at_once) if len(rows) else ():
            losses, gradients = examples_gradients_of(batch_of, part)
            torch._foreach_add_(total, clipped_sum(gradients, mechanism.max_norm))
            loss += losses.sum()
        return loss / max(1, len(rows)), [noisy(g, mechanism.std, generator) / expected for g in total]

    return dp_sgd if mechanism.unit == "example" else batch_noise
