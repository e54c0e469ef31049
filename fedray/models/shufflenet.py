"""ShuffleNet V2 (Ma et al. 2018): the small convolutional network that FedPEFT compares its Transformers with."""

from collections import OrderedDict
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from fedray.models import state_dicts
from fedray.models.classifier import Classifier, image_shape, positive
from fedray.models.resnet import NormLayer, norm_layer

_NETWORK = "shufflenet_v2_x0_5"
_STAGES = {"stage2": (48, 4), "stage3": (96, 8), "stage4": (192, 4)}  # channels and units at half the width


def shufflenet(
    input_shape: tuple[int, ...],
    num_classes: int,
    /,
    weights: str | None = None,
    image_size: int | None = None,
    norm: Literal["group", "batch"] = "group",
    groups: int = 2,
) -> nn.Module:
    """ShuffleNet V2 of half the width, with group norm; 444,292 parameters for 100 classes.

    Ma et al. 2018, table 5. FedPEFT (Sun et al. 2022) trains all of it, from torchvision's weights.

    Args:
        weights: A safetensors file of the state_dict of torchvision's shufflenet_v2_x0_5, which has batch norm; its
            classifier is left out. None for random ones.
        image_size: Height and width that images are resized to, in pixels; None for their own.
        norm: group norm, or batch norm, whose running statistics are not averaged with the parameters.
        groups: groups of channels in every group norm; must divide 8; unused with batch norm.
    """
    channels, _, _ = image_shape(input_shape, "shufflenet", least=1)
    layer = norm_layer(norm, groups, narrowest=8)  # 24, 48, 96 and 1,024 channels
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if image_size is not None:
        layers["resize"] = _Resize(positive("image_size", image_size))
    layers["conv1"] = nn.Sequential(nn.Conv2d(channels, 24, 3, 2, 1, bias=False), layer(24), nn.ReLU())
    layers["maxpool"] = nn.MaxPool2d(3, 2, 1)
    before = 24
    for name, (after, units) in _STAGES.items():
        following = (_Unit(after, after, 1, layer) for _ in range(units - 1))
        layers[name] = nn.Sequential(_Unit(before, after, 2, layer), *following)
        before = after
    layers["conv5"] = _pointwise(before, 1024, layer)
    layers["pool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    model = Classifier(nn.Sequential(layers), 1024, num_classes)
    if weights is not None:
        if norm != "batch":
            raise ValueError(f"norm is {norm!r}, but weights are those of batch norm; set norm=batch")
        kept = {name: t for name, t in state_dicts.read(weights, _NETWORK).items() if not name.startswith("fc.")}
        network = f"{_NETWORK} of {channels} channels"
        model.features.load_state_dict(state_dicts.fitted(kept, model.features.state_dict(), weights, network))
    return model


class _Resize(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)


class _Unit(nn.Module):
    """Figure 3 (c) and (d): half of the channels pass, the others are convolved, then both are shuffled.

    With stride 2 all channels go both ways. The branches have torchvision's names.
    """

    def __init__(self, before: int, after: int, stride: int, layer: NormLayer) -> None:
        super().__init__()
        self.splits, half = stride == 1, after // 2
        entering = half if self.splits else before
        passed = [] if self.splits else [*_depthwise(before, stride, layer), *_pointwise(before, half, layer)]
        self.branch1 = nn.Sequential(*passed)
        self.branch2 = nn.Sequential(
            *_pointwise(entering, half, layer), *_depthwise(half, stride, layer), *_pointwise(half, half, layer)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, 1) if self.splits else (x, x)
        return F.channel_shuffle(torch.cat([self.branch1(left), self.branch2(right)], 1), 2)


def _pointwise(before: int, after: int, layer: NormLayer) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 1, bias=False), layer(after), nn.ReLU())


def _depthwise(channels: int, stride: int, layer: NormLayer) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), layer(channels))
