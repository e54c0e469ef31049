"""Fixed networks whose activations a generator's pictures have to match, and are compared by."""

import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fedray.data.dataset import Dataset
from fedray.models import hugging_face, scripted, state_dicts
from fedray.models.pictures import in_range

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of its colours, in 0..1


@dataclass(frozen=True, eq=False)
class FeatureMaps:
    """A network that is built where it is needed.

    Attributes:
        name: What reports call it; figures under different ones are not comparable.
        build: A module; it takes pictures (N, 1 or 3, H, W) in -1..1 and returns features to match, (N, F), and
            features to compare by, (N, d).
    """

    name: str
    build: Callable[[], nn.Module]

    def on(self, device: torch.device) -> nn.Module:
        """The network on a device, in evaluation mode; built once a process."""
        return _built(self, device)


@lru_cache(maxsize=2)
def _built(maps: FeatureMaps, device: torch.device) -> nn.Module:
    with torch.random.fork_rng():
        return maps.build().to(device).requires_grad_(False)


class _Cnn(nn.Module):
    """Three convolutions with pooling, and a linear layer to classes."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        widths = [channels, width, 2 * width, 4 * width]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.head = nn.Linear(4 * width, classes)

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in self.layers:
            x = F.relu(layer(x))
            found.append(x)
            x = F.avg_pool2d(x, 2)
        return found

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.maps(x)[-1].mean((2, 3)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = self.maps(x)
        return torch.cat([each.flatten(1) for each in found], 1), found[-1].mean((2, 3))


def small_cnn(
    shape: tuple[int, ...],
    /,
    data: Dataset,
    width: int = 16,
    epochs: int = 3,
    seed: int = 0,
    cache: str = "~/.cache/fedray/features",
) -> FeatureMaps:
    """A small classifier, trained here and now on public pictures: a substitute for VGG19, and labelled so.

    Args:
        shape: (C, H, W) of a picture.
        data: Public data that no client holds, such as a `public_split` with part=public.
        width: Channels of the first of three layers.
        epochs: Passes over the data.
        seed: Seed of the weights and of the order.
        cache: Folder of what was trained, for this run and others.
    """
    from safetensors.torch import load, save

    x, y = (np.array(data.train[name], order="C") for name in ("x", "y"))  # PyTorch wants to be able to write
    asked = f"{shape} {x.shape} {zlib.crc32(x.data)} {zlib.crc32(y.data)} {width} {epochs} {seed} {torch.__version__}"
    file = Path(cache).expanduser() / f"{hashlib.sha256(asked.encode()).hexdigest()[:40]}.safetensors"
    classes = data.num_classes
    if not file.is_file():
        network = _trained(
            _Cnn(shape[0], classes, width), shape[-1], torch.from_numpy(x), torch.from_numpy(y), epochs, seed
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(f".{os.getpid()}")
        half.write_bytes(save(network.state_dict()))
        half.replace(file)
    content = np.frombuffer(file.read_bytes(), np.uint8)  # an array, which workers share

    def build() -> nn.Module:
        made = _Cnn(shape[0], classes, width)
        made.load_state_dict(load(content.tobytes()))
        return made.eval()

    return FeatureMaps("substitute CNN", build)


def _trained(network: _Cnn, size: int, x: torch.Tensor, y: torch.Tensor, epochs: int, seed: int) -> _Cnn:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whose number would be seen in the bits
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in (*network.layers, network.head):
                layer.reset_parameters()
            optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
            for _ in range(epochs):
                for rows in torch.randperm(len(y)).split(128):
                    loss = F.cross_entropy(network.logits(in_range(x[rows], size)), y[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
    finally:
        torch.set_num_threads(threads)
    return network


def vgg19_bn(
    shape: tuple[int, ...],
    /,
    path: str = "timm/vgg19_bn.tv_in1k",
    batch_statistics: bool = True,
    normalized: bool = False,
) -> FeatureMaps:
    """VGG19 with BatchNorm (torchvision's ImageNet weights): all 16 ReLU maps, as PRISM and GFMN have it.

    A narrower network, whose first layer says how narrow, is taken too, and named so.

    Args:
        shape: (C, H, W) of a picture; H and W are at least 32.
        path: A safetensors file of torchvision's state_dict, or a hub id or local folder with a model.safetensors
            whose ``features.*`` are named so, as timm's are.
        batch_statistics: BatchNorm works by the batch, as in both released codes, and not by ImageNet's statistics.
        normalized: Colours are normalised as ImageNet's, as in GFMN; PRISM's code does so with generated ones only.
    """
    if min(shape[1:]) < 32:
        raise ValueError("features is vgg19_bn, which halves pictures five times; give pictures of at least 32×32")
    file = path if Path(path).is_file() else hugging_face.file(path, "model.safetensors")
    weights = state_dicts.read(file, "vgg19_bn")
    kept = {name: tensor for name, tensor in weights.items() if name.startswith("features.")}
    width = len(kept.get("features.0.weight", range(64)))
    with torch.device("meta"):
        expected = Vgg19(width).state_dict()
    kept = state_dicts.fitted(kept, expected, path, "vgg19_bn")

    def build() -> nn.Module:
        network = Vgg19(width, normalized)
        network.load_state_dict(kept)
        return network.train(batch_statistics)

    return FeatureMaps("VGG19-BN" if width == 64 else f"VGG19-BN of width {width}", build)


class Vgg19(nn.Module):
    """The convolutions of VGG19 with BatchNorm, under torchvision's names.

    Args:
        width: Channels of the first layer; 64 in the paper (Simonyan and Zisserman, 2015).
        normalized: Normalise colours as ImageNet's.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, width: int = 64, normalized: bool = False) -> None:
        super().__init__()
        moments = _IMAGENET if normalized else ((0.5,) * 3, (0.5,) * 3)
        for name, values in zip(("mean", "std"), moments, strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        layers: list[nn.Module] = []
        before = 3
        for times, depth in ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4)):
            for _ in range(depth):
                after = times * width
                layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
                before = after
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All ReLU maps (N, F), F = 303,104 at 32×32; and the last one's mean (N, 512)."""
        x, found = ((x.expand(-1, 3, -1, -1) + 1) / 2 - self.mean) / self.std, []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x)
        return torch.cat([each.flatten(1) for each in found], 1), found[-1].mean((2, 3))


