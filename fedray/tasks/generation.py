"""Generation: a network that makes pictures like those that clients hold, by matching features (GFMN).

dos Santos, Mroueh, Padhi and Dognin, 2019: the means and variances of a fixed network's features of generated pictures
are to be those of real ones, without a discriminator.
"""

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedray.algorithm import Client, Metrics
from fedray.data import Dataset, Partition
from fedray.learner import Columns, Learner, LossFunction, Task
from fedray.metrics.quality import frechet_of
from fedray.models.feature_maps import FeatureMaps
from fedray.models.pictures import generated, in_range, latent
from fedray.seeds import seed_for
from fedray.tasks import holdings
from fedray.tasks.classification import Partitioner
from fedray.tasks.matching import Matching, Objective, adam, moments
from fedray.trees import Tree

ImageGeneratorBuilder = Callable[[tuple[int, ...]], nn.Module]
FeatureMapsBuilder = Callable[[tuple[int, ...]], FeatureMaps]

_BLOCK = 64  # pictures whose statistics are taken at a time
_SHOWN = 36  # generated pictures on the sheet
_UNIT = 2.0**-16  # of the sums of an evaluation, which are exact within a range


@dataclass(frozen=True)
class Generation:
    """Pictures, who holds which of them, a generator, and the network whose features are matched."""

    data: Dataset
    partition: Partition
    build_model: ImageGeneratorBuilder
    feature_maps: FeatureMaps
    size: int
    matching: Matching
    seed: int
    average_buffers: bool = False
    augments: bool = False
    losses: LossFunction | None = None

    @property
    def sizes(self) -> np.ndarray:
        """Pictures of each client, shape (num_clients,)."""
        return self.partition.sizes

    @property
    def num_test_examples(self) -> int:
        """How many test pictures there are; as many are generated to be compared with them."""
        return len(self.data.test["y"])

    def holdings(self) -> dict[str, np.ndarray]:
        """Who holds what."""
        return holdings.record(self.data, self.partition)

    def model(self) -> nn.Module:
        """A new generator; its parameters, frozen ones too, are drawn from the run's seed."""
        shape = (self.data.input_shape[0], self.size, self.size)
        return holdings.initial_model(lambda: self.build_model(shape), self.seed)

    def examples(self, client: int) -> Columns:
        """The pictures of one client, or of all; labels are not used."""
        return holdings.train_rows(self.data, self.partition, client)

    def test_examples(self, start: int, stop: int) -> Columns:
        """A slice of the test pictures, with their numbers, which the noise of those to compare is drawn from."""
        return {**holdings.test_rows(self.data, start, stop), "row": torch.arange(start, stop)}

    def prepare(self, examples: Columns, generator: torch.Generator | None) -> Columns:
        """``x`` in -1..1, of the generator's size."""
        return {**examples, "x": in_range(examples["x"], self.size)}

    def loss(self, model: nn.Module, batch: Columns) -> torch.Tensor:
        """Squared distances of the means and of the variances of features, of the batch and of as many generated."""
        maps = self.feature_maps.on(batch["x"].device)
        with torch.no_grad():
            real = moments(maps(batch["x"])[0])
        fake = moments(maps(generated(model, len(batch["x"])))[0])
        return sum(((a - b) ** 2).mean() for a, b in zip(real, fake, strict=True))  # type: ignore[return-value]

    def objective(self, learner: Learner, client: Client, kept: Tree | None) -> Objective:
        """The loss of one client, against statistics of all its pictures; ``kept`` is what it was when it ended."""
        maps = self.feature_maps.on(learner.device)
        if kept is None:
            known = _statistics(maps, learner, self.examples(client.id))
            kept = self.matching.begin(known, seed_for(client.seed, "objective"))
        return Objective(maps, {name: tensor.clone() for name, tensor in kept.items()}, self.matching)

    def evaluate(self, model: nn.Module, batch: Columns) -> dict[str, Any]:
        """Sums of features and of their products, of the batch and of as many generated."""
        count, device = len(batch["x"]), batch["x"].device
        seed = seed_for(self.seed, "evaluation", int(batch["row"][0]))
        torch.manual_seed(seed)  # masks, too, are drawn anew for each block, as the released code does
        maps = self.feature_maps.on(device)
        model.train()  # BatchNorm by the batch, as in training
        noise = torch.randn(count, latent(model), generator=torch.Generator().manual_seed(seed)).to(device)
        fake = model(noise)
        shown = torch.zeros(_SHOWN, *fake.shape[1:], dtype=torch.int64)
        if int(batch["row"][0]) == 0:  # whole numbers that are added to zeros
            shown[: len(fake)] = ((fake[:_SHOWN] + 1) * 127.5).round().long().cpu()
        sums: dict[str, Any] = {"count": torch.tensor(count), "shown": shown}
        for name, pictures in (("real", batch["x"]), ("fake", fake)):
            features = maps(pictures)[1].double()
            sums[f"{name}_sum"] = _UNIT * features.sum(0).cpu()
            sums[f"{name}_products"] = _UNIT * (features.T @ features).cpu()
        return sums

    def summarize(self, sums: dict[str, Any]) -> tuple[Metrics, dict[str, Any]]:
        """The Fréchet distance of generated pictures to test pictures, under the task's own features."""
        count = float(sums["count"])
        units = count * _UNIT
        moments = []
        for name in ("real", "fake"):
            mean = np.asarray(sums[f"{name}_sum"], np.float64) / units
            products = np.asarray(sums[f"{name}_products"], np.float64) / _UNIT
            moments.append((mean, (products - count * np.outer(mean, mean)) / max(1.0, count - 1)))
        distance = frechet_of(*moments[0], *moments[1])
        details = {"extractor": self.feature_maps.name, "pictures": sheet(np.asarray(sums["shown"]).astype(np.uint8))}
        return {"test_loss": distance, "frechet_distance": distance}, details


