"""Residual networks (He et al. 2016) for small images, with group norm by default.

Batch norm suffers under label skew (Hsieh et al. 2020), and its running statistics are buffers, not
parameters that are averaged; so the default is group norm with two groups, as Reddi et al. 2021 train ResNet-18.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from fedray.models.classifier import Classifier, image_shape, positive

Norm = Literal["group", "batch"]
Stem = Literal["3x3", "7x7"]


def resnet18(
    input_shape: tuple[int, ...],
    num_classes: int,
    /,
    norm: Literal["group", "batch"] = "group",
    groups: int = 2,
    stem: Literal["3x3", "7x7"] = "3x3",
) -> nn.Module:
    """ResNet-18 with group norm; 11,173,962 parameters on CIFAR-10.

    He et al. 2016, table 1, with 1x1 projections where the shape changes (option B).

    Args:
        norm: group norm, or batch norm, whose running statistics are not averaged with the parameters.
        groups: groups of channels in every group norm; must divide 64; unused with batch norm.
        stem: 3x3 keeps the resolution of small images; 7x7 with stride 2 and a max pool is the ImageNet one.
    """
    if stem not in get_args(Stem):
        raise ValueError(f"stem is {stem!r}; it must be '3x3' or '7x7'")
    large = stem == "7x7"
    channels, _, _ = image_shape(input_shape, f"resnet18 with a {stem} stem", least=32 if large else 8)
    layer = norm_layer(norm, groups, narrowest=64)
    first = nn.Conv2d(channels, 64, 7, 2, 3, bias=False) if large else _conv3x3(channels, 64)
    pool = [nn.MaxPool2d(3, 2, 1)] if large else []
    stem_layers = nn.Sequential(first, layer(64), nn.ReLU(), *pool)
    return _resnet(stem_layers, [64, 128, 256, 512], 2, layer, _Projection, num_classes)


def resnet20(
    input_shape: tuple[int, ...],
    num_classes: int,
    /,
    norm: Literal["group", "batch"] = "group",
    groups: int = 2,
) -> nn.Module:
    """ResNet-20 of the CIFAR family with group norm; 269,722 parameters on CIFAR-10.

    He et al. 2016, section 4.2, n = 3, with shortcuts that have no parameters (option A): where the shape changes,
    every second pixel, and zeros for the new channels.

    Args:
        norm: group norm, or batch norm, whose running statistics are not averaged with the parameters.
        groups: groups of channels in every group norm; must divide 16; unused with batch norm.
    """
    channels, _, _ = image_shape(input_shape, "resnet20", least=4)
    layer = norm_layer(norm, groups, narrowest=16)
    stem_layers = nn.Sequential(_conv3x3(channels, 16), layer(16), nn.ReLU())
    return _resnet(stem_layers, [16, 32, 64], 3, layer, _ZeroPadding, num_classes)


NormLayer = Callable[[int], nn.Module]


def norm_layer(norm: str, groups: int, narrowest: int) -> NormLayer:
    """A function of the number of channels, all of which are multiples of ``narrowest``."""
    if norm not in get_args(Norm):
        raise ValueError(f"norm is {norm!r}; it must be 'group' or 'batch'")
    if norm == "batch":
        return nn.BatchNorm2d
    if narrowest % positive("groups", groups):
        raise ValueError(f"groups is {groups}; it must divide {narrowest}, which divides the channels of every layer")
    return lambda channels: nn.GroupNorm(groups, channels)


def _conv3x3(before: int, after: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=False)  # the norm after it has the bias


class _Projection(nn.Sequential):
    """Option B: a 1x1 convolution, normalised."""

    def __init__(self, before: int, after: int, stride: int, layer: NormLayer) -> None:
        super().__init__(nn.Conv2d(before, after, 1, stride, bias=False), layer(after))


class _ZeroPadding(nn.Module):
    """Option A: every ``stride``-th pixel, and zeros for the new channels."""

    def __init__(self, before: int, after: int, stride: int, _layer: NormLayer) -> None:
        super().__init__()
        self.stride, self.extra = stride, after - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (He et al. 2016, figure 2)."""

    def __init__(self, before: int, after: int, stride: int, layer: NormLayer, shortcut: Callable) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv3x3(before, after, stride), layer(after)
        self.conv2, self.norm2 = _conv3x3(after, after), layer(after)
        same = before == after and stride == 1
        self.shortcut: nn.Module = nn.Identity() if same else shortcut(before, after, stride, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def _resnet(
    stem: nn.Module, widths: list[int], blocks: int, layer: NormLayer, shortcut: Callable, num_classes: int
) -> nn.Module:
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    before = widths[0]
    for i, width in enumerate(widths, start=1):
        stage = []
        for block in range(blocks):
            stride = 2 if i > 1 and block == 0 else 1
            stage.append(_BasicBlock(before, width, stride, layer, shortcut))
            before = width
        layers[f"stage{i}"] = nn.Sequential(*stage)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    return Classifier(nn.Sequential(layers), before, num_classes)
