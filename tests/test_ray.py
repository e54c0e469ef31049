"""The Ray backend computes what the serial one computes, to the bit, and survives what kills processes."""

import os
import signal
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from problems import BASIC, GANS, SYNTHETIC, outcome

from fedray.aggregators import collect, mean
from fedray.algorithm import Client, ClientResult, Pool
from fedray.algorithms import ALGORITHMS
from fedray.backends import on_ray
from fedray.backends.serial import SerialBackend
from fedray.errors import ClientError, ConfigError, DataError, FedrayError
from fedray.experiment import plan
from fedray.learner import Learner
from fedray.rounds import rounds
from fedray.trees import leaves

pytestmark = pytest.mark.usefixtures("ray_local")

CONFIG = {
    "rounds": 3,
    "cohort": 5,
    "task": {
        "name": "classification",
        "data": {"name": "digits"},
        "partition": {"name": "dirichlet", "num_clients": 12, "alpha": 0.5},
        "model": {"name": "mlp", "hidden": [8]},
    },
}


ELSEWHERE = ("fedlora", "prism", *GANS, *SYNTHETIC)  # see test_averaging.py, and below


def experiment(algorithm="fedavg", **changes):
    return plan({**CONFIG, "algorithm": {"name": algorithm, "batch_size": 8}, **changes}).experiment


def ray_backend(task, cohort=5, **resources):
    from fedray.backends.ray.backend import RayBackend
    from fedray.backends.ray.resources import Resources

    return RayBackend(task, cohort, Resources(**{"num_gpus": 0, **resources}))


@pytest.fixture(scope="module")
def ray_backends(ray_local):
    backends = {count: ray_backend(experiment().task, num_workers=count) for count in (1, 2, 3)}
    yield backends
    for backend in backends.values():
        backend.close()


def train(made, backend, num_rounds=3):
    backend.client_states.committed.clear()
    state = made.algorithm.init(Learner(made.task).params())
    loop = rounds(made.algorithm, state, backend, made.population, made.cohort, made.sampler)
    for _ in range(num_rounds):
        finished = next(loop)
    return finished


def bits(tree):
    return [leaf.view(torch.uint8).tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves(tree)]


def client_states(backend):
    return {client: bits(backend.fetch(handle)) for client, (_, handle) in backend.client_states.committed.items()}


@pytest.mark.parametrize("algorithm", [name for name in ALGORITHMS if name not in ELSEWHERE])
def test_any_number_of_workers_gives_the_bytes_of_the_serial_backend(algorithm, ray_backends):
    made = experiment(algorithm)
    serial = SerialBackend(made.task)
    expected = train(made, serial)
    for backend in ray_backends.values():
        found = train(made, backend)
        assert bits(vars(found.state)) == bits(vars(expected.state))
        assert found.metrics == expected.metrics
        assert client_states(backend) == client_states(serial)


@pytest.mark.parametrize("aggregator", ["median", "krum"])
def test_robust_aggregation_gives_the_bytes_of_the_serial_backend(aggregator, ray_backends):
    made = plan({**CONFIG, "algorithm": {"name": "fedavg", "aggregator": {"name": aggregator}}}).experiment
    expected = train(made, SerialBackend(made.task))
    for backend in ray_backends.values():
        assert bits(vars(train(made, backend).state)) == bits(vars(expected.state))


@pytest.mark.parametrize("exam", [exam for exam in BASIC if exam.algorithm in ("prism", *GANS, *SYNTHETIC)], ids=str)
def test_masks_gans_and_synthetic_data_from_any_number_of_workers_are_the_same(exam):
    states, metrics, _ = outcome(exam, exam.backend())
    backend = ray_backend(exam.task(), num_workers=2)
    try:
        found_states, found_metrics, _ = outcome(exam, backend)
    finally:
        backend.close()
    assert [bits(state.params) for state in found_states] == [bits(state.params) for state in states]
    assert found_metrics == metrics


