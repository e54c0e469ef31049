"""Many runs of one configuration: ``fedray sweep`` for Python and the shell.

A trial is an ordinary run folder of the serial backend, and trials are what is handed out to the actors of a cluster:
one process runs many of them, each on one core (or GPU), so that sixty small trials need one start of Ray and not
sixty. A sweep that is started again in its folder goes on: finished trials stay, others go on from their checkpoints.
"""

import contextlib
import csv
import itertools
import json
import re
import statistics
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from fedray import config
from fedray.errors import ConfigError, FedrayError
from fedray.experiment import plan
from fedray.report import read_run, write_report
from fedray.report.compare import costs_to, default_targets
from fedray.report.read import short_names
from fedray.runs import find, resume, run
from fedray.seeds import seed_for
from fedray.sharing import Shared

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One run: what is set, and where it is kept."""

    settings: tuple[tuple[str, str], ...]
    folder: Path

    @property
    def overrides(self) -> list[str]:
        """The settings as ``key=value``."""
        return [f"{key}={value}" for key, value in self.settings]


@dataclass(frozen=True)
class Outcome:
    """What a trial came to: its final metrics, or why it failed."""

    trial: Trial
    final: dict[str, Any]
    error: str = ""


def axis(text: str) -> tuple[str, list[str]]:
    """A key and its values: ``key=1,5,10``, ``seed=0..4``; commas within brackets do not part values.

    >>> axis("seed=0..2"), axis("m={name: mlp, hidden: [8]},lenet")
    (('seed', ['0', '1', '2']), ('m', ['{name: mlp, hidden: [8]}', 'lenet']))
    """
    key, separator, values = text.partition("=")
    if not separator or not key or not values:
        raise ConfigError(f"{text!r} is not key=value,value ...; for example cohort=1,5,10 or seed=0..4")
    if found := re.fullmatch(r"(-?\d+)\.\.(-?\d+)", values):
        first, last = map(int, found.groups())
        if last < first:
            raise ConfigError(f"{text!r} is an empty range; write the smaller number first")
        return key, [str(number) for number in range(first, last + 1)]
    cut, depth = [""], 0
    for letter in values:
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            cut.append("")
        else:
            cut[-1] += letter
    return key, cut


def rows_of(path: str | Path) -> list[dict[str, str]]:
    """Settings from a file, a trial each: a table (CSV) whose columns are keys, or a YAML list of mappings.

    An empty cell leaves the key as the configuration has it.
    """
    path = Path(path)
    try:
        if path.suffix == ".csv":
            with path.open(newline="") as file:
                return [{key: value for key, value in row.items() if value} for row in csv.DictReader(file)]
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # YAML's, OmegaConf's and the file system's share no base class
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, list) or not all(isinstance(row, dict) for row in loaded):
        raise ConfigError(f"{path} is no list of mappings, such as - {{cohort: 5, algorithm.local_lr: 0.1}}")
    return [
        {str(key): value if isinstance(value, str) else json.dumps(value) for key, value in row.items()}
        for row in loaded
    ]


def trials(
    axes: Sequence[str],
    out: Path,
    zipped: bool = False,
    random: int | None = None,
    given: Sequence[Mapping[str, str]] = ({},),
) -> list[Trial]:
    """The grid of all values, or the values in step (``zipped``), or so many of the grid at random.

    Each is combined with each of the settings ``given``. A folder is called by what differs between trials.
    """
    parsed = dict(axis(text) for text in axes)
    if zipped:
        several = {key: len(values) for key, values in parsed.items() if len(values) > 1}
        if len(set(several.values())) > 1:
            sizes = ", ".join(f"{key} has {count}" for key, count in several.items())
            raise ConfigError(f"values go in step only if there are as many of each: {sizes}")
        steps = range(max(several.values(), default=1))
        chosen = [{key: values[step % len(values)] for key, values in parsed.items()} for step in steps]
    else:
        chosen = [dict(zip(parsed, values, strict=True)) for values in itertools.product(*parsed.values())]
    rows = [{**row, **values} for row in given for values in chosen]
    if random is not None:
        order = np.random.default_rng(seed_for("sweep")).permutation(len(rows))[:random]
        rows = [rows[place] for place in sorted(order)]
    varied = [key for key in dict.fromkeys(itertools.chain(*rows)) if len({row.get(key) for row in rows}) > 1]
    made = []
    for row in rows:
        name = ",".join(f"{key}={row[key]}" for key in varied if key in row) or "trial"
        made.append(Trial(tuple(row.items()), out / re.sub(r"[^\w.=,+-]+", "_", name)[:120]))
    if len({trial.folder for trial in made}) < len(made):
        made = [Trial(t.settings, t.folder.with_name(f"{number:04d}-{t.folder.name}")) for number, t in enumerate(made)]
    return made


def sweep(
    source: str | Mapping[str, Any],
    axes: Sequence[str],
    out: str | Path,
    zipped: bool = False,
    random: int | None = None,
    retries: int = 1,
    tell: Tell = lambda _: None,
    targets: Sequence[float] | None = None,
    given: Sequence[Mapping[str, str]] = ({},),
) -> list[Outcome]:
    """Run every trial, and write ``results.csv``, ``results.parquet`` and ``report.html``: the outcomes in order.

    What it took to reach a target accuracy is among a trial's final metrics (``rounds_to_0.8``, ``megabytes_to_0.8``,
    ...) if it was reached.

    Args:
        source: A YAML file, the name of a shipped experiment, or a mapping; its backend says which cluster is used.
        axes: ``key=value,value`` each.
        out: The sweep's folder; trials that are finished in it are not run again.
        zipped: Values in step instead of all combinations.
        random: So many trials of the grid, drawn at random.
        retries: How often a trial that failed is tried again.
        tell: Told of each trial that ends.
        targets: Test accuracies between 0 and 1; None for a few that suit the trials.
        given: Settings that each of the others is combined with, such as `rows_of` a file.

    Raises:
        ConfigError: a trial's configuration is wrong; nothing was started.
    """
    out = Path(out)
    planned = trials(axes, out, zipped, random, given)
    read = [_values(source, trial) for trial in planned]
    cost = []
    launcher = None
    with Shared().open():
        for values in read:  # all mistakes show before anything starts
            made = plan(values)
            launcher = launcher or made.launcher
            cost.append(made.experiment.rounds * made.experiment.cohort * float(made.experiment.task.sizes.mean()))
            del made
    assert launcher is not None
    out.mkdir(parents=True, exist_ok=True)
    tasks = [(values.get("seed", 0), repr(values["task"])) for values in read]
    # longest first; among equals those that share a task come one after the other
    order = {task: number for number, task in enumerate(dict.fromkeys(tasks))}
    waiting = sorted(range(len(planned)), key=lambda place: (-cost[place], order[tasks[place]]))
    outcomes: dict[int, Outcome] = {}
    for attempt in range(retries + 1):
        items = [({**read[place], "backend": {"name": "serial"}}, planned[place]) for place in waiting]
        again = []
        for number, outcome in launcher.stream(_runner, items, None):
            place = waiting[number]
            outcomes[place] = outcome
            state = outcome.error.strip().splitlines()[-1] if outcome.error else _shown(outcome.final)
            tell(f"{sum(not o.error for o in outcomes.values())}/{len(planned)} {outcome.trial.folder.name}: {state}")
            if outcome.error:
                again.append(place)
        waiting = again
        if not waiting:
            break
        if attempt < retries:
            tell(f"{len(waiting)} trials failed and are tried again")
    found = [outcomes[place] for place in range(len(planned))]
    finished = {outcome.trial.folder: read_run(outcome.trial.folder) for outcome in found if not outcome.error}
    targets = default_targets(list(finished.values())) if targets is None else targets
    for outcome in found:
        if outcome.trial.folder in finished:
            outcome.final.update(costs_to(finished[outcome.trial.folder], targets))
    write_results(found, out / "results.csv")
    if finished:
        write_report(list(finished), out / "report.html", targets)
    return found


def _values(source: str | Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    return config.read(source if isinstance(source, Mapping) else find(str(source)), trial.overrides)


def _runner(device: str) -> Callable[[tuple[dict[str, Any], Trial]], Outcome]:
    return partial(_run, device, Shared())


def _run(device: str, shared: Shared, item: tuple[dict[str, Any], Trial]) -> Outcome:
    """Run a trial, or what is left of it; what goes wrong is its outcome."""
    values, trial = item
    values = {**values, "backend": {"name": "serial", "device": device}}
    folder = trial.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        printed = (folder.parent / f"{folder.name}.log").open("a")
        with printed as log, contextlib.redirect_stderr(log), shared.open():
            if (folder / "config.yaml").is_file():
                _check_same(values, folder)
                resume(folder)
            else:
                run(values, out=folder)
        return Outcome(trial, read_run(folder).final)
    except (Exception, KeyboardInterrupt):
        return Outcome(trial, {}, traceback.format_exc())


def _check_same(values: Mapping[str, Any], folder: Path) -> None:
    before = config.read(folder / "config.yaml")
    elsewhere = ("backend", "tune")  # what is no part of the run
    other = [key for key, value in values.items() if key not in elsewhere and before.get(key) != value]
    if other:
        raise ConfigError(f"{folder} holds a trial with another {', '.join(other)}; choose another --out")


def write_results(outcomes: Sequence[Outcome], path: Path) -> None:
    """A table of trials as CSV and, if pyarrow is installed, as Parquet beside it: its columns are `columns`."""
    made = columns(outcomes)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(made)
        writer.writerows(zip(*made.values(), strict=True))  # None is an empty cell
    try:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet as parquet  # type: ignore[import-untyped]
    except ImportError:  # an extra
        return
    texts = ("trial", "error")
    typed = {
        name: pyarrow.array(values, "string") if name in texts else _typed(values) for name, values in made.items()
    }
    parquet.write_table(pyarrow.table(typed), path.with_suffix(".parquet"))


def columns(outcomes: Sequence[Outcome]) -> dict[str, list[Any]]:
    """By column, a value a trial: its name, its settings, its final metrics, and why it failed; None if it has none."""
    settings = list(dict.fromkeys(key for outcome in outcomes for key, _ in outcome.trial.settings))
    metrics = {key for outcome in outcomes for key, value in outcome.final.items() if _is_number(value)}
    given = [dict(outcome.trial.settings) for outcome in outcomes]
    return {
        "trial": short_names([outcome.trial.folder for outcome in outcomes]),
        **{key: [one.get(key) for one in given] for key in settings},
        **{key: [o.final.get(key) for o in outcomes] for key in sorted(metrics - set(settings))},
        "error": [outcome.error.strip().splitlines()[-1] if outcome.error else None for outcome in outcomes],
    }


def _typed(values: Sequence[Any]) -> list[Any]:
    """One type for a column: numbers if all are numbers or, as settings, are written as such; else texts."""
    if all(value is None or re.fullmatch(r"[+-]?\d+", str(value)) for value in values):
        whole = [None if value is None else int(value) for value in values]
        if all(value is None or abs(value) < 2**63 for value in whole):
            return whole
    with contextlib.suppress(ValueError):
        return [None if value is None else float(value) for value in values]
    return [None if value is None else str(value) for value in values]


def table(outcomes: Sequence[Outcome], metric: str = "test_accuracy", over: str = "seed") -> str:
    """The metric by what was varied, as mean ± standard deviation over ``over``, a line each."""
    groups: dict[str, list[float]] = {}
    errors: dict[str, int] = {}
    values: dict[str, set[str]] = {}
    for outcome in outcomes:
        for key, value in outcome.trial.settings:
            values.setdefault(key, set()).add(value)
    varied = [key for key, seen in values.items() if len(seen) > 1 and key != over]
    for outcome in outcomes:
        given = dict(outcome.trial.settings)
        label = "  ".join(f"{key}={given[key]}" for key in varied) or "all"
        groups.setdefault(label, [])
        errors[label] = errors.get(label, 0) + bool(outcome.error)
        if _is_number(outcome.final.get(metric)):
            groups[label].append(float(outcome.final[metric]))
    width = max(map(len, groups))
    lines = []
    for label, found in groups.items():
        spread = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
        shown = f"{statistics.mean(found):.4f}{spread}  ({len(found)})" if found else "has no value"
        lines.append(f"{label:{width}}  {metric} {shown}" + (f"  {errors[label]} failed" if errors[label] else ""))
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(final: Mapping[str, Any]) -> str:
    keys = ("test_accuracy", "test_loss", "frechet_distance", "perplexity")
    return json.dumps({key: round(final[key], 4) for key in keys if _is_number(final.get(key))})


def failed(outcomes: Sequence[Outcome]) -> FedrayError | None:
    """An error that says which trials failed; None if none did."""
    wrong = [outcome for outcome in outcomes if outcome.error]
    if not wrong:
        return None
    first = wrong[0]
    return FedrayError(
        f"{len(wrong)} of {len(outcomes)} trials failed; the first, {first.trial.folder}: "
        f"{first.error.strip().splitlines()[-1]}"
    )
