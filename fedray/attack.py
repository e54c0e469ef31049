"""Attacks on what a run left: ``fedray attack`` for Python and the shell."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from fedray import config
from fedray.algorithm import EVERYONE, Client
from fedray.data.hub import hub
from fedray.errors import ConfigError, DataError
from fedray.experiment import plan
from fedray.learner import Columns, Learner
from fedray.local_training import LocalTraining
from fedray.metrics.membership import Attack, confidence, halves, judge, scores
from fedray.seeds import seed_for
from fedray.tasks.classification import Classification
from fedray.trees import Params


@dataclass(frozen=True)
class _Target:
    task: Classification
    learner: Learner
    params: Params
    private: Columns
    other: Columns


def _target(run: Path) -> _Target:
    file = run / "model.safetensors"
    if not file.is_file():
        raise DataError(f"{run} has no model.safetensors, which the last round writes; go on with: fedray resume {run}")
    task = plan(config.read(run / "config.yaml")).experiment.task
    if not isinstance(task, Classification):
        raise ConfigError(f"{run} is no run of task.name=classification, which alone these attacks know")
    learner = Learner(task, "cpu")
    try:
        params = load_file(file)
        learner.load(params)
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{file} does not fit the run's own configuration ({error})") from error
    return _Target(task, learner, params, task.examples(EVERYONE), task.test_examples(0, task.num_test_examples))


def lira(
    run: str | Path,
    shadows: int = 16,
    examples: int = 2000,
    local: LocalTraining = LocalTraining(local_lr=0.05, local_epochs=20, local_momentum=0.9),
    kind: str = "online",
    seed: int = 0,
    tell: Callable[[str], None] = lambda _: None,
) -> Attack:
    """Whether the final model of a run gives away what its clients hold (LiRA, Carlini et al., 2022).

    Half of the examples are members, of all clients; the other half are test examples. Each shadow model is trained in
    one place, on about half of them, in the way ``local`` says. ``lira.json`` is written into the run folder.

    Args:
        run: A finished run of a classifier.
        shadows: Shadow models.
        examples: How many are judged; fewer if there are not as many.
        local: How a shadow model is trained.
        kind: online, against seen and unseen; offline, against unseen alone.
        seed: Of the choice of examples and of the halves.
        tell: Told what is being done.
    """
    if kind not in ("online", "offline"):
        raise ConfigError(f"kind is {kind!r}; it must be online or offline")
    if shadows < 4:
        raise ConfigError(f"shadows is {shadows}; it must be >= 4")
    run = Path(run)
    target = _target(run)
    draw = np.random.default_rng(seed_for(seed, "lira"))
    half = min(examples // 2, len(target.private["y"]), len(target.other["y"]))
    if half < 20:
        raise ConfigError(f"examples is {examples}; with {half} members and as many others nothing can be said")
    chosen = [draw.permutation(len(columns["y"]))[:half] for columns in (target.private, target.other)]
    pool = {name: torch.cat([target.private[name][chosen[0]], target.other[name][chosen[1]]]) for name in ("x", "y")}
    member = np.arange(2 * half) < half
    seen = halves(shadows, 2 * half, draw)
    start = Learner(target.task, "cpu").params()
    found = []
    for number, rows in enumerate(seen):
        tell(f"shadow model {number + 1} of {shadows}")
        mine = {name: column[torch.from_numpy(rows)] for name, column in pool.items()}
        client = Client(EVERYONE, seed_for(seed, "shadow", number))
        trained = target.learner.train(start, client, local, examples=mine).params
        found.append(_confidence(target.learner, trained, pool))
    ratio = scores(_confidence(target.learner, target.params, pool), np.array(found), seen, cast(Any, kind))
    attack = judge(ratio, member)
    about = {"shadows": shadows, "members": half, "kind": kind, "seed": seed, "local": asdict(local)}
    (run / "lira.json").write_text(json.dumps({**about, **asdict(attack)}) + "\n")
    return attack


def _confidence(learner: Learner, params: Params, examples: Columns) -> np.ndarray:
    model = learner.load(params).eval()
    with torch.no_grad():
        logits = [
            model(learner.prepare({name: column[rows] for name, column in examples.items()})["x"]).numpy()
            for rows in torch.arange(len(examples["y"])).split(256)
        ]
    return confidence(np.concatenate(logits), examples["y"].numpy())


@dataclass(frozen=True)
class Neighbours:
    """Synthetic pictures and the private ones that they are nearest to.

    Attributes:
        distance: Of each synthetic picture to its nearest private one, (n,).
        nearest: Which private example that is, (n,).
        baseline: Of each test picture to its nearest private one: what strangers are at.
        closer: The share of synthetic pictures that are nearer than 99 % of the test pictures; 0.01 is chance.
    """

    distance: np.ndarray
    nearest: np.ndarray
    baseline: np.ndarray
    closer: float


def neighbours(run: str | Path, samples: str | Path, image_size: int | None = None) -> Neighbours:
    """Whether synthetic pictures are copies of private ones: nearest neighbours under the run's own representations.

    Args:
        run: A finished run of a classifier, whose clients hold the private pictures.
        samples: A folder that `fedray generate` wrote.
        image_size: Height and width that the samples are resized to; None for the data's own.
    """
    target = _target(Path(run))
    channels, height, _ = target.task.data.input_shape
    made = hub(str(samples), image_size=image_size or height, image_mode="L" if channels == 1 else "RGB")
    x = torch.from_numpy(np.concatenate([made.train["x"], made.test["x"]]))
    features = [
        target.learner.features(
            target.params, {"x": pictures, "y": torch.zeros(len(pictures), dtype=torch.int64)}
        ).numpy()
        for pictures in (target.private["x"], target.other["x"], x)
    ]
    distance, nearest = _nearest(features[2], features[0])
    baseline, _ = _nearest(features[1], features[0])
    return Neighbours(distance, nearest, baseline, float((distance < np.quantile(baseline, 0.01)).mean()))


def _nearest(queries: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.neighbors import NearestNeighbors

    distance, nearest = NearestNeighbors(n_neighbors=1).fit(points).kneighbors(queries)
    return distance[:, 0], nearest[:, 0]


def prompts(run: str | Path) -> list[dict[str, Any]]:
    """What each client of an FGL run gives away by its prompts: classes that it names, and bytes that it sends.

    Args:
        run: A run folder of ``algorithm.name=fgl``, finished or not.
    """
    values = config.read(Path(run) / "config.yaml")
    task: Any = plan(values).experiment.task
    algorithm = values["algorithm"]
    if not isinstance(algorithm, dict) or algorithm.get("name") != "fgl":
        raise ConfigError(f"{run} is no run of algorithm.name=fgl, whose clients alone send prompts")
    from fedray.synthesis.captions import ClientPrompts, class_level

    say = (
        config.build(ClientPrompts, algorithm["prompts"], "algorithm.prompts")
        if "prompts" in algorithm
        else class_level
    )
    found = []
    for client in range(len(task.sizes)):
        said = [text for text, _ in say(task.data, task.partition.client(client))]
        found.append(
            {
                "client": client,
                "prompts": len(said),
                "bytes": sum(len(text.encode()) for text in said),
                "classes": named(said, task.data.classes),
            }
        )
    return found


def named(texts: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The classes that texts name, as whole words or their plurals: "a woman" does not name the class man.

    >>> named(["a photo of two beetles"], ["bee", "beetle", "cat"])
    ['beetle']
    """
    words = {name: re.compile(rf"(?<!\w){re.escape(name)}(e?s)?(?!\w)", re.IGNORECASE) for name in classes}
    return [name for name, word in words.items() if any(word.search(text) for text in texts)]
