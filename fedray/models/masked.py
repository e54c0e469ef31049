"""Models whose weights are frozen at random, and of which a binary mask is learnt (FedPM, Isik et al., 2023; PRISM).

A weight w has a score s, and is kept with probability θ = sigmoid(s): every forward pass draws a mask m ~ Bern(θ) and
uses w·m. The scores are the only parameters that are trained, so they are all that an algorithm meets.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

ModelBuilder = Callable[[tuple[int, ...], int], nn.Module]
Frozen = Literal["signed_constant", "kaiming_normal", "fedpm"]
Scores = Literal["normal", "uniform", "kaiming_uniform"]
Mode = Literal["stochastic", "top_k", "threshold"]


@dataclass(frozen=True)
class Masking:
    """How a model is masked.

    Args:
        frozen: The weights: ± sqrt(2 / fan_in) (PRISM), normal with that deviation, or ± e·sqrt(1 / fan_in) (FedPM).
        scores: The first scores: standard normal, uniform in ±0.1, or uniform in ± sqrt(1 / fan_in).
        mode: Whether a mask is drawn, keeps the largest |s| of each tensor, or all of θ > 1/2.
        keep: Share of weights that top_k keeps.
        scaled_gradient: Multiply a drawn mask's gradient by θ, as the released code of both papers does.
    """

    frozen: Frozen = "signed_constant"
    scores: Scores = "normal"
    mode: Mode = "stochastic"
    keep: float = 0.5
    scaled_gradient: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is {self.keep}; it must be above 0 and at most 1")


def mask(model: nn.Module, masking: Masking = Masking()) -> nn.Module:
    """Freeze a model at random weights and give it scores, in place.

    Every Conv2d, ConvTranspose2d and Linear is masked; their biases become 0, and all other parameters are frozen as
    they are. Random numbers are torch's global ones, so a seed gives everybody the same weights.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in list(model.modules()):
        if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            continue
        weight: Any = layer.weight
        weight.data = _frozen(weight, masking.frozen)
        if layer.bias is not None:
            layer.bias.data.zero_()
        parametrize.register_parametrization(layer, "weight", Masked(weight, masking))
    return model


def _frozen(weight: torch.Tensor, kind: Frozen) -> torch.Tensor:
    fan_in = _fan_in(weight)
    std = math.sqrt(2 / fan_in) if kind != "fedpm" else math.e * math.sqrt(1 / fan_in)
    drawn = torch.randn_like(weight)
    return drawn * std if kind == "kaiming_normal" else drawn.sign() * std


def _fan_in(weight: torch.Tensor) -> int:
    return nn.init._calculate_fan_in_and_fan_out(weight)[0]


class Masked(nn.Module):
    """The scores of one tensor of weights, and what they make of it."""

    def __init__(self, weight: torch.Tensor, masking: Masking) -> None:
        super().__init__()
        bound = 0.1 if masking.scores == "uniform" else _fan_in(weight) ** -0.5
        drawn = torch.randn_like(weight) if masking.scores == "normal" else torch.rand_like(weight) * 2 * bound - bound
        self.scores = nn.Parameter(drawn)
        self.masking = masking
        self.fixed: torch.Tensor | None = None  # a mask that is used instead

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weights under a mask."""
        s, how = self.scores, self.masking
        if self.fixed is not None:
            return weight * self.fixed
        if how.mode == "stochastic":
            theta = torch.sigmoid(s)
            mask = torch.bernoulli(theta.detach())
            return weight * straight(mask, theta * theta.detach() if how.scaled_gradient else theta)
        return weight * straight(self.probabilities(), s if how.mode == "threshold" else s.abs())

    def probabilities(self) -> torch.Tensor:
        """With which each weight is kept; zeros and ones unless masks are drawn."""
        s = self.scores.detach()
        if self.masking.mode == "stochastic":
            return s.sigmoid()
        if self.masking.mode == "threshold":
            return (s > 0).to(s.dtype)
        kept = max(1, round(self.masking.keep * s.numel()))
        return (s.abs() >= s.abs().flatten().kthvalue(s.numel() - kept + 1).values).to(s.dtype)


def straight(mask: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """The mask, whose gradient goes to ``source`` as it is (Bengio et al., 2013)."""
    return mask + (source - source.detach())


def probabilities(model: nn.Module) -> dict[str, torch.Tensor]:
    """With which a masked model's weights are kept, in the order of its scores."""
    return {str(number): layer.probabilities() for number, layer in enumerate(masked_layers(model))}


@contextmanager
def under(model: nn.Module, bits: torch.Tensor | None) -> Iterator[None]:
    """Let every forward pass use one mask of all weights, in the order of the model's scores; None for its own."""
    layers, start = masked_layers(model), 0
    for layer in layers:
        if bits is not None:
            layer.fixed = bits[start : start + layer.scores.numel()].view_as(layer.scores).to(layer.scores.device)
            start += layer.scores.numel()
    try:
        yield
    finally:
        for layer in layers:
            layer.fixed = None


def unmask(model: nn.Module, bits: torch.Tensor) -> nn.Module:
    """A plain model, in place: frozen weights times a fixed mask, without scores.

    Args:
        model: A masked one.
        bits: The mask of all its weights, in the order of the model's scores.
    """
    with under(model, bits):
        for layer in list(model.modules()):
            if parametrize.is_parametrized(layer, "weight"):
                parametrize.remove_parametrizations(layer, "weight")
    return model


def masked_layers(model: nn.Module) -> list[Masked]:
    """The scores of all masked tensors, in their order; none of a model without masks."""
    return [module for module in model.modules() if isinstance(module, Masked)]


def masked(
    input_shape: tuple[int, ...], num_classes: int, /, of: ModelBuilder, masking: Masking = Masking()
) -> nn.Module:
    """Another model with frozen random weights, of which a mask is learnt: FedPM (Isik et al., 2023), with `prism`.

    Args:
        input_shape: The shape of one example.
        num_classes: Classes.
        of: The model.
        masking: How it is masked.
    """
    return mask(of(input_shape, num_classes), masking)
