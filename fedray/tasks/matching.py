"""What a client's loss makes of features of generated and of real pictures: rules for the task `generation`.

GFMN (dos Santos, Mroueh, Padhi and Dognin, 2019), and PRISM with it, matches means and variances, those of all of a
client's pictures; a kernel's maximum mean discrepancy (Gretton et al., 2012; Li, Swersky and Zemel, 2015) compares a
batch with a batch in all moments.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fedray.learner import Columns
from fedray.models.pictures import generated

Kept = dict[str, torch.Tensor]
Features = Callable[[], torch.Tensor]

_BETA1, _BETA2 = 0.5, 0.999  # of GFMN's released code


@dataclass(frozen=True)
class Matching:
    """A loss by features, and what a client keeps for it from round to round.

    Attributes:
        begin: What a client keeps at first, of ``mean`` and ``var`` (F,) of its pictures' features, and of a seed.
        loss: Of what it keeps, which it may write to, the features (B, F) of a generated batch, and a function that
            returns those of the real one.
    """

    begin: Callable[[Kept, int], Kept]
    loss: Callable[[Kept, torch.Tensor, Features], torch.Tensor]


class Objective:
    """A client's loss, which remembers: ``kept`` is what the client has to keep."""

    def __init__(self, maps: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], kept: Kept, matching: Matching):
        self._maps, self.kept, self._matching = maps, kept, matching

    def __call__(self, model: nn.Module, batch: Columns) -> torch.Tensor:
        """The loss of as many generated pictures as the batch has."""

        def real() -> torch.Tensor:
            with torch.no_grad():
                return self._maps(batch["x"])[0]

        return self._matching.loss(self.kept, self._maps(generated(model, len(batch["x"])))[0], real)


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and unbiased variances (F,) of features (B, F), in float32 under autocast, too."""
    features = features.float()
    mean = features.mean(0)
    # with its gradient, twice as fast as var
    return mean, (features - mean).square().sum(0) / max(1, len(features) - 1)


def squares(kept: Kept, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of means, and of variances, from those that are kept."""
    return (kept["mean"] - mean).square().mean() + (kept["var"] - var).square().mean()


def mse() -> Matching:
    """Squared distances of the batch's means and variances of features from those of all the client's pictures."""
    return Matching(lambda known, seed: known, lambda kept, fake, real: squares(kept, *moments(fake)))


def moving(rate: float = 0.1) -> Matching:
    """The same of a moving average of generated means and variances, as GFMN's first form has it.

    Args:
        rate: Weight of the newest batch; 1 for no average.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}; it must be above 0 and at most 1")

    def loss(kept: Kept, fake: torch.Tensor, real: Features) -> torch.Tensor:
        averages = []
        for name, found in zip(("fake_mean", "fake_var"), moments(fake), strict=True):
            averages.append((1 - rate) * kept.get(name, found.detach()) + rate * found)
            kept[name] = averages[-1].detach()
        return squares(kept, *averages)

    return Matching(lambda known, seed: known, loss)


def adam(lr: float = 1e-5) -> Matching:
    """GFMN's Adam moving average, as in PRISM: a and b follow the differences of means and of variances.

    A step of Adam each on ‖a − (μ_real − μ_fake)‖² / F and its like for b; the loss is
    a·(μ_real − μ_fake) + b·(v_real − v_fake).

    Args:
        lr: Learning rate of a and b.
    """
    if not lr > 0:
        raise ValueError(f"lr is {lr}; it must be > 0")

    def begin(known: Kept, seed: int) -> Kept:
        mean = known["mean"]  # a and b start as a linear layer's weights
        draw, bound = torch.Generator().manual_seed(seed), len(mean) ** -0.5
        fresh = {v: (torch.rand(len(mean), generator=draw) * 2 - 1).mul_(bound).to(mean.device) for v in ("a", "b")}
        zeros = {f"{v}_{m}": torch.zeros_like(mean) for v in ("a", "b") for m in ("first", "second")}
        return {**known, **fresh, **zeros, "steps": torch.zeros((), device=mean.device)}

    def follow(kept: Kept, name: str, target: torch.Tensor) -> None:
        v, steps = kept[name], float(kept["steps"])
        gradient = 2 * (v - target) / len(v)
        first = kept[f"{name}_first"].mul_(_BETA1).add_(gradient, alpha=1 - _BETA1)
        second = kept[f"{name}_second"].mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        root = (second / (1 - _BETA2**steps)).sqrt_().add_(1e-8)
        v.addcdiv_(first, root, value=-lr / (1 - _BETA1**steps))

    def loss(kept: Kept, fake: torch.Tensor, real: Features) -> torch.Tensor:
        kept["steps"] = kept["steps"] + 1
        mean, var = moments(fake)
        differences = {"a": kept["mean"] - mean, "b": kept["var"] - var}
        for name, difference in differences.items():
            follow(kept, name, difference.detach())
        return sum((kept[name] * difference).sum() for name, difference in differences.items())  # type: ignore[return-value]

    return Matching(begin, loss)


def mmd(bandwidths: list[float] = [0.25, 1.0, 4.0]) -> Matching:  # noqa: B006 - read only, and what is printed
    """Squared maximum mean discrepancy of a real and a generated batch, under a mean of Gaussian kernels.

    Args:
        bandwidths: 2σ² of each kernel, in units of the mean squared distance of two of the client's pictures.
    """
    if not bandwidths or not all(b > 0 for b in bandwidths):
        raise ValueError(f"bandwidths is {bandwidths}; give one or more, all > 0")

    def begin(known: Kept, seed: int) -> Kept:
        return {"scale": 2 * known["var"].sum()}  # E‖x − x'‖² of independent x and x'

    def loss(kept: Kept, fake: torch.Tensor, real: Features) -> torch.Tensor:
        return discrepancy(real(), fake, [b * float(kept["scale"].clamp_min(1e-12)) for b in bandwidths])

    return Matching(begin, loss)


def discrepancy(real: torch.Tensor, fake: torch.Tensor, widths: list[float]) -> torch.Tensor:
    """MMD² of two samples (B, F) and (B', F): mean k(r, r') + mean k(f, f') − 2·mean k(r, f), over all pairs.

    Pairs of one with itself count. k is the mean over the widths w of exp(−‖x − y‖² / w), so the result lies in 0..2.
    """
    centre = real.mean(0)  # distances do not mind, and their rounding does
    real, fake = real - centre, fake - centre

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        squared = (x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * (x @ y.T)).clamp_min(0)
        return torch.stack([torch.exp(-squared / w) for w in widths]).mean()

    return kernel(real, real) + kernel(fake, fake) - 2 * kernel(real, fake)


MATCHINGS: dict[str, Callable[..., Matching]] = {"adam": adam, "moving": moving, "mse": mse, "mmd": mmd}
