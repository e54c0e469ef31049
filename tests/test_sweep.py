"""Sweeps: which trials there are, that they are ordinary runs, and that a sweep goes on."""

import csv
from pathlib import Path

import pytest

from fedray import runs
from fedray.cli import main
from fedray.data import Dataset
from fedray.data.datasets import digits
from fedray.errors import ConfigError
from fedray.sharing import Shared, once
from fedray.sweep import Outcome, Trial, axis, failed, rows_of, sweep, table, trials, write_results

VALUES = {
    "rounds": 2,
    "cohort": 3,
    "evaluate_every": 0,
    "task": {
        "name": "classification",
        "data": {"name": "subset", "of": "digits", "train": 120, "test": 60},
        "partition": {"name": "dirichlet", "num_clients": 6, "alpha": 0.5},
        "model": {"name": "mlp", "hidden": [8]},
    },
    "algorithm": {"name": "fedavg", "local_lr": 0.1},
    "backend": "serial",
}


def test_axes_are_values_and_ranges():
    assert axis("algorithm={name: fedprox, mu: 0.1},fedavg") == ("algorithm", ["{name: fedprox, mu: 0.1}", "fedavg"])
    assert axis("seed=3..3") == ("seed", ["3"])
    for wrong, message in (
        ("seed", "is not key=value"),
        ("seed=4..1", "is an empty range"),
        ("=1", "is not key=value"),
    ):
        with pytest.raises(ConfigError, match=message):
            axis(wrong)


def test_trials_are_the_grid_or_in_step_or_a_part():
    grid = trials(["cohort=1,2", "rounds=5", "seed=0..2"], Path("out"))
    assert len(grid) == 6
    assert grid[0].overrides == ["cohort=1", "rounds=5", "seed=0"]
    assert grid[-1].folder == Path("out/cohort=2,seed=2")
    assert [t.overrides for t in trials(["a=1,2", "b=3,4", "c=9"], Path("o"), zipped=True)] == [
        ["a=1", "b=3", "c=9"],
        ["a=2", "b=4", "c=9"],
    ]
    part = trials(["a=0..9", "b=0..9"], Path("o"), random=7)
    assert len(part) == 7
    assert part == trials(["a=0..9", "b=0..9"], Path("o"), random=7)
    assert len({t.folder for t in trials(["m={a: 1},{a: 2},{a; 1}"], Path("o"))}) == 3
    with pytest.raises(ConfigError, match="as many of each: a has 2, b has 3"):
        trials(["a=1,2", "b=1,2,3"], Path("o"), zipped=True)


def test_trials_from_a_file_are_combined_with_the_values(tmp_path, capsys):
    table, listed = tmp_path / "some.csv", tmp_path / "some.yaml"
    table.write_text('algorithm.local_lr,cohort,task.model\n0.1,2,\n0.2,,"{name: mlp, hidden: [4]}"\n')
    listed.write_text(
        "- {algorithm.local_lr: 0.1, cohort: 2}\n- algorithm.local_lr: 0.2\n  task.model: {name: mlp, hidden: [4]}\n"
    )
    for path, model in ((table, "{name: mlp, hidden: [4]}"), (listed, '{"name": "mlp", "hidden": [4]}')):
        made = trials(["seed=0..1"], Path("out"), given=rows_of(path))
        assert [trial.overrides for trial in made[::2]] == [
            ["algorithm.local_lr=0.1", "cohort=2", "seed=0"],
            ["algorithm.local_lr=0.2", f"task.model={model}", "seed=0"],
        ]
        assert made[1].folder == Path("out/algorithm.local_lr=0.1,cohort=2,seed=1")
    out = tmp_path / "sweep"
    [first, second] = sweep({**VALUES, "rounds": 1}, [], out, given=rows_of(listed))
    assert (first.error, second.error) == ("", "")
    assert runs.read_run(second.trial.folder).config["task"]["model"] == {"name": "mlp", "hidden": [4]}
    listed.write_text("cohort: 2")
    for arguments, message in ((["--file", str(listed)], "is no list of mappings"), ([], "there is nothing to vary")):
        assert main(["sweep", "quickstart", "--out", str(tmp_path / "wrong"), *arguments]) == 2
        assert message in capsys.readouterr().err


