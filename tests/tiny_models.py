"""Hugging Face models of a few thousand parameters, drawn on the spot, and a configuration that runs on one."""

import json
from pathlib import Path
from typing import Any

import torch


def vit(**options: Any) -> Any:
    """A ViT for 8×8 images, with dropout and with biases that are not zero."""
    from transformers import ViTConfig, ViTModel

    settings = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    settings |= {"image_size": 8, "patch_size": 4, "hidden_dropout_prob": 0.2}
    return drawn(ViTModel, ViTConfig(**(settings | options)))


def dinov2(**options: Any) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    settings = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
    return drawn(Dinov2Model, Dinov2Config(**(settings | {"image_size": 8, "patch_size": 4} | options)))


def mae() -> Any:
    """A masked autoencoder for 8×8 images, as it comes out of its pre-training."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    settings = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    settings |= {f"decoder_{name}": value for name, value in settings.items()}
    return drawn(ViTMAEForPreTraining, ViTMAEConfig(**settings, image_size=8, patch_size=4, mask_ratio=0.0))


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    both = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**both, "vocab_size": len(_vocabulary()), "max_position_embeddings": 24, "eos_token_id": 1}
    text |= {"bos_token_id": 0, "pad_token_id": 1}
    vision = {**both, "image_size": 8, "patch_size": 4}
    return drawn(CLIPModel, CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))


def drawn(kind: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = kind(config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    if type(model).__name__ == "CLIPModel":
        save_tokenizer(folder)
    return folder


def _vocabulary() -> list[str]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.-/"
    return ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]


def save_tokenizer(folder: Path) -> None:
    """A CLIP tokenizer without merges: every letter is a token."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(_vocabulary())}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 24, "pad_token": "<|endoftext|>", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def configuration(folder: Path, **model: Any) -> dict[str, Any]:
    """Two rounds on the handwritten digits, which are 8×8."""
    return {
        "seed": 3,
        "rounds": 2,
        "cohort": 3,
        "task": {
            "name": "classification",
            "data": {"name": "subset", "of": "digits", "train": 120, "test": 60},
            "partition": {"name": "iid", "num_clients": 6},
            "model": {"name": "pretrained", "path": str(folder), **model},
        },
        "algorithm": {"name": "fedavg", "local_lr": 0.05, "batch_size": 8},
        "backend": {"name": "serial"},
        "checkpoint_every": 0,
    }


def language_model(folder: Path) -> Path:
    """A causal language model that knows letters."""
    from transformers import CLIPTokenizer, GPT2Config, GPT2LMHeadModel

    save_tokenizer(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=64)
    drawn(GPT2LMHeadModel, config).save_pretrained(folder)
    return folder


def stable_diffusion(folder: Path) -> Path:
    """A Stable Diffusion of a few thousand parameters, in diffusers' own format."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    save_tokenizer(folder / "words")
    text = CLIPTextConfig(**clip().config.text_config.to_dict())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=4,
            layers_per_block=1,
            block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=4)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=drawn(CLIPTextModel, text),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "words"),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "sd")
    return folder / "sd"
