"""Searches on Ray Tune: what is searched, that trials are ordinary runs, and that a search goes on."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from commands import command
from omegaconf import OmegaConf

import fedray
from fedray import config, runs
from fedray.backends.ray.schedulers import SEARCHES, Setting
from fedray.cli import main
from fedray.errors import ConfigError
from fedray.experiment import plan
from fedray.report import read_run
from fedray.search import parse
from fedray.tune import _ray_tune, _values, trainable, tune

DEADLINE = 240  # seconds for a process to get somewhere
VALUES = {
    "rounds": 6,
    "cohort": 3,
    "checkpoint_every": 2,
    "task": {
        "name": "classification",
        "data": {"name": "subset", "of": "digits", "train": 120, "test": 60},
        "partition": {"name": "dirichlet", "num_clients": 6, "alpha": 0.5},
        "model": "softmax",
    },
    "algorithm": {"name": "fedavg", "local_lr": 0.1},
    "backend": "serial",
    "tune": {
        "space": {"algorithm.local_lr": {"loguniform": [1e-3, 1]}, "cohort": {"choice": [2, 3]}},
        "trials": 4,
        "max_concurrent": 2,
    },
}


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def written(path: Path, values: dict) -> Path:
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    return path


# what is searched


def test_a_distribution_is_written_in_the_file_or_on_the_command_line():
    tuning = plan(VALUES).tune
    assert tuning is not None
    assert tuning.distributions["algorithm.local_lr"].arguments == (1e-3, 1.0)
    assert tuning.distributions["cohort"].examples == (2, 3)
    assert parse("algorithm=choice({name: fedprox, mu: 0.1}, fedavg)") == (
        "algorithm",
        {"choice": [{"name": "fedprox", "mu": 0.1}, "fedavg"]},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"cohort": {"loguniforn": [1, 2]}}}, "no distribution 'loguniforn'; did you mean 'loguniform'"),
        ({"space": {"cohort": {"uniform": [1]}}}, r"tune.space.cohort: uniform is \[1\]; it must be \[low, high\]"),
        ({"space": {"cohort": {"uniform": [2, 1]}}}, "tune.space.cohort.uniform: nothing lies between 2.0 and 1.0"),
        ({"space": {"cohort": {"loguniform": [0, 1]}}}, "tune.space.cohort.loguniform: low is 0.0; it must be > 0"),
        ({"space": {"cohort": {"randint": [3, 3]}}}, "high is 3; it must be above low"),
        ({"space": {"cohort": {"randint": [1.5, 3]}}}, "cohort.randint.low is 1.5; it must be a whole number"),
        ({"space": {"cohort": {"choice": []}}}, "tune.space.cohort.choice: there is no value to take"),
        ({"space": {"cohort": {"choice": 5}}}, "tune.space.cohort.choice is 5; it must be a list"),
        ({"space": {"cohort": [1, 2]}}, "it must be one distribution, such as {loguniform"),
        ({"space": {}}, "tune.space is empty"),
        ({"trails": 3}, "tune has no option 'trails'; did you mean 'trials'"),
        ({"trials": 0}, "tune.trials is 0; it must be >= 1"),
        ({"mode": "least"}, "tune.mode is 'least'"),
        ({"scheduler": "ascha"}, "tune.scheduler.name is 'ascha'; did you mean 'asha'"),
        ({"scheduler": {"name": "asha", "grace": 1}}, r"tune.scheduler \(asha\) has no option 'grace'; did you mean"),
        ({"search": "optima"}, "tune.search.name is 'optima'; did you mean 'optuna'"),
    ],
)
def test_mistakes_in_the_section_are_found_by_every_command(changes, message):
    with pytest.raises(ConfigError, match=message):
        plan({**VALUES, "tune": {**VALUES["tune"], **changes}})


def test_a_section_that_is_no_mapping_and_a_space_that_cannot_be_read():
    with pytest.raises(ConfigError, match="tune is 3; it must be a mapping of its options"):
        plan({**VALUES, "tune": 3})
    for wrong in ("cohort", "cohort=5", "cohort=choice", "=choice(1)"):
        with pytest.raises(ConfigError, match=r"is not key=distribution\(...\)"):
            parse(wrong)
    with pytest.raises(ConfigError, match="cannot be read"):
        parse("cohort=choice([1)")


@pytest.mark.parametrize(
    ("overrides", "space", "message"),
    [
        (["tune=null"], [], "nothing is searched; give the file a tune.space, or --space"),
        ([], ["algorithm.local_lrr=uniform(0,1)"], "no option 'local_lrr'; did you mean 'local_lr'"),
        ([], ["cohort=randint(2,9)"], "cohort is 8; there are only 6 clients"),
        ([], ["algorithm.name=choice(fedavg,fedpro)"], "algorithm.name is 'fedpro'; did you mean 'fedprox'"),
        (["tune.scheduler={name: asha, grace_period: 9}"], [], "tune.scheduler.grace_period is 9; a trial has only 6"),
        (["tune.scheduler={name: asha, reduction_factor: 1}"], [], "reduction_factor is 1; it must be >= 2"),
        (["tune.scheduler={name: median, min_trials: 0}"], [], "tune.scheduler.min_trials is 0; it must be >= 1"),
        (["tune.scheduler=pbt"], [], "interval is 5, checkpoint_every is 2; there must be a checkpoint"),
        (["tune.scheduler={name: pbt, interval: 2, quantile: 0.6}"], [], "tune.scheduler.quantile is 0.6"),
        (
            ["tune.scheduler={name: pbt, interval: 2}"],
            ["task.partition.alpha=uniform(0.1,1)"],
            "pbt changes options in mid-run, and task.partition.alpha cannot change",
        ),
        (["tune.scheduler={name: pbt, interval: 2}", "tune.search=optuna"], [], "pbt, which draws by itself"),
        (["tune.search=optuna"], ["cohort=grid(2,3)"], "optuna draws, and cohort has a grid"),
    ],
)
def test_mistakes_show_before_anything_starts(overrides, space, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        tune(VALUES, overrides, tmp_path / "search", space)


def test_the_folder_is_new_or_the_same_search(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    with pytest.raises(ConfigError, match="is not empty, and holds no search; choose another --out"):
        tune(VALUES, [], tmp_path / "other")
    (tmp_path / "other" / "letter.txt").rename(tmp_path / "other" / "config.yaml")
    written(tmp_path / "other" / "config.yaml", VALUES)
    with pytest.raises(ConfigError, match="holds a search with another rounds; choose another --out"):
        tune(VALUES, ["rounds=7"], tmp_path / "other")
    with pytest.raises(ConfigError, match=r"results at a URI need fedray\.tune\.trainable"):
        tune(VALUES, [], "s3://bucket/search")


def test_a_missing_package_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fedray.backends.ray.tune", None)
    monkeypatch.delattr("fedray.backends.ray.tune", raising=False)
    path = written(tmp_path / "c.yaml", VALUES)
    assert main(["tune", str(path), "--out", str(tmp_path / "search")]) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "run: pip install 'fedray[tune]'" in shown
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"Optuna is not installed; run: pip install 'fedray\[optuna\]'"):
        SEARCHES["optuna"](Setting({}, 1, 1, 0))


def test_a_run_of_the_same_file_checks_the_section_and_leaves_it(tmp_path, capsys):
    path = written(tmp_path / "c.yaml", {**VALUES, "rounds": 1})
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 0
    assert "tune" not in config.read(tmp_path / "run" / "config.yaml")
    assert main(["show", "tune"]) == 0
    assert "one of schedulers, default fifo" in capsys.readouterr().out


def test_an_override_of_the_scheduler_keeps_the_options_that_fit():
    values = {**VALUES, "tune": {**VALUES["tune"], "scheduler": {"name": "asha", "grace_period": 2, "brackets": 2}}}
    made = config.read(values, ["tune.scheduler.name=median"])
    assert made["tune"]["scheduler"] == {"name": "median", "grace_period": 2}


@pytest.mark.parametrize("name", SEARCHES)
def test_the_same_seed_draws_the_same_settings(name):
    module = _ray_tune()
    from ray.tune.search import BasicVariantGenerator

    def drawn(seed: int) -> list[dict]:
        space = module.space_of(plan(VALUES).tune.distributions)
        search = SEARCHES[name](Setting(space, 6, 2, seed))
        if isinstance(search, BasicVariantGenerator):
            search.add_configurations({"x": {"run": lambda _: None, "config": space, "num_samples": 4}})
            return [search.next_trial().config for _ in range(4)]
        search.set_search_properties("test_accuracy", "max", space)
        return [search.suggest(str(number)) for number in range(4)]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)
    assert all(0.001 <= settings["algorithm.local_lr"] <= 1 for settings in drawn(0))


def test_a_trial_runs_in_its_own_process_unless_it_is_told_how_many_workers_to_have():
    module = _ray_tune()
    auto = _values({**VALUES, "backend": {"name": "ray", "threads": 2, "address": "auto"}}, {"cohort": 2})
    assert auto["backend"] == {"name": "serial", "threads": 2}
    assert auto["cohort"] == 2
    assert module.bundles(auto, 2, 0.5).bundles == [{"CPU": 2, "GPU": 0.5}]
    ray = {"name": "ray", "num_gpus": 0.25, "placement": "spread"}
    nested = module.bundles(_values({**VALUES, "backend": {**ray, "num_workers": 2}}, {}), 1, 0)
    assert nested.bundles == [{"CPU": 1}, {"CPU": 1, "GPU": 0.25}, {"CPU": 1, "GPU": 0.25}]
    assert nested.strategy == "SPREAD"
    by_clients = {"name": "ray", "num_gpus": 0, "clients_per_worker": 2}
    assert len(module.bundles(_values({**VALUES, "backend": by_clients}, {"cohort": 3}), 0, 0).bundles) == 2


# searches


def test_a_search_that_is_killed_goes_on_by_the_same_command(tmp_path, monkeypatch):
    values = {**VALUES, "rounds": 30, "tune": {**VALUES["tune"], "scheduler": {"name": "asha", "reduction_factor": 3}}}
    path = written(tmp_path / "c.yaml", values)
    out = tmp_path / "search"
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "0.1")  # Tune's notes are of now, so that checkpoints are in them
    process = command("tune", path, "--out", out)
    monkeypatch.delenv("TUNE_GLOBAL_CHECKPOINT_S")
    deadline = time.monotonic() + DEADLINE
    while not (begun := with_checkpoints(out)):
        assert time.monotonic() < deadline, "the search does not get on"
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
            pytest.fail(f"the search ended: {process.stdout.read()}")
    everybody = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE)
    psutil.wait_procs([one for one in everybody if "Agent" not in _command_of(one)], timeout=DEADLINE)
    begun = [trial for trial in begun if not (trial / "run" / "model.safetensors").exists()]
    assert begun, "too late: they have ended"
    assert not (out / "results.csv").exists()
    again = command("tune", path, "--out", out)
    output, _ = again.communicate(timeout=DEADLINE)
    assert again.returncode == 0, output
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [f"{number:04d}/run" for number in range(4)]
    assert [row["error"] for row in rows] == [""] * 4
    done = [row for row in rows if int(row["round"]) == 30]
    assert done
    [line] = re.findall(r"^again: fedray run (.+)$", output, re.MULTILINE)
    [best] = re.findall(r"^best: (.+)$", output, re.MULTILINE)
    assert max(done, key=lambda row: float(row["test_accuracy"]))["test_accuracy"] == str(
        read_run(best).final["test_accuracy"]
    )
    source, *overrides = shlex.split(line)
    alone = fedray.run(source, overrides, tmp_path / "alone").folder
    assert model(Path(best)) == model(alone)
    assert [r["round"] for r in read_run(best).metrics] == list(range(31))
    assert "0000" in (out / "report.html").read_text()
    for trial in begun:  # it went on, and did not start again
        assert (trial / "run.log").read_text().count("round  1/30") == 1


def with_checkpoints(out: Path) -> list[Path]:
    """The trials whose checkpoints Tune has in its newest notes."""
    trials = []
    for path in sorted(out.glob("experiment_state-*.json"))[-1:]:
        with suppress(ValueError):  # it is just being written
            trials = json.loads(path.read_text())["trial_data"]
    last = [json.loads(known)["last_result"] or {} for _, known in trials]
    reached = {int(result["trial_id"].partition("_")[2]): result["round"] for result in last if "round" in result}
    return [out / f"{number:04d}" for number, round in reached.items() if round > 2]  # and a checkpoint is of round 2


def _command_of(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


FRAGILE = '''
import os
from dataclasses import replace
from pathlib import Path

from fedray import FederatedAlgorithm, LocalTraining
from fedray.algorithms.fedavg import fedavg


def fragile(*, local: LocalTraining, marker: str) -> FederatedAlgorithm:
    """FedAvg whose process dies in its fourth round, once for each file name in the marker's folder."""
    inner = fedavg(local=local)

    def apply(state, cohort, backend):
        if cohort[0].round == 4 and local.local_lr > 0.15:
            raise RuntimeError("too fast for me")
        if cohort[0].round == 4 and not Path(marker).exists():
            Path(marker).touch()
            os._exit(1)
        return inner.apply(state, cohort, backend)

    return replace(inner, apply=apply)
