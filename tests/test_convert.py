"""Checkpoints under timm's names become folders that compute the same, or are refused by name."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fedray.errors import DataError
from fedray.models import hugging_face

pytest.importorskip("transformers")
SCRIPT = Path(__file__).parents[1] / "experiments" / "fedpeft" / "convert.py"
_spec = importlib.util.spec_from_file_location("fedpeft_convert", SCRIPT)
assert _spec is not None
assert _spec.loader is not None
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)
WIDTH, HEADS, DEPTH, PATCH = 8, 2, 2, 4


def checkpoint() -> dict[str, torch.Tensor]:
    """A Transformer for 8 × 8 images under timm's names, and a head."""
    draw = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 5, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "head.weight": (7, WIDTH),
    }
    for i in range(DEPTH):
        linear = {"attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.fc1": (16, 8), "mlp.fc2": (8, 16)}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"blocks.{i}.{name}.bias": shape[:1] for name, shape in linear.items()}
        shapes |= {f"blocks.{i}.norm{k}.{kind}": (WIDTH,) for k in (1, 2) for kind in ("weight", "bias")}
    shapes |= {"norm.weight": (WIDTH,), "norm.bias": (WIDTH,)}
    return {name: torch.randn(shape, generator=draw) * 0.5 for name, shape in shapes.items()}


def tokens(w: dict[str, torch.Tensor], x: torch.Tensor, eps: float) -> torch.Tensor:
    """What a vision Transformer makes of images (Dosovitskiy et al. 2021, equations 1 to 4), written out."""

    def layer(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    patches = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=PATCH)
    h = torch.cat([w["cls_token"].expand(len(x), -1, -1), patches.flatten(2).transpose(1, 2)], 1) + w["pos_embed"]
    for i in range(DEPTH):
        qkv = layer(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", h))
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5, -1) @ v
        h = h + layer(f"blocks.{i}.attn.proj", mixed.transpose(1, 2).flatten(2))
        hidden = F.gelu(layer(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", h)))
        h = h + layer(f"blocks.{i}.mlp.fc2", hidden)
    return norm("norm", h)


def saved(tensors: dict[str, Any], file: Path) -> Path:
    if file.suffix == ".safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file)
    return file


def moco(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The layout of MoCo v3's pre-training: two encoders, the second of which lags behind."""
    base = {f"module.base_encoder.{name}": tensor for name, tensor in tensors.items()}
    lagging = {f"module.momentum_encoder.{name}": tensor + 1 for name, tensor in tensors.items()}
    return {"epoch": 300, "state_dict": {**lagging, **base, "module.predictor.0.weight": torch.zeros(2)}}


LAYOUTS = {
    "timm.safetensors": lambda tensors: tensors,
    "mae.pth": lambda tensors: {
        "model": {**tensors, "mask_token": torch.zeros(1), "decoder_pred.bias": torch.zeros(2)}
    },
    "moco.pth.tar": moco,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folder_computes_what_the_checkpoint_stands_for(name: str, tmp_path: Path):
    tensors = checkpoint()
    left_out = script.convert(saved(LAYOUTS[name](tensors), tmp_path / name), tmp_path / "vit", heads=2, eps=0.1)
    assert "head.weight" in left_out
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = hugging_face.load(str(tmp_path / "vit"))(pixel_values=x).last_hidden_state
    torch.testing.assert_close(found, tokens(tensors, x, 0.1), rtol=1e-4, atol=1e-5)
    assert hugging_face.own_moments(str(tmp_path / "vit"), "vit")[0] == (0.485, 0.456, 0.406)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no tensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    torch.save([1, 2], tmp_path / "list.pth")
    for name, why in (("text.pth", "more or less"), ("text.safetensors", "more or less"), ("list.pth", "no vision")):
        with pytest.raises(ValueError, match=why):
            script.convert(tmp_path / name, tmp_path / "vit")


def test_the_command_says_what_it_left_out_and_what_is_wrong(tmp_path):
    file = saved(moco(checkpoint()), tmp_path / "moco.pth.tar")
    command = [sys.executable, SCRIPT, file, tmp_path / "vit", "--heads", "2"]
    first, again = (subprocess.run(command, capture_output=True, text=True, timeout=120) for _ in range(2))
    assert first.stdout.endswith("left out: head.weight, all outside of module.base_encoder.*\n"), first.stderr
    assert (again.returncode, again.stderr) == (
        1,
        f"{file}: {tmp_path / 'vit'} is there already; name another folder\n",
    )


@pytest.mark.parametrize(
    ("change", "heads", "message"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc2.bias"), 2, r"its weights lack .*1.*bias"),
        (lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(8)}), 2, "has no place for .*ls1.gamma"),
        (lambda w: w.pop("pos_embed"), 2, "no vision Transformer of timm's"),
        (lambda w: None, None, "a width of 8 has cannot be guessed; give --heads"),
    ],
    ids=["a tensor is missing", "a tensor is too much", "something else", "no number of heads"],
)
def test_what_does_not_fit_is_refused_by_name(change, heads, message, tmp_path):
    tensors = checkpoint()
    change(tensors)
    with pytest.raises((ValueError, DataError), match=message):
        script.convert(saved(tensors, tmp_path / "w.pth"), tmp_path / "vit", heads)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]  # nothing half made
