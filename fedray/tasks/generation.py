"""Generation: a network that makes pictures like those that clients hold, by matching features (GFMN).

dos Santos, Mroueh, Padhi and Dognin, 2019: the means and variances of a fixed network's features of generated pictures
are to be those of real ones, without a discriminator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fedray.algorithm import Client, Metrics
from fedray.data import Dataset, Partition
from fedray.learner import Columns, Learner, LossFunction, Task
from fedray.models.feature_maps import FeatureMaps
from fedray.models.pictures import generated, in_range
from fedray.seeds import seed_for
from fedray.sharing import once
from fedray.tasks import holdings
from fedray.tasks.classification import Partitioner
from fedray.tasks.judging import Judging
from fedray.tasks.matching import Kept, Matching, Objective, adam, moments
from fedray.trees import Tree

ImageGeneratorBuilder = Callable[[tuple[int, ...]], nn.Module]
FeatureMapsBuilder = Callable[[tuple[int, ...]], FeatureMaps]

_BLOCK = 64  # pictures whose statistics are taken at a time


@dataclass(frozen=True)
class Generation:
    """Pictures, who holds which of them, a generator, and the network whose features are matched."""

    data: Dataset
    partition: Partition
    build_model: ImageGeneratorBuilder
    feature_maps: FeatureMaps
    compared_by: FeatureMaps
    size: int
    matching: Matching
    seed: int
    judging: Judging
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
            known = once("statistics", learner.device, dict[int, Kept], of=self)
            if client.id not in known:
                known[client.id] = _statistics(maps, learner, self.examples(client.id))
            kept = self.matching.begin(known[client.id], seed_for(client.seed, "objective"))
        return Objective(maps, {name: tensor.clone() for name, tensor in kept.items()}, self.matching)

    def evaluate(self, model: nn.Module, batch: Columns) -> dict[str, Any]:
        """Sums over the batch and over as many generated pictures."""
        return self.judging.judge(model, self.compared_by.on(batch["x"].device), batch, self.seed)

    def summarize(self, sums: dict[str, Any]) -> tuple[Metrics, dict[str, Any]]:
        """Distances of generated pictures to test pictures, by the features that are compared, and some of them."""
        metrics, pictures = self.judging.summarize(sums)
        return metrics, {"extractor": self.compared_by.name, "pictures": pictures}


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
    compared_by: FeatureMapsBuilder | None = None,
    size: int = 32,
    matching: Matching = adam(),
    judging: Judging = Judging(),
) -> Task:
    """Pictures like the clients', by matching features (GFMN), compared with test pictures by their features.

    Args:
        data: The dataset; labels only deal it out.
        partition: Who holds which part of it.
        model: The generator.
        features: The network whose features are matched.
        compared_by: The network by whose features generated pictures are compared with test pictures, such as FID's
            Inception; None for the one above.
        size: Height and width of generated pictures; real ones are resized to it.
        matching: What a client's loss makes of the features.
        judging: How generated pictures are compared with test pictures.
    """
    if data.train["x"].dtype != np.uint8:
        raise ValueError(f"data is {data.name}, which holds no pictures; give image data")
    parts = partition(data, seed_for(seed, "partition"))
    shape = (data.input_shape[0], size, size)
    with torch.device("meta"):
        judging.check(model(shape))
    maps = features(shape)
    judges = maps if compared_by is None else compared_by(shape)
    return Generation(data, parts, model, maps, judges, size, matching, seed, judging)
