"""Train a small text-to-image pipeline: ``python train.py CONFIG OUT [key=value ...]``.

The result is a folder in diffusers' own format (tokenizer, text encoder, U-Net, VAE, scheduler), which loads like
Stable Diffusion: ``DiffusionPipeline.from_pretrained(OUT)``. It is made of the same classes, only smaller: a latent
diffusion model (Rombach et al., 2022) on the latents of a VAE, conditioned by cross-attention on the tokens of a text
encoder that learns with it, with classifier-free guidance (Ho and Salimans, 2022), v-prediction (Salimans and Ho, 2022)
and min-SNR weights (Hang et al., 2023). The configuration says which images it learns from.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import EMAModel, compute_snr
from omegaconf import OmegaConf
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fedray import config as configuration
from fedray.data import Dataset
from fedray.data.domains import describe

TEMPLATES = (
    "{}",
    "a photo of a {}",
    "a picture of a {}",
    "an image of one {}",
    "a small photo of the {}",
    "{} on a plain background",
    "a close-up of a {}",
    "there is a {} in the picture",
    "{}, real world images, high resolution",
    "a {} for sale",
    "this is a {}",
    "a good photo of a {}, single object",
)
SNR_GAMMA = 5.0
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def images(data: Dataset, size: int) -> torch.Tensor:
    """The training images as uint8 RGB of shape (N, 3, size, size), padded with their border's black."""
    x = torch.from_numpy(np.array(data.train["x"])).expand(-1, 3, -1, -1)
    margin = size - x.shape[-1]
    return F.pad(x, (margin // 2, margin - margin // 2) * 2).contiguous()


def prompts(data: Dataset, names: dict[str, list[str]]) -> tuple[list[str], list[list[int]]]:
    """All prompts that are trained on, and for each image those that suit it, by position."""
    place: dict[str, int] = {}
    suitable = []
    for image, label in zip(data.train["x"], data.train["y"], strict=True):
        called = names[data.classes[label]]
        adjectives = ["", *describe(image)]
        texts = [t.format(f"{a} {n}".strip()) for t in TEMPLATES for n in called for a in adjectives]
        suitable.append([place.setdefault(text, len(place)) for text in texts])
    return list(place), suitable


def tokenizer(corpus: list[str], vocabulary: int, length: int) -> CLIPTokenizer:
    """CLIP's kind of tokenizer, with merges learnt from the prompts."""
    made = CLIPTokenizer().train_new_from_iterator(corpus, vocabulary)
    made.model_max_length = length
    return made


def loop(module: nn.Module, options: Any, what: str) -> Iterator[torch.optim.Optimizer]:
    """An optimizer, once for every step of a training that the caller makes."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.lr, weight_decay=0.01, fused=device.type == "cuda")
    began = time.perf_counter()
    for step in range(options.steps):
        done = max(step / options.steps, (time.perf_counter() - began) / options.get("seconds", math.inf))
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.lr * min(1.0, (step + 1) / options.warmup) * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.zero_grad(set_to_none=True)
        yield optimizer
        if step % 100 == 99:
            seconds = time.perf_counter() - began
            print(f"{what}: step {step + 1} of {options.steps}, {seconds:.0f} s", flush=True)


def batch_of(x: torch.Tensor, rows: torch.Tensor, flip: bool) -> torch.Tensor:
    """Images in -1..1, half of them mirrored if ``flip``."""
    batch = x[rows].float() / 127.5 - 1
    if flip:
        batch = torch.where(torch.rand(len(batch), 1, 1, 1, device=device) < 0.5, batch.flip(-1), batch)
    return batch.contiguous(memory_format=torch.channels_last)


def train_vae(x: torch.Tensor, c: Any) -> AutoencoderKL:
    """A VAE by absolute and squared errors and a slight pull of its latents towards a normal distribution."""
    n = len(c.image.levels)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=tuple(c.image.levels),
        latent_channels=c.image.latent,
        norm_num_groups=16,
        sample_size=c.image.size,
    ).to(device, memory_format=torch.channels_last)
    for optimizer in loop(vae, c.vae_training, "VAE"):
        batch = batch_of(x, torch.randint(len(x), (c.vae_training.batch,), device=device), c.flip)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(batch).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        loss = F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 1e-6 * posterior.kl().float().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
    print(f"VAE: loss {loss.item():.4f}")
    with torch.no_grad():
        sample = torch.cat(
            [
                vae.encode(batch_of(part, torch.arange(len(part), device=device), False)).latent_dist.mean
                for part in x[:4096].split(512)
            ]
        )
    vae.register_to_config(scaling_factor=1 / sample.std().item())
    return vae.eval().requires_grad_(False)


def train_unet(
    x: torch.Tensor,
    vae: AutoencoderKL,
    tokens: torch.Tensor,
    suitable: torch.Tensor,
    counts: torch.Tensor,
    none: torch.Tensor,
    text_encoder: CLIPTextModel,
    scheduler: DDPMScheduler,
    c: Any,
) -> UNet2DConditionModel:
    """The U-Net and the text encoder together; both end as their moving averages."""
    down = list(c.unet.down)
    unet = UNet2DConditionModel(
        sample_size=c.image.size // 2 ** (len(c.image.levels) - 1),
        in_channels=c.image.latent,
        out_channels=c.image.latent,
        layers_per_block=1,
        block_out_channels=tuple(c.unet.levels),
        down_block_types=tuple(down),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        cross_attention_dim=c.text.width,
        attention_head_dim=c.unet.heads,  # so diffusers calls the number of heads
        norm_num_groups=16,
    ).to(device, memory_format=torch.channels_last)
    both = nn.ModuleList([unet, text_encoder.to(device)])
    average = EMAModel(both.parameters(), decay=c.training.ema, use_ema_warmup=True, power=0.75)
    total = torch.zeros((), device=device)
    for step, optimizer in enumerate(loop(both, c.training, "U-Net")):
        rows = torch.randint(len(x), (c.training.batch,), device=device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            latents = vae.encode(batch_of(x, rows, c.flip)).latent_dist.sample().float() * vae.config.scaling_factor
        choice = (torch.rand(len(rows), device=device) * counts[rows]).long()
        prompt = tokens[suitable[rows, choice]]
        dropped = torch.rand(len(rows), 1, device=device) < c.training.unconditional
        prompt = torch.where(dropped, none, prompt)
        noise = torch.randn_like(latents)
        t = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), device=device)
        noisy = scheduler.add_noise(latents, noise, t)
        target = scheduler.get_velocity(latents, noise, t)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = unet(noisy, t, text_encoder(prompt).last_hidden_state).sample
        snr = compute_snr(scheduler, t)
        weight = snr.clamp(max=SNR_GAMMA) / (snr + 1)
        loss = (weight * (predicted.float() - target).square().mean((1, 2, 3))).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        average.step(both.parameters())
        total += loss.detach()
        if step % 500 == 499:
            print(f"U-Net: loss {total.item() / 500:.4f}", flush=True)
            total.zero_()
    average.copy_to(both.parameters())
    return unet.eval()


def main(path: str, out: str, *overrides: str) -> None:
    """Train, and save to ``out``."""
    c: Any = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
    torch.manual_seed(c.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    data = configuration.build(Dataset, OmegaConf.to_container(c.data), "data")
    x = images(data, c.image.size).to(device)
    texts, suitable = prompts(data, OmegaConf.to_container(c.names))
    corpus = [
        *texts,
        *(template.format(name) for template in TEMPLATES for names in c.names.values() for name in names),
    ]
    tokenize = tokenizer(corpus, c.text.vocabulary, c.text.length)

    def ids(some: list[str]) -> torch.Tensor:
        return tokenize(some, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenize),
            hidden_size=c.text.width,
            intermediate_size=2 * c.text.width,
            num_hidden_layers=c.text.layers,
            num_attention_heads=4,
            max_position_embeddings=c.text.length,
            projection_dim=c.text.width,
            bos_token_id=tokenize.bos_token_id,
            eos_token_id=tokenize.eos_token_id,
            pad_token_id=tokenize.pad_token_id,
        )
    )
    longest = max(map(len, suitable))
    table = torch.tensor([row + [0] * (longest - len(row)) for row in suitable], dtype=torch.int32).to(device)
    counts = torch.tensor([len(row) for row in suitable]).to(device)
    noise = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    noise |= {"prediction_type": "v_prediction"}
    scheduler = DDPMScheduler(**noise, steps_offset=1)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    vae = train_vae(x, c)
    unet = train_unet(x, vae, ids(texts), table, counts, ids([""]), text_encoder, scheduler, c)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenize,
        unet=unet,
        scheduler=DPMSolverMultistepScheduler(**noise, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to("cpu", torch.float16).save_pretrained(out)
    about = {"recipe": OmegaConf.to_container(c), "device": str(device), "torch": torch.__version__}
    Path(out, "trained.json").write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
