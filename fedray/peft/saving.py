"""LoRA, IA3 and soft prompts in peft's own format, which ``PeftModel.from_pretrained`` loads and a run starts from.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``, as peft writes them, and ``head.safetensors``
with the classification head, which peft does not know of.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedray.errors import DataError
from fedray.peft.library import ADAPTER_NAME

CONFIG, WEIGHTS, HEAD = "adapter_config.json", "adapter_model.safetensors", "head.safetensors"
_PREFIX = "base_model.model."
_SOFT_PROMPT, _SAVED_PROMPT = "soft_prompt.embedding.weight", "prompt_embeddings"  # the parameter; what peft calls it
_HEADS = ("classifier.", "head.")  # as peft saves a head, with modules_to_save
_OLD = ("attention.attention.query", "attention.attention.key", "attention.attention.value", "attention.output.dense")


def save_adapter(trunk: nn.Module, head: nn.Module | None, folder: Path, base: str, inside: str = "") -> None:
    """Write a trunk's LoRA, IA3 or soft prompt to a folder.

    Args:
        trunk: A module that `lora`, `ia3` or `soft_prompt` made.
        head: The head, whose state is written beside; None for none.
        folder: Where to; made if it is not there.
        base: The hub id or folder of the base model, for ``adapter_config.json``.
        inside: Where the trunk is in the base model, such as ``vision_model.``.

    Raises:
        DataError: the trunk was tuned by another method, which peft has no format for.
    """
    config = _config_of(trunk)
    if config is None:
        raise DataError("the model was not tuned by lora, ia3 or soft_prompt, and peft has a format for these only")
    tensors = {_saved(name, inside): p.detach().contiguous().cpu() for name, p in _adapter_tensors(trunk).items()}
    settings = {name: sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
    for option in ("target_modules", "feedforward_modules"):
        if settings.get(option):
            settings[option] = sorted(f"{inside}{name}" for name in settings[option])
    settings |= {"base_model_name_or_path": base, "inference_mode": True}
    if is_language_model(trunk):
        settings["task_type"] = "CAUSAL_LM"  # so that AutoPeftModelForCausalLM finds the base by itself
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2, default=str) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if head is not None:
        save_file({name: t.detach().contiguous().cpu() for name, t in head.state_dict().items()}, folder / HEAD)


def load_adapter(trunk: nn.Module, head: nn.Module, folder: str | Path) -> None:
    """Copy a folder's LoRA, IA3 or soft prompt into a trunk, and its head, if it has one, into the head.

    Raises:
        DataError: the folder is not complete, its adapter is of another kind, rank or scale than the trunk's, or its
            tensors are not those of the trunk; nothing is changed then.
    """
    folder = Path(folder).expanduser()
    settings, tensors = _read(folder)
    config = _config_of(trunk)
    if config is None:
        raise DataError(f"adapter is {folder}, which peft saved; the method must be lora, ia3 or soft_prompt")
    _check_same_kind(folder, settings, config)
    own = _adapter_tensors(trunk)
    prefix = f"{getattr(trunk, 'base_model_prefix', '')}."
    by_name: dict[str, torch.Tensor] = {}
    heads: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name.startswith(_HEADS):
            heads[name.rpartition(".")[2]] = tensor
            continue
        stripped = (name.removeprefix(before) for before in ("", prefix, "vision_model."))
        by_name[next((short for short in stripped if _live(short) in own), name)] = tensor
    found = {_live(name): tensor for name, tensor in by_name.items()}
    _check_same_names(folder, found.keys(), own.keys())
    if (folder / HEAD).is_file():
        heads = _tensors(folder / HEAD)
    pairs = [(name, own[name], tensor) for name, tensor in found.items()]
    own_head = dict(head.named_parameters())
    if heads and heads.keys() != own_head.keys():
        raise DataError(f"{folder} has a head of {sorted(heads)}; this model's has {sorted(own_head)}")
    pairs += [(f"head.{name}", own_head[name], tensor) for name, tensor in heads.items()]
    for name, parameter, tensor in pairs:
        if parameter.shape != tensor.shape:
            raise DataError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}, this model's {tuple(parameter.shape)}; "
                "the base model and the classes must be those that it was trained with"
            )
    with torch.no_grad():
        for _, parameter, tensor in pairs:
            parameter.copy_(tensor)


def is_language_model(trunk: nn.Module) -> bool:
    """Whether a pre-trained module continues text."""
    can_generate = getattr(trunk, "can_generate", None)
    return can_generate is not None and bool(can_generate())


def _config_of(trunk: nn.Module) -> Any:
    """The configuration that peft left in a module that it adapted, or None."""
    return getattr(trunk, "peft_config", {}).get(ADAPTER_NAME)


def _adapter_tensors(trunk: nn.Module) -> dict[str, nn.Parameter]:
    marks = (".lora_", ".ia3_", _SOFT_PROMPT)
    return {name: p for name, p in trunk.named_parameters() if any(mark in name for mark in marks)}


def _saved(name: str, inside: str) -> str:
    """The name in peft's files of a live parameter: the adapter's own name is left out."""
    if name == _SOFT_PROMPT:
        return _SAVED_PROMPT
    return f"{_PREFIX}{inside}{name.replace(f'.{ADAPTER_NAME}', '')}"


def _live(name: str) -> str:
    """The name of the live parameter for a name without the adapter's."""
    if name == _SAVED_PROMPT:
        return _SOFT_PROMPT
    return name.removesuffix(".weight") + f".{ADAPTER_NAME}.weight" if ".lora_" in name else f"{name}.{ADAPTER_NAME}"


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise DataError(
                f"adapter is {folder}, which has no {file}; give a folder that peft's save_pretrained wrote"
            )
    try:
        settings = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise DataError(f"{folder / CONFIG} is not JSON ({error}); save the adapter again") from error
    return settings, _tensors(folder / WEIGHTS)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors has its own class of errors, and the file system has others
        raise DataError(f"{path} cannot be read ({error}); save the adapter again") from error


def _check_same_kind(folder: Path, settings: dict[str, Any], config: Any) -> None:
    kind = str(settings.get("peft_type", "")).lower()
    wanted = str(config.peft_type.value).lower()
    if kind != wanted:
        raise DataError(f"adapter is {folder}, of {kind or 'no kind'}; the method is {wanted}: the two must agree")
    options = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rank_stabilised"} if wanted == "lora" else {}
    options |= {"num_virtual_tokens": "length"} if wanted == "prompt_tuning" else {}
    for key, option in options.items():
        if settings.get(key) != getattr(config, key):
            raise DataError(
                f"adapter is {folder}, whose {option} is {settings.get(key)}, while method.{option} is "
                f"{getattr(config, key)}; give task.model.method.{option}={settings.get(key)}"
            )


def _check_same_names(folder: Path, found: Iterable[str], own: Iterable[str]) -> None:
    superfluous, missing = sorted(set(found) - set(own)), sorted(set(own) - set(found))
    if any(old in name for name in superfluous for old in _OLD):
        raise DataError(
            f"{folder} has the module names of transformers before version 5, such as {superfluous[0]}; "
            "load it there, and save it again with today's names"
        )
    for what, names in (("lacks", missing), ("has, and the model has no place for,", superfluous)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(f"{folder} {what} {names[0]}{more}; method.targets must be what it was trained with")
