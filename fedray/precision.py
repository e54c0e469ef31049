"""Mixed precision: forward passes in bfloat16 where PyTorch deems it safe; parameters and updates stay float32."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fedray.learner import Columns, LossFunction, Task


class InBfloat16:
    """A task whose losses and evaluation are computed under autocast (Micikevicius et al., 2018); no loss is scaled,
    since bfloat16 has the range of float32.

    Args:
        task: The task.
        device: Where it is computed.
    """

    def __init__(self, task: "Task", device: torch.device) -> None:
        self._task, self._device = task, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, model: torch.nn.Module, batch: "Columns") -> torch.Tensor:
        """The task's mean loss."""
        return self.mixed(self._task.loss)(model, batch)

    @property
    def losses(self) -> "LossFunction | None":
        """The task's loss of each example, if it has such a thing."""
        return None if self._task.losses is None else self.mixed(self._task.losses)

    def evaluate(self, model: torch.nn.Module, batch: "Columns") -> dict[str, Any]:
        """The task's sums over a batch."""
        return self.mixed(self._task.evaluate)(model, batch)

    def mixed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of a model and a batch, such as an algorithm's own loss, under autocast."""

        def under_autocast(model: torch.nn.Module, batch: "Columns") -> Any:
            with torch.autocast(self._device.type, torch.bfloat16):
                return function(model, batch)

        return under_autocast
