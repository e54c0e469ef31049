"""Whole runs on Ray, from the command line: their bytes, and what is left when processes are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import fedray
from fedray.report import read_metrics

OPTIONS = ["rounds=12", "cohort=4", "checkpoint_every=3", "algorithm.name=scaffold", "task.partition.num_clients=10"]
DEADLINE = 120  # seconds for a process to get somewhere


def command(*arguments):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    return subprocess.Popen(
        [sys.executable, "-m", "fedray", *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_round(folder: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE
    while not any(record["round"] >= number for record in read_metrics(folder / "metrics.jsonl")):
        assert time.monotonic() < deadline, "the run does not get on"
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.01)
            pytest.fail(f"the run ended: {process.stdout.read()}")


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def only(processes, name):
    found = [p for p in processes if name in " ".join(p.cmdline())]
    assert found, f"no process {name} among {[p.cmdline() for p in processes]}"
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The bytes of the model that the serial backend comes to."""
    folder = tmp_path_factory.mktemp("serial") / "run"
    fedray.run("quickstart", [*OPTIONS, "backend.name=serial"], folder)
    return (folder / "model.safetensors").read_bytes()


def test_killing_the_driver_actor_leaves_a_run_that_resumes_to_the_same_bytes(undisturbed, tmp_path):
    process = command("run", "quickstart", *OPTIONS, "backend.num_workers=2", "--out", tmp_path / "run")
    wait_for_round(tmp_path / "run", 4, process)
    [driver] = only(family(process), "_Driver")
    driver.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert "the driver actor died" in output
    assert f"fedray resume {tmp_path / 'run'}" in output
    resumed = command("resume", tmp_path / "run")
    output, _ = resumed.communicate(timeout=DEADLINE)
    assert resumed.returncode == 0, output
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == undisturbed
    assert [record["round"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(13))


def test_killing_a_worker_and_the_command_ends_the_workers_and_leaves_a_run_that_resumes(undisturbed, tmp_path):
    process = command("run", "quickstart", *OPTIONS, "backend.num_workers=2", "--out", tmp_path / "run")
    wait_for_round(tmp_path / "run", 1, process)
    only(family(process), "_Worker")[0].send_signal(signal.SIGKILL)
    wait_for_round(tmp_path / "run", 5, process)
    # Ray's two agents notice for themselves, within minutes
    everybody = [member for member in family(process) if "Agent" not in " ".join(member.cmdline())]
    process.send_signal(signal.SIGKILL)
    process.wait(DEADLINE)
    _, alive = psutil.wait_procs(everybody, timeout=DEADLINE)
    assert not alive
    run = fedray.resume(tmp_path / "run", ["backend={name: serial}"])
    assert run.finished
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == undisturbed


def test_interrupting_a_run_on_ray_is_clean_and_resumable(undisturbed, tmp_path):
    process = command("run", "quickstart", *OPTIONS, "backend.num_workers=1", "--out", tmp_path / "run")
    wait_for_round(tmp_path / "run", 2, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to everybody
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert f"go on with: fedray resume {tmp_path / 'run'}" in output
    assert fedray.resume(tmp_path / "run", ["backend={name: serial}"]).finished
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == undisturbed


def test_workers_are_spread_over_the_gpus_of_two_nodes(tmp_path):
    script = tmp_path / "nodes.py"
    script.write_text(
        """
import json
from fedray.backends.ray.environment import prepare

prepare("local")
from ray.cluster_utils import Cluster

from fedray.backends.ray.backend import RayBackend, Resources
from fedray.backends.ray.cluster import connected
from fedray.evaluation import evaluate
from fedray.backends.serial import SerialBackend
from fedray.experiment import plan
from fedray.learner import Learner

task = plan({
    "rounds": 1,
    "cohort": 4,
    "algorithm": "fedavg",
    "task": {
        "name": "classification",
        "data": "digits",
        "partition": {"name": "iid", "num_clients": 8},
        "model": "softmax",
    },
}).experiment.task
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 2**27})
for _ in range(2):
    cluster.add_node(num_cpus=4, num_gpus=2, object_store_memory=2**27)
cluster.wait_for_nodes()
with connected(cluster.address, None):
    backend = RayBackend(task, 4, Resources(placement="spread"))
    params = Learner(task).params()
    same = evaluate(task, params, backend) == evaluate(task, params, SerialBackend(task))
    print(json.dumps({"same": same, "places": [[w["node"], w["gpus"]] for w in backend.workers]}))
cluster.shutdown()
"""
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["same"]
    assert len({(node, str(gpus)) for node, gpus in found["places"]}) == 4
    assert len({node for node, _ in found["places"]}) == 2
