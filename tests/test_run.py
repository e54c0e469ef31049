"""A run folder says what was done, and the same configuration comes to the same bytes."""

import getpass
import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from serial_runs import CONFIG, measured, model, undisturbed, without_page

import fedray
from fedray import checkpoint, training
from fedray.clock import PHASES
from fedray.errors import ConfigError
from fedray.runs import run


@pytest.fixture(autouse=True)
def page_of_no_interest() -> Iterator[None]:
    with without_page():
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("unbroken") / "run")


# the run folder


def test_the_run_folder_holds_all_that_it_is_said_to_hold(unbroken):
    assert {path.name for path in unbroken.iterdir()} == {
        "config.yaml",
        "environment.json",
        "partition.npz",
        "metrics.jsonl",
        "evaluation.json",
        "checkpoints",
        "client_states",
        "model.safetensors",
        "report.html",
    }
    assert sorted(path.name for path in (unbroken / "checkpoints").iterdir()) == ["000004", "000006"]
    assert not list(unbroken.rglob(".*")), "nothing half-written is left"


def test_there_is_one_line_of_metrics_a_round(unbroken):
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(7))
    params = sum(tensor.numel() for tensor in checkpoint.read_params(unbroken / "model.safetensors").values())
    for line in lines[1:]:
        assert {"train_loss", "test_loss", "test_accuracy", "macro_f1"} < line.keys()
        assert (line["clients_sampled"], line["clients_failed"]) == (4, 0)
        assert line["bytes_up"] == line["bytes_down"] == 4 * 2 * params * 4  # clients, trees, float32
        assert line["bytes_up_total"] == line["bytes_down_total"] == line["round"] * line["bytes_up"]
        assert sum(line["phases"].values()) <= line["seconds"]
    assert lines[0]["bytes_up_total"] == 0
    assert "train_loss" not in lines[0]
    assert {name for line in lines for name in line.get("phases", ())} == {"sample", "train", "evaluate", "checkpoint"}
    assert lines[-1]["test_accuracy"] > lines[0]["test_accuracy"]


def test_a_profile_says_what_every_round_went_to_and_changes_no_byte(unbroken, tmp_path):
    made = run(CONFIG, ["profile=true", "backend.num_shares=2"], tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (unbroken / "model.safetensors").read_bytes()
    for line in made.metrics:
        told = line["profile"]
        assert set(told) <= set(PHASES)
        assert set(told) >= ({"load", "train", "accumulate", "merge", "evaluate"} if line["round"] else {"evaluate"})
        assert 0 < sum(told.values()) <= line["seconds"]  # one process, which is never idle


def test_who_holds_what_is_kept(unbroken):
    with np.load(unbroken / "partition.npz", allow_pickle=False) as arrays:
        assert len(arrays["offsets"]) == 9
        assert sorted(arrays["indices"]) == list(range(1438))
        assert arrays["label_counts"].shape == (8, 10)
        assert arrays["label_counts"].sum() == 1438
        assert list(arrays["classes"]) == list("0123456789")


def test_the_environment_names_versions_and_nobody(unbroken):
    text = (unbroken / "environment.json").read_text()
    noted = json.loads(text)
    assert noted["versions"].keys() >= {"torch", "ray", "numpy", "omegaconf", "safetensors"}
    assert noted["python"] == ".".join(map(str, sys.version_info[:3]))
    assert noted.keys() == {"python", "platform", "cpus", "gpus", "versions", "started"}
    for secret in (socket.gethostname(), getpass.getuser(), str(Path.home()), str(Path.cwd()), sys.prefix):
        assert secret not in text


def test_the_last_evaluation_is_kept_for_the_report(unbroken):
    evaluation = json.loads((unbroken / "evaluation.json").read_text())
    assert evaluation["round"] == 6
    assert np.array(evaluation["confusion"]).sum() == 1797 - 1438


def test_what_python_gets_is_the_run(tmp_path):
    made = fedray.run({**CONFIG, "rounds": 2}, ["cohort=2"], tmp_path / "a")
    assert made.finished
    assert made.folder == tmp_path / "a"
    assert [record["round"] for record in made.metrics] == [0, 1, 2]
    assert made.final["test_accuracy"] == made.metrics[-1]["test_accuracy"]
    assert made.record.config["cohort"] == 2


def test_the_package_has_every_name_that_it_lists():
    assert all(getattr(fedray, name) is not None for name in fedray.__all__)
    assert fedray.run is run


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (3, [0, 3, 5]), (0, [5])])
def test_the_model_is_evaluated_every_so_many_rounds_and_at_the_end(tmp_path, every, expected):
    made = run(CONFIG, ["rounds=5", f"evaluate_every={every}", "checkpoint_every=0"], tmp_path / "a")
    assert [record["round"] for record in made.metrics if "test_accuracy" in record] == expected
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["000005"]


