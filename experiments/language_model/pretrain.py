"""Train a small GPT-2 on bytes of public text: ``python pretrain.py CONFIG OUT [key=value ...]``.

The configuration says what text. The result is a folder that ``AutoModelForCausalLM.from_pretrained`` loads, and
``trained.json``, which says what it was trained on and its perplexity on the end of that text.
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
from transformers import GPT2Config, GPT2LMHeadModel

from fedray import config as configuration
from fedray.data import Dataset

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loss_of(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token in sequences (N, L + 1)."""
    logits = model(input_ids=tokens[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def main(path: str, out: str, *overrides: str) -> None:
    """Train, and save to ``out``."""
    c: Any = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    torch.manual_seed(c.seed)
    data = configuration.build(Dataset, OmegaConf.to_container(c.data), "data")
    train, test = (torch.from_numpy(columns["x"].astype(np.int64)) for columns in (data.train, data.test))
    sizes = {"n_embd": c.model.width, "n_layer": c.model.layers, "n_head": c.model.heads}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=data.vocabulary, n_positions=data.input_shape[0] - 1, **sizes, **none)
    model = GPT2LMHeadModel(config).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=c.training.lr, weight_decay=c.training.weight_decay, betas=(0.9, 0.98)
    )
    size = sum(p.numel() for p in model.parameters())
    print(f"{len(train)} sequences, {size:,} parameters", flush=True)
    began = time.perf_counter()
    for step in range(c.training.steps):
        warm, done = min(1.0, (step + 1) / c.training.warmup), step / c.training.steps
        for group in optimizer.param_groups:
            group["lr"] = c.training.lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        loss = loss_of(model, train[torch.randint(len(train), (c.training.batch,))].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    with torch.no_grad():
        losses = [loss_of(model, block.to(device)).item() * len(block) for block in test.split(256)]
    perplexity = math.exp(sum(losses) / len(test))
    print(f"perplexity on the end of the text {perplexity:.2f}", flush=True)
    model.to("cpu").save_pretrained(out)
    seconds = round(time.perf_counter() - began)
    about = {"recipe": OmegaConf.to_container(c), "parameters": size, "perplexity": perplexity, "seconds": seconds}
    Path(out, "trained.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
