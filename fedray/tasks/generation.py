"""Generation: a network that makes pictures like those that clients hold, by matching features (GFMN).

dos Santos, Mroueh, Padhi and Dognin, 2019: the means and variances of a fixed network's features of generated pictures
are to be those of real ones, without a discriminator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fedray.algorithm import Client, Metrics
from fedray.data import Dataset, Partition
from fedray.learner import Columns, Learner, LossFunction, Task
from fedray.models.feature_maps import FeatureMaps
from fedray.models.pictures import generated, in_range
from fedray.seeds import seed_for
from fedray.tasks import holdings
from fedray.tasks.classification import Partitioner
from fedray.tasks.judging import Judging
from fedray.trees import Tree

ImageGeneratorBuilder = Callable[[tuple[int, ...]], nn.Module]
FeatureMapsBuilder = Callable[[tuple[int, ...]], FeatureMaps]
Averaging = Literal["adam", "moving", "none"]

_BLOCK = 64  # pictures whose statistics are taken at a time
_AMA_LR, _BETA1, _BETA2 = 1e-5, 0.5, 0.999  # of GFMN's released code


@dataclass(frozen=True)
class Generation:
    """Pictures, who holds which of them, a generator, and the network whose features are matched."""

    data: Dataset
    partition: Partition
    build_model: ImageGeneratorBuilder
    feature_maps: FeatureMaps
    compared_by: FeatureMaps
    size: int
    averaging: Averaging
    ama_lr: float
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
            real = _moments(maps(batch["x"])[0])
        fake = _moments(maps(generated(model, len(batch["x"])))[0])
        return sum(((a - b) ** 2).mean() for a, b in zip(real, fake, strict=True))  # type: ignore[return-value]

    def objective(self, learner: Learner, client: Client, kept: Tree | None) -> "Matching":
        """The loss of one client, against statistics of all its pictures; ``kept`` is what it was when it ended."""
        maps = self.feature_maps.on(learner.device)
        if kept is None:
            kept = _statistics(maps, learner, self.examples(client.id))
            if self.averaging == "adam":
                kept |= _fresh(len(kept["mean"]), seed_for(client.seed, "objective"), learner.device)
        return Matching(maps, {name: tensor.clone() for name, tensor in kept.items()}, self.averaging, self.ama_lr)

    def evaluate(self, model: nn.Module, batch: Columns) -> dict[str, Any]:
        """Sums over the batch and over as many generated pictures."""
        return self.judging.judge(model, self.compared_by.on(batch["x"].device), batch, self.seed)

    def summarize(self, sums: dict[str, Any]) -> tuple[Metrics, dict[str, Any]]:
        """Distances of generated pictures to test pictures, by the features that are compared, and some of them."""
        metrics, pictures = self.judging.summarize(sums)
        return metrics, {"extractor": self.compared_by.name, "pictures": pictures}


class Matching:
    """A client's loss: GFMN's Adam moving average of the distance of moments, a moving average of them, or neither.

    With ``adam``, a and b follow the differences of means and of variances by a step of Adam each, and the loss is
    a·(μ_real − μ_fake) + b·(v_real − v_fake).
    """

    def __init__(self, maps: nn.Module, kept: dict[str, torch.Tensor], averaging: Averaging, lr: float) -> None:
        self._maps, self.kept, self._averaging, self._lr = maps, kept, averaging, lr

    def __call__(self, model: nn.Module, batch: Columns) -> torch.Tensor:
        """The loss of as many generated pictures as the batch has."""
        fake_mean, fake_var = _moments(self._maps(generated(model, len(batch["x"])))[0])
        kept = self.kept
        differences = {"a": kept["mean"] - fake_mean, "b": kept["var"] - fake_var}
        if self._averaging == "none":
            return sum(d.square().mean() for d in differences.values())  # type: ignore[return-value]
        if self._averaging == "moving":
            for name, found in (("fake_mean", fake_mean), ("fake_var", fake_var)):
                before = kept.get(name, found.detach())
                differences["a" if name == "fake_mean" else "b"] = kept[name.removeprefix("fake_")] - (
                    0.9 * before + 0.1 * found
                )
                kept[name] = (0.9 * before + 0.1 * found).detach()
            return sum(d.square().mean() for d in differences.values())  # type: ignore[return-value]
        kept["steps"] = kept["steps"] + 1
        for name, difference in differences.items():
            self._follow(name, difference.detach())
        return sum((kept[name] * difference).sum() for name, difference in differences.items())  # type: ignore[return-value]

    def _follow(self, name: str, target: torch.Tensor) -> None:
        """One step of Adam on ‖v − target‖² / F."""
        v, steps = self.kept[name], float(self.kept["steps"])
        gradient = 2 * (v - target) / len(v)
        first = self.kept[f"{name}_first"].mul_(_BETA1).add_(gradient, alpha=1 - _BETA1)
        second = self.kept[f"{name}_second"].mul_(_BETA2).addcmul_(gradient, gradient, value=1 - _BETA2)
        root = (second / (1 - _BETA2**steps)).sqrt_().add_(1e-8)
        v.addcdiv_(first, root, value=-self._lr / (1 - _BETA1**steps))


def _moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return features.mean(0), features.var(0) if len(features) > 1 else torch.zeros_like(features[0])


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


def _fresh(length: int, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The start of the moving average: as a linear layer's weights."""
    draw, bound = torch.Generator().manual_seed(seed), length**-0.5
    fresh = {name: (torch.rand(length, generator=draw) * 2 - 1).mul_(bound).to(device) for name in ("a", "b")}
    zeros = {f"{name}_{m}": torch.zeros(length, device=device) for name in ("a", "b") for m in ("first", "second")}
    return {**fresh, **zeros, "steps": torch.zeros((), device=device)}


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
    averaging: Averaging = "adam",
    ama_lr: float = _AMA_LR,
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
        averaging: How a client's differences of moments are averaged over steps: GFMN's Adam moving average, a plain
            moving average of generated moments, or not.
        ama_lr: Learning rate of the Adam moving average.
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
    return Generation(data, parts, model, maps, judges, size, averaging, ama_lr, seed, judging)
