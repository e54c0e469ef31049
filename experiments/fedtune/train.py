"""Train a small CLIP (Radford et al., 2021) on emoji: ``python train.py CONFIG OUT [key=value ...]``.

The data are pictures of emoji with their names and groups; the configuration says which of them are seen. A text is a
name or a group in a template; two pictures of a batch with the same text are both right for it. The result is a folder
that ``CLIPModel.from_pretrained`` loads, with its tokenizer, and ``trained.json``, which says what it was trained on.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from fedray import config as configuration
from fedray.data import Dataset

TEMPLATES = ("{}", "a photo of a {}", "an emoji of {}", "a drawing of {}", "a picture of a {}")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def augmented(x: torch.Tensor, size: int) -> torch.Tensor:
    """Pictures in 0..1 at another size; shifted and scaled a little, some mirrored, and of another brightness."""
    count = len(x)
    turn = torch.zeros(count, 2, 3, device=x.device)
    scale = 1 + 0.15 * (2 * torch.rand(count, device=x.device) - 1)
    turn[:, 0, 0] = scale * torch.where(torch.rand(count, device=x.device) < 0.5, -1.0, 1.0)
    turn[:, 1, 1] = scale
    turn[:, :, 2] = 0.2 * (2 * torch.rand(count, 2, device=x.device) - 1)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    moved = F.interpolate(moved, (size, size), mode="bilinear", align_corners=False, antialias=True)
    return (moved * (1 + 0.3 * (2 * torch.rand(count, 3, 1, 1, device=x.device) - 1))).clamp(0, 1)


def contrast(logits: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """CLIP's loss of pictures (rows) against texts (columns), where equal texts share what is right."""
    right = (texts[:, None] == texts[None]).float()
    right = right / right.sum(1, keepdim=True)
    return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2


def captions(data: Dataset, rows: np.ndarray) -> tuple[list[str], torch.Tensor]:
    """All texts, and of each picture the numbers of those that are right for it."""
    place: dict[str, int] = {}
    called = [(str(data.train["name"][row]), data.classes[data.train["y"][row]]) for row in rows]
    right = [[place.setdefault(t.format(words), len(place)) for words in names for t in TEMPLATES] for names in called]
    return list(place), torch.tensor(right)


def untrained(c: Any, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of the configuration's sizes."""
    both = {side: {f"num_{what}": c[side][short] for what, short in _NAMES.items()} for side in ("text", "vision")}
    for side, sizes in both.items():
        sizes |= {"hidden_size": c[side].width, "intermediate_size": 4 * c[side].width}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**both["text"], "vocab_size": len(tokenizer), "max_position_embeddings": c.text.length, **special}
    vision = {**both["vision"], "image_size": c.vision.size, "patch_size": c.vision.patch}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=c.embedding))


_NAMES = {"hidden_layers": "layers", "attention_heads": "heads"}


def main(path: str, out: str, *overrides: str) -> None:
    """Train, and save to ``out``."""
    c: Any = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    torch.manual_seed(c.seed)
    data = configuration.build(Dataset, OmegaConf.to_container(c.data), "data")
    seen = np.ones(len(data.train["y"]), bool)
    for column, values in (c.leave_out or {}).items():
        seen &= ~np.isin(data.train[column], list(values))
    rows = np.flatnonzero(seen)
    x = torch.from_numpy(data.train["x"][rows]).to(device)
    texts, suitable = captions(data, rows)
    tokenizer = CLIPTokenizer().train_new_from_iterator(texts, c.text.vocabulary)
    tokenizer.model_max_length = c.text.length
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    model = untrained(c, tokenizer).to(device)
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(x)} pictures, {len(texts)} texts, {size:,} parameters", flush=True)
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (data.mean, data.std))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=c.training.lr, weight_decay=c.training.weight_decay, betas=(0.9, 0.98)
    )
    began = time.perf_counter()
    for step in range(c.training.steps):
        warm, done = min(1.0, (step + 1) / c.training.warmup), step / c.training.steps
        for group in optimizer.param_groups:
            group["lr"] = c.training.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        chosen = torch.randint(len(x), (c.training.batch,))
        said = suitable[chosen, torch.randint(suitable.shape[1], (len(chosen),))].to(device)
        images = (augmented(x[chosen.to(device)].float() / 255, c.vision.size) - mean) / std
        loss = contrast(model(input_ids=tokens[said], pixel_values=images).logits_per_image, said)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.to("cpu", torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    shown = {"image_mean": list(data.mean), "image_std": list(data.std), "size": {"shortest_edge": c.vision.size}}
    Path(out, "preprocessor_config.json").write_text(json.dumps(shown, indent=2) + "\n")
    recipe = OmegaConf.to_container(c)
    about = {"recipe": recipe, "pictures": len(x), "parameters": size, "seconds": round(time.perf_counter() - began)}
    Path(out, "trained.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
