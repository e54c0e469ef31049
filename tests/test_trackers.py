"""Trackers log every number of every round once, across a resume, and tell what to install when they cannot."""

import json
import math
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from fedray.errors import ConfigError
from fedray.trackers import TRACKERS

CONFIG = {"seed": 0, "algorithm": {"name": "fedavg", "local_lr": 0.1}, "model": {"hidden": [64, 32]}}
ROUNDS = range(1, 9)


def record(number: int) -> dict:
    return {
        "round": number,
        "train_loss": 1.0 + number / 1024,  # exact in binary, and a text that nothing else has
        "test_loss": math.nan,
        "note": "not a number",
        "phases": {"train": 0.5},
    }


def track_killed_and_resumed(name: str, folder: Path, **options: str) -> None:
    """Rounds 1 to 5, then from the checkpoint of round 3 on: rounds 4 and 5 are computed twice."""
    folder.mkdir(exist_ok=True)
    with TRACKERS[name](folder, CONFIG, **options) as track:
        for number in range(1, 6):
            track(record(number))
    lines = [json.dumps(record(number)) for number in range(1, 4)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with TRACKERS[name](folder, CONFIG, **options) as track:
        for number in range(4, 9):
            track(record(number))


def test_tensorboard_holds_each_round_once(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra fedray[tensorboard] is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track_killed_and_resumed("tensorboard", tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [
        (number, record(number)["train_loss"]) for number in ROUNDS
    ]
    assert [event.value for event in events.Scalars("phases/train")] == [0.5] * 8
    assert all(math.isnan(event.value) for event in events.Scalars("test_loss"))
    assert set(events.Tags()["scalars"]) == {"train_loss", "test_loss", "phases/train"}
    (text,) = events.Tensors("config/text_summary")
    assert '"local_lr": 0.1' in text.tensor_proto.string_val[0].decode()


def test_tensorboard_writes_where_it_is_told(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra fedray[tensorboard] is not installed")
    with TRACKERS["tensorboard"](tmp_path / "run", CONFIG, log_dir=str(tmp_path / "events")) as track:
        track(record(1))
    assert len(list((tmp_path / "events").iterdir())) == 1


@pytest.fixture
def mlflow_client(monkeypatch):
    for library in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(library, reason="the extra fedray[mlflow] is not installed")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    return MlflowClient


def test_mlflow_holds_each_round_once(tmp_path, mlflow_client):
    folder = tmp_path / "run"
    track_killed_and_resumed("mlflow", folder)
    client = mlflow_client(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    (experiment,) = [found for found in client.search_experiments() if found.name == "fedray"]
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [
        (number, record(number)["train_loss"]) for number in ROUNDS
    ]
    assert math.isnan(run.data.metrics["test_loss"])
    assert run.data.params == {
        "seed": "0",
        "algorithm.name": "fedavg",
        "algorithm.local_lr": "0.1",
        "model.hidden": "[64, 32]",
    }
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"


def test_mlflow_says_how_a_run_ended_and_shares_a_store(tmp_path, mlflow_client):
    store = f"sqlite:///{tmp_path / 'shared.db'}"
    for name, error in (("killed", KeyboardInterrupt), ("failed", RuntimeError)):
        (tmp_path / name).mkdir()
        with suppress(error), TRACKERS["mlflow"](tmp_path / name, CONFIG, tracking_uri=store) as track:
            track(record(1))
            raise error
        assert not (tmp_path / name / "mlflow.db").exists()
    client = mlflow_client(tracking_uri=store)
    experiment = client.get_experiment_by_name("fedray")
    ended = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert ended == {"killed": "KILLED", "failed": "FAILED"}


def test_wandb_offline_holds_each_round_in_its_newest_folder(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra fedray[wandb] is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    track_killed_and_resumed("wandb", tmp_path)
    wandb.teardown()  # its own process writes the files, some of it after a run's end
    run_id = json.loads((tmp_path / "wandb.json").read_text())["id"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert files
    written = files[-1].read_bytes()
    for number in ROUNDS:
        assert str(record(number)["train_loss"]).encode() in written, f"round {number} is missing"


@pytest.mark.parametrize(
    ("name", "library"), [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_missing_library_names_the_extra(name, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    message = rf"the tracker {name} is not installed; run: pip install 'fedray\[{name}\]'"
    with pytest.raises(ConfigError, match=message), TRACKERS[name](tmp_path, CONFIG):
        pass


@pytest.mark.usefixtures("mlflow_client")
def test_a_corrupt_note_of_the_run_is_named(tmp_path):
    (tmp_path / "mlflow.json").write_text("{")
    with (
        pytest.raises(ConfigError, match=r"mlflow\.json does not name a tracker's run; remove it"),
        TRACKERS["mlflow"](tmp_path, CONFIG),
    ):
        pass
