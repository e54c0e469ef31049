"""The quality of a generator's pictures, by a classifier's judgement: ``python judge.py CONFIG FOLDER [epochs]``.

CONFIG is the recipe of a generator, FOLDER what ``fedray generate`` wrote. The classifier learns from the private
part of the recipe's data, which the generator has not seen, and never meets a synthetic picture before it judges. It
says how often it agrees with the prompt; and its representations stand in for Inception's in the distances to real test
pictures, which are therefore comparable with nothing but themselves.
"""

import sys

import numpy as np
import torch
from omegaconf import OmegaConf

from fedray import config
from fedray.algorithm import EVERYONE, Client
from fedray.data import Dataset
from fedray.data.hub import hub
from fedray.data.partitions import iid
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.metrics.extractors import classifier
from fedray.metrics.quality import frechet_distance, kernel_distance, prdc
from fedray.models.resnet import resnet20
from fedray.tasks.classification import Classification


def main(recipe: str, folder: str, epochs: int = 5) -> None:
    """Print the share of synthetic pictures that are taken for what was asked for, in all and by class."""
    options = OmegaConf.to_container(OmegaConf.load(recipe))["data"]
    data = config.build(Dataset, {**options, "part": "private"}, "data")
    task = Classification(
        data, iid(data, 0, num_clients=1), resnet20, 0, "none" if len(data.input_shape) == 1 else "crop_flip", False
    )
    learner, params = Learner(task), Learner(task, "cpu").params()
    for epoch in range(1, epochs + 1):
        local = LocalTraining(
            local_lr=0.05 * 0.5 * (1 + np.cos(np.pi * (epoch - 1) / epochs)), local_momentum=0.9, batch_size=128
        )
        params = learner.train(params, Client(EVERYONE, epoch), local).params
        print(f"epoch {epoch}: accuracy on real test pictures {learner.test(params)['test_accuracy']:.4f}", flush=True)
    made = hub(folder, image_size=32, image_mode="L" if data.input_shape[0] == 1 else "RGB", test_fraction=0.2)
    x, y = (np.concatenate([part[name] for part in (made.train, made.test)]) for name in ("x", "y"))
    edge = (x.shape[-1] - data.input_shape[-1]) // 2
    x = x[:, :, edge : x.shape[2] - edge, edge : x.shape[3] - edge]
    examples = {"x": torch.from_numpy(np.ascontiguousarray(x)), "y": torch.from_numpy(y)}
    metrics, details = task.summarize(learner.evaluate(params, examples))
    confusion = np.array(details["confusion"])
    print(f"{len(y)} synthetic pictures: the classifier agrees with the prompt on {metrics['test_accuracy']:.3f}")
    extract = classifier(data, task.model(), params)
    real, fake = extract(data.test["x"][:5000]), extract(x)
    distances = {"Frechet": frechet_distance(real, fake), "kernel": kernel_distance(real, fake), **prdc(real, fake)}
    print("to real test pictures, by the classifier:", ", ".join(f"{n} {v:.4g}" for n, v in distances.items()))
    halves = extract(data.test["x"][5000:])
    print(f"real pictures to other real ones: Frechet {frechet_distance(real, halves):.4g}")
    for name, row, hits in zip(data.classes, confusion, confusion.diagonal(), strict=True):
        print(f"  {name:12} {hits / row.sum():.3f}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
