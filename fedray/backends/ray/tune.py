"""Trials of a search on Ray Tune: one is an ordinary run, which reports its rounds and goes on from its checkpoints."""

import logging
import os
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, redirect_stderr, suppress
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import BasicVariantGenerator

from fedray.backends import on_ray
from fedray.backends.ray.cluster import connected
from fedray.backends.ray.resources import nodes
from fedray.backends.ray.schedulers import Setting
from fedray.backends.ray.scheduling import Population, number_of
from fedray.checkpoint import put_back, take_out
from fedray.config import nearest
from fedray.errors import ConfigError
from fedray.options import options_of
from fedray.report.read import read_metrics, scalars
from fedray.search import Distribution, Tuning

logger = logging.getLogger(__name__)

Values = dict[str, Any]
ValuesOf = Callable[[Mapping[str, Any]], Values]  # of a trial's settings: its whole configuration
Follow = Callable[[Values, Path], Generator[dict[str, Any]]]  # `fedray.runs.trial`
Run = Callable[[dict[str, Any]], None]


def space_of(distributions: Mapping[str, Distribution]) -> dict[str, Any]:
    """Ray Tune's search space. Lists and mappings become texts, which mean the same as an option's value."""
    made = {**{name: getattr(tune, name) for name in ("choice", "loguniform", "lograndint", "quniform", "randint")}}
    made |= {"uniform": tune.uniform, "grid": tune.grid_search}
    return {key: made[one.name](*one.arguments) for key, one in distributions.items()}


