"""What tasks over a `Dataset` share: who holds which rows, and a model that follows from the seed."""

import zlib
from collections.abc import Callable

import numpy as np
import torch

from fedray.algorithm import EVERYONE
from fedray.data import Dataset, Partition
from fedray.learner import Columns
from fedray.seeds import seed_for


def record(data: Dataset, partition: Partition) -> dict[str, np.ndarray]:
    """The partition (``indices``, ``offsets``, ``names``), ``label_counts`` (clients × ``classes``), checksums."""
    columns = [split[name] for split in (data.train, data.test) for name in sorted(split)]
    return {
        "indices": partition.indices,
        "offsets": partition.offsets,
        "names": np.array(partition.names, np.str_),
        "classes": np.array(data.classes, np.str_),
        "label_counts": partition.label_counts(data.train["y"], data.num_classes),
        "data_crc32": np.array([zlib.crc32(column.data) for column in columns]),
    }


def train_rows(data: Dataset, partition: Partition, client: int) -> Columns:
    """``x`` as stored and ``y`` (int64) of one client, or of all clients."""
    held = partition.indices if client == EVERYONE else partition.client(client)
    return {name: torch.from_numpy(data.train[name][held]) for name in ("x", "y")}


def test_rows(data: Dataset, start: int, stop: int) -> Columns:
    """A slice of the test set."""
    return {name: torch.from_numpy(np.array(data.test[name][start:stop])) for name in ("x", "y")}


def initial_model(build: Callable[[], torch.nn.Module], seed: int) -> torch.nn.Module:
    """A new model; its parameters are drawn from the run's seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed_for(seed, "model"))
        return build()
