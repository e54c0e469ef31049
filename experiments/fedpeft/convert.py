"""A vision Transformer's checkpoint under timm's names (timm, MoCo v3, MAE, DINO) to a folder that ``path`` may name.

    python experiments/fedpeft/convert.py vit-b-300ep.pth.tar moco_v3

The folder is transformers': config.json, model.safetensors, preprocessor_config.json. Every tensor of the Transformer
must have a place, and every place a tensor; what is of a head, a decoder or a second encoder is named and left out.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fedray.errors import FedrayError
from fedray.models import hugging_face

MOMENTS = {"imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), "half": ([0.5] * 3, [0.5] * 3)}
PREFIXES = ("", "module.base_encoder.", "module.momentum_encoder.", "module.", "base_encoder.", "encoder.", "backbone.")
OUTSIDE = ("head", "fc_norm", "fc.", "pre_logits", "decoder", "mask_token")
EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
Tensors = dict[str, torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a file of torch.save or of safetensors")
    parser.add_argument("folder", type=Path, help="which is made")
    parser.add_argument("--heads", type=int, help="attention heads, which no tensor tells; default: width / 64")
    parser.add_argument("--eps", type=float, default=1e-6, help="of the LayerNorms; default: 1e-6, timm's")
    parser.add_argument("--moments", choices=MOMENTS, default="imagenet", help="of the colours; half is AugReg's")
    options = parser.parse_args()
    try:
        left_out = convert(options.file, options.folder, options.heads, options.eps, options.moments)
    except (FedrayError, OSError, ValueError) as error:
        sys.exit(f"{options.file}: {error}")
    print(f"{options.folder} is made; left out: {', '.join(left_out) or 'nothing'}")


def convert(
    file: Path, folder: Path, heads: int | None = None, eps: float = 1e-6, moments: str = "imagenet"
) -> list[str]:
    """Write the folder, and return the names that have no place in it.

    Raises:
        ValueError: the file holds no such Transformer.
    """
    prefix, tensors = transformer(read(file))
    inside = {name: tensor for name, tensor in tensors.items() if not name.startswith(OUTSIDE)}
    width, channels, patch, _ = inside["patch_embed.proj.weight"].shape
    if heads is None and width % 64:
        raise ValueError(f"how many heads a width of {width} has cannot be guessed; give --heads")
    side = round((inside["pos_embed"].shape[1] - 1) ** 0.5) * patch
    config = {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        "hidden_size": width,
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in inside),
        "num_attention_heads": heads or width // 64,
        "intermediate_size": len(inside.get("blocks.0.mlp.fc1.bias", [])),
        "image_size": side,
        "patch_size": patch,
        "num_channels": channels,
        "layer_norm_eps": eps,
        "qkv_bias": "blocks.0.attn.qkv.bias" in inside,
    }
    mean, std = MOMENTS[moments]
    size = {"height": side, "width": side}
    shown = {"image_processor_type": "ViTImageProcessor", "image_mean": mean, "image_std": std, "size": size}
    if folder.exists():
        raise ValueError(f"{folder} is there already; name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as place:
        made = Path(place, folder.name)
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (made / "preprocessor_config.json").write_text(json.dumps(shown, indent=2) + "\n")
        save_file(dict(renamed(inside)), made / "model.safetensors", {"format": "pt"})
        hugging_face.load(str(made))  # an error if a tensor has no place, or a place no tensor
        made.rename(folder)
    return sorted(name for name in tensors if name not in inside) + ([f"all outside of {prefix}*"] if prefix else [])


def read(file: Path) -> Tensors:
    """The tensors of a file, by name.

    Raises:
        ValueError: it is no such file.
    """
    try:
        found: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"it holds more or less than tensors ({' '.join(str(error).split())[:200]})") from error
    for name in ("state_dict", "model"):
        found = found.get(name, found) if isinstance(found, dict) else {}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, torch.Tensor)}


def transformer(tensors: Tensors) -> tuple[str, Tensors]:
    """The prefix of the names of the Transformer that is in there, and its tensors without it."""
    for prefix in PREFIXES:
        if f"{prefix}patch_embed.proj.weight" in tensors and f"{prefix}pos_embed" in tensors:
            return prefix, {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    some = ", ".join(list(tensors)[:3])
    raise ValueError(
        f"it has no patch_embed.proj.weight and pos_embed, but {some} ...: no vision Transformer of timm's"
    )


def renamed(tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Names that transformers knows from its published checkpoints; unknown ones stay, and are refused there."""
    for name, tensor in tensors.items():
        block, _, rest = name.removeprefix("blocks.").partition(".")
        layer, _, kind = rest.rpartition(".")
        if not name.startswith("blocks."):
            yield EMBEDDINGS.get(name, name), tensor.contiguous()
        elif layer == "attn.qkv":
            for which, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                yield f"encoder.layer.{block}.attention.attention.{which}.{kind}", part.contiguous()
        else:
            yield f"encoder.layer.{block}.{BLOCK.get(layer, layer)}.{kind}", tensor.contiguous()


if __name__ == "__main__":
    main()
