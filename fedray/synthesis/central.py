"""Training on synthetic data in one place, before or between rounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fedray.algorithm import EVERYONE, Backend, Client, Metrics
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.trees import Params


@dataclass(frozen=True)
class CentralTraining:
    """How the server trains on synthetic data (GPT-FL's released code: AdamW at 1e-4, weight decay 0.9, cosine).

    Args:
        central_epochs: Passes over the synthetic data.
        central_lr: Learning rate at the start.
        central_batch_size: Examples a step.
        central_optimizer: Optimizer.
        central_momentum: Of SGD.
        central_weight_decay: L2 term of SGD and Adam, decoupled for AdamW.
        central_schedule: Whether the learning rate falls to 0 along a cosine, or is constant.
    """

    central_epochs: int = 20
    central_lr: float = 1e-3
    central_batch_size: int = 32
    central_optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    central_momentum: float = 0.0
    central_weight_decay: float = 0.1
    central_schedule: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        for name in ("central_epochs", "central_lr", "central_batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be > 0")

    def local(self, length: int, epochs: int) -> LocalTraining:
        """The same as the local training of one client with so many examples."""
        steps = -(-length // self.central_batch_size) * epochs
        return LocalTraining(
            local_lr=self.central_lr,
            local_epochs=epochs,
            batch_size=self.central_batch_size,
            local_optimizer=self.central_optimizer,
            local_momentum=self.central_momentum,
            weight_decay=self.central_weight_decay,
            local_cosine_steps=steps if self.central_schedule == "cosine" else None,
        )


def train_centrally(
    start: Params, columns: dict[str, np.ndarray], central: CentralTraining, backend: Backend, seed: int, epochs: int
) -> tuple[Params, Metrics]:
    """Train from ``start`` on examples that the server holds; the params, and the mean loss of the steps."""
    if epochs == 0:
        return start, {}
    local = central.local(len(columns["y"]), epochs)
    [(params, loss)] = backend.map(_train, [(start, columns, local, seed)])
    return params, {"synthetic_loss": loss}


def _train(learner: Learner, item: tuple[Params, dict[str, np.ndarray], LocalTraining, int]) -> tuple[Params, float]:
    start, columns, local, seed = item
    tensors = {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}
    result = learner.train(start, Client(EVERYONE, seed), local, examples=tensors)
    return result.params, float(result.loss)


def about(learner: Learner, _: Any) -> tuple[tuple[str, ...], Sequence[int], int]:
    """The task's classes, the shape of an example, and how many examples all clients hold."""
    task: Any = learner.task
    return task.data.classes, task.data.input_shape, int(task.sizes.sum())
