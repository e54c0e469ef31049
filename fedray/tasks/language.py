"""Language modelling: the next token of a text, by cross-entropy."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fedray.algorithm import Metrics
from fedray.data import Dataset, Partition
from fedray.data.partitions import by_column
from fedray.learner import Columns, Task
from fedray.seeds import seed_for
from fedray.tasks import holdings
from fedray.tasks.classification import Partitioner

LanguageModelBuilder = Callable[[int, int], torch.nn.Module]  # of the vocabulary, and the length of a sequence
_LOGITS = 1 << 24  # evaluated at a time; a vocabulary of 50,000 would fill the memory with those of a few sequences


@dataclass(frozen=True)
class LanguageModeling:
    """Sequences of tokens, who holds which of them, and a model that continues them."""

    data: Dataset
    partition: Partition
    build_model: LanguageModelBuilder
    seed: int
    average_buffers: bool = False
    augments: bool = False

    @property
    def sizes(self) -> np.ndarray:
        """Sequences of each client, shape (num_clients,)."""
        return self.partition.sizes

    @property
    def length(self) -> int:
        """Tokens that the model sees at once, each of which it continues."""
        return self.data.input_shape[0] - 1

    @property
    def num_test_examples(self) -> int:
        """How many test sequences there are."""
        return len(self.data.test["y"])

    def holdings(self) -> dict[str, np.ndarray]:
        """Who holds what; ``classes`` are the authors, ``label_counts`` their sequences."""
        return holdings.record(self.data, self.partition)

    def model(self) -> torch.nn.Module:
        """A new model; its parameters are drawn from the run's seed, or were trained before."""
        return holdings.initial_model(lambda: self.build_model(self.data.vocabulary, self.length), self.seed)

    def examples(self, client: int) -> Columns:
        """``x``, tokens as stored of shape (n, length + 1), and ``y``, the authors, of a client, or of all."""
        return holdings.train_rows(self.data, self.partition, client)

    def test_examples(self, start: int, stop: int) -> Columns:
        """A slice of the test set."""
        return holdings.test_rows(self.data, start, stop)

    def prepare(self, examples: Columns, generator: torch.Generator | None) -> Columns:
        """Tokens as int64, which models take."""
        return {**examples, "x": examples["x"].long()}

    def loss(self, model: torch.nn.Module, batch: Columns) -> torch.Tensor:
        """Mean cross-entropy of the next token."""
        return self.losses(model, batch).mean()

    def losses(self, model: torch.nn.Module, batch: Columns) -> torch.Tensor:
        """Mean cross-entropy of the next token in each sequence."""
        return _cross_entropy(*_continued(model, batch["x"])).mean(1)

    def evaluate(self, model: torch.nn.Module, batch: Columns) -> dict[str, Any]:
        """The summed loss, how many tokens were predicted, and how many of these rightly."""
        sequences = max(1, _LOGITS // (self.length * self.data.vocabulary))
        loss, hits = 0.0, 0
        for tokens in batch["x"].split(sequences):
            logits, following = _continued(model, tokens)
            loss += _cross_entropy(logits, following).double().sum().item()
            hits += int((logits.argmax(-1) == following).sum())
        count = batch["x"].shape[0] * self.length
        return {"loss": loss, "hits": torch.tensor(hits), "tokens": torch.tensor(count)}

    def summarize(self, sums: dict[str, Any]) -> tuple[Metrics, dict[str, Any]]:
        """Loss in nats a token, perplexity (its exponential), and accuracy of the next token."""
        count = float(sums["tokens"])
        loss = float(sums["loss"]) / count
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"test_loss": loss, "perplexity": perplexity, "test_accuracy": float(sums["hits"]) / count}, {}


def _continued(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at each place, (n, length, V), and the token that follows it, (n, length)."""
    return model(tokens[:, :-1].contiguous()), tokens[:, 1:]


def _cross_entropy(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none").view(following.shape)


def language_modeling(
    seed: int,
    /,
    *,
    data: Dataset,
    model: LanguageModelBuilder,
    partition: Partitioner = partial(by_column, column="y"),
) -> Task:
    """The next token, by cross-entropy; loss, perplexity and accuracy on a global test set.

    Args:
        data: Texts.
        model: The language model.
        partition: Who holds which sequences; by default each author is a client.
    """
    if not data.vocabulary:
        raise ValueError(f"data is {data.name}, which holds no text; use sotu or text, or task.name=classification")
    return LanguageModeling(data, partition(data, seed_for(seed, "partition")), model, seed)
