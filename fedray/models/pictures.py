"""Pictures as generators make them."""

import torch
import torch.nn.functional as F


def in_range(x: torch.Tensor, size: int) -> torch.Tensor:
    """Pictures uint8 (N, C, H, W) as float32 in -1..1, resized (bilinear) to squares of ``size`` pixels."""
    x = x.to(torch.float32) / 127.5 - 1
    if x.shape[-2:] == (size, size):
        return x
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)


def generated(model: torch.nn.Module, count: int) -> torch.Tensor:
    """Pictures of noise from torch's global generator."""
    device = next(model.parameters()).device
    return model(torch.randn(count, latent(model), device=device))


def latent(model: torch.nn.Module) -> int:
    """The length of a generator's noise."""
    return int(model.latent)  # type: ignore[arg-type]
