"""Whatever ends a run, going on with it comes to the same bytes; and what must not go on is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serial_runs import CONFIG, measured, model, undisturbed, without_page

import fedray
from fedray import checkpoint, cli, runs
from fedray.errors import ConfigError, DataError
from fedray.runs import Interrupted, resume, run

DEADLINE = 120  # seconds for a process to get somewhere


@pytest.fixture(autouse=True)
def page_of_no_interest() -> Iterator[None]:
    with without_page():
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    return undisturbed(tmp_path_factory.mktemp("unbroken") / "run")


@contextmanager
def at_round(number: int, do: Any) -> Iterator[None]:
    """Call ``do`` when a round is shown to the user."""

    @contextmanager
    def progress(*_: Any) -> Iterator[Any]:
        yield lambda record: do() if record["round"] == number else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "progress", progress)
        yield


def interrupt(times: int = 1, number: int = signal.SIGINT) -> Any:
    def send() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    return send


def goes_on_to_the_bytes_of(unbroken: Path, folder: Path, *overrides: str) -> None:
    assert resume(folder, overrides).finished
    assert model(folder) == model(unbroken)
    assert measured(folder) == measured(unbroken)
    assert not list(folder.rglob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_an_interrupted_run_is_resumed_to_the_same_bytes(unbroken, tmp_path, capsys, number, at):
    folder = tmp_path / "a"
    with (
        at_round(at, interrupt(number=number)),
        pytest.raises(Interrupted, match=f"go on with: fedray resume {folder}"),
    ):
        run(CONFIG, out=folder)
    assert "stopping after this round; once more to stop at once" in capsys.readouterr().err
    assert [record["round"] for record in measured(folder)] == list(range(at + 1))
    assert checkpoint.newest_round(folder) == at
    assert (folder / "report.html").exists()
    assert not (folder / "model.safetensors").exists()
    goes_on_to_the_bytes_of(unbroken, folder)


def test_an_interruption_after_the_last_round_is_none(unbroken, tmp_path):
    with at_round(6, interrupt()):
        assert run(CONFIG, out=tmp_path / "a").finished
    assert model(tmp_path / "a") == model(unbroken)


def test_the_second_signal_stops_at_once(unbroken, tmp_path):
    folder = tmp_path / "a"
    with at_round(3, interrupt(times=2)), pytest.raises(Interrupted):
        run(CONFIG, out=folder)
    assert checkpoint.newest_round(folder) == 2
    goes_on_to_the_bytes_of(unbroken, folder)


def test_signals_are_handled_as_before_after_a_run(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with at_round(1, interrupt()), suppress(Interrupted):
        run(CONFIG, out=tmp_path / "a")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_can_be_interrupted_again_and_again(unbroken, tmp_path):
    folder = tmp_path / "a"
    for number in (1, 3, 4):
        with at_round(number, interrupt()), pytest.raises(Interrupted):
            (resume(folder) if folder.exists() else run(CONFIG, out=folder))
    goes_on_to_the_bytes_of(unbroken, folder)


def test_a_finished_run_goes_on_with_more_rounds(unbroken, tmp_path):
    folder = run(CONFIG, ["rounds=4"], tmp_path / "a").folder
    assert resume(folder, ["rounds=6"]).finished
    assert model(folder) == model(unbroken)
    assert measured(folder) == measured(unbroken)
    assert "rounds: 6" in (folder / "config.yaml").read_text()


def test_resuming_a_finished_run_changes_nothing(unbroken, tmp_path):
    folder = tmp_path / "a"
    shutil.copytree(unbroken, folder)
    (folder / "model.safetensors").unlink()  # as if it had been killed just before the end
    goes_on_to_the_bytes_of(unbroken, folder)
    assert (folder / "metrics.jsonl").read_text() == (unbroken / "metrics.jsonl").read_text()


def test_a_run_may_go_on_elsewhere(unbroken, tmp_path):
    folder = run(CONFIG, ["rounds=3"], tmp_path / "a").folder
    goes_on_to_the_bytes_of(unbroken, folder, "backend.num_shares=3", "rounds=6")


# damage


def test_a_run_that_fails_names_its_folder_and_can_go_on(unbroken, tmp_path, capsys, monkeypatch):
    """The disk is full when the fourth round's checkpoint is written, after its line in the metrics."""
    folder = tmp_path / "a"
    write = checkpoint.write

    def full(run: Path, round: int, *rest: Any) -> None:
        if round == 4:
            raise OSError(28, "No space left on device")
        write(run, round, *rest)

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(CONFIG, out=folder)
    assert (
        f"the run is in {folder}; once the cause is mended, go on with: fedray resume {folder}"
        in caught.value.__notes__
    )
    assert [record["round"] for record in measured(folder)][:5] == [0, 1, 2, 3, 4]
    assert checkpoint.newest_round(folder) == 2
    monkeypatch.setattr(checkpoint, "write", write)
    goes_on_to_the_bytes_of(unbroken, folder)