def test_what_a_target_takes_is_a_metric_of_a_trial(tmp_path):
    axes = ["algorithm.local_lr=0.3", "seed=0..1"]
    found = sweep({**VALUES, "rounds": 4, "evaluate_every": 1}, axes, tmp_path / "sweep", targets=[0.15, 0.99])
    for outcome in found:
        lines = runs.read_run(outcome.trial.folder).metrics
        first = next(line for line in lines if line["test_accuracy"] >= 0.15)
        assert outcome.final["rounds_to_0.15"] == first["round"]
        assert outcome.final["megabytes_to_0.15"] == (first["bytes_up_total"] + first["bytes_down_total"]) / 1e6
        assert not [key for key in outcome.final if key.endswith("_to_0.99") or key.startswith("virtual_")]
    with (tmp_path / "sweep" / "results.csv").open() as file:
        assert [float(row["rounds_to_0.15"]) for row in csv.DictReader(file)] == [
            outcome.final["rounds_to_0.15"] for outcome in found
        ]
    assert "≥ 0.99" in (tmp_path / "sweep" / "report.html").read_text()
    assert "rounds_to_0.15" in table(found, "rounds_to_0.15")


def test_a_trial_is_the_run_that_it_would_be_alone_and_a_sweep_goes_on(tmp_path, monkeypatch):
    found = sweep(VALUES, ["cohort=2,3", "seed=0..1"], tmp_path / "sweep")
    assert [outcome.error for outcome in found] == [""] * 4
    alone = runs.run(VALUES, ["cohort=3", "seed=1"], tmp_path / "alone").folder
    trial = tmp_path / "sweep" / "cohort=3,seed=1"
    assert (trial / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    with (tmp_path / "sweep" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["cohort"], row["seed"]) for row in rows] == [("2", "0"), ("2", "1"), ("3", "0"), ("3", "1")]
    assert float(rows[3]["test_accuracy"]) == found[3].final["test_accuracy"]
    assert "cohort=3,seed=1" in (tmp_path / "sweep" / "report.html").read_text()
    monkeypatch.setattr("fedray.sweep.run", None)  # nothing is run again
    again = sweep(VALUES, ["cohort=2,3", "seed=0..1"], tmp_path / "sweep")
    assert [outcome.final for outcome in again] == [outcome.final for outcome in found]
    [other, *_] = sweep({**VALUES, "rounds": 3}, ["cohort=2,3", "seed=0..1"], tmp_path / "sweep", retries=0)
    assert "holds a trial with another rounds; choose another --out" in other.error
    lines = table(found).splitlines()
    assert [line.split()[0] for line in lines] == ["cohort=2", "cohort=3"]
    assert all("±" in line and line.endswith("(2)") for line in lines)


