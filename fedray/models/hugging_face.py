"""Hugging Face models from the hub or a local folder: loaded strictly, read from disk once a process.

A folder needs no network. A missing, superfluous or misshapen tensor is an error, except for the head that a
checkpoint was trained with and for a pooler, which are not used. Checkpoints with the module names of older
transformers are converted by transformers itself.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedray.errors import ConfigError, DataError
from fedray.peft import blocks_of

_HEADS = ("classifier", "cls_classifier", "distillation_classifier", "lm_head", "head", "fc_norm")
_NOT_USED = (*_HEADS, "pooler", "decoder")
_SHOWN = 3  # names in a message
_MOST_HELD = 2
Key = tuple[str, str]  # the path of a model, and what of transformers makes it
_HELD: dict[Key, tuple[nn.Module, list[int]]] = {}  # with how often its tensors had been written to


def transformers() -> Any:
    """The library transformers, or a message that says how to install it."""
    try:
        import transformers
    except ImportError:
        raise ConfigError("pre-trained models need the package 'transformers': pip install 'fedray[peft]'") from None
    return transformers


def load(path: str, auto: str = "AutoModel") -> nn.Module:
    """A pre-trained model with nothing trained, in float32, as transformers' class ``auto`` makes it.

    The models of a process share the memory of these tensors, so they must not be written in place: a tensor that is
    to be trained is cloned first. (One that was written to all the same is read from disk again.)

    Raises:
        DataError: there is no such model, or its tensors are not those that its configuration asks for.
    """
    key = (path, auto)
    model, versions = _HELD.get(key, (None, []))
    if model is None or _versions(model) != versions:
        model = _read(path, auto)
        hold({key: model})
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared)


def held() -> dict[Key, nn.Module]:
    """The pre-trained models that this process holds."""
    return {key: model for key, (model, _) in _HELD.items()}


def hold(models: Mapping[Key, nn.Module]) -> None:
    """Let `load` find these models, which it would read from disk; such as those in memory that processes share."""
    for key, model in models.items():
        _HELD.pop(key, None)
        _HELD[key] = model, _versions(model)
    while len(_HELD) > _MOST_HELD:
        del _HELD[next(iter(_HELD))]


def save_changed(path: str, weights: Mapping[str, torch.Tensor], folder: Path, auto: str = "AutoModel") -> Path:
    """Save the model of ``path`` with other weights in some places, as ``from_pretrained`` loads it, to ``folder``."""
    model: Any = load(path, auto)
    for name, weight in weights.items():
        model.get_parameter(name).data = weight  # replaced, not written to: other models share what was there
    with _quietly(transformers()):
        model.save_pretrained(folder)
    file = _preprocessing(path)
    if file is not None:
        shutil.copy(file, folder)
    return folder


def blank(path: str, auto: str = "AutoModel") -> nn.Module:
    """A model as the configuration at ``path`` describes it, with parameters drawn from the global generator."""
    return getattr(transformers(), auto).from_config(configuration(path), dtype=torch.float32)


def image_tower(model: nn.Module, layer: int | None = None) -> Any:
    """The part of a model that takes images, with its first ``layer`` blocks (all if None), and without a pooler.

    Raises:
        ValueError: it takes no images, or has no such layer; the message begins with the option's name.
    """
    trunk: Any = getattr(model, "vision_model", model)
    if getattr(trunk, "main_input_name", None) != "pixel_values":
        raise ValueError(f"path names a {type(model).__name__}, which takes no images; give a vision Transformer")
    if getattr(trunk, "pooler", None) is not None:
        trunk.pooler = None  # a layer that was trained for another head
    if layer is not None:
        blocks = blocks_of(trunk)
        if not 1 <= layer <= len(blocks):
            raise ValueError(f"layer is {layer}; it must be between 1 and {len(blocks)}, the blocks that there are")
        del blocks[layer:]
    return trunk


@lru_cache
def own_moments(path: str, model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the channels that a model was trained with, of pixels in 0..1.

    From its ``preprocessor_config.json``; without one, those of the model type's authors, or ImageNet's.
    """
    utils, file = transformers().utils, _preprocessing(path)
    found = json.loads(Path(file).read_text()) if file else {}
    if "image_mean" in found and "image_std" in found:
        return tuple(found["image_mean"]), tuple(found["image_std"])
    authors = "IMAGENET_STANDARD" if model_type in ("vit", "siglip", "siglip_vision_model") else "IMAGENET_DEFAULT"
    authors = "OPENAI_CLIP" if model_type.startswith("clip") else authors
    mean, std = (getattr(utils.constants, f"{authors}_{what}") for what in ("MEAN", "STD"))
    return tuple(mean), tuple(std)


def file(path: str, name: str) -> str:
    """Where a file of a hub id or of a local folder is on this machine.

    Raises:
        DataError: there is no such file, or the hub is out of reach.
    """
    try:
        return transformers().utils.cached_file(path, name, local_files_only=_local(path))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise DataError(
            f"{path} has no {name} ({why}); give a file, a folder, or a hub id that can be reached"
        ) from error


def _preprocessing(path: str) -> str | None:
    """The file that says how a model's images were prepared, if it has one."""
    try:
        return transformers().utils.cached_file(
            path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False, local_files_only=_local(path)
        )
    except OSError:
        return None


def _versions(model: nn.Module) -> list[int]:
    """How often each parameter has been written to."""
    return [p._version for p in model.parameters()]


def _read(path: str, auto: str) -> nn.Module:
    library, config = transformers(), configuration(path)
    try:
        with torch.random.fork_rng(), _quietly(library):  # whether it is read or remembered must not be felt
            model, found = getattr(library, auto).from_pretrained(
                path, config=config, dtype=torch.float32, output_loading_info=True, local_files_only=_local(path)
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
    prefix = f"{model.base_model_prefix}."
    for what, names in (("lacks", found["missing_keys"]), ("has no place for", found["unexpected_keys"])):
        unused = _NOT_USED if auto == "AutoModel" else ()
        wrong = sorted(name for name in names if not name.removeprefix(prefix).startswith(unused))
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            subject = "its weights lack" if what == "lacks" else f"a {type(model).__name__} has no place for"
            raise DataError(
                f"{path} is not what its config.json says: {subject} {', '.join(wrong[:_SHOWN])}{more}; "
                "restore the folder, or save the model again with save_pretrained"
            )
    return model.requires_grad_(False).eval()


@lru_cache  # of a hub id, transformers asks the hub every time
def configuration(path: str) -> Any:
    """A model's configuration.

    Raises:
        DataError: there is none.
    """
    library = transformers()
    try:
        config = library.AutoConfig.from_pretrained(path, local_files_only=_local(path))
    except (OSError, ValueError) as error:
        hint = "give a hub id, or a folder that holds config.json and model.safetensors"
        raise DataError(f"{path} has no model configuration ({' '.join(str(error).split())}); {hint}") from error
    if config.model_type != "vit_mae":
        return config
    # a masked autoencoder drops patches at random, and its encoder is a ViT, tensor by tensor
    given = {key: value for key, value in config.to_dict().items() if key in library.ViTConfig().to_dict()}
    return library.ViTConfig(**{key: given[key] for key in given.keys() - {"model_type", "architectures"}})


def _local(path: str) -> bool:
    return Path(path).is_dir()


@contextmanager
def _quietly(library: Any) -> Any:
    """Without a progress bar for every worker, and without the notes on what this module checks itself."""
    logging = library.utils.logging
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()
