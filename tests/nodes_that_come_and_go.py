"""A cluster of several nodes on this machine, and what workers do there; prints what was seen as JSON."""

import json
import os
import threading
import time
from pathlib import Path
from tempfile import mkdtemp

import psutil
import ray
import torch
from ray.cluster_utils import Cluster
from ray.exceptions import ObjectLostError

import fedray
from fedray.aggregators import mean
from fedray.algorithm import Client, ClientResult
from fedray.backends.ray.backend import RayBackend
from fedray.backends.ray.cluster import connected
from fedray.backends.ray.resources import Resources
from fedray.backends.serial import SerialBackend
from fedray.evaluation import evaluate
from fedray.experiment import plan
from fedray.learner import Learner

FAST_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
STORE = 2**27
MEETING = Path(mkdtemp())  # files by which this process and the workers meet

CONFIG = {
    "rounds": 1,
    "cohort": 4,
    "algorithm": "fedavg",
    "task": {
        "name": "classification",
        "data": "digits",
        "partition": {"name": "iid", "num_clients": 8},
        "model": "softmax",
    },
}
task = plan(CONFIG).experiment.task
cohort = [Client(i, seed=i, slot=i) for i in range(24)]


def places(backend):
    return [[worker["node"], worker["gpus"]] for worker in backend.probe()]


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def kill(node):
    """As if somebody had pulled its plug."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    for process in [*raylet.children(recursive=True), raylet]:
        if psutil.pid_exists(process.pid):
            process.kill()
    cluster.remove_node(node, allow_graceful=False)


def meet(learner, name, client):
    """Client 3 waits where it is told to, until it is told to go on."""
    if name and client.id == 3 and not (MEETING / f"{name}-go").exists():
        (MEETING / name).write_text(ray.get_runtime_context().get_node_id())
        wait((MEETING / f"{name}-go").exists)
    return ClientResult({"id": float(client.id)}, 1)


def keep(learner, broadcast, client):
    """More than Ray would send along with the call, so that it lies on the node."""
    return ClientResult({"id": float(client.id)}, 1, state={"kept": torch.zeros(100_000)})


def lose_a_node_while_client_3_is_there():
    wait((MEETING / "loss").exists)
    kill(next(node for node in nodes if node.node_id == (MEETING / "loss").read_text()))
    (MEETING / "loss-go").touch()


if __name__ == "__main__":  # doctest imports every module
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray would not start with more GPUs than it names
    seen = {}
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE, "_system_config": FAST_HEALTH},
    )
    nodes = [
        cluster.add_node(num_cpus=4, num_gpus=2, object_store_memory=STORE, labels={"zone": zone})
        for zone in ("a", "b")
    ]
    cluster.wait_for_nodes()
    with connected(cluster.address, None):
        backend = RayBackend(task, 4, Resources(placement="spread"))
        seen["spread"] = places(backend)
        params = Learner(task).params()
        seen["same_evaluation"] = evaluate(task, params, backend) == evaluate(task, params, SerialBackend(task))
        backend.close()

        backend = RayBackend(task, 4, Resources(num_workers=3, num_gpus=0))
        seen["packed"] = places(backend)
        backend.close()

        backend = RayBackend(task, 4, Resources(num_workers=2, num_gpus=0, placement="spread", labels=("zone=b",)))
        seen["labelled"] = places(backend)
        seen["labelled_node"] = nodes[1].node_id
        backend.close()

        backend = RayBackend(task, 20, Resources(num_workers=50, min_workers=2, num_gpus=0))
        seen["begun_with"] = backend.num_workers
        backend.close()

        backend = RayBackend(task, 20, Resources(num_gpus=0))
        seen["before"] = backend.num_workers
        seen["undisturbed"] = backend.map_reduce(meet, "", cohort, mean())
        helper = threading.Thread(target=lose_a_node_while_client_3_is_there)
        helper.start()
        seen["after_the_loss"] = backend.map_reduce(meet, "loss", cohort, mean())
        helper.join()
        backend.map_reduce(meet, "", cohort, mean())  # finds those who died after they had done their part
        seen["left"] = backend.num_workers

        nodes += [cluster.add_node(num_cpus=4, object_store_memory=STORE) for _ in range(2)]

        def all_are_up():
            seen["after_the_nodes"] = backend.map_reduce(meet, "", cohort, mean())
            return backend.num_workers == 12

        wait(all_are_up)
        seen["joined"] = backend.num_workers

        backend.map_reduce(keep, None, cohort, mean(), keeps_state=True)
        backend.client_states.commit()
        kill(nodes[-1])
        try:
            backend.map_reduce(keep, None, cohort, mean(), keeps_state=True)
        except ObjectLostError:
            seen["lost_states"] = "ObjectLostError"
        backend.close()

        os.chdir(MEETING)  # elsewhere than where the cluster was started
        fedray.run(CONFIG, ["backend={name: ray, num_workers: 2}"], "run")
        seen["files"] = sorted(path.name for path in (MEETING / "run").iterdir())
    cluster.shutdown()
    print(json.dumps(seen))
