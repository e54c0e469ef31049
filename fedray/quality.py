"""How good a generated set is: ``fedray quality`` for Python and the shell."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fedray import config
from fedray.algorithm import EVERYONE, Client
from fedray.data import Dataset
from fedray.data.dataset import Columns
from fedray.data.partitions import iid
from fedray.errors import ConfigError, DataError
from fedray.learner import Learner
from fedray.metrics.extractors import Extractor, features, representations
from fedray.metrics.quality import frechet_distance, kernel_distance, prdc
from fedray.options import options_of
from fedray.seeds import seed_for
from fedray.synthesis.central import CentralTraining
from fedray.synthesis.sets import Fit, read_set
from fedray.tasks.classification import ModelBuilder, classification
from fedray.trees import Params


@dataclass(frozen=True)
class Measurement:
    """What a set is measured against, and how."""

    learner: Learner
    data: Dataset
    central: CentralTraining
    extractor: Extractor | None
    fit: Fit
    sample_rate: int | None
    real: int
    k: int
    cache: str
    seed: int


def measurement(
    *,
    data: Dataset,
    model: ModelBuilder,
    central: CentralTraining = CentralTraining(),
    augment: Literal["none", "crop_flip"] = "none",
    batch_norm: Literal["refuse", "average"] = "refuse",
    extractor: Extractor | None = None,
    fit: Fit = "resize",
    sample_rate: int | None = None,
    real: int = 10_000,
    k: int = 5,
    cache: str = "~/.cache/fedray/features",
    seed: int = 0,
) -> Measurement:
    """The configuration of ``fedray quality``.

    Args:
        data: The real data.
        model: What is trained on synthetic and on real examples.
        central: How it is trained, on either.
        augment: Random shifts and flips of training images.
        batch_norm: Whether a model with BatchNorm is refused, or its running statistics are kept.
        extractor: What makes the features that distances are taken of; None for the representations of the model
            that was trained on real examples, a substitute that is comparable with nothing but itself.
        fit: How pictures come to the size of the data: resized, or cut out of their middle.
        sample_rate: In hertz, of the data's sounds.
        real: Real training examples that the judge learns from, drawn at random; fewer if there are not as many.
        k: Neighbours that make the radius around a point, for precision, recall, density and coverage.
        cache: Folder of features, for this command and others.
        seed: Of the model's start, of the order of examples, and of the choice of real ones.
    """
    if real < 1:
        raise ValueError(f"real is {real}; it must be >= 1")
    made = classification(
        seed, data=data, partition=partial(iid, num_clients=1), model=model, augment=augment, batch_norm=batch_norm
    )
    return Measurement(Learner(made), data, central, extractor, fit, sample_rate, real, k, cache, seed)


def quality(samples: str | Path, values: Mapping[str, Any], out: str | Path | None = None) -> dict[str, Any]:
    """Measure a generated set against real data.

    Train on synthetic, test on real: the accuracy on real test examples of a model that has seen nothing but the set.
    Label hits: the share of samples that a judge, the same model trained on real examples, takes for what they are
    labelled as. Distances of features: of the samples to the test examples, and beside them, as what is attainable,
    those of as many real training examples that the judge has not seen, where there are as many.

    Args:
        samples: What `fedray generate` wrote, or any labelled pictures or sounds that ``data.name=hub`` reads.
        values: A configuration of `measurement`, or of an experiment whose data the set stands for.
        out: Where to write the figures, as JSON; None for nowhere.
    """
    made: Measurement = config.call(measurement, _own(values))
    data, learner = made.data, made.learner
    fake = read_set(str(samples), data, made.fit, made.sample_rate)
    order = np.random.default_rng(seed_for(made.seed, "judge")).permutation(len(data.train["y"]))
    shown, others = order[: made.real], order[made.real :][: len(fake["y"])]
    student = _trained(made, fake)
    judge = _trained(made, {name: data.train[name][shown] for name in ("x", "y")})
    hits = _confusion(learner, judge, fake)
    asked = hits.sum(1)
    real_accuracy = learner.test(judge)["test_accuracy"]
    extractor = made.extractor or representations(
        learner, judge, f"substitute: this model, trained on {len(shown)} real examples (accuracy {real_accuracy:.3f})"
    )
    found: dict[str, Any] = {
        "samples": len(fake["y"]),
        "data": data.name,
        "train_on_synthetic": learner.test(student)["test_accuracy"],
        "train_on_real": real_accuracy,
        "real_examples": len(shown),
        "label_hits": float(hits.trace() / asked.sum()),
        "label_hits_of": {data.classes[k]: float(hits[k, k] / asked[k]) for k in np.flatnonzero(asked)},
        "extractor": extractor.name,
        "synthetic_to_test": _distances(made, extractor, fake["x"]),
        "real_to_test": _distances(made, extractor, data.train["x"][others]) if len(others) == len(fake["y"]) else None,
        "test_examples": len(data.test["y"]),
    }
    if out is not None:
        try:
            Path(out).write_text(json.dumps(found, indent=2) + "\n")
        except OSError as error:
            raise DataError(f"{out} cannot be written ({error.strerror}); choose another --out") from error
    return found


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an experiment's configuration that says what real data are and how a model is trained."""
    known = options_of(measurement)
    if "task" not in values:
        return dict(values)
    task, algorithm = values["task"], values.get("algorithm")
    if not isinstance(task, Mapping) or task.get("name") != "classification":
        raise ConfigError("this experiment's task is not classification, which alone a set is measured by")
    training = {field.name for field in fields(CentralTraining)} | {"fit", "sample_rate"}
    own = {name: value for name, value in task.items() if name in known}
    if isinstance(algorithm, Mapping):
        own |= {name: value for name, value in algorithm.items() if name in training}
    return own | {name: value for name, value in values.items() if name in known}  # which was given for this command


def _trained(made: Measurement, columns: Columns) -> Params:
    learner, local = made.learner, made.central.local(len(columns["y"]), made.central.central_epochs)
    examples = {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}
    client = Client(EVERYONE, seed_for(made.seed, "quality"))
    return learner.train(Learner(learner.task, "cpu").params(), client, local, examples=examples).params


def _confusion(learner: Learner, params: Params, columns: Columns) -> np.ndarray:
    examples = {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}
    return np.asarray(learner.evaluate(params, examples)["confusion"])


def _distances(made: Measurement, extractor: Extractor, x: np.ndarray) -> dict[str, float]:
    """Of examples to the test examples."""
    real, fake = (features(extractor, each, made.cache) for each in (made.data.test["x"], x))
    try:
        areas = prdc(real, fake, made.k)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return {"frechet_distance": frechet_distance(real, fake), "kernel_distance": kernel_distance(real, fake), **areas}


def table(found: Mapping[str, Any]) -> str:
    """The figures of a set as lines of text."""
    hits = "  ".join(f"{name} {share:.2f}" for name, share in found["label_hits_of"].items())
    lines = [
        f"{found['samples']} samples for {found['data']}",
        f"train on synthetic, test on real  {found['train_on_synthetic']:.4f}",
        f"train on real, test on real       {found['train_on_real']:.4f}  ({found['real_examples']} examples)",
        f"label hits                        {found['label_hits']:.4f}  ({hits})",
        f"features: {found['extractor']}",
        f"{'to the test examples':24}{'synthetic':>12}{'real' if found['real_to_test'] else '':>12}",
    ]
    for name, value in found["synthetic_to_test"].items():
        other = f"{found['real_to_test'][name]:12.4g}" if found["real_to_test"] else ""
        lines.append(f"{name.replace('_', ' '):24}{value:12.4g}{other}")
    return "\n".join(lines)
