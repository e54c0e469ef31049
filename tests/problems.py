"""Tiny tasks, and every algorithm with everything that can be varied about it: what the laws are examined on."""

import atexit
import dataclasses
import functools
import inspect
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedray.aggregators import AGGREGATORS
from fedray.algorithm import EVERYONE, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.algorithms import ALGORITHMS
from fedray.algorithms.fedavg import fedavg
from fedray.backends.serial import SerialBackend
from fedray.backends.worker import Failure
from fedray.client_states import ClientStates
from fedray.data import Partition
from fedray.data.dataset import make_dataset
from fedray.execution import Execution
from fedray.experiment import Experiment
from fedray.learner import Columns, Learner
from fedray.local_training import LocalTraining
from fedray.models import Classifier
from fedray.models.discriminators import Gan
from fedray.models.masked import Masking, mask
from fedray.models.nets import softmax
from fedray.peft.averaging import AVERAGINGS
from fedray.peft.library import lora
from fedray.rounds import Round, rounds
from fedray.samplers import Population, over_selection
from fedray.synthesis.central import CentralTraining
from fedray.synthesis.generator import Generator, png
from fedray.synthesis.requests import Request
from fedray.synthesis.synthesize import Synthesis
from fedray.tasks.classification import Classification

SIZES = (1, 2, 3, 5, 8, 4, 6, 7, 2)  # unequal, with two clients of equal size


@dataclass(frozen=True)
class Problem:
    """A task written directly against the protocol: each client's examples, a model and each example's loss."""

    clients: tuple[Columns, ...]
    test: Columns
    build: Callable[[], nn.Module]
    losses: Callable[[nn.Module, Columns], torch.Tensor]
    average_buffers: bool = False
    noise: float = 0.0  # of the augmentation

    @property
    def sizes(self) -> np.ndarray:
        return np.array([len(columns["y"]) for columns in self.clients])

    def holdings(self) -> dict[str, np.ndarray]:
        return {"sizes": self.sizes}

    def model(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build()

    def examples(self, client: int) -> Columns:
        if client == EVERYONE:
            return {name: torch.cat([columns[name] for columns in self.clients]) for name in self.test}
        return dict(self.clients[client])

    def test_examples(self, start: int, stop: int) -> Columns:
        return {name: column[start:stop] for name, column in self.test.items()}

    @property
    def augments(self) -> bool:
        return self.noise > 0

    @property
    def num_test_examples(self) -> int:
        return len(self.test["y"])

    def prepare(self, examples: Columns, generator: torch.Generator | None) -> Columns:
        if generator is None or not self.noise:
            return examples
        jitter = torch.randn(examples["x"].shape, generator=generator).to(examples["x"].device)
        return {**examples, "x": examples["x"] + self.noise * jitter}

    def loss(self, model: nn.Module, batch: Columns) -> torch.Tensor:
        return self.losses(model, batch).mean()

    def evaluate(self, model: nn.Module, batch: Columns) -> dict[str, Any]:
        count = len(batch["y"])
        sums = {"loss": self.loss(model, batch).item() * count, "count": torch.tensor(count)}
        if not batch["y"].is_floating_point():
            sums["hits"] = (model(batch["x"]).argmax(1) == batch["y"]).sum()
        return sums

    def summarize(self, sums: dict[str, Any]) -> tuple[Metrics, dict[str, Any]]:
        metrics = {"test_loss": float(sums["loss"]) / float(sums["count"])}
        if "hits" in sums:
            metrics["test_accuracy"] = float(sums["hits"]) / float(sums["count"])
        return metrics, {}


def regression(spread: float = 0.3) -> Problem:
    """Linear regression; every client has its own line, by so much."""
    draw = torch.Generator().manual_seed(1)

    def columns(count: int, slope: torch.Tensor) -> Columns:
        x = torch.randn(count, 3, generator=draw)
        return {"x": x, "y": x @ slope + 0.1 * torch.randn(count, generator=draw)}

    shared = torch.tensor([1.0, -2.0, 0.5])
    clients = tuple(columns(n, shared + spread * torch.randn(3, generator=draw)) for n in SIZES)

    def loss(model: nn.Module, batch: Columns) -> torch.Tensor:
        return F.mse_loss(model(batch["x"])[:, 0], batch["y"], reduction="none")

    return Problem(clients, columns(20, shared), lambda: nn.Linear(3, 1), loss)


def _classification(shape: tuple[int, ...], build: Callable[[], nn.Module], noise: float = 0.0) -> Problem:
    draw = torch.Generator().manual_seed(2)
    centres = 1.5 * torch.randn(3, *shape, generator=draw)

    def columns(count: int) -> Columns:
        y = torch.randint(3, (count,), generator=draw)
        return {"x": centres[y] + torch.randn(count, *shape, generator=draw), "y": y}

    def loss(model: nn.Module, batch: Columns) -> torch.Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    return Problem(tuple(columns(n) for n in SIZES), columns(20), build, loss, noise=noise)


def blobs() -> Problem:
    """Classification of points by a perceptron with ``features`` and ``head``."""
    return _classification((4,), lambda: Classifier(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), 6, 3))


