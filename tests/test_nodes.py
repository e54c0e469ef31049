"""Workers on a cluster of several nodes, which come and go."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fedray.backends.worker import Costs, Speeds, balance, learn

DEADLINE = 400  # seconds for all that happens on the cluster


@pytest.fixture(scope="module")
def seen() -> dict:
    """What happens on a cluster; it has a process of its own, for this one has a Ray already."""
    script = Path(__file__).with_name("nodes_that_come_and_go.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_workers_are_spread_over_the_gpus_of_two_nodes(seen):
    places = seen["spread"]
    assert len({(node, str(gpus)) for node, gpus in places}) == 4
    assert len({node for node, _ in places}) == 2


@pytest.mark.slow
def test_workers_are_packed_onto_one_node(seen):
    assert len({node for node, _ in seen["packed"]}) == 1


@pytest.mark.slow
def test_workers_go_to_the_nodes_with_their_labels(seen):
    assert [node for node, _ in seen["labelled"]] == [seen["labelled_node"]] * 2


@pytest.mark.slow
def test_an_evaluation_on_nodes_is_the_same(seen):
    assert seen["same_evaluation"]


@pytest.mark.slow
def test_a_node_lost_in_mid_round_changes_nothing(seen):
    """Its workers' shares go to the others, though nowhere is room for new workers."""
    assert seen["after_the_loss"] == seen["undisturbed"]
    assert (seen["before"], seen["left"]) == (8, 4)


@pytest.mark.slow
def test_more_workers_join_when_nodes_do(seen):
    assert seen["joined"] == 12
    assert seen["after_the_nodes"] == seen["undisturbed"]


@pytest.mark.slow
def test_what_clients_kept_on_a_lost_node_is_not_their_fault(seen):
    """It is told apart from a client that takes its worker down, so that the driver goes back to the checkpoint."""
    assert seen["lost_states"] == "ObjectLostError"


@pytest.mark.slow
def test_enough_workers_begin_and_the_others_may_come(seen):
    assert 2 <= seen["begun_with"] <= 8


@pytest.mark.slow
def test_relative_paths_are_those_of_the_command(seen):
    """Whatever the folder was that the cluster was started in."""
    assert {"model.safetensors", "metrics.jsonl", "report.html"} <= set(seen["files"])


def test_faster_workers_are_given_more():
    speeds = Speeds()
    for _ in range(20):
        speeds.learn({"slow": (10.0, 10.0), "fast": (30.0, 10.0), "new": (0.0, 0.0)})
    slow, fast, new = speeds.of(["slow", "fast", "new"])
    assert fast / slow == pytest.approx(3, rel=0.02)
    assert new == 1
    shares = balance([[client(i)] for i in range(40)], 2, Costs(), [slow, fast])
    assert [len(share) for share in shares] == [10, 30]


def test_a_worker_that_had_one_bad_moment_is_given_work_again():
    speeds = Speeds()
    speeds.learn({"a": (10.0, 1.0), "b": (10.0, 100.0)})  # it warmed up
    assert speeds.of(["a", "b"]) == [1.0, 1.0]
    for _ in range(3):
        speeds.learn({"a": (10.0, 1.0), "b": (10.0, 100.0)})
    cut = [[client(0)], [client(1)]]
    assert balance(cut, 2, Costs(), speeds.of(["a", "b"])) == [cut, []]
    for _ in range(8):  # where it has nothing to do, nothing can be known of it
        speeds.learn({"a": (20.0, 2.0)})
    assert balance(cut, 2, Costs(), speeds.of(["a", "b"])) == [[cut[0]], [cut[1]]]


def test_workers_that_are_equal_stay_so_while_the_costs_are_learnt():
    costs, speeds = Costs(), Speeds()
    cut = [[client(i)] for i in range(8)]
    for _ in range(4):
        shares = balance(cut, 2, costs, speeds.of(["a", "b"]))
        assert [len(share) for share in shares] == [4, 4]
        learn(costs, speeds, [(worker, share, [0.1] * 4) for worker, share in zip("ab", shares, strict=True)])


def test_speeds_that_differ_no_more_than_equal_machines_do_leave_the_balance_alone():
    speeds = Speeds()
    speeds.learn({"a": (10.0, 10.0), "b": (10.0, 9.0)})
    speeds.learn({"a": (10.0, 0.001), "b": (10.0, 0.01)})  # too short to say anything
    assert speeds.of(["a", "b"]) == [1.0, 1.0]


def client(id):
    from fedray.algorithm import Client

    return Client(id, seed=id)
