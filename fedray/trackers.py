"""Trackers: where a run's numbers can be sent while it runs, besides its own ``metrics.jsonl``.

A tracker is a context manager that yields a function to be called with the record of each round. It keeps what it
needs to go on under the run folder, so that a resumed run continues the same series.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from fedray.errors import ConfigError
from fedray.report.read import flat, read_metrics, scalars

Tracker = Callable[[Mapping[str, Any]], None]
TrackerFactory = Callable[[Path, Mapping[str, Any]], AbstractContextManager[Tracker]]  # (run folder, config)

_MLFLOW_BATCH = 100  # parameters that MLflow takes in one call


@contextmanager
def tensorboard(folder: Path, config: Mapping[str, Any], /, log_dir: str | None = None) -> Iterator[Tracker]:
    """Event files for TensorBoard: `tensorboard --logdir RUN`.

    Rounds that a resumed run computes again replace those that were written before.

    Args:
        log_dir: where the event files go; without it, `tensorboard` in the run folder.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise _missing("tensorboard") from error
    where = Path(log_dir) if log_dir is not None else folder / "tensorboard"
    fresh = not any(where.glob("events.out.tfevents.*"))
    writer: SummaryWriter | None = None

    def track(record: Mapping[str, Any]) -> None:
        nonlocal writer
        step = int(record["round"])
        if writer is None:  # only now is it known from which round on older events are void
            writer = SummaryWriter(str(where), purge_step=step)
            if fresh:
                text = json.dumps(config, indent=2, default=str)
                writer.add_text("config", "    " + text.replace("\n", "\n    "), step)
        for name, value in _measured(record).items():
            writer.add_scalar(name, value, step)
        writer.flush()  # a killed run must not lose rounds that it does not repeat

    try:
        yield track
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def mlflow(
    folder: Path,
    config: Mapping[str, Any],
    /,
    tracking_uri: str | None = None,
    experiment: str = "fedray",
    run_name: str | None = None,
) -> Iterator[Tracker]:
    """MLflow: a local SQLite file in the run folder, or a tracking server.

    Rounds that a resumed run computes again are not logged twice.

    Args:
        tracking_uri: server or database; without it, MLFLOW_TRACKING_URI if set, else `mlflow.db` in the run folder.
        experiment: name of the MLflow experiment, made if it does not exist.
        run_name: name of the MLflow run; without it, the run folder's name.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a local store stays local
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        for needed in ("sqlalchemy", "alembic"):  # by the local store; mlflow-skinny does not bring them
            import_module(needed)
    except ImportError as error:
        raise _missing("mlflow") from error
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{(folder / 'mlflow.db').resolve()}")
    memory, store = folder / "mlflow.json", uri or "mlflow.db"
    run_id = _recall(memory, store)
    if run_id is None:
        found = client.get_experiment_by_name(experiment)
        artifacts = (folder / "mlflow").resolve().as_uri() if uri is None else None
        place = found.experiment_id if found else client.create_experiment(experiment, artifact_location=artifacts)
        run_id = str(client.create_run(place, run_name=run_name or folder.resolve().name).info.run_id)
        options = [Param(name, str(value)[:500]) for name, value in flat(config)]
        for at in range(0, len(options), _MLFLOW_BATCH):
            client.log_batch(run_id, params=options[at : at + _MLFLOW_BATCH])
        _remember(memory, store, run_id)
    else:
        client.update_run(run_id, status="RUNNING")
    last = client.get_run(run_id).data.metrics.get("round", -1)

    def track(record: Mapping[str, Any]) -> None:
        step = int(record["round"])
        if step > last:
            now = time.time_ns() // 1_000_000
            numbers = {**_measured(record), "round": float(step)}
            client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in numbers.items()])

    status = "FAILED"
    try:
        yield track
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        client.set_terminated(run_id, status=status)


@contextmanager
def wandb(
    folder: Path,
    config: Mapping[str, Any],
    /,
    project: str = "fedray",
    entity: str | None = None,
    run_name: str | None = None,
    mode: Literal["offline", "online"] | None = None,
) -> Iterator[Tracker]:
    """Weights & Biases: offline files in the run folder for `wandb sync`, or live.

    A resumed run goes on under the same id. Online, rounds that the server already has are dropped. Offline, there is a
    new folder after each resume, and it begins with the rounds before it: to `wandb sync` the newest one is enough.

    Args:
        project: name of the project.
        entity: user or team; without it, the account's own.
        run_name: name of the run; without it, the run folder's name.
        mode: offline or online; without it, WANDB_MODE if set, else offline.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline means that nothing leaves this machine
    try:
        import wandb as library
    except ImportError as error:
        raise _missing("wandb") from error
    memory = folder / "wandb.json"
    mode_now: Any = mode or os.environ.get("WANDB_MODE") or "offline"
    run_id = _recall(memory, project)
    before = read_metrics(folder / "metrics.jsonl") if run_id and mode_now != "online" else []
    if run_id is None:
        run_id = uuid.uuid4().hex[:12]
        _remember(memory, project, run_id)
    run = library.init(
        id=run_id,
        project=project,
        entity=entity,
        name=run_name or folder.resolve().name,
        dir=str(folder),
        config=dict(config),
        mode=mode_now,
        resume="allow",
        reinit="create_new",
        settings=library.Settings(silent=True, console="off", save_code=False),
    )

    def track(record: Mapping[str, Any]) -> None:
        step = int(record["round"])
        for earlier in before:
            if earlier["round"] < step:
                run.log(_measured(earlier), step=int(earlier["round"]))
        before.clear()
        run.log(_measured(record), step=step)

    try:
        yield track
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def _measured(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of the record but the round, which is the step."""
    return {name: value for name, value in scalars(record).items() if name != "round"}


def _missing(extra: str) -> ConfigError:
    return ConfigError(f"the tracker {extra} is not installed; run: pip install 'fedray[{extra}]'")


def _recall(memory: Path, where: str) -> str | None:
    """The tracker's id of this run, if it was noted for the same store."""
    if not memory.is_file():
        return None
    try:
        noted = json.loads(memory.read_text(encoding="utf-8"))
        return str(noted["id"]) if noted["where"] == where else None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{memory} does not name a tracker's run; remove it to start a new one") from error


def _remember(memory: Path, where: str, run_id: str) -> None:
    aside = memory.with_suffix(".part")
    aside.write_text(json.dumps({"where": where, "id": run_id}) + "\n", encoding="utf-8")
    aside.replace(memory)


TRACKERS: dict[str, Callable[..., Any]] = {"tensorboard": tensorboard, "mlflow": mlflow, "wandb": wandb}
