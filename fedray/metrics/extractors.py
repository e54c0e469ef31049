"""Extractors: examples to features, by which real and synthetic ones are compared; features are computed once."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedray.errors import DataError
from fedray.learner import Learner
from fedray.models import hugging_face, scripted
from fedray.trees import Params

logger = logging.getLogger(__name__)

# a direct translation of the TensorFlow graph that defines FID, as StyleGAN and clean-fid use it
INCEPTION = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"

_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Extractor:
    """A network whose features stand for examples.

    Attributes:
        name: What reports call it; figures under different ones are not comparable.
        identity: Everything that features depend on beside the examples, as JSON values: the cache is keyed by it.
        extract: Examples (N, ...), pictures as uint8 of shape (N, C, H, W), to float32 features (N, d).
    """

    name: str
    identity: Sequence[Any]
    extract: Callable[[np.ndarray], np.ndarray]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Features (N, d) of examples (N, ...)."""
        return self.extract(x)


def features(extractor: Extractor, x: np.ndarray, cache: str | Path | None) -> np.ndarray:
    """Features of examples, which are computed once: the cache knows them by the network's and the examples' content.

    Args:
        extractor: What makes them.
        x: The examples.
        cache: Folder of features, for this call and others; None to compute them.
    """
    if cache is None:
        return extractor(x)
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save

    file = Path(cache).expanduser() / f"{_key(extractor, x)}.features.safetensors"
    if file.is_file():
        try:
            return load_file(file)["features"]
        except (SafetensorError, OSError, KeyError) as error:
            logger.warning("%s is damaged (%s) and will be computed again", file, error)
    found = np.ascontiguousarray(extractor(x), np.float32)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(f".{os.getpid()}")
        half.write_bytes(save({"features": found}))
        half.replace(file)
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error.strerror or error}); choose another cache") from error
    return found


def _key(extractor: Extractor, x: np.ndarray) -> str:
    about = json.dumps([extractor.name, *extractor.identity, torch.__version__, str(x.dtype), x.shape])
    return hashlib.sha256(about.encode() + np.ascontiguousarray(x).tobytes()).hexdigest()[:40]


def inception(path: str | None = None) -> Extractor:
    """FID's own Inception-v3, pooled features (2,048): what FID and KID in papers are measured by.

    Args:
        path: The TorchScript file inception-2015-12-05.pt of StyleGAN and clean-fid; None to fetch it (96 MB) once.
    """
    if path is None:
        path = _fetched(INCEPTION)
    network, content = _scripted(path)

    def pooled(x: torch.Tensor) -> torch.Tensor:
        return network(x * 255, return_features=True)  # it resizes as TensorFlow did

    return Extractor("Inception-v3 of FID", [content], _of_pictures(pooled))


def _fetched(url: str) -> str:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / url.rpartition("/")[2]
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), progress=False)
        except OSError as error:
            raise DataError(
                f"{url} cannot be fetched ({error}); bring the file here and give extractor.path=FILE, or leave the "
                "extractor out: a classifier's representations are a substitute"
            ) from error
    return str(file)


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

    def token(x: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        return tower(pixel_values=(x - shift) / scale, **options).last_hidden_state[:, 0]

    name = f"{Path(path).name}{'' if layer is None else f' (block {layer})'}"
    return Extractor(name, [content_of(tower.state_dict()), side, mean, std], _of_pictures(token))


def torchscript(path: str, size: int | None = None) -> Extractor:
    """Any network that was saved by torch.jit: RGB in 0..255 to features.

    Args:
        path: The file.
        size: Height and width that pictures are resized to; None to leave them.
    """
    network, content = _scripted(path)

    def called(x: torch.Tensor) -> torch.Tensor:
        if size is not None:
            x = F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)
        return network(x * 255)

    return Extractor(Path(path).name, [content, size], _of_pictures(called))


def _scripted(path: str) -> tuple[Any, str]:
    """A network of torch.jit, and a hash of its file."""
    return scripted.load(path), hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()


def representations(learner: Learner, params: Params, name: str) -> Extractor:
    """A classifier's representations: a substitute for Inception, comparable with nothing but itself.

    Args:
        learner: Of the task that it was trained for.
        params: Its params.
        name: What reports call it.
    """
    task: Any = learner.task
    identity = [content_of(params), str(learner.model), list(task.data.mean), list(task.data.std)]

    def extract(x: np.ndarray) -> np.ndarray:
        columns = {"x": torch.from_numpy(np.array(x)), "y": torch.zeros(len(x), dtype=torch.int64)}
        return learner.features(params, columns).float().cpu().numpy()

    return Extractor(name, identity, extract)


def content_of(params: Params) -> str:
    """A hash of tensors, their names and their shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(params.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _of_pictures(network: Callable[[torch.Tensor], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of RGB pictures in 0..1, as one of uint8 pictures with one channel or three, a block at a time."""

    def extract(x: np.ndarray) -> np.ndarray:
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3):
            raise DataError(
                f"examples are {x.dtype} of shape {x.shape[1:]}; this extractor takes pictures: leave it out"
            )
        found = []
        with torch.no_grad():
            for start in range(0, len(x), _BLOCK):
                block = torch.from_numpy(np.array(x[start : start + _BLOCK])).float() / 255
                found.append(network(block.expand(-1, 3, -1, -1)).float().numpy())
        return np.concatenate(found)

    return extract


EXTRACTORS: dict[str, Callable[..., Extractor]] = {
    "inception": inception,
    "transformer": transformer,
    "torchscript": torchscript,
}