def adapted() -> Problem:
    """Classification of points by a frozen perceptron with LoRA, and a head that is trained as a whole."""

    def build() -> nn.Module:
        trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh())
        return Classifier(lora(trunk, rank=3, targets=["0", "2"]), 5, 3)

    return _classification((4,), build)


def images() -> Problem:
    """Classification of images by a convolutional net with dropout, on augmented examples."""
    layers = lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten())  # noqa: E731
    return _classification((1, 5, 5), lambda: Classifier(layers(), 18, 3), noise=0.1)


def pictures() -> Classification:
    """Classification of tiny pictures, as data sets are: what synthetic data can be made for."""
    draw = np.random.default_rng(3)
    y = np.arange(sum(SIZES)) % 3
    columns = {"x": np.stack([scribble(label, draw) for label in y]), "y": y.astype(np.int64)}
    data = make_dataset("pictures", columns, columns, ["top", "middle", "bottom"])
    offsets = np.concatenate([[0], np.cumsum(SIZES)])
    return Classification(data, Partition(np.arange(len(y)), offsets), softmax, 0, "none", False)


def scribble(label: int, draw: np.random.Generator) -> np.ndarray:
    """A picture, uint8 of shape (1, 6, 6), with a bright bar whose height is its class."""
    picture = draw.integers(0, 120, (1, 6, 6)).astype(np.uint8)
    picture[:, 2 * label : 2 * label + 2] += 100
    return picture


def scribbler(batch: int = 4) -> Generator:
    """A generator of scribbles, which reads the last word of its prompt."""

    def load(device: str) -> Any:
        def draw(request: Request) -> bytes:
            label = ["top", "middle", "bottom"].index(request.prompt.split()[-1])
            picture = scribble(label, np.random.default_rng(request.seed))
            return png(picture.transpose(1, 2, 0) / 255)

        return lambda batch: [draw(request) for request in batch]

    return Generator({"scribbler": 1, "batch": batch}, load, batch)


@functools.cache
def synthesis() -> Synthesis:
    """Scribbles, in a cache that lives as long as the process."""
    folder = tempfile.TemporaryDirectory(prefix="fedray-scribbles-")
    atexit.register(folder.cleanup)
    return Synthesis(scribbler(), cache=folder.name)


def masked() -> Problem:
    """Classification of points by a perceptron with frozen weights, of which a mask is learnt."""

    def build() -> nn.Module:
        return mask(Classifier(nn.Sequential(nn.Linear(4, 12), nn.Tanh()), 12, 3), Masking("fedpm"))

    return _classification((4,), build)


class FromNoise(nn.Sequential):
    """A generator of points."""

    latent = 2


def points() -> Problem:
    """Points around (2, -1), and a GAN that learns to make such; the loss is their distance from its own."""
    draw, centre, spread = torch.Generator().manual_seed(4), torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.5])

    def columns(count: int) -> Columns:
        return {"x": centre + spread * torch.randn(count, 2, generator=draw), "y": torch.zeros(count)}

    def build() -> nn.Module:
        judge = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1), nn.Flatten(0))
        return Gan(FromNoise(nn.Linear(2, 2)), judge)

    def loss(model: nn.Module, batch: Columns) -> torch.Tensor:
        z = torch.randn(len(batch["x"]), 2, generator=torch.Generator().manual_seed(0))
        return (model(z) - batch["x"]).square().sum(1)

    return Problem(tuple(columns(n) for n in SIZES), columns(20), build, loss)


