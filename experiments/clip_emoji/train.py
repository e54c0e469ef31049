"""Train a small CLIP (Radford et al., 2021) on emoji: ``python train.py CONFIG OUT [key=value ...]``.

The data are pictures of emoji by several vendors with their names and groups; the configuration says which of them are
seen. Texts are names and groups in templates; two pictures of a batch with the same text are both right for it. The
result is a folder that ``CLIPModel.from_pretrained`` loads, with its tokenizer.
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


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Pictures in 0..1, shifted and scaled a little, some mirrored, and of another brightness."""
    count = len(x)
    turn = torch.zeros(count, 2, 3, device=x.device)
    scale = 1 + 0.15 * (2 * torch.rand(count, device=x.device) - 1)
    turn[:, 0, 0] = scale * torch.where(torch.rand(count, device=x.device) < 0.5, -1.0, 1.0)
    turn[:, 1, 1] = scale
    turn[:, :, 2] = 0.2 * (2 * torch.rand(count, 2, device=x.device) - 1)
    grid = F.affine_grid(turn, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return (moved * (1 + 0.3 * (2 * torch.rand(count, 3, 1, 1, device=x.device) - 1))).clamp(0, 1)


def main(path: str, out: str, *overrides: str) -> None:
    """Train, and save to ``out``."""
    c: Any = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    torch.manual_seed(c.seed)
    data = configuration.build(Dataset, OmegaConf.to_container(c.data), "data")
    x = torch.from_numpy(np.array(data.train["x"])).to(device)
    called = [[str(name), data.classes[label]] for name, label in zip(data.train["name"], data.train["y"], strict=True)]
    place: dict[str, int] = {}
    suitable = torch.tensor(
        [[place.setdefault(t.format(words), len(place)) for words in names for t in TEMPLATES] for names in called]
    ).to(device)
    tokenizer = CLIPTokenizer().train_new_from_iterator(list(place), c.text.vocabulary)
    tokenizer.model_max_length = c.text.length
    tokens = tokenizer(list(place), padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": c.text.width,
        "intermediate_size": 4 * c.text.width,
        "num_hidden_layers": c.text.layers,
        "num_attention_heads": c.text.heads,
        "max_position_embeddings": c.text.length,
        "pad_token_id": tokenizer.pad_token_id,
        **special,
    }
    vision = {
        "hidden_size": c.vision.width,
        "intermediate_size": 4 * c.vision.width,
        "num_hidden_layers": c.vision.layers,
        "num_attention_heads": c.vision.heads,
        "image_size": c.vision.size,
        "patch_size": c.vision.patch,
    }
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=c.embedding)).to(device)
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in (data.mean, data.std))
    settings = {"weight_decay": c.training.weight_decay, "betas": (0.9, 0.98), "fused": device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.training.lr, **settings)
    began = time.perf_counter()
    for step in range(c.training.steps):
        warm, done = min(1.0, (step + 1) / c.training.warmup), step / c.training.steps
        for group in optimizer.param_groups:
            group["lr"] = c.training.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        rows = torch.randint(len(x), (c.training.batch,), device=device)
        chosen = suitable[rows, torch.randint(suitable.shape[1], (len(rows),), device=device)]
        batch = (augmented(x[rows].float() / 255) - mean) / std
        with torch.autocast(device.type, torch.bfloat16):
            result = model(input_ids=tokens[chosen], pixel_values=batch)
        logits = result.logits_per_image.float()
        right = (chosen[:, None] == chosen[None]).float()
        right = right / right.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 200 == 199:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.to("cpu", torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    images = {"image_mean": list(data.mean), "image_std": list(data.std), "size": {"shortest_edge": c.vision.size}}
    Path(out, "preprocessor_config.json").write_text(json.dumps(images, indent=2) + "\n")
    about = {"recipe": OmegaConf.to_container(c), "device": str(device), "torch": torch.__version__}
    Path(out, "trained.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
