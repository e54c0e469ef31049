"""A compiled training step: one fused program for the loss of a batch and its gradients."""

from typing import TYPE_CHECKING, Any

import torch

from fedray.errors import FedrayError
from fedray.precision import InBfloat16
from fedray.trees import Params

if TYPE_CHECKING:
    from fedray.learner import Columns, LossFunction, Task


class CompiledStep:
    """Mean loss and gradients of batches of one size, by ``torch.compile``.

    Smaller batches are filled up with examples that count nothing, so there is one program and its bits do not
    depend on which sizes came first. PyTorch keeps compiled code on disk, for the next process and the next run.

    Args:
        task: Whose loss; a mean over examples that do not know of each other.
        model: A scratch model; its parameters are read at every call.
        trained: Its trained parameters by name.
        size: Examples of a batch.
    """

    def __init__(self, task: "Task", model: torch.nn.Module, trained: Params, size: int) -> None:
        assert task.losses is not None  # or compiling would have been refused
        self._task, self._params, self._size = task, trained, size
        self._whole = whole = _Losses(task.losses, model)

        def mean(params: dict[str, torch.Tensor], batch: "Columns", weights: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(whole, params, (batch, weights))

        self._step: Any = torch.compile(torch.func.grad_and_value(mean), fullgraph=True, dynamic=False)
        self._is_checked = False

    def rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of a batch, filled up to its size."""
        return rows if len(rows) == self._size else rows[torch.arange(self._size) % len(rows)]

    def __call__(self, batch: "Columns", count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The mean loss and the gradients, by name, of the first ``count`` examples of a batch that is filled up.

        Raises:
            FedrayError: the step cannot be compiled, or not rightly.
        """
        device = next(iter(batch.values())).device
        weights = torch.arange(self._size, device=device).lt(count) / count
        params = {f"model.{name}": p.detach() for name, p in self._params.items()}
        try:
            found, loss = self._step(params, batch, weights)
        except Exception as error:
            if self._is_checked:
                raise
            raise FedrayError(
                f"this model's training step cannot be compiled ({' '.join(str(error).split())[:300]}); "
                "set compile=false, or see that there is a C++ compiler (g++ or clang++)"
            ) from error
        gradients = {name: found[f"model.{name}"] for name in self._params}
        if not self._is_checked:
            self._check({name: column[:count] for name, column in batch.items()}, [loss, *gradients.values()])
            self._is_checked = True
        return loss, gradients

    def _check(self, batch: "Columns", found: list[torch.Tensor]) -> None:
        """Once, compare with what the model itself computes, if it draws no random numbers."""
        model = self._whole.model
        if any(isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules()):
            return
        loss = self._task.loss(model, batch)
        plain = [loss.detach(), *torch.autograd.grad(loss, list(self._params.values()), materialize_grads=True)]
        tolerance = 0.1 if isinstance(self._task, InBfloat16) else 0.01
        whole = torch.stack([each.norm() for each in plain]).norm()  # a bias may have a gradient of rounding alone
        off = [(a - b).norm() > tolerance * (b.norm() + 0.1 * whole) for a, b in zip(found, plain, strict=True)]
        if any(off):
            raise FedrayError("compiled, this model's training step computes something else; set compile=false")


class _Losses(torch.nn.Module):
    def __init__(self, losses: "LossFunction", model: torch.nn.Module) -> None:
        super().__init__()
        self.losses, self.model = losses, model

    def forward(self, batch: "Columns", weights: torch.Tensor) -> torch.Tensor:
        return (self.losses(self.model, batch).view(len(weights), -1).mean(1) * weights).sum()
