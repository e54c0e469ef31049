"""Runs beside each other: the lines to draw, the rounds and bytes to a target, and what the configs differ in."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np

from fedray.peft.counting import paper_cost_mib
from fedray.report.read import RunRecord, flat, scalars, short_names

Rows = list[list[str]]  # a table: the header, then a line for each row
AXES = ("rounds", "megabytes", "seconds", "virtual")  # what a curve can be drawn against


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed, and so share one line in a plot; mostly a single run."""

    label: str
    runs: tuple[RunRecord, ...]


@dataclass(frozen=True)
class Curve:
    """A measured number along a run; over several seeds the mean, with the lowest and the highest around it.

    Attributes:
        x: the position by axis (``AXES``), each of n values.
        y: n values.
        low: n values, or None where there is one run.
        high: n values, or None where there is one run.
    """

    x: dict[str, np.ndarray]
    y: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


def group_by_seed(runs: Sequence[RunRecord]) -> list[Group]:
    """Gather the runs whose configs are the same but for seeds; the order is that of each group's first run."""
    runs = [replace(run, name=name) for run, name in zip(runs, short_names([run.path for run in runs]), strict=True)]
    gathered: dict[str, list[RunRecord]] = {}
    for run in runs:
        same = {path: value for path, value in flat(run.config) if not _is_seed(path)}
        gathered.setdefault(repr(sorted(same.items())), []).append(run)
    groups: list[list[RunRecord]] = []
    for members in gathered.values():
        seeds = {repr([item for item in flat(run.config) if _is_seed(item[0])]) for run in members}
        groups += [members] if len(seeds) == len(members) else [[run] for run in members]
    stems = [_stem(group) for group in groups]
    return [
        Group(stem if stems.count(stem) == 1 else group[0].name, tuple(group))
        for stem, group in zip(stems, groups, strict=True)
    ]


