"""A search for good options: ``fedray tune`` for Python and the shell, and a trainable for a ``ray.tune.Tuner``.

A trial is an ordinary run folder. It reports every round to Ray Tune, with its checkpoint where there is one, and is
stopped, continued or given other options by the scheduler that the ``tune:`` section names. A search that is started
again in its folder goes on.
"""

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

from fedray import config, runs
from fedray.backends import in_process
from fedray.backends.ray.environment import prepare
from fedray.checkpoint import replace_file
from fedray.errors import ConfigError
from fedray.experiment import plan
from fedray.options import options_of
from fedray.report import read_run, write_report
from fedray.report.compare import quantity, text_table
from fedray.search import Distribution, Tuning, parse
from fedray.sweep import Outcome, Trial, write_results

_QUIET = {  # what Ray Tune reads from the environment when it is imported
    "AIR_VERBOSITY": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_LOGGER_LEVEL": "warning",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a metric may be measured in some rounds only
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def trainable(
    source: str | Path | Mapping[str, Any] = "quickstart",
    overrides: Sequence[str] = (),
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
) -> Callable[[dict[str, Any]], None]:
    """A function trainable for ``ray.tune.Tuner``, whose search space is options by dotted key.

    Every round is reported under its own names (``round``, ``test_accuracy``, ``train_loss`` ...), and a checkpoint in
    the rounds that ``checkpoint_every`` says. It reserves what it needs; ``tune.with_resources`` replaces that.

    Args:
        source: A YAML file, the name of a shipped experiment, or a mapping.
        overrides: ``key=value`` texts on top.
        num_cpus: CPUs of a trial's own process.
        num_gpus: GPUs of it.

    Raises:
        ConfigError: the configuration cannot be read, or Ray Tune is not installed.
    """
    raw = _unresolved(source, overrides)
    made = _ray_tune().trainable(partial(_values, raw), runs.trial, num_cpus, num_gpus)
    return cast(Callable[[dict[str, Any]], None], made)


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        out: Its folder.
        tuning: What was searched.
        outcomes: The trials, in the order in which they were drawn; their folders are ordinary run folders.
    """

    out: Path
    tuning: Tuning
    outcomes: list[Outcome]

    @property
    def ranked(self) -> list[Outcome]:
        """The trials that measured the metric, the best first; those that came to their last round before others."""
        sign = -1 if self.tuning.mode == "max" else 1
        measured = [outcome for outcome in self.outcomes if not math.isnan(self._metric(outcome))]
        return sorted(measured, key=lambda outcome: (not finished(outcome), sign * self._metric(outcome)))

    def command(self, outcome: Outcome) -> str:
        """The command that makes a trial's run again, by itself."""
        return shlex.join(["fedray", "run", str(self.out / "config.yaml"), *outcome.trial.overrides])

    def table(self, most: int = 10) -> str:
        """The best trials, a line each."""
        keys = list(self.tuning.space)
        rows = [["trial", *keys, "rounds", self.tuning.metric]]
        for outcome in self.ranked[:most]:
            given = dict(outcome.trial.settings)
            rounds = f"{outcome.final['round']:g}{'' if finished(outcome) else ' (stopped)'}"
            shown = [given.get(key, "")[:20] for key in keys]
            rows.append([outcome.trial.folder.parent.name, *shown, rounds, quantity(self._metric(outcome), 4)])
        return text_table(rows)

    def _metric(self, outcome: Outcome) -> float:
        value = outcome.final.get(self.tuning.metric)
        return float(value) if isinstance(value, int | float) else math.nan


def finished(outcome: Outcome) -> bool:
    """Whether the trial came to its last round."""
    return not outcome.error and (outcome.trial.folder / "model.safetensors").is_file()


def changed(outcome: Outcome) -> bool:
    """Whether the trial was given other options in mid-run."""
    return (outcome.trial.folder / "changes.jsonl").is_file()


def tune(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    out: str | Path = "tune",
    space: Sequence[str] = (),
    address: str | None = None,
) -> Found:
    """Search, and write ``results.csv``, ``results.parquet`` and ``report.html`` into ``out``.

    Args:
        source: A YAML file, the name of a shipped experiment, or a mapping.
        overrides: ``key=value`` texts on top, such as ``tune.trials=20``.
        out: The folder of the search, on a file system that all nodes share; a search that is there goes on.
        space: ``key=distribution(...)`` texts, on top of ``tune.space``.
        address: The cluster; None for the configuration's ``backend.address``.

    Raises:
        ConfigError: a mistake in the configuration; nothing was started.
        KeyboardInterrupt: it was interrupted, and can go on.
    """
    if "://" in str(out):
        raise ConfigError(f"{out} is no folder; results at a URI need fedray.tune.trainable and a ray.tune.Tuner")
    out = Path(out)
    raw = _unresolved(source, overrides)
    if space:
        section = raw.get("tune") or {}
        raw["tune"] = {**section, "space": {**(section.get("space") or {}), **dict(map(parse, space))}}
    values = config.read(raw)
    if not values.get("tune"):
        raise ConfigError("nothing is searched; give the file a tune.space, or --space 'key=loguniform(0.001,1)'")
    tuning = cast(Tuning, config.convert(values["tune"], Tuning | None, "tune"))
    examples = [_values(raw, settings) for settings in _examples(tuning.distributions)]
    rounds, every = 0, 1
    for example in examples:  # all mistakes show before anything starts
        made = plan(example).experiment
        rounds, every = max(rounds, made.rounds), made.checkpoint_every
        del made
    backend = values.get("backend")
    cluster = backend if isinstance(backend, Mapping) and backend.get("name") == "ray" else {}
    address = address or cluster.get("address", "local")
    ray_tune = _ray_tune(address)
    run = ray_tune.trainable(partial(_values, raw), runs.trial, tuning.num_cpus, tuning.num_gpus, tuning.metric)
    _take_folder(raw, out)
    ended = ray_tune.fit(run, examples, tuning, rounds, every, out, address, cluster.get("object_store_gb"))
    outcomes = [_outcome(settings, folder, error) for settings, folder, error in ended]
    write_results(outcomes, out / "results.csv")
    folders = [outcome.trial.folder for outcome in outcomes if outcome.final]
    if folders:
        write_report(folders, out / "report.html")
    return Found(out, tuning, outcomes)


def _unresolved(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    return config.unresolved(source if isinstance(source, Mapping) else runs.find(str(source)), overrides)


def _ray_tune(address: str | None = None) -> Any:
    if address is not None:
        prepare(address)
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        from fedray.backends.ray import tune
    except ImportError as error:
        why = str(error).strip().partition("\n")[0]
        raise ConfigError(f"Ray Tune cannot be imported ({why}); run: pip install 'fedray[tune]'") from None
    return tune


def _values(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's configuration; with ``num_workers: auto``, it runs in its own process."""
    values = config.read(raw, [override(key, value) for key, value in settings.items()])
    values.pop("tune", None)
    given = values.get("backend", "ray")
    backend = {"name": given} if isinstance(given, str) else dict(given)
    chosen = {backend.get(option, "auto") for option in ("num_workers", "clients_per_worker")}
    if backend["name"] == "ray" and chosen == {"auto"}:
        common = options_of(in_process)
        backend = {"name": "serial", **{key: value for key, value in backend.items() if key in common}}
    return {**values, "backend": backend}


def override(key: str, value: Any) -> str:
    """A setting as it is written on the command line; a text is what is written there, all else is JSON.

    >>> override("cohort", 5), override("algorithm.name", "fedprox"), override("algorithm.local_steps", None)
    ('cohort=5', 'algorithm.name=fedprox', 'algorithm.local_steps=null')
    """
    plain = value.item() if hasattr(value, "item") else value  # numpy's numbers
    return f"{key}={plain if isinstance(plain, str) else json.dumps(plain)}"


def _examples(distributions: Mapping[str, Distribution]) -> list[dict[str, Any]]:
    """As few settings as show every end of a range and every value of a choice."""
    most = max(len(one.examples) for one in distributions.values())
    return [{key: one.examples[row % len(one.examples)] for key, one in distributions.items()} for row in range(most)]


def _take_folder(raw: Mapping[str, Any], out: Path) -> None:
    """Note in the folder what is searched, or check that it is the search that is there."""
    note = out / "config.yaml"
    try:
        out.mkdir(parents=True, exist_ok=True)
        empty = not any(out.iterdir())
    except OSError as error:
        raise ConfigError(f"{out} cannot be the folder of a search ({error.strerror}); choose another --out") from None
    if empty:
        replace_file(note, OmegaConf.to_yaml(OmegaConf.create(dict(raw))).encode())
        return
    if not note.is_file():
        raise ConfigError(f"{out} is not empty, and holds no search; choose another --out")
    before = config.unresolved(note)
    other = [key for key in {**before, **raw} if key != "backend" and before.get(key) != raw.get(key)]
    if other:
        raise ConfigError(f"{out} holds a search with another {', '.join(other)}; choose another --out")


def _outcome(settings: Mapping[str, Any], folder: Path, error: str) -> Outcome:
    texts = [override(key, value).partition("=") for key, value in settings.items()]
    trial = Trial(tuple((key, text) for key, _, text in texts), folder)
    return Outcome(trial, read_run(folder).final if (folder / "config.yaml").is_file() else {}, error)
