"""The federated work that every contender does, and the clock that they all use. Needs numpy and PyTorch only.

Fashion-MNIST, or addresses of US presidents, dealt to clients of 50 images or sequences; a client makes 5 SGD steps of
batch 10 in a fixed order, learning rate 0.1; FedAvg with equal weights. Cohorts and initial parameters are drawn here
from fixed seeds, so all contenders do the same arithmetic but for the order of sums. A population beyond 1,000 clients
uses the examples again.
"""

import gzip
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

HOLDERS, EXAMPLES, BATCH, LR = 1000, 50, 10, 0.1
LENGTH = 32  # tokens that the language model sees at once
_BLOCK = 1000  # examples evaluated at a time


@dataclass(frozen=True)
class Work:
    """What is trained, on whom, and for how long.

    Attributes:
        model: cnn (596,042 parameters), mlp, softmax, padded (softmax and an unused parameter), vit-bias (a Transformer
            of which only the biases and the head are trained and sent), or text (a causal Transformer).
        size: Width of the mlp's hidden layer, or of a Transformer; megabytes of the unused parameter.
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
            **{name: f" (width {self.size})" for name in TRANSFORMERS if self.size != 64},
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

    @property
    def data(self) -> str:
        """What it learns from."""
        return "text" if self.model == "text" else "images"

    def build(self) -> nn.Module:
        """The model with its initial parameters."""
        if self.model in TRANSFORMERS:
            return TRANSFORMERS[self.model](self.size)
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
        if isinstance(layer, nn.Embedding):
            drawn = 0.1 * rng.standard_normal(layer.weight.shape, np.float32)
            layer.weight.data.copy_(torch.from_numpy(drawn))
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


class Transformer(nn.Module):
    """Blocks with layer norm first; 16 patches of an image to the mean's class, or each token of a text to the next."""

    def __init__(self, width: int, depth: int, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.embedding = nn.Embedding(256, width) if causal else nn.Linear(49, width)
        self.positions = nn.Embedding(LENGTH if causal else 16, width)
        self.blocks = nn.Sequential(*(Block(width, causal) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256 if causal else 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.causal:
            x = x.view(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)
        places = torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)
        x = self.norm(self.blocks(self.embedding(x) + self.positions(places)))
        return self.head(x if self.causal else x.mean(1))


class Block(nn.Module):
    def __init__(self, width: int, causal: bool, heads: int = 4) -> None:
        super().__init__()
        self.causal, self.heads = causal, heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(), is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def bias_tuned(width: int) -> nn.Module:
    """A vision Transformer of which all is frozen but the biases and the head (BitFit; Zaken et al. 2022)."""
    model = initialized(Transformer(width, depth=4, causal=False))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith(".bias") or name.startswith("head."))
    return model


TRANSFORMERS: dict[str, Callable[[int], nn.Module]] = {
    "vit-bias": bias_tuned,
    "text": lambda width: initialized(Transformer(width, depth=2, causal=True)),
}


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that clients train and send, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of images' classes, or of all tokens of sequences."""
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction)


def given() -> Work:
    """The work that this process was started for."""
    torch.set_num_threads(1)
    return Work(**json.loads(os.environ["SPEED_WORK"]))


def holdings(num_train: int) -> np.ndarray:
    """Which examples the first 1,000 clients hold, in the order of their steps: (clients, examples)."""
    return np.resize(np.random.default_rng(0).permutation(num_train), (HOLDERS, EXAMPLES))


def prepare(source: Path, folder: Path) -> None:
    """Write what is learnt from as arrays that processes can share; ``source`` has Fashion-MNIST's four idx files."""
    for name, write_arrays in (("images", partial(_write_images, source)), ("text", _write_text)):
        if not (folder / name / "done").exists():
            (folder / name).mkdir(parents=True, exist_ok=True)
            write_arrays(folder / name)
            (folder / name / "done").touch()


def _write_images(source: Path, folder: Path) -> None:
    """Normalised images and their labels."""
    train, test = _images(source, "train"), _images(source, "t10k")
    values, counts = np.arange(256) / 255, np.bincount(train.reshape(-1), minlength=256)
    mean = np.average(values, weights=counts)
    table = ((values - mean) / np.average((values - mean) ** 2, weights=counts) ** 0.5).astype(np.float32)
    held = holdings(len(train))
    np.save(folder / "x.npy", table[train[held]][:, :, None])
    np.save(folder / "y.npy", _labels(source, "train")[held])
    np.save(folder / "x_test.npy", table[test][:, None])
    np.save(folder / "y_test.npy", _labels(source, "t10k"))


def _write_text(folder: Path) -> None:
    """Tokens, and those that follow them."""
    from fedray.data.text import Reading, sotu  # in the one process that prepares

    data = sotu(reading=Reading(length=LENGTH))
    for split, tokens in (("", data.train["x"][holdings(len(data.train["x"]))]), ("_test", data.test["x"])):
        np.save(folder / f"x{split}.npy", tokens[..., :-1].astype(np.int64))
        np.save(folder / f"y{split}.npy", tokens[..., 1:].astype(np.int64))


def load(work: Work, split: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Examples and labels, by client (1000, 50, ...) and (1000, 50, ...); those of ``_test`` (n, ...) and (n, ...)."""
    folder = Path(os.environ["SPEED_DATA"], work.data)
    x, y = (torch.from_numpy(np.load(folder / f"{name}{split}.npy", mmap_mode="c")) for name in "xy")
    return x, y


class Clock:
    """Times the rounds of a contender, tests its model between them, and writes down what came out."""

    def __init__(self, work: Work) -> None:
        self._work, self._test = work, load(work, "_test")
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
        losses = [loss(model(x), y, "sum").item() for x, y in blocks]
        self._losses[round] = sum(losses) / self._test[1].numel()

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
