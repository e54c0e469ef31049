"""A run from its configuration to its report: ``fedray run`` and ``fedray resume`` for Python and the shell."""

import itertools
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from omegaconf import OmegaConf

from fedray import config, storage
from fedray.checkpoint import newest_round, replace_file
from fedray.errors import ConfigError, DataError
from fedray.experiment import Plan, plan
from fedray.learner import Task
from fedray.progress import progress
from fedray.report import RunRecord, read_run, write_report
from fedray.report.read import flat
from fedray.storage import Mirror, Place

PACKAGES = (
    *("fedray", "ray", "torch", "numpy", "omegaconf", "safetensors", "scikit-learn"),
    *("datasets", "transformers", "peft"),
)


@dataclass(frozen=True)
class Run:
    """A run folder, which is a path or a URI as it was given, and whether its run came to its last round."""

    folder: Place
    finished: bool

    @property
    def record(self) -> RunRecord:
        """Everything that the folder says."""
        return storage.read(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One record a round; see `fedray.report.RunRecord`."""
        return self.record.metrics

    @property
    def final(self) -> dict[str, Any]:
        """The newest value of everything that was measured."""
        return self.record.final


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal before its last round; its folder can be resumed."""

    def __init__(self, folder: Place) -> None:
        super().__init__(f"interrupted; go on with: fedray resume {folder}")


def run(
    source: str | Path | Mapping[str, Any] = "quickstart", overrides: Sequence[str] = (), out: str | Path | None = None
) -> Run:
    """Run an experiment from the start.

    Args:
        source: A YAML file, the name of a shipped experiment, or a mapping.
        overrides: ``key=value`` texts on top, as on the command line.
        out: The run folder, or a URI such as ``s3://bucket/folder``; ``runs/<name>-<time>`` if None.

    Raises:
        ConfigError: a mistake in the configuration; nothing was started.
        Interrupted: SIGINT or SIGTERM; the folder can be resumed.
    """
    values = config.read(source if isinstance(source, Mapping) else find(str(source)), overrides)
    made = plan(values)
    values |= asdict(made.experiment.execution)  # what a rule chose stays chosen, whatever the rule becomes
    values.pop("tune", None)  # it says nothing about this run
    name = "run" if isinstance(source, Mapping) else name_of(find(str(source)))
    folder = _unused(Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}") if out is None else storage.place(out)
    if isinstance(folder, str):
        with storage.scratch(folder) as mirror:
            if mirror.files():
                raise ConfigError(_not_empty(folder))
            _begin(made, values, mirror.folder)
            return _to_the_end(made, values, mirror.folder, mirror)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be the run folder ({error.strerror}); choose another --out") from None
    if not empty:
        raise ConfigError(_not_empty(folder))
    _begin(made, values, folder)
    return _to_the_end(made, values, folder)


def _not_empty(folder: Place) -> str:
    return f"{folder} is not empty; choose another --out, or go on with: fedray resume {folder}"


def _begin(made: Plan, values: dict[str, Any], folder: Path) -> None:
    _save(values, folder)
    (folder / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n")
    np.savez(folder / "partition.npz", **made.experiment.task.holdings())  # type: ignore[arg-type]


def resume(folder: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Go on with a run from its newest checkpoint.

    Args:
        folder: The run folder, or its URI.
        overrides: ``rounds=...`` for another last round, ``backend....`` to run elsewhere, ``trackers``.

    Raises:
        DataError: it is no run folder, or the data are no longer what the run began with.
    """
    folder = storage.place(folder)
    check_overrides(overrides)
    if isinstance(folder, Path):
        return _resume(folder, overrides)
    with storage.scratch(folder) as mirror:
        mirror.fetch()
        return _resume(mirror.folder, overrides, mirror)


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what cannot change when a run is resumed.

    Raises:
        ConfigError: an override would make it another run.
    """
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] not in ("rounds", "backend", "trackers"):
            allowed = "only rounds, backend and trackers can change"
            raise ConfigError(f"the override {override!r} would make it another run; {allowed}")


def _resume(folder: Path, overrides: Sequence[str], mirror: Mirror | None = None) -> Run:
    place = mirror.uri if mirror else folder
    read_run(folder)
    values = config.read(folder / "config.yaml", overrides)
    made = plan(values)
    done = newest_round(folder)
    if made.experiment.rounds < done:
        raise ConfigError(f"rounds is {made.experiment.rounds}; {place} has already done {done}, which stay done")
    _check_same_data(made.experiment.task, folder / "partition.npz")
    _save(values, folder)
    return _to_the_end(made, values, folder, mirror)


def trial(values: dict[str, Any], folder: Path) -> Generator[dict[str, Any]]:
    """A run in a folder of its own, round by round: from the start, or on from its newest checkpoint.

    It is for those who change options in mid-run, as population based training does. A change is a line of
    ``changes.jsonl``: the round that was done, and each option before and after. While the caller has a record in
    hand nothing is written, and the round's checkpoint, if one was due, is whole.

    Args:
        values: The configuration as it is from now on.
        folder: The run folder, which may be new.

    Raises:
        ConfigError: a mistake in the configuration.
        DataError: these options make other data, or another partition, than those that the run began with.
    """
    made = plan(values)
    values = {**values, **asdict(made.experiment.execution)}
    if (folder / "config.yaml").is_file():
        _check_same_data(made.experiment.task, folder / "partition.npz")
        _note_changes(values, folder)
        _save(values, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        _begin(made, values, folder)
    yield from _follow(replace(made, experiment=replace(made.experiment, lockstep=True)), values, folder)


def shipped() -> dict[str, Path]:
    """The shipped experiments by name, each a YAML file."""
    package = Path(__file__).parent
    for root in (package / "experiments", package.parent / "experiments"):
        if root.is_dir():
            return {name_of(path): path for path in sorted(root.glob("*/*.yaml"))}
    return {}


def find(source: str) -> Path:
    """The YAML file that ``source`` names: a path, or a shipped experiment's name."""
    path = Path(source)
    if path.is_file():
        return path
    if source in shipped():
        return shipped()[source]
    hint = config.nearest(source, shipped())
    raise ConfigError(f"there is no configuration {source!r}: no such file, and no shipped experiment; {hint}")


def environment() -> dict[str, Any]:
    """What a run ran with: versions, and the hardware in words. No names, no paths, no environment variables."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    import torch

    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _note_changes(values: Mapping[str, Any], folder: Path) -> None:
    before, after = dict(flat(config.read(folder / "config.yaml"))), dict(flat(values))
    elsewhere = ("backend", "trackers")  # what may change without making it another run
    keys = [key for key in {**before, **after} if key.partition(".")[0] not in elsewhere]
    changed = {key: [before.get(key), after.get(key)] for key in keys if before.get(key) != after.get(key)}
    if changed:
        with (folder / "changes.jsonl").open("a") as file:
            file.write(json.dumps({"round": newest_round(folder), **changed}) + "\n")


def _to_the_end(made: Plan, values: dict[str, Any], folder: Path, mirror: Mirror | None = None) -> Run:
    for _ in _follow(made, values, folder, mirror):
        pass
    return Run(mirror.uri if mirror else folder, finished=True)


def _follow(made: Plan, values: dict[str, Any], folder: Path, mirror: Mirror | None = None) -> Iterator[dict[str, Any]]:
    place = mirror.uri if mirror else folder
    rounds = made.experiment.rounds
    start = newest_round(folder)
    launch, trackers, experiment = made.launcher.launch, made.trackers, made.experiment
    del made  # the driver holds the data; a second copy here would stay for the whole run
    with mirror.running() if mirror else nullcontext():
        with ExitStack() as stack:
            show = stack.enter_context(progress(rounds, start))
            tracks = [stack.enter_context(tracker(folder, values)) for tracker in trackers]
            stop = stack.enter_context(_signals(place))
            records = launch(experiment, folder, stop.is_set)
            del experiment
            done = start
            try:
                for record in records:
                    done = record["round"]
                    show(record)
                    for track in tracks:
                        track(record)
                    yield record
            except Exception as error:
                error.add_note(f"the run is in {place}; once the cause is mended, go on with: fedray resume {place}")
                raise
        write_report([folder], folder / "report.html")
        if done < rounds:
            raise Interrupted(place)


def _save(values: dict[str, Any], folder: Path) -> None:
    replace_file(folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.create(values)).encode())


@contextmanager
def _signals(folder: Place) -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one stops at once."""
    stop = threading.Event()

    def handle(_number: int, _frame: Any) -> None:
        if stop.is_set():
            raise Interrupted(folder)
        stop.set()
        print("stopping after this round; once more to stop at once", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread; there the caller deals with them
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _unused(folder: Path) -> Path:
    """The folder, or with a number behind if another run of the same second has it."""
    candidates = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], candidates) if not path.exists())


def _check_same_data(task: Task, path: Path) -> None:
    try:
        with np.load(path, allow_pickle=False) as before:
            same = all(np.array_equal(before[name], array) for name, array in task.holdings().items())
    except (OSError, EOFError, ValueError, KeyError, BadZipFile) as error:
        raise DataError(f"{path} cannot be read ({error}); without it the run cannot be resumed safely") from None
    if not same:
        raise DataError(f"{path} differs from the data as they are now; restore the data (or fedray's version) of then")


def name_of(path: Path) -> str:
    """What a configuration is called: its folder, and the file unless that is ``run.yaml``."""
    path = path.resolve()  # the parent of mine.yaml, or of ../mine.yaml, must not become a part of a path as it stands
    return path.parent.name if path.stem == "run" else f"{path.parent.name}/{path.stem}"
