"""Break a cluster at random moments while runs are on it, and compare what they come to with undisturbed runs.

    python experiments/chaos/chaos.py --out results.json

It starts a Ray cluster of several nodes on this machine, runs `fedray run` on it, and kills what each scenario says.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from fedray.backends.ray.environment import prepare
from fedray.report import read_metrics

prepare("local")  # before anything imports ray

from ray.cluster_utils import Cluster  # noqa: E402

HERE = Path(__file__).parent
FAST_HEALTH = {  # a node's death is noticed within a second instead of fifteen
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
STUCK = 300.0  # seconds without a new round, after which a run has not survived

TRAINING = ["quickstart", "rounds=80", "cohort=8", "checkpoint_every=3", "task.partition.num_clients=16"]
TRAINING += ["algorithm={name: scaffold, local_lr: 0.05, local_epochs: 10, batch_size: 8}"]
HANGING = [*TRAINING[:-1], "algorithm={name: clients.hanging_fedavg, local_epochs: 10}", "backend.client_timeout=4"]
MORTAL = [*TRAINING[:-1], "algorithm={name: clients.mortal_fedavg, local_epochs: 10}"]
SYNTHESIS = [str(HERE / "synthesis.yaml"), "backend.num_workers=2"]


@dataclass
class Stage:
    """What a fault is given: the cluster, its chance, and the run."""

    cluster: Cluster
    chance: random.Random
    run: subprocess.Popen
    folder: Path
    nodes: list[Any] = field(default_factory=list)

    def processes(self, name: str) -> list[psutil.Process]:
        """Ray's processes of this name on any node."""
        found = []
        for node in self.nodes:
            with suppress(psutil.NoSuchProcess):
                found += [p for p in _raylet(node).children(recursive=True) if name in _command(p)]
        return found

    def kill(self, name: str) -> bool:
        """SIGKILL to one of them; False if there is none."""
        found = self.processes(name)
        with suppress(psutil.NoSuchProcess):
            if found:
                self.chance.choice(found).kill()
                return True
        return False


def _raylet(node: Any) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


def kill_worker(stage: Stage) -> bool:
    return stage.kill("ray::WorkerActor")


def kill_generator(stage: Stage) -> bool:
    return stage.kill("ray::WorkerActor.call")


def kill_driver(stage: Stage) -> bool:
    return stage.kill("ray::_Driver")


def kill_driver_in_checkpoint(stage: Stage) -> bool:
    began = time.monotonic()
    while time.monotonic() - began < 60 and stage.run.poll() is None:
        if list(stage.folder.glob("checkpoints/.*.part")) or list(stage.folder.glob("client_states/.*.part")):
            return stage.kill("ray::_Driver")
    return False


def kill_node(stage: Stage) -> bool:
    """A node is gone with everything on it; a new one joins later."""
    node = stage.chance.choice(stage.nodes[1:])  # the first one is the head, where the run's own process is
    stage.nodes.remove(node)
    with suppress(psutil.NoSuchProcess):
        for process in _raylet(node).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()
    stage.cluster.remove_node(node, allow_graceful=False)
    time.sleep(stage.chance.uniform(0, 3))
    stage.nodes.append(_add_node(stage.cluster))
    return True


def kill_command(stage: Stage) -> bool:
    stage.run.kill()
    return True


def fill_disk(stage: Stage) -> bool:
    """The run folder's file system is full for a while: until somebody makes room, and resumes."""
    ballast = stage.folder.parent / "ballast"
    with suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(b"x" * 65536)
            file.flush()
    stage.run.wait(STUCK)
    ballast.unlink()
    return True


def nothing(stage: Stage) -> bool:
    """The run's own clients are the fault."""
    return True


def _add_node(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20)


def kill_head(stage: Stage) -> bool:
    """The head dies with the whole cluster, and the run's process with it."""
    stage.run.kill()
    stage.cluster.shutdown()
    stage.nodes.clear()
    start_nodes(stage)
    return True


def start_nodes(stage: Stage) -> None:
    stage.cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20, "_system_config": FAST_HEALTH},
    )
    stage.nodes = [stage.cluster.head_node, *(_add_node(stage.cluster) for _ in range(2))]


@dataclass(frozen=True)
class Scenario:
    """What is broken while what runs."""

    what: str
    fault: Callable[[Stage], bool]
    options: list[str]
    times: int = 3
    small_disk: bool = False
    during: str | None = None  # a process that must be there for the fault to come