def bundles(values: Mapping[str, Any], num_cpus: float, num_gpus: float) -> tune.PlacementGroupFactory:
    """What a trial reserves as a whole: for its own process, and for each of its workers on Ray."""
    own = _bundle(num_cpus, num_gpus)
    backend = values["backend"]
    if backend["name"] != "ray":
        return tune.PlacementGroupFactory([own])
    given = {name: backend.get(name, option.default) for name, option in options_of(on_ray).items()}
    count = given["num_workers"]
    if count == "auto":
        count = -(-values["cohort"] // given["clients_per_worker"])
    if given["num_gpus"] == "auto":
        given["num_gpus"] = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    worker = _bundle(given["num_cpus"], given["num_gpus"])
    return tune.PlacementGroupFactory([own, *[worker] * count], strategy=given["placement"].upper())


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {name: float(amount) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _check_room(asked: tune.PlacementGroupFactory) -> None:
    """What can never start would wait for ever."""
    every = nodes(())
    for name, options in (("CPU", "tune.num_cpus"), ("GPU", "tune.num_gpus")):
        wanted, there = asked.required_resources.get(name, 0.0), sum(node.get(name, 0.0) for node in every)
        largest = max((bundle.get(name, 0.0) for bundle in asked.bundles), default=0.0)
        if wanted > there or largest > max(node.get(name, 0.0) for node in every):
            raise ConfigError(
                f"a trial asks for {wanted:g} {name}s ({len(asked.bundles)} processes, up to {largest:g} each); the "
                f"cluster has {there:g}: lower {options}, backend.num_workers or what a worker reserves"
            )


def trainable(values_of: ValuesOf, follow: Follow, num_cpus: float, num_gpus: float, metric: str | None = None) -> Run:
    """A function trainable with what it reserves.

    Args:
        values_of: A trial's configuration, from its settings.
        follow: Runs a configuration in a folder, from the newest checkpoint there.
        num_cpus: CPUs of the trial's own process.
        num_gpus: GPUs of it.
        metric: What must be among the reported numbers; None for whatever there is.
    """
    here = Path.cwd()

    def fedray(settings: dict[str, Any]) -> None:
        with suppress(OSError):  # paths are relative to where the search was started, if that is there
            os.chdir(here)
        storage = tune.get_context().get_storage()
        local = storage.storage_filesystem.type_name == "local"
        place = Path(storage.trial_fs_path if local else storage.trial_working_directory)
        place.mkdir(parents=True, exist_ok=True)
        for lost in place.glob("checkpoint_*"):  # of a time that a restored search has gone back behind
            if int(lost.name.partition("_")[2]) > storage.current_checkpoint_index:
                shutil.rmtree(lost, ignore_errors=True)
        with (place / "run.log").open("a") as log, redirect_stderr(log):
            _take_up(tune.get_checkpoint(), place / "run")
            _run(values_of(settings), follow, place / "run", metric)

    return tune.with_resources(fedray, lambda settings: bundles(values_of(settings), num_cpus, num_gpus))


def _run(values: Values, follow: Follow, folder: Path, metric: str | None) -> None:
    known: dict[str, float] = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        known |= scalars(record)
    with closing(follow(values, folder)) as records:
        for record in records:
            known |= scalars(record)
            if metric is not None and metric not in known and values.get("evaluate_every", 1):
                raise ConfigError(f"tune.metric is {metric!r}, which no round reports; {nearest(metric, known)}")
            if 0 < record["round"] < values["rounds"]:
                _report(known, folder)
    _report(known, folder)  # the last round, once the model is written: Tune may end the trial here


def _report(known: Mapping[str, float], folder: Path) -> None:
    """Report the newest value of everything, with the round's checkpoint if there is one."""
    round = int(known["round"])
    metrics = {**known, "round": round}
    if not (folder / "checkpoints" / f"{round:06d}").is_dir():
        tune.report(metrics)
        return
    taken = folder.with_name(".taken")
    shutil.rmtree(taken, ignore_errors=True)
    take_out(folder, round, taken)
    try:
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(str(taken)))
    finally:
        shutil.rmtree(taken, ignore_errors=True)


def _take_up(checkpoint: tune.Checkpoint | None, folder: Path) -> None:
    """Make the folder what Tune says that it goes on from, which may be another trial's."""
    if checkpoint is None:
        put_back(None, folder)
        return
    try:
        with checkpoint.as_directory() as taken:
            put_back(Path(taken), folder)
    except OSError as error:  # removed between Tune's last note of it and the end of its process
        logger.warning("the checkpoint %s is gone (%s); starting from the first round", checkpoint.path, error)
        put_back(None, folder)


class _Teller(tune.Callback):
    """Says when a trial has ended."""

    def __init__(self, metric: str) -> None:
        self._metric = metric

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        last = trial.last_result
        self._tell(trials, trial, f"round {last.get('round')}, {self._metric} {last.get(self._metric)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if trial.is_finished():
            self._tell(trials, trial, "failed")

    def _tell(self, trials: list[Any], trial: Any, what: str) -> None:
        ended = sum(other.is_finished() for other in trials if other is not trial) + 1
        logger.info("%d ended: %s %s, %s", ended, trial, _shown(trial.config), what)


def _shown(settings: Mapping[str, Any]) -> str:
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def fit(
    run: Run,
    examples: Sequence[Values],
    tuning: Tuning,
    rounds: int,
    checkpoint_every: int,
    out: Path,
    address: str,
    object_store_gb: float | None,
) -> list[tuple[dict[str, Any], Path, str]]:
    """Search, or go on with the search that is in ``out``: each trial's settings, run folder, and why it failed.

    Args:
        run: What `trainable` made.
        examples: Configurations that trials may have, to check that they fit into the cluster.
        tuning: What is searched, and how.
        rounds: The most rounds of a trial.
        checkpoint_every: Rounds between checkpoints.
        out: The folder.
        address: The cluster.
        object_store_gb: Size of a local cluster's shared memory; None for Ray's default.

    Raises:
        ConfigError: a trial does not fit into the cluster, or the scheduler or search refuses its options.
        KeyboardInterrupt: it was interrupted.
    """
    out = out.resolve()
    space = space_of(tuning.distributions)
    setting = Setting(space, rounds, checkpoint_every, tuning.seed)
    scheduler, search = tuning.scheduler(setting), tuning.search(setting)
    if isinstance(scheduler, Population) and not isinstance(search, BasicVariantGenerator):
        raise ConfigError("tune.scheduler is pbt, which draws by itself; give tune.search=random")
    with connected(address, object_store_gb):
        for example in examples:
            _check_room(bundles(example, tuning.num_cpus, tuning.num_gpus))
        if tune.Tuner.can_restore(str(out)) and any(out.glob("experiment_state-*.json")):
            tuner = tune.Tuner.restore(str(out), trainable=run, resume_unfinished=True, resume_errored=True)
        else:
            tuner = tune.Tuner(run, param_space=space, **_how(tuning, scheduler, search, out))
        results = tuner.fit()
    found = [results[place] for place in range(len(results))]
    if not all(one.error or (one.metrics or {}).get("done") for one in found):
        raise KeyboardInterrupt("interrupted; go on with the same command")
    made = [(dict(one.config or {}), Path(one.path) / "run", _told(one.error)) for one in found]
    return sorted(made, key=lambda one: one[1])


def _told(error: Exception | None) -> str:
    """The whole of an error, and in its last line what it comes down to."""
    if error is None:
        return ""
    cause = getattr(error, "cause", None) or error
    return f"{error}\n{type(cause).__name__}: {' '.join(str(cause).split())}"


def _how(tuning: Tuning, scheduler: Any, search: Any, out: Path) -> dict[str, Any]:
    return {
        "tune_config": tune.TuneConfig(
            metric=tuning.metric,
            mode=tuning.mode,
            num_samples=tuning.trials,
            scheduler=scheduler,
            search_alg=search,
            max_concurrent_trials=tuning.max_concurrent,
            reuse_actors=True,
            trial_name_creator=_name,
            trial_dirname_creator=_name,
        ),
        "run_config": tune.RunConfig(
            name=out.name,
            storage_path=str(out.parent),
            failure_config=tune.FailureConfig(max_failures=tuning.retries),
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=None if isinstance(scheduler, Population) else 2  # others may go on from any of them
            ),
            callbacks=[_Teller(tuning.metric)],
            verbose=0,
        ),
    }


def _name(trial: Any) -> str:
    return f"{number_of(trial):04d}"