def test_evaluating_less_often_changes_nothing_else(unbroken, tmp_path):
    run(CONFIG, ["evaluate_every=0", "checkpoint_every=0"], tmp_path / "a")
    assert model(tmp_path / "a") == model(unbroken)


def test_the_folder_is_named_after_the_experiment_and_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "run.yaml"
    shutil.copy(run({**CONFIG, "rounds": 1}, out=tmp_path / "first").folder / "config.yaml", path)
    made = run(path)
    assert made.folder.parent == Path("runs")
    assert made.folder.name.startswith("mine-")


def test_a_folder_in_use_is_not_written_to(unbroken, tmp_path):
    with pytest.raises(ConfigError, match=r"is not empty; choose another --out, or go on with: fedray resume"):
        run(CONFIG, out=unbroken)
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"cannot be the run folder \(.*\); choose another --out"):
            run(CONFIG, out=out)
    (tmp_path / "empty").mkdir()
    assert run({**CONFIG, "rounds": 1}, out=tmp_path / "empty").finished


def test_numbers_that_json_does_not_know_are_null():
    line = training._json(
        {"loss": float("nan"), "phases": {"train": float("inf")}, "list": [1.5, float("-inf")], "n": 1}
    )
    assert json.loads(line) == {"loss": None, "phases": {"train": None}, "list": [1.5, None], "n": 1}
    assert "NaN" not in line


# the same bytes


def test_the_same_configuration_gives_the_same_bytes(unbroken, tmp_path):
    run(CONFIG, out=tmp_path / "a")
    assert model(tmp_path / "a") == model(unbroken)
    assert measured(tmp_path / "a") == measured(unbroken)


@pytest.mark.parametrize(
    "overrides", [[], ["algorithm=fedadam", "task.model=softmax", "backend=serial"], ["seed=${rounds}", "rounds=3"]]
)
def test_the_configuration_in_the_folder_reproduces_the_run(tmp_path, overrides):
    run(CONFIG, overrides, tmp_path / "a")
    run(tmp_path / "a" / "config.yaml", out=tmp_path / "b")
    assert model(tmp_path / "a") == model(tmp_path / "b")
    assert measured(tmp_path / "a") == measured(tmp_path / "b")
    assert (tmp_path / "a" / "config.yaml").read_text() == (tmp_path / "b" / "config.yaml").read_text()


def test_another_seed_gives_other_bytes(unbroken, tmp_path):
    run(CONFIG, ["seed=4"], tmp_path / "a")
    assert model(tmp_path / "a") != model(unbroken)


@pytest.mark.parametrize("source", ["mine.yaml", "./mine.yaml", "../here/mine.yaml", "../above.yaml"])
def test_a_run_without_a_folder_of_its_own_stays_below_runs(source, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    OmegaConf.save(OmegaConf.create(CONFIG | {"rounds": 1}), source)
    with without_page():
        folder = run(source).folder
    assert folder.resolve().is_relative_to(here / "runs")
