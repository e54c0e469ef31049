"""Whole runs on Ray, from the command line: their bytes, and what is left when processes are killed."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from commands import command

import fedray
from fedray.report import read_metrics

OPTIONS = ["rounds=12", "cohort=4", "checkpoint_every=3", "algorithm.name=scaffold", "task.partition.num_clients=10"]
DEADLINE = 120  # seconds for a process to get somewhere


def wait_for_round(folder: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE
    while not any(record["round"] >= number for record in read_metrics(folder / "metrics.jsonl")):
        assert time.monotonic() < deadline, "the run does not get on"
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
            pytest.fail(f"the run ended: {process.stdout.read()}")


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def called(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:  # it has ended just now
        return ""


def only(processes, name):
    found = [p for p in processes if name in called(p)]
    assert found, f"no process {name} among {[called(p) for p in processes]}"
    return found


def kill_a_worker_and_then_the_command(process: subprocess.Popen, folder: Path) -> list[psutil.Process]:
    """In rounds 1 and 5 of a run; who is still alive a while afterwards."""
    wait_for_round(folder, 1, process)
    only(family(process), "WorkerActor")[0].send_signal(signal.SIGKILL)
    wait_for_round(folder, 5, process)
    # Ray's two agents notice for themselves, within minutes
    everybody = [member for member in family(process) if "Agent" not in called(member)]
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE)
    return psutil.wait_procs(everybody, timeout=DEADLINE)[1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The bytes of the model that the serial backend comes to."""
    folder = tmp_path_factory.mktemp("serial") / "run"
    fedray.run("quickstart", [*OPTIONS, "backend.name=serial"], folder)
    return (folder / "model.safetensors").read_bytes()


def test_a_run_goes_on_from_its_checkpoint_when_the_driver_actor_is_killed(undisturbed, tmp_path):
    process = command("run", "quickstart", *OPTIONS, "backend.num_workers=2", "--out", tmp_path / "run")
    for number in (4, 7):
        wait_for_round(tmp_path / "run", number, process)
        [driver] = only(family(process), "_Driver")
        driver.send_signal(signal.SIGKILL)
        psutil.wait_procs([driver], timeout=DEADLINE)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, output
    assert "the driver actor died; going on from the checkpoint of round" in output
    shown = [int(number) for number in re.findall(r"^round +(\d+)/12", output, re.MULTILINE)]
    assert shown == list(range(13))
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == undisturbed
    assert [record["round"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(13))


def test_killing_a_worker_and_the_command_ends_the_workers_and_leaves_a_run_that_resumes(undisturbed, tmp_path):
    process = command("run", "quickstart", *OPTIONS, "backend.num_workers=2", "--out", tmp_path / "run")
    assert not kill_a_worker_and_then_the_command(process, tmp_path / "run")
    run = fedray.resume(tmp_path / "run", ["backend={name: serial}"])
    assert run.finished
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == undisturbed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_a_run_on_ray_is_clean_and_resumable(number, undisturbed, tmp_path):
    process = command("run", "quickstart", *OPTIONS, "backend.num_workers=1", "--out", tmp_path / "run")
    wait_for_round(tmp_path / "run", 2, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal sends it: to everybody
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert f"go on with: fedray resume {tmp_path / 'run'}" in output
    assert fedray.resume(tmp_path / "run", ["backend={name: serial}"]).finished
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == undisturbed