def partly(unbroken: Path, folder: Path, rounds: int) -> Path:
    """A run of which the last rounds are missing."""
    run(CONFIG, [f"rounds={rounds}", "keep_checkpoints=2"], folder)
    (folder / "model.safetensors").unlink()
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(f"rounds: {rounds}\n", "rounds: 6\n"))
    return folder


@pytest.mark.parametrize(
    "victim", ["checkpoints/000004/state.json", "checkpoints/000004/server.safetensors", "client_states/*-4.*"]
)
def test_a_damaged_checkpoint_costs_rounds_and_no_bytes(unbroken, tmp_path, caplog, victim):
    folder = partly(unbroken, tmp_path / "a", 4)
    [path, *_] = folder.glob(victim)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    goes_on_to_the_bytes_of(unbroken, folder)
    assert "000004 is damaged" in caplog.text
    caplog.clear()
    goes_on_to_the_bytes_of(unbroken, folder)
    assert "damaged" not in caplog.text, "what was damaged has been written anew"


def test_if_every_checkpoint_is_damaged_the_user_decides(unbroken, tmp_path, capsys):
    folder = partly(unbroken, tmp_path / "a", 4)
    for path in folder.glob("checkpoints/*/state.json"):
        path.write_text("{}")
    before = (folder / "metrics.jsonl").read_text()
    assert cli.main(["resume", str(folder)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    advice = "remove that folder to start from the first round"
    assert last == f"fedray: no checkpoint in {folder / 'checkpoints'} can be read; {advice}"
    assert (folder / "metrics.jsonl").read_text() == before
    shutil.rmtree(folder / "checkpoints")
    goes_on_to_the_bytes_of(unbroken, folder)


def test_a_last_line_that_a_crash_cut_off_is_no_harm(unbroken, tmp_path):
    folder = partly(unbroken, tmp_path / "a", 5)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-40])
    (folder / ".metrics.jsonl.part").write_text("what a kill left")
    (folder / ".evaluation.json.part").write_text("what a kill left")
    shutil.rmtree(folder / "checkpoints" / "000005")
    goes_on_to_the_bytes_of(unbroken, folder)


def test_a_run_without_a_checkpoint_starts_from_the_first_round(unbroken, tmp_path):
    folder = partly(unbroken, tmp_path / "a", 1)
    shutil.rmtree(folder / "checkpoints")
    goes_on_to_the_bytes_of(unbroken, folder)


# what may not be resumed


@pytest.mark.parametrize(
    "override", ["seed=4", "cohort=5", "algorithm.local_lr=1", "task.data.name=npz", "group=1", "roundss=3"]
)
def test_another_run_is_not_resumed(unbroken, override):
    with pytest.raises(ConfigError, match="would make it another run; only rounds, backend and trackers can change"):
        resume(unbroken, [override])


def test_rounds_that_are_done_stay_done(unbroken):
    with pytest.raises(ConfigError, match=r"rounds is 5; .* has already done 6, which stay done"):
        resume(unbroken, ["rounds=5"])
    assert "rounds: 6" in (unbroken / "config.yaml").read_text()


def test_a_mistaken_override_leaves_the_run_as_it_is(unbroken):
    before = (unbroken / "config.yaml").read_text()
    with pytest.raises(ConfigError, match="has no option"):
        resume(unbroken, ["backend.nonsense=1"])
    assert (unbroken / "config.yaml").read_text() == before


@pytest.mark.parametrize(("make", "why"), [(False, "there is no such folder"), (True, "it has no config.yaml")])
def test_only_a_run_folder_is_resumed(tmp_path, make, why):
    if make:
        (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=f"is no run folder: {why}; name a folder that `fedray run` has written"):
        resume(tmp_path / "a")


def changed_pixels(arrays: dict[str, np.ndarray]) -> None:
    arrays["x"][17] += 1


def changed_labels(arrays: dict[str, np.ndarray]) -> None:
    arrays["y"][:] = 1 - arrays["y"]


def fewer(arrays: dict[str, np.ndarray]) -> None:
    arrays.update({name: array[:-5] for name, array in arrays.items()})