def doubler(folder):
    """A maker of a function that doubles, and kills its process the first time that it meets 3."""

    def make(device):
        Path(folder, f"made-{os.getpid()}").touch()

        def double(item):
            if item == 3 and not Path(folder, "died").exists():
                Path(folder, "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return 2 * item, device

        return double

    return make


@pytest.mark.parametrize("pool", [None, Pool(2, num_cpus=0)])
def test_what_a_pool_has_in_hand_survives_its_death(pool, ray_backends, tmp_path):
    found = dict(ray_backends[2].stream(doubler(str(tmp_path)), range(8), pool))
    assert found == {item: (2 * item, "cpu") for item in range(8)}
    assert (tmp_path / "died").exists(), "nothing died"
    assert len(list(tmp_path.glob("made-*"))) <= 3  # once for each process, however many items it did


def test_on_a_busy_cluster_a_pool_takes_what_is_free(tmp_path):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    free = int(ray.available_resources()["CPU"])
    held = placement_group([{"CPU": 1}] * (free - 1))
    ray.get(held.ready())
    try:
        found = dict(on_ray(num_gpus=0, address="auto").stream(doubler(str(tmp_path)), range(3), None))
    finally:
        remove_placement_group(held)
    assert found == {item: (2 * item, "cpu") for item in range(3)}


def test_what_goes_wrong_in_a_pool_is_what_the_caller_meets(ray_backends):
    def make(device):
        raise DataError("there is no such model")

    with pytest.raises(DataError, match="there is no such model"):
        list(ray_backends[1].stream(make, [1]))
    with pytest.raises(ConfigError, match=r"1000 actors with 1 CPUs each do not fit beside the workers"):
        list(ray_backends[1].stream(make, [1], Pool(1000)))


def cohort_of(*ids):
    return [Client(id, seed=id, slot=slot) for slot, id in enumerate(ids)]


def die_once(learner, marker, client):
    """Client 3 takes its worker down the first time that it runs."""
    if client.id == 3 and not Path(marker["path"]).exists():
        Path(marker["path"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return ClientResult({"id": float(client.id)}, 1, {"loss": float(client.id)})


def test_a_worker_killed_in_mid_round_changes_nothing(ray_backends, tmp_path):
    cohort = cohort_of(*range(8))
    for count, backend in ray_backends.items():
        marker = {"path": str(tmp_path / f"died-{count}")}
        result, metrics = backend.map_reduce(die_once, marker, cohort, mean())
        assert Path(marker["path"]).exists(), "nothing died"
        assert (result, metrics) == ({"id": 3.5}, {"loss": 3.5})


def test_over_a_standing_line_and_by_calls_rounds_have_the_same_bytes(monkeypatch, tmp_path):
    made = experiment()
    expected = train(made, SerialBackend(made.task))

    def is_expected(backend):
        found = train(made, backend)
        return bits(vars(found.state)) == bits(vars(expected.state)) and found.metrics == expected.metrics

    with closing(ray_backend(made.task, num_workers=2)) as backend:
        assert is_expected(backend)
        first = backend.line
        assert first is not None
        with monkeypatch.context() as without:
            without.setattr("fedray.backends.ray.backend._SMALL", 0)  # bytes, beyond which it is calls
            without.setattr(first, "ask", None)
            assert is_expected(backend)
        marker = {"path": str(tmp_path / "died")}
        assert backend.map_reduce(die_once, marker, cohort_of(*range(8)), mean())[0] == {"id": 3.5}
        assert (backend.line, backend.deaths) == (None, 1)  # it ends with a worker
        backend.probe()
        assert is_expected(backend)
        assert backend.line not in (None, first)  # and there is another one once all are up


def test_what_a_round_that_failed_left_on_the_line_is_not_met_by_the_next(ray_backends):
    def merge(left, right):
        raise RuntimeError("no")

    backend, cohort = ray_backends[2], cohort_of(*range(8))
    backend.probe()
    marker = {"path": os.devnull}  # nobody dies
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            backend.map_reduce(die_once, marker, cohort, replace(mean(), merge=merge))
        assert backend.line is not None
        assert backend.map_reduce(die_once, marker, cohort, mean()) == ({"id": 3.5}, {"loss": 3.5})


def test_scaffold_survives_killed_workers_with_the_same_bytes_and_client_states(ray_backends):
    made = experiment("scaffold")
    serial, backend = SerialBackend(made.task), ray_backends[2]
    expected = train(made, serial, num_rounds=4)
    backend.client_states.committed.clear()
    state = made.algorithm.init(Learner(made.task).params())
    loop = rounds(made.algorithm, state, backend, made.population, made.cohort, made.sampler)
    for _ in range(4):
        finished = next(loop)
        os.kill(backend.probe()[0]["pid"], signal.SIGKILL)  # its states must not die with it
    assert bits(vars(finished.state)) == bits(vars(expected.state))
    assert client_states(backend) == client_states(serial)


def always_die(learner, broadcast, client):
    if client.id == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return ClientResult({"id": float(client.id)}, 1)


def test_a_client_that_always_kills_its_worker_is_named(ray_backends):
    with pytest.raises(ClientError, match=r"client 3 failed in round 1:\nit took its worker down \d times"):
        ray_backends[2].map_reduce(always_die, None, cohort_of(*range(6)), collect())


def test_a_client_that_kills_workers_can_be_dropped():
    backend = ray_backend(experiment().task, num_workers=2, on_client_error="drop")
    result, metrics = backend.map_reduce(always_die, None, cohort_of(*range(6)), collect())
    backend.close()
    assert [update["id"] for update in result] == [0, 1, 2, 4, 5]
    assert metrics["clients_failed"] == 1


def hang(learner, marker, client):
    """Client 3 does not come back, if there is a marker only the first time."""
    if client.id == 3 and not (marker and Path(marker).exists()):
        if marker:
            Path(marker).touch()
        while True:
            pass
    return ClientResult({"id": float(client.id)}, 1)


def test_a_client_that_hangs_once_is_ended_by_its_deadline_and_tried_again(tmp_path):
    backend = ray_backend(experiment().task, num_workers=2, client_timeout=1.0)
    result, _ = backend.map_reduce(hang, str(tmp_path / "hung"), cohort_of(*range(4)), mean())
    backend.close()
    assert (tmp_path / "hung").exists(), "nobody hung"
    assert result == {"id": 1.5}


def test_a_client_that_always_hangs_is_dropped_and_the_reason_is_kept():
    backend = ray_backend(experiment().task, num_workers=2, client_timeout=0.5, on_client_error="drop")
    result, metrics = backend.map_reduce(hang, None, cohort_of(*range(4)), collect())
    backend.close()
    assert [update["id"] for update in result] == [0, 1, 2]
    assert metrics["clients_failed"] == 1
    [lost] = backend.dropped
    assert lost.client == 3
    assert lost.why.startswith("it did not end within client_timeout = 0.5 s 3 times")


def fail(learner, broadcast, client):
    raise RuntimeError(f"no data for {client.id}")


def test_a_client_that_raises_shows_its_own_traceback(ray_backends):
    with pytest.raises(ClientError, match=r"(?s)client 2 failed in round 1.*in fail.*RuntimeError: no data for 2"):
        ray_backends[2].map_reduce(fail, None, cohort_of(2), mean())


def write_into_the_broadcast(learner, broadcast, client):
    broadcast["w"].add_(1)
    return ClientResult({}, 1)


def test_writing_into_the_shared_broadcast_is_caught(ray_backends):
    with pytest.raises(ClientError, match="client 0 wrote into the broadcast"):
        ray_backends[1].map_reduce(write_into_the_broadcast, {"w": torch.zeros(3)}, cohort_of(0), mean())


def test_modules_that_nobody_installed_travel_by_value_and_those_of_any_folder_of_pip_do_not(tmp_path, monkeypatch):
    import ray

    from fedray.backends.ray.cluster import carry_users_modules

    for folder in ("mine", "pips"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}_only.py").write_text("def answer():\n    return 42\n")
        monkeypatch.syspath_prepend(tmp_path / folder)
    (tmp_path / "pips" / "pips_only-1.0.dist-info").mkdir()
    mine, pips = (__import__(name) for name in ("mine_only", "pips_only"))
    carry_users_modules()
    sent = ray.cloudpickle.dumps(mine.answer), ray.cloudpickle.dumps(pips.answer)
    for name in ("mine_only", "pips_only"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if not entry.startswith(str(tmp_path))])
    assert ray.cloudpickle.loads(sent[0])() == 42
    with pytest.raises(ModuleNotFoundError, match="pips_only"):
        ray.cloudpickle.loads(sent[1])


def test_map_keeps_the_order_of_its_items(ray_backends):
    assert ray_backends[3].map(lambda learner, item: item**2, range(10)) == [i**2 for i in range(10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_travel_unchanged(dtype, ray_backends):
    sent = torch.arange(6).reshape(2, 3).to(dtype)
    [received] = ray_backends[1].map(lambda learner, item: item.clone(), [sent])
    assert received.dtype == dtype
    assert torch.equal(received, sent)


def test_fractions_of_gpus_are_filled_by_workers():
    backend = ray_backend(experiment().task, num_workers=8, num_cpus=0.5, num_gpus=0.5)
    held = Counter(gpu for worker in backend.probe() for gpu in worker["gpus"])
    backend.close()
    assert held == {"0": 2, "1": 2, "2": 2, "3": 2} or held == {0: 2, 1: 2, 2: 2, 3: 2}


@pytest.mark.parametrize(
    ("wanted", "cluster", "expected"),
    [
        ({}, {"CPU": 8}, (8, 0.0)),
        ({}, {"CPU": 64}, (20, 0.0)),  # never more than clients
        ({}, {"CPU": 16, "GPU": 4}, (4, 1.0)),
        ({"num_gpus": 0.5}, {"CPU": 16, "GPU": 4}, (8, 0.5)),
        ({"num_gpus": 0}, {"CPU": 16, "GPU": 4}, (16, 0.0)),
        ({"num_cpus": 2.0}, {"CPU": 9}, (4, 0.0)),
        ({"clients_per_worker": 1, "num_cpus": 0.1}, {"CPU": 8}, (20, 0.0)),
        ({"clients_per_worker": 8}, {"CPU": 8}, (3, 0.0)),
        ({"num_workers": 3}, {"CPU": 8}, (3, 0.0)),
        ({"num_workers": 30, "min_workers": 1}, {"CPU": 8}, (30, 0.0)),  # the others join when nodes do
        ({"min_workers": 12}, {"CPU": 8}, (12, 0.0)),
    ],
)
def test_the_number_of_workers_follows_from_the_cluster(wanted, cluster, expected):
    from fedray.backends.ray.resources import Resources

    resolved = Resources(**wanted).resolve([cluster], cohort=20)
    assert (resolved.num_workers, resolved.num_gpus) == expected


def test_a_worker_needs_a_node_that_has_room_for_the_whole_of_it():
    from fedray.backends.ray.resources import Resources

    nodes = [{"CPU": 3.0}, {"CPU": 3.0}, {"memory": 1.0}]
    assert Resources(num_cpus=2.0).resolve(nodes, cohort=20).num_workers == 2
    with pytest.raises(ConfigError, match=r"3 workers with 2 CPUs .* \(at most 2\)"):
        Resources(num_workers=3, num_cpus=2.0).resolve(nodes, cohort=20)


def test_labels_that_no_node_has_say_so_at_once():
    with pytest.raises(ConfigError, match=r"do not fit into the nodes with zone=moon and their 0 CPUs and 0 GPUs"):
        ray_backend(experiment().task, num_workers=1, labels=("zone=moon",))


def test_an_actor_for_each_client(ray_backends):
    backend = ray_backend(experiment().task, clients_per_worker=1, num_cpus=0.1)
    pids = backend.map_reduce(
        lambda learner, _, client: ClientResult(os.getpid(), 1), None, cohort_of(*range(5)), collect()
    )
    backend.close()
    assert len(set(pids[0])) == 5


def test_workers_that_do_not_fit_say_so_at_once():
    with pytest.raises(ConfigError, match=r"99 workers with 1 CPUs and 0 GPUs each do not fit .* \(at most 16\)"):
        ray_backend(experiment().task, num_workers=99)


def test_workers_that_find_no_room_say_what_is_free():
    holder = ray_backend(experiment().task, num_workers=1, num_cpus=4.0, num_gpus=4)
    with pytest.raises(
        FedrayError,
        match=r"of 1 workers .* 0 started within 1 s; the cluster has 16 CPU, 4 GPU, of which free: .*0 GPU",
    ):
        ray_backend(experiment().task, num_workers=1, num_gpus=4, start_timeout=1.0)
    holder.close()
