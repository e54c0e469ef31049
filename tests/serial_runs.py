"""A small run that takes a fraction of a second, and what to compare of two of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedray import runs
from fedray.report import read_metrics
from fedray.runs import run

CONFIG: dict[str, Any] = {
    "seed": 3,
    "rounds": 6,
    "cohort": 4,
    "task": {
        "name": "classification",
        "data": {"name": "digits"},
        "partition": {"name": "dirichlet", "num_clients": 8, "alpha": 0.5},
        "model": {"name": "mlp", "hidden": [8]},
    },
    "algorithm": {"name": "scaffold", "local_lr": 0.1, "batch_size": 64, "local_lr_decay": 0.9},
    "checkpoint_every": 2,
    "backend": {"name": "serial"},
}


@contextmanager
def without_page() -> Iterator[pytest.MonkeyPatch]:
    """The report has its own tests, and takes longer than a run here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "write_report", lambda _, out: out.write_text("a page"))
        yield patch


def undisturbed(folder: Path) -> Path:
    """A run that nothing disturbed."""
    with without_page():
        return run(CONFIG, out=folder).folder


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def measured(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock says."""
    records = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in ("seconds", "phases")} for record in records]
