"""How a client trains: the options that every algorithm shares, and one step of it."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from fedray.trees import Number, Params

Weighting = Literal["examples", "batches", "uniform"]


@dataclass(frozen=True)
class LocalTraining:
    """How a client trains; the options that every algorithm shares.

    Args:
        local_lr: Learning rate of the clients.
        local_epochs: Passes over a client's examples each round.
        batch_size: Examples a step.
        local_steps: Steps each round, instead of epochs; None for epochs.
        local_optimizer: Optimizer of the clients; its state is new each round.
        local_momentum: Heavy-ball momentum of SGD.
        local_beta1: Decay of Adam's first moment.
        local_nesterov: Nesterov's form of the momentum, as PyTorch has it.
        weight_decay: L2 term of SGD and Adam, decoupled for AdamW.
        max_grad_norm: Clip each step's gradient to this Euclidean norm; None for no clipping.
        local_lr_decay: The learning rate is multiplied by this after every round.
        local_cosine_steps: Half a period of a cosine that the learning rate follows within each round, beginning at its
            top, in steps (GPT-FL's clients: 100); None for a constant rate.
        shuffle: A new random order of the examples each epoch; otherwise their stored order.
    """

    local_lr: float = 0.1
    local_epochs: int = 1
    batch_size: int = 32
    local_steps: int | None = None
    local_optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    local_momentum: float = 0.0
    local_beta1: float = 0.9
    local_nesterov: bool = False
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    local_lr_decay: float = 1.0
    local_cosine_steps: int | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        positive = ("local_lr", "local_epochs", "batch_size", "local_steps", "max_grad_norm", "local_lr_decay")
        for name in (*positive, "local_cosine_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be > 0")
        if not 0 <= self.local_momentum < 1:
            raise ValueError(f"local_momentum is {self.local_momentum}; it must be at least 0 and below 1")
        if self.local_momentum and self.local_optimizer != "sgd":
            raise ValueError(f"local_momentum is {self.local_momentum}; {self.local_optimizer} has no such option")
        if not 0 <= self.local_beta1 < 1:
            raise ValueError(f"local_beta1 is {self.local_beta1}; it must be at least 0 and below 1")
        if self.local_nesterov and not self.local_momentum:
            raise ValueError("local_nesterov is true; it needs local_momentum above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be >= 0")

    @property
    def is_plain_sgd(self) -> bool:
        """Whether a step is the gradient times the learning rate, and nothing else."""
        others = self.local_momentum or self.weight_decay or self.max_grad_norm or self.local_cosine_steps
        return self.local_optimizer == "sgd" and not others

    def lr(self, round: int) -> float:
        """The learning rate of a round (1-based)."""
        return self.local_lr * self.local_lr_decay ** (round - 1)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step of a round (0-based)."""
        if self.local_cosine_steps is None:
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * step / self.local_cosine_steps))

    def num_steps(self, length: int) -> int:
        """Steps of a round on so many examples."""
        return self.local_steps or -(-length // self.batch_size) * self.local_epochs

    def weight(self, num_examples: Number, weighting: Weighting) -> Number:
        """What a client weighs: as many as its examples, these rounded up to whole batches, or one."""
        if weighting == "batches":
            return -(-num_examples // self.batch_size) * self.batch_size
        return num_examples if weighting == "examples" else 1

    def rate(self, length: int) -> float:
        """The expected share of so many examples in a batch."""
        return min(1.0, self.batch_size / length)

    def poisson_batches(self, length: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """The rows of each step's batch, which has each with the same probability; there may be none."""
        for _ in range(self.num_steps(length)):
            yield (torch.rand(length, generator=generator, dtype=torch.float64) < self.rate(length)).nonzero()[:, 0]

    def batches(self, length: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """The rows of each step's batch, out of ``length``; the last of an epoch may be smaller."""
        steps_left = self.num_steps(length)
        while True:
            order = torch.randperm(length, generator=generator) if self.shuffle else torch.arange(length)
            for rows in order.split(self.batch_size):
                yield rows
                steps_left -= 1
                if steps_left == 0:
                    return


@dataclass(frozen=True)
class LocalResult:
    """What local training came to; of a group, params are stacked and numbers are vectors.

    Attributes:
        params: The params after the last step.
        num_steps: Steps made.
        num_examples: Examples that the client holds.
        loss: Mean loss over the steps, each before its update.
    """

    params: Params
    num_steps: Number
    num_examples: Number
    loss: Number


def num_examples(columns: dict[str, torch.Tensor]) -> int:
    """How many examples there are; none is an error."""
    length = len(next(iter(columns.values())))
    if length == 0:
        raise ValueError("there are no examples to train on")
    return length


Gradients = tuple[torch.Tensor, ...] | list[torch.Tensor]
Step = Callable[..., None]


def stepper(
    params: list[torch.Tensor],
    names: Iterable[str],
    start: Params,
    local: LocalTraining,
    round: int,
    correction: Params | None,
    proximal: float,
    stacked: bool = False,
    moments: Params | None = None,
) -> Step:
    """One local step as a function of the gradients; it writes to ``params``.

    Args:
        params: What is trained.
        names: The names of ``params``.
        start: Where training started, for the proximal term.
        local: How to train.
        round: Which round it is, for the learning rate.
        correction: A tree that is added to every gradient, or None.
        proximal: μ of a term μ/2·‖params − start‖².
        stacked: Whether ``params`` are a group's, with a first dimension of clients (``start`` and ``correction``
            may lack it).
        moments: Adam's moments, which it goes on from and writes to; {} to begin with, None to forget them.

    Returns:
        ``step(gradients, active=None)``; of stacked params, ``active`` is 1 for the clients that move and 0 for others.
        A gradient may be None where the backward pass has made its step (`fedray.dense`).
    """
    top, velocity, count = local.lr(round), list[torch.Tensor](), itertools.count()
    names, device = list(names), params[0].device
    anchor = [start[name].to(device) for name in names] if proximal else []
    shift = [correction[name].to(device) for name in names] if correction else []
    library = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}.get(local.local_optimizer)
    settings = {"lr": top, "betas": (local.local_beta1, 0.999), "weight_decay": local.weight_decay}
    optimizer = library(params, **settings) if library else None
    if moments is not None:
        if optimizer is None:
            raise ValueError(f"local_optimizer is {local.local_optimizer}; only adam and adamw have moments to keep")
        _go_on(optimizer, dict(zip(names, params, strict=True)), moments)

    def step(gradients: Gradients, active: torch.Tensor | None = None) -> None:
        lr = top * local.factor(next(count))
        if shift:
            if any(gradient is None for gradient in gradients):
                gradients = [c if g is None else g + c for g, c in zip(gradients, shift, strict=True)]
            else:  # in one kernel on a GPU
                gradients = torch._foreach_add(gradients, shift)
        if proximal:
            gradients = torch._foreach_add(gradients, torch._foreach_sub(params, anchor), alpha=proximal)
        if local.max_grad_norm is not None:
            gradients = clipped(gradients, local.max_grad_norm)
        if optimizer is not None:
            before = [param.clone() for param in params] if active is not None else []
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            if moments is not None:
                moments["steps"] += 1
            if active is not None:
                for param, old in zip(params, before, strict=True):
                    param.copy_(torch.where(rows(active, param) > 0, param, old))
            return
        # torch.optim.SGD's arithmetic without its bookkeeping, which costs as much as a small model's step
        if local.weight_decay:
            gradients = torch._foreach_add(gradients, params, alpha=local.weight_decay)
        if local.local_momentum:
            if velocity:
                torch._foreach_mul_(velocity, local.local_momentum)
                torch._foreach_add_(velocity, gradients)
            else:
                velocity.extend(torch._foreach_mul(gradients, 1.0))
            ahead = local.local_nesterov
            gradients = torch._foreach_add(gradients, velocity, alpha=local.local_momentum) if ahead else velocity
        left = [(p, g) for p, g in zip(params, gradients, strict=True) if g is not None]
        if active is None and left:
            torch._foreach_add_(*map(list, zip(*left, strict=True)), alpha=-lr)
        elif active is not None:
            for param, gradient in left:
                param.addcmul_(gradient, rows(active, param), value=-lr)

    def clipped(gradients: Gradients, max_norm: float) -> Gradients:
        if not stacked:
            norm = torch.nn.utils.get_total_norm(gradients)
            return torch._foreach_mul(gradients, (max_norm / norm.clamp_min(1e-12)).clamp_max(1.0))
        norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
        factors = (max_norm / norms.clamp_min(1e-12)).clamp_max(1.0)
        return [gradient * rows(factors, gradient) for gradient in gradients]

    def rows(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return vector.view(-1, *[1] * (like.dim() - 1))

    return step


def _go_on(optimizer: torch.optim.Optimizer, params: Params, moments: Params) -> None:
    """Let the optimizer's moments be the tensors in ``moments``, which it writes to."""
    moments.setdefault("steps", torch.zeros(()))
    for name, param in params.items():
        first, second = (
            moments.setdefault(f"{name}.{which}", torch.zeros_like(param)) for which in ("first", "second")
        )
        optimizer.state[param] = {"step": moments["steps"].cpu().clone(), "exp_avg": first, "exp_avg_sq": second}
