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
from fedray.errors import ConfigError, DataError
from fedray.experiment import plan
from fedray.learner import Columns, Learner
from fedray.local_training import LocalTraining
from fedray.metrics.extractors import features, representations
from fedray.metrics.membership import Attack, confidence, halves, judge, scores
from fedray.report.attacks import Pair, membership_page, neighbours_page
from fedray.seeds import seed_for
from fedray.synthesis.sets import Fit, read_set
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
    one place, on about half of them, in the way ``local`` says. ``lira.json`` and ``lira.html`` (the ROC curve on
    logarithmic axes) are written into the run folder.

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
        found.append(confidence(_logits(target.learner, trained, pool), pool["y"].numpy()))
    logits, y = _logits(target.learner, target.params, pool), pool["y"].numpy()
    ratio = scores(confidence(logits, y), np.array(found), seen, cast(Any, kind))
    attack, right = judge(ratio, member), logits.argmax(1) == y
    about = {"shadows": shadows, "members": half, "kind": kind, "seed": seed, "local": asdict(local)}
    about |= {"accuracy_of_members": float(right[member].mean()), "accuracy_of_others": float(right[~member].mean())}
    (run / "lira.json").write_text(json.dumps({**about, **asdict(attack)}) + "\n")
    membership_page(attack, about, run / "lira.html")
    return attack


def _logits(learner: Learner, params: Params, examples: Columns) -> np.ndarray:
    model = learner.load(params).eval()
    with torch.no_grad():
        blocks = [
            model(learner.prepare({name: column[rows] for name, column in examples.items()})["x"]).numpy()
            for rows in torch.arange(len(examples["y"])).split(256)
        ]
    return np.concatenate(blocks)


@dataclass(frozen=True)
class Neighbours:
    """Synthetic pictures and the private ones that they are nearest to.

    Attributes:
        distance: Of each synthetic picture to its nearest private one, (n,).
        nearest: Which private example that is, as a row of the training set, (n,).
        baseline: Of each test picture to its nearest private one: what strangers are at.
        closer: The share of synthetic pictures that are nearer than 99 % of the test pictures; 0.01 is chance.
    """

    distance: np.ndarray
    nearest: np.ndarray
    baseline: np.ndarray
    closer: float


def neighbours(
    run: str | Path,
    samples: str | Path,
    fit: Fit | None = None,
    cache: str | Path | None = "~/.cache/fedray/features",
    shown: int = 24,
) -> Neighbours:
    """Whether synthetic pictures are copies of private ones: nearest neighbours under the run's own representations.

    ``neighbours.json`` and ``neighbours.html``, with the nearest pairs, are written into the run folder.

    Args:
        run: A finished run of a classifier, whose clients hold the private pictures.
        samples: What `fedray generate` wrote, or any labelled pictures that ``data.name=hub`` reads.
        fit: How samples come to the size of the data; None for what the run's algorithm says, or resize.
        cache: Folder of features, for this attack and others; None to compute them.
        shown: Pairs on the page.
    """
    run = Path(run)
    target = _target(run)
    if len(target.task.data.input_shape) != 3:
        raise ConfigError(
            f"{run} is about {target.task.data.name}, which has no pictures; neighbours compares pictures"
        )
    own = config.read(run / "config.yaml")["algorithm"]
    fit = fit or (own.get("fit", "resize") if isinstance(own, dict) else "resize")
    pictures = {
        "synthetic": read_set(str(samples), target.task.data, cast(Fit, fit))["x"],
        "test": target.other["x"].numpy(),
        "private": target.private["x"].numpy(),
    }
    extractor = representations(target.learner, target.params, "the run's own representations")
    private = features(extractor, pictures["private"], cache)
    found = {kind: _nearest(features(extractor, pictures[kind], cache), private) for kind in ("synthetic", "test")}
    (distance, nearest), (baseline, _) = found["synthetic"], found["test"]
    rows = target.task.partition.indices  # of the private pictures, which stand client by client
    near = Neighbours(distance, rows[nearest], baseline, float((distance < np.quantile(baseline, 0.01)).mean()))
    (run / "neighbours.json").write_text(
        json.dumps({"samples": str(samples), **{k: np.asarray(v).tolist() for k, v in asdict(near).items()}}) + "\n"
    )
    pairs: dict[str, list[Pair]] = {
        kind: [
            (
                pictures[kind][row],
                pictures["private"][place[row]],
                f"{kind} {row}, private {rows[place[row]]}: {far[row]:.3g}",
            )
            for row in far.argsort()[:shown]
        ]
        for kind, (far, place) in found.items()
    }
    neighbours_page({kind: far for kind, (far, _) in found.items()}, pairs, near.closer, run / "neighbours.html")
    return near


def _nearest(queries: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.neighbors import NearestNeighbors

    distance, nearest = NearestNeighbors(n_neighbors=1).fit(points).kneighbors(queries)
    return distance[:, 0], nearest[:, 0]


def prompts(run: str | Path, tokenizer: str | None = None) -> list[dict[str, Any]]:
    """What each client of an FGL run gives away by its prompts: classes that it names, bytes and tokens that it sends.

    The same is written into the run folder, as ``prompts.json``.

    Args:
        run: A run folder of ``algorithm.name=fgl``, finished or not.
        tokenizer: Whose tokens are counted, a hub id or a folder; None for the generator's own, if that is a folder
            (tokens are not counted otherwise).
    """
    run = Path(run)
    values = config.read(run / "config.yaml")
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
    length = _lengths(tokenizer or _own_tokenizer(algorithm.get("generator")))
    found = []
    for client in range(len(task.sizes)):
        said = [text for text, _ in say(task.data, task.partition.client(client))]
        counts = {"prompts": len(said), "bytes": sum(len(text.encode()) for text in said)}
        tokens = {} if length is None else {"tokens": sum(map(length, said))}
        found.append({"client": client, **counts, **tokens, "classes": named(said, task.data.classes)})
    (run / "prompts.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


def _own_tokenizer(generator: Any) -> str | None:
    from fedray.synthesis.diffusion_models import SHIPPED

    path = str(generator.get("path", "")) if isinstance(generator, dict) else ""
    folder = SHIPPED / path.removeprefix("shipped:") if path.startswith("shipped:") else Path(path).expanduser()
    return str(folder / "tokenizer") if path and (folder / "tokenizer").is_dir() else None


def _lengths(tokenizer: str | None) -> Callable[[str], int] | None:
    """How many tokens a text has, without those that every text gets."""
    if tokenizer is None:
        return None
    try:
        import transformers

        made = transformers.AutoTokenizer.from_pretrained(tokenizer)
    except ImportError:
        raise ConfigError("counting tokens needs the package transformers: pip install 'fedray[synthesis]'") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{tokenizer} cannot be loaded as a tokenizer: {' '.join(str(error).split())}") from error
    return lambda text: len(made(text, add_special_tokens=False).input_ids)


def named(texts: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The classes that texts name, as whole words or their plurals: "a woman" does not name the class man.

    >>> named(["a photo of two beetles"], ["bee", "beetle", "cat"])
    ['beetle']
    """
    words = {name: re.compile(rf"(?<!\w){re.escape(name)}(e?s)?(?!\w)", re.IGNORECASE) for name in classes}
    return [name for name, word in words.items() if any(word.search(text) for text in texts)]