def test_an_interrupted_trial_goes_on_from_its_checkpoint(tmp_path):
    out = tmp_path / "sweep"
    runs.run({**VALUES, "checkpoint_every": 1}, ["seed=0", "rounds=1"], out / "seed=0")
    (out / "seed=0" / "config.yaml").write_text(
        (out / "seed=0" / "config.yaml").read_text().replace("rounds: 1", "rounds: 2")
    )
    (out / "seed=0" / "model.safetensors").unlink()
    [first, _] = sweep({**VALUES, "checkpoint_every": 1}, ["seed=0..1"], out)
    alone = runs.run({**VALUES, "checkpoint_every": 1}, ["seed=0"], tmp_path / "alone").folder
    assert (first.trial.folder / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_a_trial_that_fails_is_tried_again_and_told_and_the_others_go_on(tmp_path, monkeypatch):
    attempts = []

    def fragile(values, out):
        attempts.append(out.name)
        if values["seed"] == 1:
            raise RuntimeError("the disk is on fire")
        return runs.run(values, out=out)

    monkeypatch.setattr("fedray.sweep.run", fragile)
    found = sweep(VALUES, ["seed=0..2"], tmp_path / "sweep", retries=2)
    assert attempts.count("seed=1") == 3
    assert len(attempts) == 5
    assert [bool(outcome.error) for outcome in found] == [False, True, False]
    assert "1 of 3 trials failed" in str(failed(found))
    assert "the disk is on fire" in str(failed(found))
    assert "the disk is on fire" in (tmp_path / "sweep" / "results.csv").read_text()
    assert failed(found[:1]) is None


def digits_that_count_how_often_they_are_read(reads: str) -> Dataset:
    with Path(reads).open("a") as file:
        file.write("read\n")
    return digits()


def test_trials_of_a_process_read_the_same_data_once(tmp_path):
    reads = tmp_path / "reads"
    own = {"name": "tests.test_sweep.digits_that_count_how_often_they_are_read", "reads": str(reads)}
    data = {"name": "subset", "of": own, "train": 120, "test": 60}
    values = {**VALUES, "task": {**VALUES["task"], "data": data}}
    found = sweep(values, ["task.data.train=60,120", "seed=0..2"], tmp_path / "sweep")
    assert [outcome.error for outcome in found] == [""] * 6
    assert reads.read_text().count("read") == 2  # for planning, and for all trials
    alone = runs.run(values, ["task.data.train=60", "seed=2"], tmp_path / "alone").folder
    assert reads.read_text().count("read") == 3  # nothing is kept outside of a sweep
    trial = tmp_path / "sweep" / "task.data.train=60,seed=2"
    assert (trial / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_trials_that_share_a_task_come_one_after_the_other_and_the_longest_first(tmp_path):
    ended = []
    sweep(VALUES, ["rounds=1,2", "algorithm.local_lr=0.1,0.2", "seed=0..1"], tmp_path / "sweep", tell=ended.append)
    assert ["rounds=2" in line for line in ended] == [True] * 4 + [False] * 4
    assert ["seed=1" in line for line in ended] == [False, False, True, True] * 2


def test_what_is_shared_is_what_was_used_last():
    shared, made = Shared(), []

    def used(key):
        return once("datasets", key, lambda: made.append(key) or key)

    with shared.open():
        for key in (1, 2, 1, 3, 4, 5, 1, 2):
            assert used(key) == key
    assert made == [1, 2, 3, 4, 5, 2]
    assert used(2) == 2
    assert made[-2:] == [2, 2]  # outside, nothing is kept


def test_mistakes_show_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="no option 'alhpa'"):
        sweep(VALUES, ["task.partition.alpha=1,2", "task.partition.alhpa=3"], tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_table_says_what_failed():
    trial = Trial((("a", "1"), ("seed", "0")), Path("x"))
    assert table([Outcome(trial, {}, "boom")]) == "all  test_accuracy has no value  1 failed"
    found = [Outcome(trial, {}, "boom"), Outcome(trial, {"test_accuracy": 0.5}), Outcome(trial, {"test_accuracy": 0.5})]
    assert table(found) == "all  test_accuracy 0.5000 ± 0.0000  (2)  1 failed"
    assert table(found[1:], "rounds_to_0.9") == "all  rounds_to_0.9 has no value"


def test_results_have_types_in_parquet_and_the_same_cells_in_csv(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    settings = [("0.1", "2", "fedavg", "1"), ("1", "3", "7", "2")]
    keys = ("alpha", "cohort", "algorithm", "round")
    made = [Trial(tuple(zip(keys, row, strict=True)), tmp_path / str(number)) for number, row in enumerate(settings)]
    finals = [{"bytes": 2**60 + 1, "loss": 1, "round": 9, "test_accuracy": 0.5}, {"bytes": 3, "loss": 0.5, "note": "x"}]
    found = [Outcome(made[0], finals[0]), Outcome(made[1], finals[1], "Traceback\nValueError: no, no\n")]
    write_results(found, tmp_path / "results.csv")
    table = parquet.read_table(tmp_path / "results.parquet").to_pydict()
    assert table == {
        "trial": ["0", "1"],
        "alpha": [0.1, 1.0],
        "cohort": [2, 3],
        "algorithm": ["fedavg", "7"],
        "round": [1, 2],  # the setting, not the metric
        "bytes": [2**60 + 1, 3],
        "loss": [1.0, 0.5],
        "test_accuracy": [0.5, None],
        "error": [None, "ValueError: no, no"],
    }
    assert [type(value) for value in table["cohort"] + table["loss"]] == [int, int, float, float]
    many = Outcome(Trial((("seed", "9" * 30),), tmp_path / "2"), {})  # more than 64 bits
    write_results([many], tmp_path / "many.csv")
    assert parquet.read_table(tmp_path / "many.parquet")["seed"].to_pylist() == [1e30]
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(table)
    assert [row["error"] for row in rows] == ["", "ValueError: no, no"]
    assert rows[1]["test_accuracy"] == ""
    assert rows[0]["bytes"] == str(2**60 + 1)


def test_on_ray_trials_are_packed_and_have_the_same_bytes(tmp_path, capfd):
    values = {**VALUES, "backend": {"name": "ray", "num_workers": 2}}
    from omegaconf import OmegaConf

    (tmp_path / "c.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    assert main(["sweep", str(tmp_path / "c.yaml"), "seed=0..3", "--out", str(tmp_path / "sweep")]) == 0
    assert "test_accuracy" in capfd.readouterr().out
    alone = runs.run(VALUES, ["seed=2"], tmp_path / "alone").folder
    trial = tmp_path / "sweep" / "seed=2"
    assert (trial / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