'''


def test_a_trial_whose_process_dies_goes_on_and_one_that_fails_is_told(ray_local, tmp_path, monkeypatch):
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.chdir(tmp_path)
    algorithm = {"name": "fragile.fragile", "local_lr": 0.1, "marker": str(tmp_path / "died")}
    space = {"algorithm.local_lr": {"grid": [0.1, 0.2]}}
    values = {**VALUES, "algorithm": algorithm, "tune": {"space": space, "trials": 1, "max_concurrent": 1}}
    found = tune(values, [], tmp_path / "search")
    died, failed = found.outcomes
    assert (tmp_path / "died").exists()
    assert died.error == ""
    alone = runs.run(values, ["algorithm.local_lr=0.1"], tmp_path / "alone").folder
    assert model(died.trial.folder) == model(alone)
    assert "RuntimeError: too fast for me" in failed.error.splitlines()[-1]
    assert found.ranked[0] is died
    assert [len(line.split()) for line in found.table().splitlines()][:2] == [4, 4]
    log = (died.trial.folder.parent / "run.log").read_text()
    assert "round 6/6" in log


@pytest.mark.slow
def test_population_based_training_goes_on_from_the_better_ones_with_other_options(ray_local, tmp_path):
    space = {"algorithm.local_lr": {"loguniform": [1e-3, 1]}}
    scheduler = {"name": "pbt", "interval": 2, "quantile": 0.5}
    section = {"space": space, "trials": 3, "scheduler": scheduler, "max_concurrent": 2, "seed": 1}
    values = {**VALUES, "tune": section}
    found = tune(values, [], tmp_path / "search")
    assert [outcome.error for outcome in found.outcomes] == [""] * 3
    changed = 0
    for number, outcome in enumerate(found.outcomes):
        folder = outcome.trial.folder
        notes = folder / "changes.jsonl"
        changes = [json.loads(line) for line in notes.read_text().splitlines()] if notes.is_file() else []
        changed += len(changes)
        assert all(change["round"] in (2, 4) for change in changes)
        last = config.read(folder / "config.yaml")["algorithm"]["local_lr"]
        assert outcome.trial.overrides == [f"algorithm.local_lr={last}"]
        # the same by hand: what its changes say, one after the other
        steps = [change["algorithm.local_lr"] for change in changes]
        rates = [steps[0][0], *(after for _, after in steps)] if steps else [last]
        assert rates[-1] == last
        replay = tmp_path / f"replay{number}"
        for rate, end in zip(rates, [*(change["round"] for change in changes), 6], strict=True):
            list(runs.trial({**values, "rounds": end, "algorithm": {"name": "fedavg", "local_lr": rate}}, replay))
        assert model(folder) == model(replay)
        assert [r["round"] for r in read_run(folder).metrics] == list(range(7))
    assert changed
    # whoever is first does not matter
    again = tune({**values, "tune": {**section, "max_concurrent": 1}}, [], tmp_path / "again")
    assert [model(o.trial.folder) for o in again.outcomes] == [model(o.trial.folder) for o in found.outcomes]


LATE = """
from dataclasses import replace
from pathlib import Path

from fedray import FederatedAlgorithm, LocalTraining
from fedray.algorithms.fedavg import fedavg


def late(*, local: LocalTraining, marker: str) -> FederatedAlgorithm:
    inner = fedavg(local=local)

    def apply(state, cohort, backend):
        if cohort[0].round == 3:
            Path(marker).touch(exist_ok=False)
        return inner.apply(state, cohort, backend)

    return replace(inner, apply=apply)
"""


@pytest.mark.slow
def test_a_population_does_not_wait_for_one_that_has_failed(ray_local, tmp_path, monkeypatch):
    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.chdir(tmp_path)
    scheduler = {"name": "pbt", "interval": 2}
    space = {"algorithm.local_lr": {"uniform": [0.01, 0.1]}}
    section = {"space": space, "trials": 2, "scheduler": scheduler, "max_concurrent": 1, "retries": 0}
    algorithm = {"name": "late.late", "marker": str(tmp_path / "first")}
    found = tune({**VALUES, "algorithm": algorithm, "tune": section}, [], tmp_path / "search")
    # the first waits in round 4 for the second, which fails in round 3
    assert sorted(bool(outcome.error) for outcome in found.outcomes) == [False, True]
    assert found.ranked[0].final["round"] == 6


def test_optuna_searches(ray_local, tmp_path):
    section = {**VALUES["tune"], "search": {"name": "optuna", "startup_trials": 2}, "trials": 3, "max_concurrent": 1}
    found = tune({**VALUES, "rounds": 2, "tune": section}, [], tmp_path / "search", ["cohort=choice(3)"])
    assert [outcome.error for outcome in found.outcomes] == [""] * 3
    assert len({outcome.trial.settings for outcome in found.outcomes}) == 3
    assert all(dict(outcome.trial.settings)["cohort"] == "3" for outcome in found.outcomes)


def test_a_metric_that_no_round_reports_is_named(ray_local, tmp_path):
    section = {**VALUES["tune"], "metric": "test_acuracy", "trials": 1, "retries": 0}
    found = tune({**VALUES, "tune": section}, [], tmp_path / "search")
    assert (
        "tune.metric is 'test_acuracy', which no round reports; did you mean 'test_accuracy'?"
        in found.outcomes[0].error
    )
    assert found.ranked == []


def test_a_trainable_for_ones_own_tuner_with_storage_that_is_no_folder(ray_local, tmp_path):
    _ray_tune()
    from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
    from ray import tune as ray_tune

    (tmp_path / "bucket").mkdir()
    bucket = SubTreeFileSystem(str(tmp_path / "bucket"), LocalFileSystem())
    values = {**VALUES, "algorithm": {"name": "scaffold"}, "method": "scaffold"}
    values["algorithm"] = {"name": "${method}", "local_lr": 0.1}
    tuner = ray_tune.Tuner(
        trainable(values, ["rounds=3"], num_cpus=0.5),
        param_space={"algorithm.local_lr": ray_tune.uniform(0.05, 0.1), "method": ray_tune.grid_search(["scaffold"])},
        tune_config=ray_tune.TuneConfig(metric="test_accuracy", mode="max"),
        run_config=ray_tune.RunConfig(name="mine", storage_path="experiments", storage_filesystem=bucket, verbose=0),
    )
    best = tuner.fit().get_best_result()
    assert best.metrics["round"] == 3
    assert best.error is None
    with best.checkpoint.as_directory() as folder:
        kept = read_run(folder)
        assert kept.config["algorithm"]["name"] == "scaffold"
        assert kept.config["algorithm"]["local_lr"] == best.config["algorithm.local_lr"]
        alone = runs.run({**kept.config}, [], tmp_path / "alone").folder
        assert model(Path(folder)) == model(alone)


CROWDED = """
import json
import sys

from fedray.backends.ray.environment import prepare

prepare("local")
from fedray.backends.ray.cluster import connected
from fedray.errors import ConfigError
from fedray.tune import tune

values, out = json.loads(sys.argv[1]), sys.argv[2]
if __name__ == "__main__":
    with connected("local", 0.25, num_cpus=4):
        try:
            tune(values, ["backend.num_workers=4"], out + "-large")
        except ConfigError as error:
            print(error)
        found = tune(values, [], out)
    print(json.dumps([[o.error, o.final.get("round"), str(o.trial.folder)] for o in found.outcomes]))
"""


@pytest.mark.slow
def test_more_trials_than_fit_with_workers_of_their_own_do_not_wait_for_each_other(tmp_path):
    backend = {"name": "ray", "num_workers": 2}
    section = {"space": {"seed": {"grid": [0, 1, 2]}}, "trials": 1}
    values = {**VALUES, "rounds": 3, "backend": backend, "tune": section}
    done = subprocess.run(
        [sys.executable, "-c", CROWDED, json.dumps(values), str(tmp_path / "search")],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, *_, printed = done.stdout.strip().splitlines()
    assert "a trial asks for 5 CPUs (5 processes, up to 1 each); the cluster has 4: lower tune.num_cpus" in refused
    found = json.loads(printed)
    assert [(error, round) for error, round, _ in found] == [("", 3)] * 3
    alone = runs.run({**values, "backend": "serial"}, ["seed=2"], tmp_path / "alone").folder
    assert model(Path(found[2][2])) == model(alone)
