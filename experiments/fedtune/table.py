"""What a sweep of this experiment found, as Markdown: ``python table.py SWEEP``.

A row is a model, a number of shots and a method, with means over the seeds and, of more than one seed, standard
deviations. ``own`` is the mean over the clients of the accuracy under a client's own shares of the classes; a common
model's follows from its table of confusions and from who held what.
"""

import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from fedray.metrics.accuracy import own_accuracy
from fedray.report import read_run
from fedray.report.read import RunRecord

COLUMNS = ("zero-shot", "federated", "own", "alone", "worst alone", "own alone", "together", "MB up")


def found(run: RunRecord) -> dict[str, float]:
    """A run's part of a row, by column."""
    setting, final = run.config["algorithm"]["name"], run.final
    if setting == "centralized":
        return {"together": final["test_accuracy"]}
    if setting == "local_only":
        names = {"alone": "test_accuracy", "worst alone": "worst_test_accuracy", "own alone": "own_accuracy"}
        return {column: final[name] for column, name in names.items()}
    row = {"federated": final["test_accuracy"], "MB up": final["bytes_up_total"] / 1e6}
    if run.confusion is not None and run.label_counts is not None:
        row["own"] = float(np.nanmean(own_accuracy(run.confusion, run.label_counts)))
    first = run.metrics[0]
    # random prompts, and a new head, are no zero shots
    zero_shot = run.config["task"]["model"]["name"] == "clip" and method(run) not in ("prompt", "coop")
    return row | ({"zero-shot": first["test_accuracy"]} if zero_shot and first["round"] == 0 else {})


def method(run: RunRecord) -> str:
    """What was tuned."""
    return run.config["task"]["model"]["method"]["name"]


def shown(column: str, values: list[float]) -> str:
    """Mean and deviation."""
    if not values:
        return "–"
    digits = 2 if column == "MB up" else 3
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and column != "MB up" else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(sweep: Path) -> str:
    """All finished runs of a sweep."""
    rows: dict[tuple[str, int, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for folder in sorted(path.parent for path in sweep.glob("*/model.safetensors")):
        run = read_run(folder)
        model = run.config["task"]["model"]["name"]
        for column, value in found(run).items():
            rows[model, run.config["task"]["data"]["per_class"], method(run)][column].append(value)
    lines = ["| model | shots | method | " + " | ".join(COLUMNS) + " |", "|---" * 3 + "|---:" * len(COLUMNS) + "|"]
    for (model, shots, tuned), values in sorted(rows.items()):
        cells = " | ".join(shown(column, values[column]) for column in COLUMNS)
        lines.append(f"| {model} | {shots} | {tuned} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table(Path(sys.argv[1])))
