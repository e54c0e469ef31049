"""How the pictures of a generator are judged: beside test pictures, by the features of a fixed network."""

import io
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fedray.aggregators import Rows
from fedray.algorithm import Metrics
from fedray.bits import final_mask, flat
from fedray.learner import Columns
from fedray.metrics.quality import frechet_of, prdc
from fedray.models.masked import masked_layers, probabilities, under
from fedray.models.pictures import latent
from fedray.seeds import seed_for

Masks = Literal["fresh", "fixed", "threshold"]

_SHOWN = 36  # generated pictures on a sheet
_NEIGHBOURS = 5  # that make the radius around a picture, as in PRISM's and most papers' tables
_UNIT = 2.0**-16  # of the sums of an evaluation, which are exact within a range


@dataclass(frozen=True)
class Judging:
    """How generated pictures are compared with test pictures, as many as there are.

    Args:
        evaluated_masks: Which masks of a masked generator make the pictures: a fresh one for each batch (as PRISM's
            released code does), the fixed one that ``fedray export`` writes, or the threshold's, of all θ > 1/2.
            Figures of the latter two have the name in front. A generator without masks has ``fresh`` only.
        neighbour_samples: Test pictures, and as many generated ones, that precision, recall, density and coverage are
            measured with (10,000 in PRISM's tables); 0 to leave them out. Their distances are the driver's work.
    """

    evaluated_masks: list[Masks] = field(default_factory=lambda: ["fresh"])
    neighbour_samples: int = 1000

    def __post_init__(self) -> None:
        if not self.evaluated_masks or len(set(self.evaluated_masks)) < len(self.evaluated_masks):
            raise ValueError(f"evaluated_masks is {self.evaluated_masks}; name one or several, each once")
        least = _NEIGHBOURS + 1
        if self.neighbour_samples != 0 and self.neighbour_samples < least:
            raise ValueError(f"neighbour_samples is {self.neighbour_samples}; it must be 0, or at least {least}")

    def check(self, model: nn.Module) -> None:
        """Raise a ValueError if the generator has no masks of these kinds."""
        further = [kind for kind in self.evaluated_masks if kind != "fresh"]
        if further and not masked_layers(model):
            raise ValueError(f"evaluated_masks is {self.evaluated_masks}, but the generator has no masks; give [fresh]")

    def judge(self, model: nn.Module, maps: nn.Module, batch: Columns, seed: int) -> dict[str, Any]:
        """Sums of features and of their products, and some features as they are, of a batch and of as many generated.

        Args:
            model: The generator; BatchNorm works by the batch, as in training.
            maps: Pictures to features to match and features to compare by, (N, d).
            batch: Test pictures ``x`` in -1..1, and their numbers ``row``.
            seed: Of the noise and of fresh masks, the same in every evaluation.
        """
        row, x = int(batch["row"][0]), batch["x"]
        draw = torch.Generator().manual_seed(seed_for(seed, "evaluation", row))
        noise = torch.randn(len(x), latent(model), generator=draw).to(x.device)
        torch.manual_seed(seed_for(seed, "evaluation", row))  # of masks, drawn anew for each block
        compared = max(0, min(len(x), self.neighbour_samples - row))
        sums: dict[str, Any] = {"count": torch.tensor(len(x))}
        pictures: dict[str, torch.Tensor] = {"real": x}
        for kind in self.evaluated_masks:
            with under(model.train(), mask_of(model, kind)):
                pictures[kind] = model(noise)
        for name, made in pictures.items():
            features = maps(made)[1].double()
            sums[f"{name}_sum"] = _UNIT * features.sum(0).cpu()
            sums[f"{name}_products"] = _UNIT * (features.T @ features).cpu()
            sums[f"{name}_features"] = Rows(features[:compared].float().cpu())
        shown = pictures[self.evaluated_masks[0]][: max(0, _SHOWN - row)].float()
        return {**sums, "shown": Rows(((shown + 1) * 127.5).round().to(torch.uint8).cpu())}

    def summarize(self, sums: dict[str, Any]) -> tuple[Metrics, bytes]:
        """Metrics of each kind of masks, and a sheet of pictures (a PNG) of the first kind."""
        count = float(sums["count"])
        metrics: Metrics = {}
        features = {kind: sums[f"{kind}_features"].values.numpy() for kind in ("real", *self.evaluated_masks)}
        for kind in self.evaluated_masks:
            found = {"frechet_distance": frechet_of(*_moments(sums, "real", count), *_moments(sums, kind, count))}
            if len(features["real"]) > _NEIGHBOURS:
                found |= prdc(features["real"], features[kind], _NEIGHBOURS)
            metrics |= {name if kind == "fresh" else f"{kind}_{name}": value for name, value in found.items()}
            metrics.setdefault("test_loss", found["frechet_distance"])
        return metrics, sheet(sums["shown"].values.numpy())


def mask_of(model: nn.Module, kind: Masks) -> torch.Tensor | None:
    """The one mask of a kind; None for a fresh one each time."""
    if kind == "fresh":
        return None
    theta = probabilities(model)
    return final_mask(theta) if kind == "fixed" else flat(theta) > 0.5


def sheet(pictures: np.ndarray) -> bytes:
    """Pictures uint8 (n, C, H, W) as one, √n in a row: a PNG."""
    from PIL import Image

    side = math.isqrt(len(pictures))
    _, channels, height, width = pictures.shape
    grid = pictures[: side * side].reshape(side, side, channels, height, width).transpose(0, 3, 1, 4, 2)
    whole = grid.reshape(side * height, side * width, channels)
    content = io.BytesIO()
    Image.fromarray(whole[..., 0] if channels == 1 else whole).save(content, "PNG", optimize=True)
    return content.getvalue()


def _moments(sums: dict[str, Any], kind: str, count: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean (d,) and unbiased covariance (d, d) of features."""
    mean = np.asarray(sums[f"{kind}_sum"], np.float64) / (count * _UNIT)
    products = np.asarray(sums[f"{kind}_products"], np.float64) / _UNIT
    return mean, (products - count * np.outer(mean, mean)) / max(1.0, count - 1)