def sheet(pictures: np.ndarray) -> str:
    """Pictures uint8 (n², C, H, W) as one, n in a row: a PNG in base64."""
    from PIL import Image

    side = math.isqrt(len(pictures))
    _, channels, height, width = pictures.shape
    grid = pictures[: side * side].reshape(side, side, channels, height, width).transpose(0, 3, 1, 4, 2)
    whole = grid.reshape(side * height, side * width, channels)
    content = io.BytesIO()
    Image.fromarray(whole[..., 0] if channels == 1 else whole).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


def _statistics(maps: nn.Module, learner: Learner, examples: Columns) -> dict[str, torch.Tensor]:
    """Means and unbiased variances of the features of all pictures of a client."""
    total = squares = None
    count = len(examples["x"])
    with torch.no_grad():
        for start in range(0, count, _BLOCK):
            block = learner.prepare({name: column[start : start + _BLOCK] for name, column in examples.items()})
            features = maps(block["x"])[0].double()
            total = features.sum(0) + (0 if total is None else total)
            squares = features.square().sum(0) + (0 if squares is None else squares)
    assert total is not None
    assert squares is not None
    mean = total / count
    return {"mean": mean.float(), "var": ((squares - count * mean.square()) / max(1, count - 1)).clamp_min(0).float()}


def generation(
    seed: int,
    /,
    *,
    data: Dataset,
    partition: Partitioner,
    model: ImageGeneratorBuilder,
    features: FeatureMapsBuilder,
    size: int = 32,
    matching: Matching = adam(),
) -> Task:
    """Pictures like the clients', by matching features (GFMN); the Fréchet distance to test pictures is measured.

    Args:
        data: The dataset; labels only deal it out.
        partition: Who holds which part of it.
        model: The generator.
        features: The network whose features are matched.
        size: Height and width of generated pictures; real ones are resized to it.
        matching: What a client's loss makes of the features.
    """
    if data.train["x"].dtype != np.uint8:
        raise ValueError(f"data is {data.name}, which holds no pictures; give image data")
    parts = partition(data, seed_for(seed, "partition"))
    shape = (data.input_shape[0], size, size)
    return Generation(data, parts, model, features(shape), size, matching, seed)