def vision_transformer(shape: tuple[int, ...], /, path: str, layer: int | None = None, size: int = 56) -> FeatureMaps:
    """Tokens of a vision Transformer of the hub or a local folder, such as DINOv2-small.

    Args:
        shape: (C, H, W) of a picture.
        path: Hub id or local folder.
        layer: Blocks that are used; None for all.
        size: Height and width that pictures are resized to.
    """

    def build() -> nn.Module:
        return _Tower(hugging_face.image_tower(hugging_face.load(path), layer), path, size)

    build()  # a folder that is none says so now
    return FeatureMaps(path.rstrip("/").rpartition("/")[2], build)


class _Tower(nn.Module):
    def __init__(self, tower: Any, path: str, size: int) -> None:
        super().__init__()
        self.tower, self.size = tower, size
        mean, std = hugging_face.own_moments(path, tower.config.model_type)
        self.mean, self.std = (nn.Buffer(torch.tensor(values).view(-1, 1, 1)) for values in (mean, std))
        self.options = {"interpolate_pos_encoding": True} if size != tower.config.image_size else {}

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = F.interpolate(x.expand(-1, 3, -1, -1), (self.size, self.size), mode="bilinear", align_corners=False)
        tokens = self.tower(pixel_values=((x + 1) / 2 - self.mean) / self.std, **self.options).last_hidden_state
        return tokens.flatten(1), tokens[:, 0]


def torchscript(shape: tuple[int, ...], /, path: str, size: int | None = None) -> FeatureMaps:
    """Any network that was saved by torch.jit, such as FID's own Inception-v3: RGB in 0..255 to features (N, d).

    Args:
        shape: (C, H, W) of a picture.
        path: The file.
        size: Height and width that pictures are resized to; None to leave them.
    """
    scripted.load(path)  # a file that is none says so now
    return FeatureMaps(Path(path).stem, lambda: _Scripted(path, size))


class _Scripted(nn.Module):
    def __init__(self, path: str, size: int | None) -> None:
        super().__init__()
        self.size, self.network = size, scripted.load(path)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = (x.expand(-1, 3, -1, -1) + 1) * 127.5
        if self.size is not None:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        features = self.network(x).flatten(1)
        return features, features


FEATURE_MAPS: dict[str, Callable[..., FeatureMaps]] = {
    "small_cnn": small_cnn,
    "torchscript": torchscript,
    "vgg19_bn": vgg19_bn,
    "vision_transformer": vision_transformer,
}
