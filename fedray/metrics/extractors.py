"""Extractors: pictures to features, by which real and synthetic ones are compared."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedray.data import Dataset
from fedray.models import Classifier, hugging_face

Extractor = Callable[[np.ndarray], np.ndarray]  # uint8 of shape (N, C, H, W) to float32 of shape (N, d)

_BLOCK = 128


def transformer(path: str, layer: int | None = None, size: int | None = None) -> Extractor:
    """Class tokens of a vision Transformer of the hub or a local folder, such as DINOv2.

    Args:
        path: Hub id or local folder.
        layer: Blocks that are used; None for all.
        size: Height and width that pictures are resized to; None for the model's own.
    """
    tower = hugging_face.image_tower(hugging_face.load(path), layer)
    mean, std = hugging_face.own_moments(path, tower.config.model_type)
    side = size or tower.config.image_size
    options = {} if side == tower.config.image_size else {"interpolate_pos_encoding": True}
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def features(x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return tower(pixel_values=(x - shift) / scale, **options).last_hidden_state[:, 0]

    return _in_blocks(features)


def torchscript(path: str, size: int | None = None) -> Extractor:
    """Any network that was saved by torch.jit, such as FID's own Inception-v3: RGB in 0..255 to features.

    Args:
        path: The file.
        size: Height and width that pictures are resized to; None to leave them.
    """
    network = torch.jit.load(path, map_location="cpu").eval()

    def features(x: torch.Tensor) -> torch.Tensor:
        if size is not None:
            x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)
        return network(x * 255)

    return _in_blocks(features)


def classifier(data: Dataset, model: Classifier, params: dict[str, torch.Tensor]) -> Extractor:
    """A classifier's representations: a substitute for Inception, comparable with nothing but itself.

    Args:
        data: What it was trained on, for the normalisation.
        model: The classifier.
        params: Its params.
    """
    model.load_state_dict(params, strict=False)
    model.eval()
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))

    def features(x: torch.Tensor) -> torch.Tensor:
        return model.features((x[:, : data.input_shape[0]] - mean) / std)

    return _in_blocks(features)


def _in_blocks(features: Callable[[torch.Tensor], Any]) -> Extractor:
    def extract(x: np.ndarray) -> np.ndarray:
        found = []
        with torch.no_grad():
            for start in range(0, len(x), _BLOCK):
                block = torch.from_numpy(np.array(x[start : start + _BLOCK])).float() / 255
                found.append(features(block.expand(-1, 3, -1, -1)).float().numpy())
        return np.concatenate(found)

    return extract
