"""What fedray is told to use for the shared work: components by dotted paths, as a user would write them."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from work import BATCH, EXAMPLES, LENGTH, LR, Work, holdings, initialized, padded

from fedray.aggregators import mean
from fedray.algorithm import Client, ClientResult, FederatedAlgorithm
from fedray.algorithms.fedavg import ServerState
from fedray.data import Dataset, Partition
from fedray.learner import Learner
from fedray.models import MODELS
from fedray.samplers import Population, Selection


def configuration(work: Work, images: str) -> dict[str, Any]:
    """The shared work as a configuration of fedray.

    Args:
        work: What is trained.
        images: Folder of Fashion-MNIST.
    """
    tasks: dict[str, dict[str, Any]] = {
        "images": {
            "name": "classification",
            "data": {"name": "fashion_mnist", "path": images},
            "model": {"name": "components.model", "kind": work.model, "size": work.size},
        },
        "text": {
            "name": "language_modeling",
            "data": {"name": "sotu", "length": LENGTH},
            "model": {"name": "components.language_model", "size": work.size},
        },
    }
    local = {"local_lr": LR, "local_steps": work.steps, "batch_size": BATCH, "shuffle": False}
    return {
        "rounds": work.rounds,
        "cohort": work.cohort,
        "evaluate_every": work.evaluate_every,
        "checkpoint_every": 0,
        "task": tasks[work.data] | {"partition": {"name": "components.partition", "num_clients": work.population}},
        "sampler": {"name": "components.sampler"},
        "algorithm": {"name": "fedavg", **local} if work.steps else {"name": "components.no_work"},
        "backend": {"name": "ray", "num_workers": 2},
    }


def sampler(population: Population, cohort: int, _rng: np.random.Generator, round: int, /) -> Selection:
    """The cohorts of the shared work."""
    work = Work(population=population.num_clients, cohort=cohort)
    return Selection(tuple(work.draw(round).tolist()))


def partition(data: Dataset, _seed: int, /, num_clients: int) -> Partition:
    """Fifty examples each; from the 1,001st client on, examples are used again.

    Args:
        num_clients: Number of clients.
    """
    indices = np.resize(holdings(len(data.train["y"])), num_clients * EXAMPLES)
    return Partition(indices, np.arange(num_clients + 1) * EXAMPLES)


def model(input_shape: tuple[int, ...], num_classes: int, /, kind: str, size: int) -> nn.Module:
    """A reference model of fedray, with the initial parameters of the shared work.

    Args:
        kind: cnn, mlp, softmax, padded or vit-bias.
        size: Width of the mlp's hidden layer, or of the Transformer; megabytes of the padding.
    """
    if kind == "vit-bias":  # which is no model of fedray
        return Work(kind, size).build()
    options = {"hidden": [size]} if kind == "mlp" else {}
    made = initialized(MODELS["softmax" if kind == "padded" else kind](input_shape, num_classes, **options))
    return padded(made, size) if kind == "padded" else made


def language_model(_vocabulary: int, _length: int, /, size: int) -> nn.Module:
    """The causal Transformer of the shared work.

    Args:
        size: Width.
    """
    return Work("text", size).build()


def no_work() -> FederatedAlgorithm:
    """What a round costs when clients do nothing: each sends back the parameters that it received."""

    def client_update(_learner: Learner, params: Any, _client: Client) -> ClientResult:
        return ClientResult(params, EXAMPLES)

    def apply(state: ServerState, cohort: list[Client], backend: Any) -> tuple[ServerState, dict[str, float]]:
        params, metrics = backend.map_reduce(client_update, state.params, cohort, mean())
        return ServerState(params, None), metrics

    return FederatedAlgorithm(lambda params: ServerState(params, None), apply)


@contextmanager
def stamps(folder: Path, _config: Mapping[str, Any], /) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A tracker that writes down when each record came."""
    with (folder / "stamps").open("w", buffering=1) as file:
        yield lambda _record: print(time.time(), file=file)