def curve(group: Group, key: str) -> Curve:
    """How ``key`` went, over the rounds in which every run of the group has it."""
    curves = [_curve(run, key) for run in group.runs]
    if len(curves) == 1:
        return curves[0]
    common = sorted(set.intersection(*(set(one.x["rounds"]) for one in curves)))
    kept = [np.isin(one.x["rounds"], common) for one in curves]
    values = np.stack([one.y[rows] for one, rows in zip(curves, kept, strict=True)])
    x = {axis: np.mean([one.x[axis][rows] for one, rows in zip(curves, kept, strict=True)], axis=0) for axis in AXES}
    return Curve(x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def reach(run: RunRecord, target: float) -> tuple[float, ...] | None:
    """Where on each of ``AXES`` the test accuracy was first ``target`` or more; None if it never was."""
    line = _curve(run, "test_accuracy")
    reached = np.flatnonzero(line.y >= target - 1e-9)  # 0.09 · 5 has reached 0.45
    if not reached.size:
        return None
    return tuple(float(line.x[axis][reached[0]]) for axis in AXES)


def costs_to(run: RunRecord, targets: Sequence[float]) -> dict[str, float]:
    """What it took to reach each target, on each of ``AXES`` that the run has, by names such as ``rounds_to_0.8``."""
    found = {}
    for target in targets:
        for axis, cost in zip(AXES, reach(run, target) or (), strict=False):
            if cost or axis != "virtual":
                found[f"{axis}_to_{target:g}"] = cost
    return found


def default_targets(runs: Sequence[RunRecord]) -> list[float]:
    """Up to three round accuracies: one that is easy for every run, the worst run's best, and the best run's best."""
    best = [found[0] for run in runs if (found := best_accuracy(run))]
    if not best:
        return []
    step = 0.05 if max(best) >= 0.2 else 0.01
    steps = {math.floor(value / step + 1e-9) for value in (0.8 * min(best), min(best), max(best))}
    return [round(step * count, 2) for count in sorted(steps) if count > 0]


def best_accuracy(run: RunRecord) -> tuple[float, int] | None:
    """The highest test accuracy and its round; None if there was none."""
    return _best(run, "test_accuracy", 1)


def best_distance(run: RunRecord) -> tuple[float, int] | None:
    """The least Fréchet distance of generated pictures and its round; None if there was none."""
    return _best(run, "frechet_distance", -1)


def _best(run: RunRecord, key: str, sign: int) -> tuple[float, int] | None:
    line = _curve(run, key)
    if not np.isfinite(line.y).any():
        return None
    at = int(np.nanargmax(sign * line.y))
    return float(line.y[at]), int(line.x["rounds"][at])


def final_number(run: RunRecord, key: str) -> float | None:
    """The newest value of ``key``; None if it was never measured."""
    return scalars(run.final).get(key)


def total_seconds(run: RunRecord) -> float | None:
    """What all the rounds took together; None before the first."""
    return sum(scalars(record).get("seconds", 0.0) for record in run.metrics) if run.metrics else None


def _megabytes(run: RunRecord, key: str) -> float | None:
    total = final_number(run, key)
    return None if total is None else total / 1e6


def sent_each(run: RunRecord) -> tuple[int, int] | None:
    """Of a run that tunes a pre-trained model: parameters that a client sent in its last round, and how many clients.

    They are 32-bit numbers, as all that is trained is. None for other runs, and where nothing is sent.
    """
    model = (run.config.get("task") or {}).get("model")
    if not isinstance(model, dict) or "method" not in model:
        return None
    newest = scalars(run.final)
    clients = int(newest.get("clients_sampled", 0) - newest.get("clients_failed", 0))
    sent = newest.get("bytes_up", 0)
    return (round(sent / 4 / clients), clients) if sent and clients else None


def _paper_cost(run: RunRecord) -> float | None:
    found = sent_each(run)
    return None if found is None else paper_cost_mib(*found)


SUMMARY: tuple[tuple[str, int | None, Callable[[RunRecord], float | None]], ...] = (  # title, decimals, measure
    ("rounds", 0, lambda run: final_number(run, "round")),
    ("accuracy", 4, lambda run: final_number(run, "test_accuracy")),
    ("best", 4, lambda run: (best_accuracy(run) or (None,))[0]),
    ("macro F1", 4, lambda run: final_number(run, "macro_f1")),
    ("test loss", 4, lambda run: final_number(run, "test_loss")),
    ("MB up", None, lambda run: _megabytes(run, "bytes_up_total")),
    ("MB down", None, lambda run: _megabytes(run, "bytes_down_total")),
    ("params sent", 0, lambda run: (sent_each(run) or (None,))[0]),
    ("paper's MiB a round", 2, _paper_cost),
    ("seconds", None, total_seconds),
    ("virtual s", None, lambda run: final_number(run, "virtual_seconds")),
)


def summary_rows(groups: Sequence[Group]) -> Rows:
    """What became of every group; numbers over several seeds are mean ± sample standard deviation."""
    columns = [["run", *(group.label for group in groups)]]
    if any(len(group.runs) > 1 for group in groups):
        columns.append(["seeds", *(str(len(group.runs)) for group in groups)])
    for title, digits, measure in SUMMARY:
        values = [[value for run in group.runs if (value := measure(run)) is not None] for group in groups]
        if any(values):
            columns.append([title, *(spread(value, digits) if value else "–" for value in values)])
    return [list(row) for row in zip(*columns, strict=True)]


def target_rows(groups: Sequence[Group], targets: Sequence[float]) -> Rows:
    """Rounds, megabytes (up and down) and seconds that it took to reach each target, as means over the seeds."""
    rows = [["test accuracy", *(f"≥ {target:g}" for target in targets)]]
    for group in groups:
        cells = []
        for target in targets:
            reached = [cost for run in group.runs if (cost := reach(run, target)) is not None]
            if not reached:
                cells.append("not reached")
                continue
            rounds, megabytes, seconds, virtual = np.mean(reached, axis=0)
            time = f"{quantity(virtual)} virtual s" if virtual else f"{quantity(seconds)} s"
            part = f" ({len(reached)} of {len(group.runs)} seeds)" if len(reached) < len(group.runs) else ""
            cells.append(f"{rounds:.3g} rounds, {quantity(megabytes)} MB, {time}{part}")
        rows.append([group.label, *cells])
    return rows


def difference_rows(groups: Sequence[Group]) -> Rows:
    """The options in which the groups differ; only a header if they do not."""
    configs = [dict(flat(group.runs[0].config)) for group in groups]
    options = dict.fromkeys(option for config in configs for option in config)
    rows = [["option", *(group.label for group in groups)]]
    for option in options:
        values = [str(config.get(option, "–")) for config in configs]
        if len(set(values)) > 1 and not (_is_seed(option) and any(len(group.runs) > 1 for group in groups)):
            rows.append([option, *values])
    return rows


def comparison(runs: Sequence[RunRecord], targets: Sequence[float] | None = None) -> str:
    """The runs' results, and what it took to reach each target accuracy, as plain text.

    Args:
        runs: what ``read_run`` read.
        targets: test accuracies between 0 and 1; without it, a few that suit the runs.
    """
    groups = group_by_seed(runs)
    targets = default_targets(runs) if targets is None else targets
    tables = [summary_rows(groups), *([target_rows(groups, targets)] if targets else [])]
    return "\n\n".join(map(text_table, tables))


def text_table(rows: Rows) -> str:
    """Columns padded with spaces: the first to the left, the others to the right.

    >>> print(text_table([["run", "rounds"], ["fedavg", "20"]]))
    run     rounds
    fedavg      20
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(row) for row in padded)


def quantity(value: float, digits: int | None = None) -> str:
    """A number for people: with ``digits`` decimals, or without it with three significant ones.

    >>> quantity(0.01234), quantity(1234567.0), quantity(0.5, 4), quantity(float("nan"))
    ('0.0123', '1,234,567', '0.5000', 'nan')
    """
    return f"{value:,.{_decimals(value) if digits is None else digits}f}"


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """One value, or mean ± sample standard deviation.

    >>> spread([0.5], 2), spread([0.5, 0.7], 2), spread([20, 20], 0)
    ('0.50', '0.60 ± 0.14', '20')
    """
    mean = float(np.mean(values))
    digits = _decimals(mean) if digits is None else digits
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return quantity(mean, digits) + (f" ± {quantity(deviation, digits)}" if deviation > 0 else "")


def _decimals(value: float) -> int:
    """How many decimals show three significant digits, nine at most."""
    return min(9, max(0, 2 - math.floor(math.log10(abs(value))))) if value and math.isfinite(value) else 0


def _curve(run: RunRecord, key: str) -> Curve:
    numbers = [scalars(record) for record in run.metrics]

    def column(name: str) -> np.ndarray:
        return np.array([record.get(name, 0.0) for record in numbers], dtype=float)

    x = {
        "rounds": column("round"),
        "megabytes": (column("bytes_up_total") + column("bytes_down_total")) / 1e6,
        "seconds": np.cumsum(np.nan_to_num(column("seconds"))),
        "virtual": column("virtual_seconds"),
    }
    has = np.array([key in record for record in numbers], dtype=bool)
    return Curve({axis: x[axis][has] for axis in AXES}, column(key)[has])


def _is_seed(path: str) -> bool:
    return path.rpartition(".")[2] == "seed"


def _stem(runs: Sequence[RunRecord]) -> str:
    """What the names of a group share, without the mark of the seed at its end."""
    names = [run.name for run in runs]
    if len(names) == 1:
        return names[0]
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    shared = "".join(letters[0] for letters in same)
    if any(name[len(shared) :][:1].isdigit() for name in names):
        shared = shared.rstrip("0123456789")  # of fedavg-10 and fedavg-11
    stem = re.sub(r"(^|[-_./, ]+)(seed|s)?[-_=./, ]*$", "", shared)
    algorithm = runs[0].config.get("algorithm")
    return stem or (str(algorithm["name"]) if isinstance(algorithm, dict) and "name" in algorithm else names[0])
