"""What clients of PRISM keep (Adam's moments of the scores, the moving averages of the loss) outlives all deaths."""

import os
import shutil
import signal
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import command
from problems import assert_same_bits, generation_of_digits, initial
from serial_runs import measured, model, without_page
from test_ray import ray_backend
from test_ray_run import kill_a_worker_and_then_the_command

from fedray import checkpoint
from fedray.backends.serial import SerialBackend
from fedray.experiment import Experiment, plan
from fedray.learner import Learner
from fedray.rounds import rounds
from fedray.runs import resume, run
from fedray.sweep import sweep
from fedray.tasks.generation import _statistics


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, Any]:
    cache = str(tmp_path_factory.mktemp("features"))
    return {
        "rounds": 16,
        "cohort": 3,
        "evaluate_every": 4,
        "checkpoint_every": 2,
        "task": {
            **generation_of_digits(cache, {"name": "masked_resnet_generator", "width": 2, "latent": 4}, 120, 30, 5),
            "evaluated_masks": ["fresh", "fixed"],
        },
        "algorithm": {"name": "prism", "local_optimizer": "adam", "local_lr": 0.1, "local_steps": 2, "batch_size": 8},
        "backend": "serial",
    }


def kept_by(backend: Any) -> dict[int, Any]:
    return {client: (at, backend.fetch(kept)) for client, (at, kept) in backend.client_states.committed.items()}


def assert_all_is_kept(clients: dict[int, Any], num_clients: int) -> None:
    """Every client has gone on from where it was: as many steps of both optimisers as it took part in, of two each."""
    assert len(clients) == num_clients
    for _, state in clients.values():
        assert set(state["objective"]) >= {"mean", "var", "a", "b", "a_first", "a_second", "b_first", "b_second"}
        assert float(state["objective"]["steps"]) == float(state["moments"]["steps"]) >= 2
    assert max(float(state["moments"]["steps"]) for _, state in clients.values()) >= 4


def after(made: Experiment, backend: Any, num_rounds: int, kill_after: int = 0) -> Any:
    loop = rounds(
        made.algorithm, initial(made.task, made.algorithm), backend, made.population, made.cohort, made.sampler
    )
    for _ in range(num_rounds):
        finished = next(loop)
        if finished.number == kill_after:
            os.kill(backend.probe()[0]["pid"], signal.SIGKILL)  # its states must not die with it
    return finished.state, finished.metrics, kept_by(backend)


def dies_in_mid_round(made: Experiment, marker: Path) -> Experiment:
    """The same, but the first client to train in round 3 takes its worker down when it has trained."""

    class Deadly:
        def __init__(self, backend: Any) -> None:
            self.backend = backend

        def map_reduce(self, client_update: Any, *args: Any, **options: Any) -> Any:
            def update(learner: Learner, broadcast: Any, client: Any) -> Any:
                result = client_update(learner, broadcast, client)
                if client.round == 3 and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return self.backend.map_reduce(update, *args, **options)

    apply = made.algorithm.apply
    deadly = replace(made.algorithm, apply=lambda state, cohort, backend: apply(state, cohort, Deadly(backend)))
    return replace(made, algorithm=deadly)


@pytest.mark.usefixtures("ray_local")
def test_killed_workers_take_no_moments_and_no_averages_with_them(values, tmp_path):
    made = plan(values).experiment
    expected = after(made, SerialBackend(made.task), 5)
    assert_all_is_kept(expected[2], 5)
    backend = ray_backend(made.task, cohort=3, num_workers=2)
    marker = tmp_path / "died"
    try:
        found = after(dies_in_mid_round(made, marker), backend, 5, kill_after=1)
    finally:
        backend.close()
    assert marker.exists(), "nothing died in mid-round"
    assert_same_bits(found, expected)


def clients_of(folder: Path, values: dict[str, Any]) -> dict[int, Any]:
    made = plan(values).experiment
    return checkpoint.read_newest(folder, made.algorithm.init(Learner(made.task, "cpu").params())).clients


def samples(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


@pytest.fixture(scope="module")
def undisturbed(values, tmp_path_factory) -> Path:
    with without_page():
        return run(values, out=tmp_path_factory.mktemp("serial") / "run").folder


def assert_same_run(folder: Path, undisturbed: Path, values: dict[str, Any]) -> None:
    assert model(folder) == model(undisturbed)
    assert measured(folder) == measured(undisturbed)
    assert samples(folder) == samples(undisturbed)
    clients = clients_of(undisturbed, values)
    assert_all_is_kept(clients, 5)
    assert_same_bits(clients_of(folder, values), clients)


def test_a_run_whose_worker_and_then_whose_command_is_killed_resumes_to_the_same_clients(values, undisturbed, tmp_path):
    (tmp_path / "prism.yaml").write_text(yaml.safe_dump({**values, "backend": {"name": "ray", "num_workers": 2}}))
    process = command("run", tmp_path / "prism.yaml", "--out", tmp_path / "run")
    kill_a_worker_and_then_the_command(process, tmp_path / "run")
    done = checkpoint.newest_round(tmp_path / "run")
    assert 4 <= done < 16, "the run was over before it was killed"
    with without_page():
        assert resume(tmp_path / "run", ["backend={name: serial}"]).finished
    assert_same_run(tmp_path / "run", undisturbed, values)


def test_a_forgotten_state_would_be_seen(values, undisturbed, tmp_path):
    """These tests can fail: without what one client kept, the run comes to other bytes."""
    folder = tmp_path / "run"
    with without_page():
        run({**values, "rounds": 8}, out=folder)
        at = checkpoint.newest_round(folder)
        clients = clients_of(folder, {**values, "rounds": 8})
        made = plan(values).experiment
        state = checkpoint.read_newest(folder, made.algorithm.init(Learner(made.task, "cpu").params()))
        shutil.rmtree(folder / "checkpoints")
        forgotten = dict(list(clients.items())[1:])
        checkpoint.write(folder, at, state.state, forgotten, lambda kept: kept, state.progress, 2)
        assert resume(folder, ["rounds=16"]).finished
    assert model(folder) != model(undisturbed)


def test_trials_of_a_sweep_take_the_statistics_of_real_pictures_once(values, tmp_path, monkeypatch):
    taken = []

    def counted(maps: Any, learner: Learner, examples: Any) -> Any:
        taken.append(len(examples["x"]))
        return _statistics(maps, learner, examples)

    module = import_module("fedray.tasks.generation")  # its dotted name is a function's, too
    monkeypatch.setattr(module, "_statistics", counted)
    short = {**values, "rounds": 2, "cohort": 5}
    [_, second] = sweep(short, ["algorithm.mada=hamming,none"], tmp_path / "sweep")
    assert sum(taken) == 120  # each client's, once
    alone = run(short, ["algorithm.mada=none"], tmp_path / "alone").folder
    assert sum(taken) == 240
    assert second.error == ""
    assert model(second.trial.folder) == model(alone)