class Point(nn.Module):
    """A model that is its parameters."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size, dtype=torch.float64))


def quadratic(curvatures: list[list[float]], optima: list[list[float]], weights: list[int] | None = None) -> Problem:
    """Client i has the loss ½ Σ_j a_ij (w_j − b_ij)²; ``weights`` are its numbers of (equal) examples."""
    a, b = torch.tensor(curvatures, dtype=torch.float64), torch.tensor(optima, dtype=torch.float64)
    copies = weights or [1] * len(a)
    parts = tuple({"y": a[i].expand(n, -1), "b": b[i].expand(n, -1)} for i, n in enumerate(copies))

    def loss(model: nn.Module, batch: Columns) -> torch.Tensor:
        return (batch["y"] * (model.w - batch["b"]).square()).sum(1) / 2

    return Problem(parts, parts[0], lambda: Point(len(optima[0])), loss)


def slopes(directions: list[list[float]], sizes: list[int]) -> Problem:
    """Client i has the loss ⟨g_i, w⟩, so that its gradient is g_i wherever it goes."""
    g = torch.tensor(directions, dtype=torch.float64)
    parts = tuple({"y": g[i].expand(n, -1)} for i, n in enumerate(sizes))

    def loss(model: nn.Module, batch: Columns) -> torch.Tensor:
        return batch["y"] @ model.w

    return Problem(parts, parts[0], lambda: Point(g.shape[1]), loss)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "regression": regression,
    "blobs": blobs,
    "images": images,
    "adapted": adapted,
    "pictures": pictures,
    "masked": masked,
    "points": points,
}
GANS = ("dp_fedavg_gan", "md_gan")
SYNTHETIC = ("gpt_fl", "fgl")  # which go on with another algorithm
LOCAL = LocalTraining(local_lr=0.05, local_epochs=2, batch_size=4, local_lr_decay=0.9)
OPTIONS: dict[str, dict[str, Any]] = {  # where the default would not show on tiny tasks
    "trimmed_mean": {"trim": 0.3},
    "multi_krum": {"num_selected": 3},
    "norm_bound": {"max_norm": 0.1},
}


@dataclass(frozen=True)
class Exam:
    """An algorithm by name, what it is tried on, and with which aggregator if it lets one choose."""

    algorithm: str
    problem: str = "regression"
    aggregator: str | None = None
    group: int = 1
    averaging: str | None = None

    def __str__(self) -> str:
        group = f"{self.group}_at_once" if self.group > 1 else None
        named = (self.algorithm, self.aggregator, self.averaging, self.problem, group)
        return "-".join(part for part in named if part)

    def task(self) -> Any:
        return PROBLEMS[self.problem]()

    def backend(self, num_shares: int = 1, **options: Any) -> SerialBackend:
        return SerialBackend(self.task(), num_shares, execution=Execution(self.group), **options)

    def make(self, local: LocalTraining = LOCAL) -> FederatedAlgorithm:
        options: dict[str, Any] = {"local": local}
        if self.algorithm == "prism":
            options["local"] = replace(local, local_optimizer="adam", local_lr=0.1)
        if self.algorithm == "md_gan":
            options |= {"local": replace(local, local_optimizer="adam"), "batches": 3, "swap_every": 2}
        if self.algorithm in SYNTHETIC:
            central = CentralTraining(central_epochs=2, central_batch_size=8)
            options = {"base": fedavg(local=local), "synthesis": synthesis(), "central": central}
            options |= {"per_prompt": 5} if self.algorithm == "fgl" else {}
        if self.aggregator:
            options["aggregator"] = AGGREGATORS[self.aggregator](**OPTIONS.get(self.aggregator, {}))
        if self.averaging:
            options["averaging"] = AVERAGINGS[self.averaging]()
        return make(self.algorithm, **options)


def make(name: str, num_clients: int = len(SIZES), **options: Any) -> FederatedAlgorithm:
    """A registered algorithm; those that ask for the size of the population are told."""
    first = next(iter(inspect.signature(ALGORITHMS[name]).parameters.values()))
    return ALGORITHMS[name](*([num_clients] if first.kind is first.POSITIONAL_ONLY else []), **options)


def chooses_aggregator(name: str) -> bool:
    return "aggregator" in inspect.signature(ALGORITHMS[name]).parameters


# MOON compares representations, FedLoRA averages factors and PRISM masks, which a linear regression has not
SUITS = {"moon": "blobs", "fedlora": "adapted", "prism": "masked", **dict.fromkeys(SYNTHETIC, "pictures")}
SUITS |= dict.fromkeys(GANS, "points")
BASIC = [Exam(name, SUITS.get(name, "regression")) for name in ALGORITHMS]
LORA = [Exam("fedlora", "adapted", averaging=name) for name in AVERAGINGS]
GROUPED = [
    Exam(name, "blobs", group=3)
    for name in ("fedavg", "fedprox", "fedadam", "scaffold", "fednova", "feddyn", "dp_fedavg")
]
GROUPED += [Exam("fedlora", "adapted", group=3, averaging=name) for name in (None, "rolora", "flora")]
VARIANTS = ("fedavgm", "fedadagrad", "fedadam", "fedyogi")  # whose clients do what FedAvg's do
EXAMS = [
    *BASIC,
    *(Exam(name, "blobs") for name in ("fedavg", "scaffold")),
    *(Exam(name, "images") for name in ALGORITHMS if name not in (*VARIANTS, *SYNTHETIC, *GANS, "fedlora", "prism")),
    *(
        Exam(name, "regression", rule)
        for name in ALGORITHMS
        if chooses_aggregator(name)
        for rule in AGGREGATORS
        if rule != "mean"
    ),
    *LORA,
    *GROUPED,
]


# those whose clients all do the same in every round: not where the first one is of synthetic data
FEDERATED = [exam for exam in BASIC if exam.algorithm not in ("centralized", *SYNTHETIC)]
STATEFUL = [exam for exam in BASIC if exam.algorithm in ("scaffold", "feddyn", "moon", "prism", "md_gan", "local_only")]
exams = functools.partial(pytest.mark.parametrize, "exam", ids=str)


def initial(task: Problem, algorithm: FederatedAlgorithm) -> Any:
    return algorithm.init(Learner(task, "cpu").params())


def train(
    task: Problem,
    algorithm: FederatedAlgorithm,
    backend: Any,
    num_rounds: int = 2,
    cohort: int = 7,
    seed: int = 0,
) -> list[Round]:
    loop = rounds(algorithm, initial(task, algorithm), backend, Population(task.sizes), cohort, seed=seed)
    return [next(loop) for _ in range(num_rounds)]


def parts(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a state, with where it stands."""
    if isinstance(value, ClientStates):
        value = {"committed": value.committed, "staged": value.staged}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from parts(value[key], f"{path}/{key}")
    else:
        yield path, value