SCENARIOS = {
    "worker": Scenario("a client worker is killed", kill_worker, TRAINING),
    "memory": Scenario("a client's process is killed in mid-update, as for want of memory", nothing, MORTAL, times=0),
    "driver": Scenario("the driver actor is killed", kill_driver, TRAINING),
    "checkpoint": Scenario(
        "the driver actor is killed while it writes a checkpoint", kill_driver_in_checkpoint, TRAINING
    ),
    "node": Scenario("a node is lost, with workers and clients' states; a new one joins", kill_node, TRAINING),
    "generator": Scenario(
        "an actor of the generator pool is killed", kill_generator, SYNTHESIS, during="WorkerActor.call"
    ),
    "synthesis_node": Scenario(
        "a node is lost while data are generated", kill_node, SYNTHESIS, during="WorkerActor.call"
    ),
    "hang": Scenario("clients hang, and are ended by their deadline", nothing, HANGING, times=0),
    "command": Scenario("the command is killed", kill_command, TRAINING, times=2),
    "head": Scenario("the head dies, and with it the cluster", kill_head, TRAINING, times=1),
    "disk": Scenario("the disk is full", fill_disk, TRAINING, times=1, small_disk=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS), metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims (default: 0)")
    parser.add_argument("--out", type=Path, help="where to write the table as JSON")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])  # of all that is started
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.scenarios:
            rows.append(suffer(name, SCENARIOS[name], options.seed, Path(scratch)))
            print(json.dumps(rows[-1]), flush=True)
    print(f"\n{'scenario':16} injected survived resumed  bytes")
    for row in rows:
        equal = "equal" if row["equal"] else "DIFFERENT"
        print(f"{row['scenario']:16} {row['injected']:8} {row['survived']:8} {row['resumed']:7}  {equal}")
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")
    if not all(row["equal"] for row in rows):
        sys.exit(1)


def suffer(name: str, scenario: Scenario, seed: int, scratch: Path) -> dict[str, Any]:
    """Run a scenario: how often it was broken, how often the run went on by itself, and whether it is the same."""
    chance = random.Random(f"{seed} {name}")
    folder = scratch / name
    folder.mkdir()
    expected = undisturbed(scenario.options, scratch)
    chaos = patch.dict(os.environ, FEDRAY_CHAOS=str(folder), FEDRAY_CHAOS_SEED=str(seed))  # the nodes read it, too
    with chaos, disk(folder, scenario.small_disk), (scratch / f"{name}.log").open("w+") as log:
        stage = Stage(None, chance, None, folder / "run")
        start_nodes(stage)

        def begin(*arguments: str) -> None:
            command = [sys.executable, "-m", "fedray", *arguments, f"backend.address={stage.cluster.address}"]
            stage.run = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)

        begin("run", *scenario.options, "backend.placement=spread", "--out", str(stage.folder))
        injected = resumed = 0
        try:
            for _ in range(scenario.times):
                reached = wait_for(stage, scenario.during)
                time.sleep(chance.uniform(0, 2))
                if stage.run.poll() is not None or not scenario.fault(stage):
                    break
                injected += 1
                print(f"  {name}: {scenario.fault.__name__} after round {reached}", file=sys.stderr, flush=True)
                resumed += revive(stage, begin)
            while stage.run.poll() is None:
                wait_for(stage)
                resumed += revive(stage, begin)
        finally:
            if stage.run.poll() is None:
                stage.run.kill()
            stage.cluster.shutdown()
        log.seek(0)
        if scenario.fault is nothing:
            injected = len(list(folder.glob("died-*")))
        model = stage.folder / "model.safetensors"
        equal = model.exists() and model.read_bytes() == expected
        if not equal:
            print(log.read()[-3000:], file=sys.stderr)
    survived = injected - resumed
    counts = {"injected": injected, "survived": survived, "resumed": resumed}
    return {"scenario": name, "what": scenario.what, "seed": seed, **counts, "equal": equal}


def undisturbed(options: list[str], scratch: Path) -> bytes:
    """The model of the same run in one process, where nothing happens."""
    folder = scratch / re.sub(r"\W+", "_", " ".join(options))[-100:]
    if not folder.exists():
        own = [option for option in options if not option.startswith("backend")]
        command = [sys.executable, "-m", "fedray", "run", *own, "backend={name: serial}", "--out", str(folder)]
        subprocess.run(command, cwd=scratch, check=True, capture_output=True)
    return (folder / "model.safetensors").read_bytes()


def revive(stage: Stage, begin: Callable[..., None]) -> int:
    """Resume a run whose process has ended before its time; how often that was needed."""
    with suppress(subprocess.TimeoutExpired):
        stage.run.wait(1)
    if stage.run.poll() in (None, 0, 2):  # it runs, or is done, or was set up wrongly
        return 0
    begin("resume", str(stage.folder))
    return 1


def wait_for(stage: Stage, name: str | None = None) -> int:
    """Wait for the next round, or for a process of this name, or for the end of the run."""
    began, reached = time.monotonic(), progress(stage.folder)
    while stage.run.poll() is None and not (stage.processes(name) if name else progress(stage.folder) > reached):
        if time.monotonic() - began > STUCK:
            raise SystemExit(f"the run in {stage.folder} does not get on after round {reached}")
        time.sleep(0.05)
    return progress(stage.folder)


def progress(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return max((record["round"] for record in read_metrics(path)), default=-1) if path.exists() else -1


@contextmanager
def disk(folder: Path, small: bool) -> Iterator[None]:
    """A file system of 4 MB, if it is to be filled (mounting asks for root)."""
    if not small:
        yield
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


if __name__ == "__main__":
    main()
