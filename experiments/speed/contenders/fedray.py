"""fedray, by its one public call; arguments are overrides, such as backend.name=serial.

python -m contenders.fedray [key=value ...]
"""

import os
import sys
import tempfile
from pathlib import Path

from work import BATCH, LENGTH, LR, given, write

from fedray import run

work = given()
tasks = {
    "images": {
        "name": "classification",
        "data": {"name": "fashion_mnist", "path": os.environ["SPEED_SOURCE"]},
        "model": {"name": "components.model", "kind": work.model, "size": work.size},
    },
    "text": {
        "name": "language_modeling",
        "data": {"name": "sotu", "length": LENGTH},
        "model": {"name": "components.language_model", "size": work.size},
    },
}
values = {
    "rounds": work.rounds,
    "cohort": work.cohort,
    "evaluate_every": work.evaluate_every,
    "checkpoint_every": 0,
    "task": tasks[work.data] | {"partition": {"name": "components.partition", "num_clients": work.population}},
    "sampler": {"name": "components.sampler"},
    "algorithm": {"name": "fedavg", "local_lr": LR, "local_steps": work.steps, "batch_size": BATCH, "shuffle": False}
    if work.steps
    else {"name": "components.no_work"},
    "backend": {"name": "ray", "num_workers": 2},
    "trackers": [{"name": "components.stamps"}],
}
with tempfile.TemporaryDirectory() as folder:
    record = run(values, sys.argv[1:], Path(folder) / "run").record
    stamps = [float(line) for line in (record.path / "stamps").read_text().split()]
rounds = [line for line in record.metrics if line["round"] > 0]
write(
    [line["phases"]["sample"] + line["phases"]["train"] for line in rounds],
    stamps[len(record.metrics) - len(rounds)],
    {line["round"]: line["test_loss"] for line in rounds if "test_loss" in line},
)
