"""The federated work that every contender does, and the clock that they all use. Needs numpy and PyTorch only.

Fashion-MNIST dealt to clients of 50 images; a client makes 5 SGD steps of batch 10 in a fixed order, learning rate
0.1; FedAvg with equal weights. Cohorts and initial parameters are drawn here from fixed seeds, so all contenders do
the same arithmetic but for the order of sums. A population beyond 1,000 clients uses the images again.
"""

import gzip
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HOLDERS, EXAMPLES, BATCH, LR = 1000, 50, 10, 0.1
_BLOCK = 1000  # images evaluated at a time


@dataclass(frozen=True)
class Work:
    """What is trained, on whom, and for how long.

    Attributes:
        model: cnn (596,042 parameters), mlp, softmax, or padded (softmax and an unused parameter).
        size: Width of the mlp's hidden layer; megabytes of the unused parameter.
        population: Clients.
        cohort: Clients a round.
        rounds: Rounds.
        steps: SGD steps of a client; 5 are one epoch, 0 leave what a round costs without any work.
    """

    model: str = "mlp"
    size: int = 64
    population: int = 1000
    cohort: int = 40
    rounds: int = 20
    steps: int = 5

    def __str__(self) -> str:
        sized = {
            "mlp": f" ({self.size} hidden)" if self.size != 64 else "",
            "padded": f" ({self.size} MB, no training)",
        }
        return f"{self.model}{sized.get(self.model, '')}, {self.cohort} of {self.population:,}"

    @property
    def evaluate_every(self) -> int:
        """Rounds between evaluations, none of which counts as a part of a round."""
        return max(1, self.rounds // 2)

    def evaluates(self, round: int) -> bool:
        return round > 0 and (round % self.evaluate_every == 0 or round == self.rounds)

    def draw(self, round: int) -> np.ndarray:
        """The cohort of a round (1-based)."""
        return np.random.default_rng([1, round]).choice(self.population, self.cohort, replace=False)

    def schedule(self) -> list[list[int]]:
        """The cohorts of all rounds."""
        return [self.draw(round).tolist() for round in range(1, self.rounds + 1)]

    def build(self) -> nn.Module:
        """The model with its initial parameters."""
        layers: dict[str, list[nn.Module]] = {
            "softmax": [nn.Flatten(), nn.Linear(784, 10)],
            "padded": [nn.Flatten(), nn.Linear(784, 10)],
            "mlp": [nn.Flatten(), nn.Linear(784, self.size), nn.ReLU(), nn.Linear(self.size, 10)],
            "cnn": [
                *(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(4608, 128), nn.ReLU(), nn.Linear(128, 10)),
            ],
        }
        model = initialized(nn.Sequential(*layers[self.model]))
        return padded(model, self.size) if self.model == "padded" else model


def initialized(model: nn.Module) -> nn.Module:
    """The model with parameters like PyTorch's defaults, but drawn by numpy: the same with every version of PyTorch."""
    rng = np.random.default_rng(0)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            bound = layer.weight[0].numel() ** -0.5
            for parameter in (layer.weight, layer.bias):
                drawn = rng.uniform(-bound, bound, parameter.shape).astype(np.float32)
                parameter.data.copy_(torch.from_numpy(drawn))
    return model


def padded(model: nn.Module, megabytes: int) -> nn.Module:
    """The model and an unused parameter, which is sent and averaged like all others."""
    model.padding = nn.Parameter(torch.zeros(megabytes * 1_000_000 // 4))
    return model


def given() -> Work:
    """The work that this process was started for."""
    torch.set_num_threads(1)
    return Work(**json.loads(os.environ["SPEED_WORK"]))


def holdings(num_train: int) -> np.ndarray:
    """Which images the first 1,000 clients hold, in the order of their steps: (clients, examples)."""
    return np.random.default_rng(0).permutation(num_train)[: HOLDERS * EXAMPLES].reshape(HOLDERS, EXAMPLES)


def prepare(source: Path, folder: Path) -> None:
    """Write normalised images and labels, from the four idx files in ``source``, as arrays that processes can share."""
    if (folder / "done").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    train, test = _images(source, "train"), _images(source, "t10k")
    values, counts = np.arange(256) / 255, np.bincount(train.reshape(-1), minlength=256)
    mean = np.average(values, weights=counts)
    table = ((values - mean) / np.average((values - mean) ** 2, weights=counts) ** 0.5).astype(np.float32)
    held = holdings(len(train))
    np.save(folder / "x.npy", table[train[held]][:, :, None])
    np.save(folder / "y.npy", _labels(source, "train")[held])
    np.save(folder / "x_test.npy", table[test][:, None])
    np.save(folder / "y_test.npy", _labels(source, "t10k"))
    (folder / "done").touch()


def load(split: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels: (1000, 50, 1, 28, 28) and (1000, 50); of ``_test`` (10000, 1, 28, 28) and (10000,)."""
    folder = Path(os.environ["SPEED_DATA"])
    x, y = (torch.from_numpy(np.load(folder / f"{name}{split}.npy", mmap_mode="c")) for name in "xy")
    return x, y


class Clock:
    """Times the rounds of a contender, tests its model between them, and writes down what came out."""

    def __init__(self, work: Work) -> None:
        self._work, self._test = work, load("_test")
        self._seconds: list[float] = []
        self._losses: dict[int, float] = {}
        self._first_round = 0.0

    def start(self) -> None:
        self._began = time.perf_counter()

    def stop(self) -> int:
        """End a round; returns its number."""
        self._seconds.append(time.perf_counter() - self._began)
        if len(self._seconds) == 1:
            self._first_round = time.time()
        return len(self._seconds)

    @torch.inference_mode()
    def test(self, round: int, model: nn.Module) -> None:
        """Note the loss of a model, if it is due after this round."""
        if not self._work.evaluates(round):
            return
        blocks = zip(*(column.split(_BLOCK) for column in self._test), strict=True)
        losses = [F.cross_entropy(model(x), y, reduction="sum").item() for x, y in blocks]
        self._losses[round] = sum(losses) / len(self._test[1])

    def write(self) -> None:
        write(self._seconds, self._first_round, self._losses)


def write(seconds: list[float], first_round: float, losses: dict[int, float]) -> None:
    """What a contender hands over: seconds of each round, when the first one ended, losses by round."""
    startup = first_round - float(os.environ["SPEED_BEGAN"])
    result = {"seconds": seconds, "startup": startup, "losses": losses, "torch": torch.__version__}
    Path(os.environ["SPEED_OUT"]).write_text(json.dumps(result))


def _images(source: Path, prefix: str) -> np.ndarray:
    return _idx(source / f"{prefix}-images-idx3-ubyte", 16).reshape(-1, 28, 28)


def _labels(source: Path, prefix: str) -> np.ndarray:
    return _idx(source / f"{prefix}-labels-idx1-ubyte", 8).astype(np.int64)


def _idx(path: Path, header: int) -> np.ndarray:
    zipped = path.with_name(f"{path.name}.gz")
    content = gzip.decompress(zipped.read_bytes()) if zipped.exists() else path.read_bytes()
    return np.frombuffer(content, np.uint8, offset=header)