def generation_of_digits(
    cache: Any, model: dict[str, Any], train: int = 60, test: int = 40, num_clients: int = 3
) -> Any:
    """The section ``task`` of a configuration: a small generator of digits, by features that are kept in a folder."""
    return {
        "name": "generation",
        "data": {"name": "subset", "of": "digits", "train": train, "test": test},
        "partition": {"name": "shards", "num_clients": num_clients},
        "model": model,
        "features": {"name": "small_cnn", "data": "digits", "width": 2, "epochs": 1, "cache": str(cache)},
        "size": 8,
    }


def assert_same_bits(a: Any, b: Any) -> None:
    """Equal to the bit: the same leaves in the same places."""
    left, right = dict(parts(a)), dict(parts(b))
    assert left.keys() == right.keys()
    for path, x in left.items():
        y = right[path]
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype, path
            assert torch.equal(x, y), f"{path} differs by {(x - y).abs().max()}"
        else:
            assert x == y, path


def differ(a: Any, b: Any) -> bool:
    return any(not torch.equal(x, y) for (_, x), (_, y) in zip(parts(a), parts(b), strict=True) if torch.is_tensor(x))


def copy(value: Any) -> dict[str, Any]:
    """The leaves as they are now, whatever happens to them later."""
    return {path: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for path, leaf in parts(value)}


@dataclass(frozen=True)
class Altered:
    """A backend on which every client update is replaced by what ``alter`` makes of it."""

    backend: SerialBackend
    alter: Callable[[Callable[..., ClientResult]], Callable[..., ClientResult]]

    def map_reduce(self, client_update: Any, *args: Any, **options: Any) -> Any:
        return self.backend.map_reduce(self.alter(client_update), *args, **options)

    def map(self, fn: Any, items: Any) -> Any:
        return self.backend.map(fn, items)

    def stream(self, make: Any, items: Any, pool: Any = None) -> Any:
        return self.backend.stream(make, items, pool)

    def fetch(self, handle: Any) -> Any:
        return handle

    def store(self, state: Any) -> Any:
        return state

    @property
    def client_states(self) -> ClientStates:
        return self.backend.client_states

    @property
    def dropped(self) -> list[Failure]:
        return self.backend.dropped


def failing(victim: int) -> Callable[..., Any]:
    """A client whose work is lost at the very end of it."""

    def alter(client_update: Callable[..., ClientResult]) -> Callable[..., ClientResult]:
        def update(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
            result = client_update(learner, broadcast, client)
            if client.id == victim:
                raise RuntimeError("the battery is empty")
            return result

        return update

    return alter


@functools.cache
def reference(exam: Exam) -> tuple[Any, ...]:
    return outcome(exam, exam.backend())


def outcome(exam: Exam, backend: SerialBackend, **options: Any) -> tuple[Any, ...]:
    history = train(exam.task(), exam.make(), backend, **options)
    return [r.state for r in history], [r.metrics for r in history], backend.client_states


def experiment(exam: Exam, num_rounds: int = 5, **options: Any) -> Experiment:
    settings: dict[str, Any] = {
        "cohort": 5,
        "seed": 0,
        "evaluate_every": 2,
        "checkpoint_every": 2,
        "keep_checkpoints": 2,
    }
    settings |= {
        "task": exam.task(),
        "algorithm": exam.make(),
        "sampler": over_selection,
        "execution": Execution(exam.group),
    }
    return Experiment(**(settings | {"rounds": num_rounds} | options))  # type: ignore[arg-type]


def backend_for(made: Experiment, num_shares: int = 1, **options: Any) -> SerialBackend:
    return SerialBackend(made.task, num_shares, execution=made.execution, **options)
