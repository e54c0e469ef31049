"""Runs as jobs of a Ray cluster: one that is started here, with a token, on the loopback interface."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from fedray.checkpoint import newest_round

pytestmark = pytest.mark.slow

DEADLINE = 120  # seconds for a process to get somewhere
CONFIG = """\
rounds: 4
cohort: 4
task:
  name: classification
  data: digits
  partition: {name: iid, num_clients: 8}
  model: {name: mlp, hidden: [8]}
algorithm: {name: mine.my_fedavg, batch_size: 64}
checkpoint_every: 2
"""
MINE = """\
import helpers
import fedray
from fedray.algorithms.fedavg import fedavg
from fedray import LocalTraining

print("fedray is", fedray.__file__, "and the secret has", helpers.LENGTH, "letters", flush=True)


def my_fedavg(*, local: LocalTraining):
    return fedavg(local=local)
"""
HELPERS = "import os\nLENGTH = len(os.environ.get('MY_SECRET', ''))\n"
SECRET = "hush-hush-hush"


@dataclass(frozen=True)
class Cluster:
    """A cluster, and how to talk to it as a user does."""

    address: str
    token: str
    folder: Path
    head: int  # its process
    gcs: int  # the port that nodes join at
    environment: dict[str, str]  # of the processes of a node

    def fedray(self, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the folder of the user's files."""
        process = self.begin(*arguments, **more)
        out, err = process.communicate(timeout=DEADLINE)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def begin(self, *arguments: object, token: str | None = None, address: bool = True, **more: str):
        """Start one."""
        ours = ("RAY_AUTH", "RAY_API", "RAY_ADDRESS")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        environment |= {"RAY_AUTH_TOKEN": self.token if token is None else token, **more}
        environment |= {"RAY_API_SERVER_ADDRESS": self.address} if address else {}
        if not environment["RAY_AUTH_TOKEN"]:
            del environment["RAY_AUTH_TOKEN"]
        return subprocess.Popen(
            [sys.executable, "-m", "fedray", *map(str, arguments)],
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def free_port() -> int:
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return asked.getsockname()[1]


def until(condition: Callable[[], bool], problem: Callable[[], str]) -> None:
    deadline, pause = time.monotonic() + DEADLINE, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, problem()
        pause.wait(0.1)


def listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    scratch = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))  # sockets have short names
    port, token = free_port(), secrets.token_hex(32)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the loopback interface only
        "RAY_TMPDIR": str(scratch),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]]),
    }
    gcs = free_port()
    ports = [f"--{name}={free_port()}" for name in ("ray-client-server-port", "dashboard-agent-listen-port")]
    ports.append(f"--port={gcs}")
    options = ["--head", "--block", "--num-cpus=4", f"--object-store-memory={200 * 2**20}", f"--temp-dir={scratch}"]
    options += ["--node-ip-address=127.0.0.2", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", *ports]
    with (scratch / "log").open("w") as log:
        head = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", *options],
            env=environment,
            cwd=scratch,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            until(lambda: listens(port) or head.poll() is not None, lambda: (scratch / "log").read_text())
            assert head.poll() is None, (scratch / "log").read_text()
            folder = tmp_path_factory.mktemp("user")
            for name, text in (("run.yaml", CONFIG), ("mine.py", MINE), ("helpers.py", HELPERS)):
                (folder / name).write_text(text)
            yield Cluster(f"http://127.0.0.1:{port}", token, folder, head.pid, gcs, environment)
        finally:
            family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
            head.terminate()
            _, alive = psutil.wait_procs(family, timeout=20)
            for process in alive:
                process.kill()
            with suppress(ProcessLookupError):
                os.killpg(head.pid, signal.SIGKILL)
            head.wait(DEADLINE)
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def another_node(cluster: Cluster) -> Iterator[subprocess.Popen]:
    """A second node, of which only its death is gentle if nobody has killed it before."""
    options = [f"--address=127.0.0.2:{cluster.gcs}", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.3"]
    options += [f"--dashboard-agent-listen-port={free_port()}", f"--object-store-memory={100 * 2**20}"]
    scratch = Path(
        tempfile.mkdtemp(prefix="fr-", dir="/tmp")
    )  # two nodes of one machine would clear up each other's files
    options.append(f"--temp-dir={scratch}")
    with (cluster.folder / "node.log").open("w") as log:
        node = subprocess.Popen(
            [Path(sys.executable).with_name("ray"), "start", *options],
            env={**cluster.environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},  # which, it says, can have no nodes
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    text = (cluster.folder / "node.log").read_text
    try:
        until(lambda: "Ray runtime started" in text(), text)
        yield node
    finally:
        pull_the_plug(node)
        shutil.rmtree(scratch, ignore_errors=True)


def pull_the_plug(node: subprocess.Popen) -> None:
    family = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.kill()
    node.wait(DEADLINE)


def workers_below(pid: int) -> list[psutil.Process]:
    """The worker actors of a node."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::WorkerActor") else []
    return found


@dataclass(frozen=True)
class Submitted:
    """A command that submitted a job."""

    id: str
    out: str
    err: str


def submit(cluster: Cluster, *arguments: object, **more: str) -> Submitted:
    done = cluster.fedray("submit", *arguments, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    [id] = re.findall(r"^job: (\S+)$", done.stdout, re.MULTILINE)
    return Submitted(id, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def followed(cluster: Cluster) -> Submitted:
    """A job that has ended, followed from its submission."""
    out = f"file://{cluster.folder}/out"
    return submit(cluster, "run.yaml", "seed=3", "--out", out, "--env", "MY_SECRET", "--follow", MY_SECRET=SECRET)


def test_a_followed_job_shows_what_travels_and_every_round(cluster, followed):
    name = re.escape(cluster.folder.name)
    assert re.fullmatch(rf"{name}-\d{{8}}-\d{{6}}-[0-9a-f]{{4}}", followed.id)
    assert re.search(r"^sent: config.yaml, helpers.py, mine.py, fedray \S+$", followed.out, re.MULTILINE)
    assert [int(number) for number in re.findall(r"^round +(\d+)/4 ", followed.out, re.MULTILINE)] == [0, 1, 2, 3, 4]
    assert re.search(r"^report: file://.*/out/report.html$", followed.out, re.MULTILINE)


def test_a_job_computes_with_the_fedray_that_was_sent_and_knows_the_secret(followed):
    [there] = re.findall(rf"fedray is (\S+) and the secret has {len(SECRET)} letters", followed.out)[1:]
    assert "py_modules_files" in there
    assert SECRET not in followed.out + followed.err


def test_the_run_folder_is_that_of_the_same_run_here_and_holds_no_secret(cluster, followed):
    there, here = cluster.folder / "out", cluster.folder / "here"
    done = cluster.fedray("run", "run.yaml", "seed=3", "backend=serial", "--out", here)
    assert done.returncode == 0, done.stderr
    assert (there / "model.safetensors").read_bytes() == (here / "model.safetensors").read_bytes()
    files = [path for path in there.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.yaml", "state.json", "report.html"}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert json.loads((there / "environment.json").read_text())["versions"]["fedray"] == version("fedray")


def test_a_job_whose_worker_and_node_are_killed_leaves_the_bytes_of_the_same_run_here(cluster):
    there, options = cluster.folder / "hurt", ["seed=5", "rounds=120", "evaluate_every=40", "checkpoint_every=10"]
    options.append("algorithm.local_epochs=20")  # so that there is time to do something to it
    with another_node(cluster) as node:
        spread = "backend={num_workers: 6, placement: spread}"  # four CPUs here, two there
        following = cluster.begin("submit", "run.yaml", *options, spread, "--out", f"file://{there}", "--follow")

        def logs() -> str:
            following.terminate()
            return "".join(following.communicate())

        until(lambda: newest_round(there) >= 20 or following.poll() is not None, logs)
        assert workers_below(node.pid), logs()
        workers_below(cluster.head)[0].kill()
        until(lambda: newest_round(there) >= 50 or following.poll() is not None, logs)
        pull_the_plug(node)
        assert newest_round(there) < 120  # all that was in mid-run
        out, err = following.communicate(timeout=DEADLINE)
    assert following.returncode == 0, out + err
    assert re.search(r"^round +120/120 ", out, re.MULTILINE)
    fetched = cluster.fedray("fetch", f"file://{there}", cluster.folder / "fetched")
    assert fetched.returncode == 0, fetched.stderr
    here = cluster.fedray("run", "run.yaml", *options, "backend=serial", "--out", cluster.folder / "unhurt")
    assert here.returncode == 0, here.stderr
    for name in ("model.safetensors", "report.html"):
        assert (cluster.folder / "fetched" / name).is_file()
    models = [cluster.folder / name / "model.safetensors" for name in ("fetched", "unhurt")]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_jobs_are_listed_with_their_state_and_place(cluster, followed):
    listed = cluster.fedray("jobs").stdout
    assert re.search(rf"^{followed.id} +SUCCEEDED +\S+ \S+ +\S+ +file://{cluster.folder}/out$", listed, re.MULTILINE)
    state = cluster.fedray("jobs", "status", followed.id).stdout
    assert state == f"SUCCEEDED (exit code 0): Job finished successfully.\nrun folder: file://{cluster.folder}/out\n"
    assert "round 4/4" in cluster.fedray("jobs", "logs", followed.id).stdout


def test_a_stopped_job_writes_a_checkpoint_from_which_another_goes_on(cluster):
    there = cluster.folder / "long"
    options = ["rounds=100000", "evaluate_every=0", "--entrypoint-cpus", "1", "--out", f"file://{there}"]
    job = submit(cluster, "run.yaml", *options)
    assert f"follow it with: fedray jobs logs {job.id} --follow" in job.out
    until(lambda: newest_round(there) > 0, lambda: cluster.fedray("jobs", "logs", job.id).stdout)
    stopped = cluster.fedray("jobs", "stop", job.id)
    assert (stopped.returncode, stopped.stdout) == (0, "STOPPED\n"), stopped.stderr
    assert "stopping after this round" in cluster.fedray("jobs", "logs", job.id).stdout
    again = cluster.fedray("jobs", "stop", job.id)
    assert again.stdout == "STOPPED\n"
    done = newest_round(there)
    resumed = submit(cluster, "--resume", f"file://{there}", f"rounds={done + 2}", "--follow")
    assert re.search(rf"^round +{done + 2}/{done + 2} ", resumed.out, re.MULTILINE)
    assert (there / "model.safetensors").is_file()


def test_a_job_that_finds_no_node_for_its_driver_says_that_it_waits(cluster):
    job = submit(cluster, "run.yaml", "--label", "ray.io/node-group=nowhere", "--out", cluster.folder / "never")
    assert cluster.fedray("jobs", "status", job.id).stdout.startswith("PENDING: Job has not started yet. It may be")
    stopped = cluster.fedray("jobs", "stop", job.id)
    assert stopped.returncode == 1
    assert f"fedray: job {job.id} is still PENDING (Job has not started yet." in stopped.stderr


def test_a_job_that_fails_ends_the_command_that_follows_it_with_exit_1(cluster):
    done = cluster.fedray("submit", "run.yaml", "--out", "file:///proc/nowhere", "--follow")
    assert done.returncode == 1
    assert "file:///proc/nowhere cannot be written" in done.stdout
    assert re.search(r"^fedray: job \S+ is FAILED: .*exit code 2", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "token", "expected"),
    [
        (["jobs"], "wrong" * 5, "{address} does not accept this token; set RAY_AUTH_MODE=token, and the cluster's"),
        (["submit", "run.yaml"], "", "{address} asks for a token; set RAY_AUTH_MODE=token, and the cluster's token in"),
        (["jobs", "status", "nothing"], None, "there is no job 'nothing' at {address}; `fedray jobs` lists those"),
        (["jobs", "stop", "nothing"], None, "there is no job 'nothing' at {address}; `fedray jobs` lists those"),
        (["jobs", "logs", "nothing"], None, "there is no job 'nothing' at {address}; `fedray jobs` lists those"),
    ],
)
def test_what_the_cluster_refuses_is_one_line(cluster, arguments, token, expected):
    done = cluster.fedray(*arguments, token=token)
    assert done.returncode == 2
    [message] = [line for line in done.stderr.splitlines() if line.startswith("fedray: ")]
    assert expected.format(address=cluster.address) in message
    assert "Traceback" not in done.stderr
