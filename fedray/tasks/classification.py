"""Classification of images, or of any tensors, by cross-entropy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from fedray.algorithm import Metrics
from fedray.data import Dataset, Partition
from fedray.learner import Columns, Task
from fedray.options import parameters
from fedray.seeds import seed_for
from fedray.tasks import holdings

Partitioner = Callable[[Dataset, int], Partition]
ModelBuilder = Callable[[tuple[int, ...], int], torch.nn.Module]  # or of the Dataset alone, if its signature says so


@dataclass(frozen=True)
class Classification:
    """A dataset, who holds which part of it, and a model."""

    data: Dataset
    partition: Partition
    build_model: ModelBuilder
    seed: int
    augment: Literal["none", "crop_flip"]
    average_buffers: bool
    domains: str | None = None

    @property
    def sizes(self) -> np.ndarray:
        """Examples of each client, shape (num_clients,)."""
        return self.partition.sizes

    @property
    def augments(self) -> bool:
        """Whether training images are shifted and flipped at random."""
        return self.augment != "none"

    @property
    def num_test_examples(self) -> int:
        """How many test examples there are."""
        return len(self.data.test["y"])

    def holdings(self) -> dict[str, np.ndarray]:
        """The partition (``indices``, ``offsets``, ``names``), ``label_counts`` (clients × ``classes``), checksums."""
        return holdings.record(self.data, self.partition)

    def model(self) -> torch.nn.Module:
        """A new model; its parameters are drawn from the run's seed."""
        shape = (self.data.input_shape, self.data.num_classes)
        of = (self.data,) if _takes_dataset(self.build_model) else shape
        return holdings.initial_model(lambda: self.build_model(*of), self.seed)

    def examples(self, client: int) -> Columns:
        """``x`` as stored and ``y`` (int64) of one client, or of all clients."""
        return holdings.train_rows(self.data, self.partition, client)

    def test_examples(self, start: int, stop: int) -> Columns:
        """A slice of the test set; with ``domains``, the number of each example's domain is among its columns."""
        rows = holdings.test_rows(self.data, start, stop)
        if self.domains is None:
            return rows
        code = np.searchsorted(self._domains, self.data.test[self.domains][start:stop])
        return {**rows, "domain": torch.from_numpy(code)}

    @cached_property
    def _domains(self) -> np.ndarray:
        return np.unique(self.data.test[self.domains]) if self.domains is not None else np.array([])

    def prepare(self, examples: Columns, generator: torch.Generator | None) -> Columns:
        """Normalise ``x`` (uint8 is read as 0..255) to mean 0 and deviation 1 a channel, and augment for training."""
        x = examples["x"]
        if generator is not None and self.augment == "crop_flip":
            x = _crop_and_flip(x, generator)
        shape = (-1, *[1] * (x.dim() - 2))
        scale = 255.0 if x.dtype == torch.uint8 else 1.0
        mean, std = (
            (torch.tensor(each).view(shape) * scale).to(x.device, non_blocking=True)
            for each in (self.data.mean, self.data.std)
        )
        return {**examples, "x": (x.to(torch.float32) - mean).div_(std)}

    def loss(self, model: torch.nn.Module, batch: Columns) -> torch.Tensor:
        """Mean cross-entropy."""
        return F.cross_entropy(model(batch["x"]), batch["y"])

    def losses(self, model: torch.nn.Module, batch: Columns) -> torch.Tensor:
        """Cross-entropy of each example."""
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    def evaluate(self, model: torch.nn.Module, batch: Columns) -> dict[str, Any]:
        """The summed loss, and the confusion matrix (true class × predicted class); hits and examples by domain."""
        logits, classes = model(batch["x"]), self.data.num_classes
        pairs = batch["y"] * classes + logits.argmax(1)
        confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes).cpu()
        sums = {"loss": F.cross_entropy(logits, batch["y"], reduction="sum").item(), "confusion": confusion}
        if "domain" not in batch:
            return sums
        right, domain, count = batch["y"] == logits.argmax(1), batch["domain"], len(self._domains)
        hits, examples = (torch.bincount(d, minlength=count).cpu() for d in (domain[right], domain))
        return {**sums, "domain_hits": hits, "domain_examples": examples}

    def summarize(self, sums: dict[str, Any]) -> tuple[Metrics, dict[str, Any]]:
        """Loss, accuracy and macro-averaged F1 (classes without test examples left out); accuracy by domain."""
        confusion = torch.as_tensor(sums["confusion"], dtype=torch.float64)
        support, predicted, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal()
        present = support > 0
        f1 = 2 * hits / (support + predicted).clamp_min(1)
        metrics = {
            "test_loss": float(sums["loss"]) / float(support.sum()),
            "test_accuracy": float(hits.sum() / support.sum()),
            "macro_f1": float(f1[present].mean()),
        }
        if "domain_hits" in sums:
            shares = torch.as_tensor(sums["domain_hits"]).double() / torch.as_tensor(sums["domain_examples"])
            metrics |= {f"test_accuracy/{n}": float(s) for n, s in zip(self._domains, shares, strict=True)}
            metrics["domain_accuracy"] = float(shares.mean())
        return metrics, {"classes": list(self.data.classes), "confusion": confusion.long().tolist()}


def classification(
    seed: int,
    /,
    *,
    data: Dataset,
    partition: Partitioner,
    model: ModelBuilder,
    augment: Literal["none", "crop_flip"] = "none",
    batch_norm: Literal["refuse", "average"] = "refuse",
    domains: str | None = None,
) -> Task:
    """Classification by cross-entropy; accuracy and macro-F1 on a global test set.

    Args:
        data: The dataset.
        partition: Who holds which part of it.
        model: The classifier.
        augment: Random shifts by up to an eighth of the size, and horizontal flips, of training images.
        batch_norm: Whether a model with BatchNorm is refused, or its running statistics averaged.
        domains: A column, such as the domain; accuracy is reported for each of its values, too, and their mean.
    """
    if data.vocabulary:
        raise ValueError(f"data is {data.name}, which is text; continue it with task.name=language_modeling")
    if augment == "crop_flip" and len(data.input_shape) != 3:
        raise ValueError(f"augment is crop_flip; {data.name} has examples of shape {data.input_shape}, not images")
    if domains is not None and domains not in data.test:
        raise ValueError(f"domains is {domains!r}; {data.name} has the columns {', '.join(sorted(data.test))}")
    parts = partition(data, seed_for(seed, "partition"))
    return Classification(data, parts, model, seed, augment, batch_norm == "average", domains)


def _takes_dataset(builder: ModelBuilder) -> bool:
    function = getattr(builder, "function", builder)  # of one that was configured
    return [parameter.annotation for parameter in parameters(function)[:1]] == [Dataset]


def _crop_and_flip(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count, _, height, width = x.shape
    pad = max(1, height // 8)
    padded = F.pad(x, (pad, pad, pad, pad))
    down, right = torch.randint(2 * pad + 1, (2, count, 1), generator=generator).to(x.device)
    flip = torch.rand(count, 1, generator=generator).to(x.device) < 0.5
    rows = down + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(count, width)
    columns = right + torch.where(flip, width - 1 - columns, columns)
    image = torch.arange(count, device=x.device)
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
