"""Classifiers on a pre-trained vision Transformer: `features` is its image tower, `head` a new linear layer."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fedray.data.dataset import Dataset
from fedray.models import hugging_face
from fedray.models.classifier import Classifier
from fedray.peft import Method, Tuned
from fedray.peft.methods import full
from fedray.peft.saving import load_adapter

Pool = Literal["cls", "mean"]


@dataclass(frozen=True)
class Images:
    """How a tower is called: images that a task has normalised, to features.

    Attributes:
        size: Height and width that images are resized to.
        patches: How many patches such an image has.
        channels: Channels of the tower's input; grey images are repeated.
        scale: What a task's values are multiplied by, per channel, to be normalised as the tower was trained with.
        shift: What is then added.
        pool: The token that stands for the whole image, or the mean over its patches.
        interpolate: Whether the tower must be told that the size is not its own.
    """

    size: int
    patches: int
    channels: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    pool: Pool
    interpolate: bool

    def __call__(self, tower: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Features (N, width) of images (N, C, H, W)."""
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        scale, shift = (x.new_tensor(values).view(-1, 1, 1) for values in (self.scale, self.shift))
        return self.through(tower, x.expand(-1, self.channels, -1, -1) * scale + shift)

    def through(self, tower: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Features of images that are as the tower wants them."""
        out = tower(pixel_values=x, **({"interpolate_pos_encoding": True} if self.interpolate else {}))
        if self.pool == "mean":
            return out.last_hidden_state[:, -self.patches :].mean(1)
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state[:, 0] if pooled is None else pooled


def pretrained(
    data: Dataset,
    /,
    path: str,
    method: Method = full,
    weights: Literal["pretrained", "random"] = "pretrained",
    image_size: int | None = None,
    pool: Pool = "cls",
    layer: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    adapter: str | None = None,
) -> nn.Module:
    """A pre-trained vision Transformer (ViT, DINOv2, CLIP's image tower ...) with a new linear head.

    Images are resized and grey ones repeated to three channels; the task's normalisation is undone and the model's own
    applied instead. The head is always trained and sent.

    Args:
        path: A Hugging Face hub id, or a local folder, which needs no network.
        method: Which part of the pre-trained model is trained and sent.
        weights: The pre-trained ones, or random ones in the same architecture.
        image_size: Height and width that images are resized to, in pixels; None for the model's own.
        pool: Features are the class token's, or the mean over the patches.
        layer: Blocks that are used, counted from the input; the others are left out. None for all.
        mean: Channel means of the model's training images, in 0..1; None for what the model says.
        std: Channel deviations, likewise.
        adapter: A folder that peft or `fedray export` saved, which training starts from; its kind must be the method's.
    """
    model = hugging_face.load(path) if weights == "pretrained" else hugging_face.blank(path)
    tower = hugging_face.image_tower(model, layer)
    own_mean, own_std = hugging_face.own_moments(path, tower.config.model_type)
    images = images_for(tower, data, image_size, pool, mean or own_mean, std or own_std)
    made = classifier(tower, data.num_classes, method, images)
    if adapter is not None:
        load_adapter(made.get_submodule("features.trunk"), made.head, adapter)
    return made


def classifier(
    tower: Any, num_classes: int, method: Method, images: Callable[..., torch.Tensor] | None = None
) -> Classifier:
    """A tower, tuned by a method, under a new linear head.

    Args:
        tower: The pre-trained image tower, which this changes.
        num_classes: Classes of the head.
        method: Which part of the tower is trained.
        images: How the tower is called; None if it will not be, as a model on the device "meta".
    """
    tuned = Tuned(tower, method, images)
    own_what_is_trained(tuned)
    return Classifier(tuned, tower.config.hidden_size, num_classes)


def own_what_is_trained(module: nn.Module) -> None:
    """Give trained parameters memory of their own, which `hugging_face.load` lets models share."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()


def images_for(
    tower: Any, data: Dataset, image_size: int | None, pool: Pool, mean: Sequence[float], std: Sequence[float]
) -> Images:
    """How a tower is called with a dataset's images.

    Raises:
        ValueError: the data are no images, or the size does not suit the tower.
    """
    config = tower.config
    channels, patch = config.num_channels, config.patch_size
    size: int = config.image_size if image_size is None else image_size
    if len(data.input_shape) != 3 or data.input_shape[0] not in (1, channels):
        raise ValueError(f"path names a model of images; {data.name} has examples of shape {data.input_shape}")
    if size < patch or size % patch:
        raise ValueError(f"image_size is {size}; it must be a multiple of {patch}, the size of a patch")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != channels or (name == "std" and min(values) <= 0):
            raise ValueError(f"{name} is {list(values)}; it must be {channels} numbers, and deviations positive")
    mine = [(data.mean[i % len(data.mean)], data.std[i % len(data.std)]) for i in range(channels)]
    scale = tuple(s / to for (_, s), to in zip(mine, std, strict=True))
    shift = tuple((m - to) / by for (m, _), to, by in zip(mine, mean, std, strict=True))
    takes = inspect.signature(tower.forward).parameters
    interpolate = size != config.image_size and "interpolate_pos_encoding" in takes
    return Images(size, (size // patch) ** 2, channels, scale, shift, pool, interpolate)
