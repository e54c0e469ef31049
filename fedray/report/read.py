"""Reading a run folder back: its config, its metrics, who held what, and the last evaluation."""

import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedray.errors import DataError


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says.

    Attributes:
        path: the folder.
        name: the folder's name.
        config: the resolved configuration.
        environment: versions and hardware; empty if the run did not note them.
        metrics: one record a round, in the order of the rounds; a number that JSON could not hold is nan.
        classes: the classes' names; empty if the task has none.
        label_counts: examples of each class that each client holds, clients × classes; None if unknown.
        samples: sheets of generated pictures (PNG) by their round; empty if the task has none.
        evaluation: the confusion matrix with its ``round`` and ``classes``; None before the run has ended.
    """

    path: Path
    name: str
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    classes: tuple[str, ...]
    label_counts: np.ndarray | None
    evaluation: dict[str, Any] | None
    samples: dict[int, bytes]

    @property
    def final(self) -> dict[str, Any]:
        """The newest value of everything that was measured, for rounds may leave out the evaluation."""
        newest: dict[str, Any] = {}
        for record in self.metrics:
            newest.update(record)
        return newest

    @property
    def confusion(self) -> np.ndarray | None:
        """How often a class (row) was taken for a class (column); None if the task has no such table."""
        table = np.asarray((self.evaluation or {}).get("confusion", ()), dtype=np.int64)
        return table if table.ndim == 2 and table.size else None


def read_run(folder: Path | str) -> RunRecord:
    """Read the folder of a run, which may be unfinished, diverged, or yet without a round.

    Raises:
        DataError: it is no run folder, or one of its files is corrupt.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        reason = "it has no config.yaml" if folder.is_dir() else "there is no such folder"
        raise DataError(f"{folder} is no run folder: {reason}; name a folder that `fedray run` has written")
    classes, label_counts = _read_partition(folder / "partition.npz")
    evaluation = _read_object(folder / "evaluation.json")
    return RunRecord(
        path=folder,
        name=folder.resolve().name,
        config=_read_config(folder / "config.yaml"),
        environment=_read_object(folder / "environment.json") or {},
        metrics=read_metrics(folder / "metrics.jsonl"),
        classes=classes or tuple(str(name) for name in (evaluation or {}).get("classes", ())),
        label_counts=label_counts,
        evaluation=evaluation,
        samples=_read_samples(folder / "samples"),
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` by round; of a round that was run again after a resume, the last one.

    A killed run may leave its last line cut off: that line is not read.

    Raises:
        DataError: a line before the last is not a record.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rounds: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = _without_null(json.loads(line))
            rounds[int(record["round"])] = record
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise DataError(f"{path}, line {number}, is no record of a round; remove that line") from error
    return [record for _, record in sorted(rounds.items())]


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, nested ones as ``outer/inner``.

    >>> scalars({"round": 3, "note": "x", "phases": {"train": 0.5}})
    {'round': 3.0, 'phases/train': 0.5}
    """
    return {
        name: float(value)
        for name, value in flat(record, "/")
        if isinstance(value, int | float | np.number) and not isinstance(value, bool)
    }


def flat(tree: Mapping[str, Any], separator: str = ".") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings with their paths.

    >>> list(flat({"task": {"data": {"name": "digits"}}, "seed": 0}))
    [('task.data.name', 'digits'), ('seed', 0)]
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}{separator}{inner}", leaf) for inner, leaf in flat(value, separator))
        else:
            yield str(key), value


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart.

    >>> short_names([Path("runs/fedavg/0"), Path("runs/prism/0")])
    ['fedavg/0', 'prism/0']
    """
    parts = [path.resolve().parts[1:] for path in paths]
    deepest = max(map(len, parts), default=1)
    for depth in range(1, deepest + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names if parts else []


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(inner) for key, inner in value.items()}
    return math.nan if value is None else value


def _read_config(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        config = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # YAML's and OmegaConf's errors share no base class
        raise DataError(f"{path} cannot be read as YAML ({_first_line(error)}); restore it from the run") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} holds no configuration; restore it from the run")
    return {str(key): value for key, value in config.items()}


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({_first_line(error)}); remove it to do without") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object; remove it to do without")
    return value


def _read_partition(path: Path) -> tuple[tuple[str, ...], np.ndarray | None]:
    if not path.is_file():
        return (), None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            classes = tuple(str(name) for name in arrays["classes"]) if "classes" in arrays else ()
            counts = arrays.get("label_counts")
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is corrupt ({_first_line(error)}); remove it to do without") from error
    return classes, counts if counts is not None and counts.ndim == 2 and counts.size else None


def _read_samples(folder: Path) -> dict[int, bytes]:
    return {int(path.stem): path.read_bytes() for path in sorted(folder.glob("*.png")) if path.stem.isdigit()}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