@pytest.mark.parametrize("change", [changed_pixels, changed_labels, fewer])
def test_a_run_does_not_go_on_with_other_data(tmp_path, change):
    rng = np.random.default_rng(0)
    arrays = {"x": rng.normal(size=(60, 4)).astype(np.float32), "y": rng.integers(0, 2, 60)}
    np.savez(tmp_path / "data.npz", **arrays)
    data = {"name": "npz", "path": tmp_path / "data.npz"}
    task = {**CONFIG["task"], "data": data, "partition": {"name": "iid", "num_clients": 4}, "model": "softmax"}
    folder = run({**CONFIG, "task": task, "rounds": 2}, out=tmp_path / "a").folder
    assert resume(folder, ["rounds=3"]).finished
    change(arrays)
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=r"partition\.npz differs from the data as they are now; restore the data"):
        resume(folder, ["rounds=4"])
    assert "rounds: 3" in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda path: path.write_bytes(b"PK\3\4nonsense"), lambda path: path.write_bytes(b"")]
)
def test_without_knowing_who_held_what_a_run_does_not_go_on(unbroken, tmp_path, spoil):
    folder = shutil.copytree(unbroken, tmp_path / "a")
    spoil(folder / "partition.npz")
    with pytest.raises(DataError, match=r"partition\.npz (cannot be read|is corrupt)"):
        resume(folder, ["rounds=7"])


# processes

OWN = """
import os
import signal
from dataclasses import replace
from pathlib import Path

from fedray import Aggregator
from fedray.aggregators import mean


def waiting() -> Aggregator:
    '''A mean that waits in the middle of round 5 for a signal, in the first process that comes there.'''
    inner = mean()

    def accumulate(acc, client, result):
        if client.round == 5 and client.slot == 1 and not Path("there").exists():
            Path("there").write_text(str(os.getpid()))
        while Path("there").exists() and Path("there").read_text() == str(os.getpid()):
            signal.pause()
        return inner.accumulate(acc, client, result)

    return replace(inner, accumulate=accumulate)
"""


@contextmanager
def waiting_in_round_5(place: Path) -> Iterator[subprocess.Popen]:
    """A process of `fedray run` that stands in the middle of a round."""
    (place / "own_waiting.py").write_text(OWN)
    (place / "config.json").write_text(json.dumps({**CONFIG, "backend": "serial"}))  # JSON is YAML
    overrides = ["algorithm.aggregator=own_waiting.waiting"]
    command = [sys.executable, "-m", "fedray", "run", "config.json", "--out", "run", *overrides]
    path = os.pathsep.join([str(Path(fedray.__file__).parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.Popen(
        command, cwd=place, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + DEADLINE
        while not (place / "there").exists() or not (place / "there").read_text():
            assert time.monotonic() < deadline, "the run does not get on"
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.02)
                pytest.fail(f"the run ended: {process.communicate()}")
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_killed_process_is_resumed_to_the_same_bytes(unbroken, tmp_path, monkeypatch):
    with waiting_in_round_5(tmp_path) as process:
        process.kill()
        process.wait()
    folder = tmp_path / "run"
    assert [record["round"] for record in measured(folder)] == [0, 1, 2, 3, 4]
    monkeypatch.chdir(tmp_path)
    goes_on_to_the_bytes_of(unbroken, folder)


def test_ctrl_c_twice_stops_at_once_says_how_to_go_on_and_exits_with_130(unbroken, tmp_path, monkeypatch):
    with waiting_in_round_5(tmp_path) as process:
        process.send_signal(signal.SIGINT)
        line = ""
        while "stopping after this round; once more to stop at once" not in line:
            line = process.stderr.readline()
            assert line, "the run ended"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130
    assert err == "fedray: interrupted; go on with: fedray resume run\n"
    assert out == ""
    monkeypatch.chdir(tmp_path)
    goes_on_to_the_bytes_of(unbroken, Path("run"))


def test_ctrl_c_on_the_command_line_says_how_to_go_on(unbroken, tmp_path, capsys):
    folder = tmp_path / "a"
    config = shutil.copy(unbroken / "config.yaml", tmp_path / "mine.yaml")
    with at_round(3, interrupt()):
        assert cli.main(["run", str(config), "--out", str(folder)]) == 130
    assert capsys.readouterr().err.endswith(f"fedray: interrupted; go on with: fedray resume {folder}\n")
    assert cli.main(["resume", str(folder)]) == 0
    assert model(folder) == model(unbroken)
