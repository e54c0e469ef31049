"""What every reference classifier is made of: features, a linear head, and checks that speak."""

import math
from collections.abc import Sequence

import torch
from torch import nn


class Classifier(nn.Module):
    """``head(features(x))``: a representation of shape (N, d), then a linear layer to (N, num_classes).

    The two parts are sub-modules, so their parameters are named ``features.*`` and ``head.*``: MOON compares
    representations, and head-only training selects the parameters by that prefix.

    Args:
        features: maps float inputs (N, *input_shape), already normalised, to (N, width).
        width: d, the length of one representation.
        num_classes: the number of logits.

    Raises:
        ValueError: ``num_classes`` is below 1.
    """

    def __init__(self, features: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(width, positive("num_classes", num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes) of inputs (N, *input_shape)."""
        return self.head(self.features(x))


def positive(name: str, value: int) -> int:
    """``value`` itself, if it is at least 1; else a ValueError that begins with ``name``."""
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be >= 1")
    return value


def all_positive(name: str, values: Sequence[int], length: int | None = None) -> list[int]:
    """``values`` as a list, if each is at least 1 (and there are ``length`` of them); else a ValueError."""
    if length is not None and len(values) != length:
        raise ValueError(f"{name} is {list(values)}; it must have {length} entries")
    if any(value < 1 for value in values):
        raise ValueError(f"{name} is {list(values)}; every entry must be >= 1")
    return list(values)


def flat_size(input_shape: tuple[int, ...]) -> int:
    """The number of values in one example."""
    if not input_shape or min(input_shape) < 1:
        raise ValueError(f"input_shape is {input_shape}; every example must have at least one value")
    return math.prod(input_shape)


def image_shape(input_shape: tuple[int, ...], model: str, least: int) -> tuple[int, int, int]:
    """``input_shape`` as (channels, height, width), if ``model`` can take it.

    Args:
        input_shape: the shape of one example.
        model: the name for the message.
        least: the smallest height and width, in pixels, that survives the model's pooling.

    Raises:
        ValueError: not three sizes, an empty one, or fewer than ``least`` pixels along a side.
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"input_shape is {input_shape}; {model} takes images of shape (channels, height, width); "
            "softmax and mlp take any shape"
        )
    flat_size(input_shape)
    channels, height, width = input_shape
    if min(height, width) < least:
        raise ValueError(
            f"input_shape is {input_shape}; {model} needs images of at least {least} x {least} pixels; "
            "softmax and mlp take any size"
        )
    return channels, height, width
