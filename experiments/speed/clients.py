"""What a client costs in fedray and in a plain loop, in turn in one process, so that a noisy machine meets both alike.

    python experiments/speed/clients.py --work cnn --repeat 20 [--device cuda]

Prints the milliseconds of a client, the median over the repeats, and the median of the ratios to the loop's in each.
What a round costs beside its clients (messages, and waiting for the last worker) is in `speed.py`.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from components import configuration
from contenders.floor import trainer
from speed import DATA, IMAGES
from work import TRANSFORMERS, Work, load, prepare, trained

from fedray.backends.serial import SerialBackend
from fedray.backends.worker import keep_freed_memory
from fedray.experiment import plan
from fedray.learner import Learner
from fedray.rounds import clients, draw

COHORT = 20  # clients in one measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="cnn", choices=["mlp", "cnn", "softmax", *TRANSFORMERS])
    parser.add_argument("--size", type=int, default=64, help="width of the mlp's hidden layer, or of a Transformer")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--data", type=Path, default=IMAGES, help="folder of Fashion-MNIST's four idx files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    prepare(Path(options.data), DATA)
    os.environ["SPEED_DATA"] = str(DATA)
    work = Work(options.work, options.size, cohort=COHORT)
    device = options.device
    ways = {"loop": loop(work, device), "loop, compiled": loop(work, device, "compile")}
    executions: dict[str, dict[str, Any]] = {"": {}, ", compiled": {"group": 1, "compile": True}}
    if device != "cpu":
        executions |= {", not recorded": {"group": 1, "cuda_graphs": False}, ", one by one": {"group": 1}}
        executions |= {", 20 together": {"group": COHORT}}
    ways |= {f"fedray{name}": fedray(work, options.data, device, **each) for name, each in executions.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-2, options.repeat):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if repeat >= 0:  # it is warm
                taken[name].append(1e3 * (time.perf_counter() - began) / COHORT)
    print(f"| {str(work).split(', ')[0]} | ms a client | ÷ loop |\n| --- | ---: | ---: |")
    for name, each in taken.items():
        ratio = median(own / floor for own, floor in zip(each, taken["loop"], strict=True))
        print(f"| {name} | {median(each):.2f} | {ratio:.3f} |")


def loop(work: Work, device: str, *flags: str) -> Callable[[], object]:
    """A cohort in the plain loop."""
    shared = torch.cat([p.detach().flatten() for p in trained(work.build()).values()]).to(device)
    total, (x, y) = torch.zeros_like(shared), load(work)
    share = trainer(work, (x.to(device), y.to(device)), shared, total, list(flags))
    cohort = work.schedule()[0]

    def a_round() -> torch.Tensor:
        share(cohort)
        return total.cpu()  # once a GPU is through

    return a_round


def fedray(work: Work, images: Path, device: str, **execution: Any) -> Callable[[], object]:
    """A round of the same cohort in fedray's serial backend."""
    made = plan(configuration(work, str(images)) | {"backend": "serial"}).experiment
    backend = SerialBackend(made.task, 1, device, execution=replace(made.execution, **execution))
    members = clients(draw(made.population, made.cohort, made.sampler, made.seed, 1), made.population, made.seed, 1)
    state = made.algorithm.init(Learner(made.task, "cpu").params())
    return lambda: made.algorithm.apply(state, members, backend)


if __name__ == "__main__":
    main()
