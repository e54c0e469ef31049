"""What survives disk, and runs that were stopped, killed or damaged: each equals an unbroken one to the bit."""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from problems import BASIC, EXAMS, Exam, assert_same_bits, backend_for, exams, experiment, initial, reference

from fedray import checkpoint, training
from fedray.experiment import Experiment
from fedray.training import train as train_in


@exams(EXAMS)
def test_server_and_client_states_survive_disk(exam: Exam, tmp_path: Path):
    states, _, kept = reference(exam)
    checkpoint.write(tmp_path, 3, states[-1], kept.committed, lambda handle: handle, {"bytes_up_total": 7}, keep=1)
    found = checkpoint.read_newest(tmp_path, initial(exam.task(), exam.make()))
    assert found is not None
    assert (found.round, found.progress) == (3, {"bytes_up_total": 7})
    assert type(found.state) is type(states[-1])
    assert_same_bits(found.state, states[-1])
    assert_same_bits(found.clients, kept.committed)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics, but for the clock's."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in r.items() if key not in ("seconds", "phases")} for r in records]


def folder_of(made: Experiment, folder: Path, *stops: Callable[[], None]) -> Path:
    folder.mkdir()
    for stop in stops:
        stop()
    list(train_in(made, folder, backend_for(made, 2)))
    return folder


def assert_same_runs(a: Path, b: Path, exam: Exam) -> None:
    assert lines(a) == lines(b)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    left, right = (checkpoint.read_newest(folder, initial(exam.task(), exam.make())) for folder in (a, b))
    assert_same_bits(left, right)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Exam], Path]:
    root = tmp_path_factory.mktemp("unbroken")
    return functools.cache(lambda exam: folder_of(experiment(exam), root / str(exam)))


@exams([*BASIC, Exam("scaffold", "blobs", group=3), Exam("fedlora", "adapted", averaging="flora")])
@pytest.mark.parametrize("after", [0, 3])
def test_a_run_stopped_and_resumed_equals_an_unbroken_one(exam: Exam, after: int, tmp_path: Path, unbroken: Callable):
    made, asked = experiment(exam), itertools.count()
    folder = tmp_path / "run"

    def stopped() -> None:
        records = list(train_in(made, folder, backend_for(made), lambda: next(asked) >= after))
        assert [r["round"] for r in records] == list(range(after + 1))
        assert not (folder / "model.safetensors").exists()

    assert_same_runs(folder_of(made, folder, stopped), unbroken(exam), exam)


@exams(BASIC)
@pytest.mark.parametrize("after", [1, 3])  # checkpoints are of rounds 2 and 4: none yet, and an older one
def test_a_run_killed_between_checkpoints_equals_an_unbroken_one(
    exam: Exam, after: int, tmp_path: Path, unbroken: Callable
):
    made, folder = experiment(exam), tmp_path / "run"

    def killed() -> None:
        loop = train_in(made, folder, backend_for(made, 3))
        for _ in range(after + 1):
            next(loop)
        loop.close()
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"round": 4, "test_l')  # the line that it was writing

    assert_same_runs(folder_of(made, folder, killed), unbroken(exam), exam)


@pytest.mark.parametrize(
    ("moment", "call"),
    [
        *(("training._keep", call) for call in (1, 2, 3, 5)),
        *(("checkpoint.write", call) for call in (1, 2, 3)),
        *((f"checkpoint.{name}", call) for name in ("_write_tree", "_prune") for call in (1, 2, 7)),
        ("checkpoint.write_params", 1),
    ],
)
def test_a_run_killed_at_any_moment_of_keeping_its_results_equals_an_unbroken_one(
    moment: str, call: int, tmp_path: Path, unbroken: Callable, monkeypatch: pytest.MonkeyPatch
):
    exam = Exam("scaffold")
    made, folder, count = experiment(exam), tmp_path / "run", itertools.count(1)

    class Killed(BaseException):
        """So that nobody catches it."""

    def killed() -> None:
        module, name = {"training": training, "checkpoint": checkpoint}[moment.split(".")[0]], moment.split(".")[1]
        original = getattr(module, name)

        def die(*args: Any, **options: Any) -> Any:
            if next(count) == call:
                raise Killed
            return original(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, die)
            with contextlib.suppress(Killed):
                list(train_in(made, folder, backend_for(made, 3)))

    assert_same_runs(folder_of(made, folder, killed), unbroken(exam), exam)


@pytest.mark.parametrize(
    "damage", ["checkpoints/*3/server.safetensors", "checkpoints/*3/state.json", "client_states/*-3.safetensors"]
)
def test_a_damaged_newest_checkpoint_costs_rounds_and_nothing_else(
    damage: str, tmp_path: Path, unbroken: Callable, caplog: pytest.LogCaptureFixture
):
    exam = Exam("scaffold")
    made, folder = experiment(exam), tmp_path / "run"

    def damaged() -> None:
        asked = itertools.count()
        list(train_in(made, folder, backend_for(made), lambda: next(asked) >= 3))
        victim = next(folder.glob(damage))
        data = victim.read_bytes()
        victim.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    assert_same_runs(folder_of(made, folder, damaged), unbroken(exam), exam)
    assert "000003 is damaged" in caplog.text
    caplog.clear()
    found = checkpoint.read_newest(folder, initial(exam.task(), exam.make()))
    assert found is not None
    assert found.round == 5
    assert not caplog.text  # what was damaged is not among what the newer checkpoints consist of


def test_more_rounds_later_equal_more_rounds_at_once(tmp_path: Path):
    exam = Exam("scaffold")
    first = experiment(exam, 4, evaluate_every=0)
    folder = folder_of(first, tmp_path / "a")
    list(train_in(replace(first, rounds=6), folder, backend_for(first)))
    straight = folder_of(replace(first, rounds=6), tmp_path / "b")
    assert (folder / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
