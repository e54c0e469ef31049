"""What PRISM does to probabilities for privacy, and what ε that supports.

Four readings (Seo et al., 2025, and its released code). *none*: a mask of θ in [c, 1 − c] is still a randomised
response. *gaussian*: noise on θ in [c, 1 − c], the textbook's mechanism. *code_intent*: noise on θ, of the deviation
that the code computes. *release*: the code adds this noise and then clamps the raw scores instead, so that neither
noise nor sigmoid has any effect. The accounts are of all that a client sends, without amplification.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from fedray.trees import Params

DELTA = 1e-5

Noise = Literal["none", "gaussian", "code_intent", "release"]


@dataclass(frozen=True)
class MaskPrivacy:
    """What happens to probabilities before masks are drawn.

    Args:
        noise: Nothing; Gaussian noise on clipped probabilities; what the released code seems to intend; or what it
            does, which is to clamp the raw scores and throw its noise away.
        clip: Probabilities are kept this far from 0 and 1.
        claimed_epsilon: ε that is claimed at δ = 1e-5, and that code_intent's noise is made for. The metric epsilon is
            the one that all masks of a client support so far, and claim_holds says whether that is as small.
        noise_deviation: Standard deviation of gaussian's noise.
    """

    noise: Noise = "none"
    clip: float = 0.0
    claimed_epsilon: float = 9.8
    noise_deviation: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.clip <= 0.49:
            raise ValueError(f"clip is {self.clip}; it must be in 0..0.49")
        for option in ("claimed_epsilon", "noise_deviation"):
            if not getattr(self, option) > 0:
                raise ValueError(f"{option} is {getattr(self, option)}; it must be > 0")

    def probabilities(self, scores: Params, seed: int) -> Params:
        """With which masks are drawn, of each tensor of scores; the noise is drawn from ``seed``."""
        draw = torch.Generator().manual_seed(seed)
        found = {}
        for name, s in scores.items():
            theta = s.cpu() if self.noise == "release" else s.cpu().sigmoid()
            if self.noise == "gaussian":
                theta = theta.clamp(self.clip, 1 - self.clip)
            if self.noise in ("gaussian", "code_intent"):
                theta = theta + self.deviation(s.numel()) * torch.randn(s.shape, generator=draw)
            found[name] = theta.clamp(self.clip, 1 - self.clip)
        return found

    def deviation(self, size: int) -> float:
        """The noise's, for a tensor of d weights; as released, sqrt(sqrt(2·ln(1.25/δ)/ε)·(1 − 2c)·sqrt(d))."""
        if self.noise == "gaussian":
            return self.noise_deviation
        multiplier = math.sqrt(2 * math.log(1.25 / DELTA) / self.claimed_epsilon)
        return math.sqrt(multiplier * (1 - 2 * self.clip) * math.sqrt(size))

    def account(self, scores: Params, rounds: int, masks: int, bare: bool = False) -> dict[str, float]:
        """``epsilon`` at δ = 1e-5 of a client that sends masks of these scores, and ``claim_holds`` (0 or 1).

        Gaussian noise composes (Dong, Roth and Su, 2022): μ² adds up over tensors and rounds. Masks that are drawn of
        the same noisy probabilities cost nothing further. Bits of clipped probabilities are randomised responses of
        ln((1 − c)/c) each, which add up. The smaller of the two holds; where nothing bounds it, there is no epsilon.

        Args:
            scores: Of each tensor.
            rounds: In which masks are sent.
            masks: In each round.
            bare: Whether other scores are sent as they are, which no account of masks bounds.
        """
        sizes = [s.numel() for s in scores.values()]
        bounds = []
        if self.clip > 0:
            bounds.append(rounds * masks * sum(sizes) * math.log((1 - self.clip) / self.clip))
        if self.noise in ("gaussian", "code_intent"):
            width = 1 - 2 * self.clip if self.noise == "gaussian" else 1.0  # which the code clips only afterwards
            each = [width * math.sqrt(size) / self.deviation(size) for size in sizes]
            bounds.append(gaussian_epsilon(math.sqrt(rounds * sum(mu * mu for mu in each))))
        if self.noise == "none" and not bounds:
            return {}  # nothing is claimed
        if bare or not bounds:
            return {"claim_holds": 0.0}
        return {"epsilon": min(bounds), "claim_holds": float(min(bounds) <= self.claimed_epsilon)}


def gaussian_epsilon(mu: float) -> float:
    """ε at δ = 1e-5 of a Gaussian mechanism whose sensitivity is μ deviations: δ = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ)."""
    from scipy.optimize import brentq  # type: ignore[import-untyped]
    from scipy.stats import norm  # type: ignore[import-untyped]

    def excess(eps: float) -> float:
        return norm.cdf(mu / 2 - eps / mu) - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu)) - DELTA

    top = mu * mu / 2 + 6 * mu + 1
    return float(brentq(excess, 0, top)) if excess(0) > 0 else 0.0
