"""What PRISM does to probabilities for privacy, and what ε that supports.

Three readings (Seo et al., 2025, and its released code). *release*: the code adds noise and then clamps the raw scores
instead, so that neither noise nor sigmoid has any effect. *code_intent*: Gaussian noise on θ, of the deviation that the
code computes. *none*: a mask of θ in [c, 1 − c] is still a randomised response. The accounts are of all that a client
sends, without amplification.
"""

import math
from typing import Literal

import torch

from fedray.trees import Params

DELTA = 1e-5

Noise = Literal["none", "release", "code_intent"]


def noisy(scores: Params, noise: Noise, clip: float, claimed: float, seed: int) -> Params:
    """The probabilities that masks are drawn with.

    Args:
        scores: Of each tensor.
        noise: What is done.
        clip: Distance that probabilities keep from 0 and 1.
        claimed: ε that the noise is made for.
        seed: Of the noise.
    """
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, s in scores.items():
        theta = s.cpu() if noise == "release" else s.cpu().sigmoid()
        if noise == "code_intent":
            theta = theta + deviation(s.numel(), clip, claimed) * torch.randn(s.shape, generator=draw)
        found[name] = theta.clamp(clip, 1 - clip)
    return found


def deviation(size: int, clip: float, claimed: float) -> float:
    """The noise's deviation for a tensor of d weights, as released: sqrt(sqrt(2·ln(1.25/δ)/ε)·(1 − 2c)·sqrt(d))."""
    return math.sqrt(math.sqrt(2 * math.log(1.25 / DELTA) / claimed) * (1 - 2 * clip) * math.sqrt(size))


def account(scores: Params, noise: Noise, clip: float, claimed: float, masks: int) -> dict[str, float]:
    """``epsilon`` at δ = 1e-5 that so many masks of a client support; nothing where nothing bounds it.

    Gaussian noise composes (Dong, Roth and Su, 2022): μ² adds up over tensors and masks. Bits of clipped probabilities
    are randomised responses of ln((1 − c)/c) each, which add up. The smaller of the two holds.
    """
    sizes = [s.numel() for s in scores.values()]
    bounds = []
    if clip > 0:
        bounds.append(masks * sum(sizes) * math.log((1 - clip) / clip))
    if noise == "code_intent":
        each = [(1 - 2 * clip) * math.sqrt(size) / deviation(size, clip, claimed) for size in sizes]
        bounds.append(gaussian_epsilon(math.sqrt(masks * sum(mu * mu for mu in each))))
    return {"epsilon": min(bounds)} if bounds else {}


def gaussian_epsilon(mu: float) -> float:
    """ε at δ = 1e-5 of a Gaussian mechanism whose sensitivity is μ deviations: δ = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ)."""
    from scipy.optimize import brentq  # type: ignore[import-untyped]
    from scipy.stats import norm  # type: ignore[import-untyped]

    def excess(eps: float) -> float:
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu)) - DELTA

    top = mu * mu / 2 + 6 * mu + 1
    return float(brentq(excess, 0, top)) if excess(0) > 0 else 0.0
