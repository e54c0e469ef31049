"""Gradient diversity: its law, and that measuring it changes nothing else."""

import json

import pytest
import torch
from problems import SIZES, Exam, assert_same_bits, experiment, regression, train

from fedray.aggregators import collect, mean
from fedray.algorithm import Client, ClientResult
from fedray.backends.serial import SerialBackend
from fedray.ledger import Ledger, MeteredBackend
from fedray.training import train as train_in

COHORT = [Client(id, id, slot=id) for id in range(4)]


def measuring(backend):
    return MeteredBackend(backend, Ledger(), diversity=True)


def measured(updates, num_shares=1, aggregator=mean()):
    backend = measuring(SerialBackend(regression(), num_shares))
    update = lambda learner, broadcast, client: ClientResult(updates[client.id], 1.0 + client.id)  # noqa: E731
    return backend.map_reduce(update, None, COHORT, aggregator)


@pytest.mark.parametrize(
    ("updates", "diversity"),
    [
        ([torch.tensor([3.0, 4.0])] * 4, 1 / 4),
        (list(2.0 * torch.eye(4)), 1.0),
        ([torch.tensor([1.0, x]) for x in (1.0, 1.0, -1.0, -1.0)], 8 / 16),
    ],
    ids=["equal", "orthogonal", "partly cancelling"],
)
def test_equal_updates_have_one_over_n_and_orthogonal_ones_one(updates, diversity):
    for shares in (1, 2, 4):
        _, metrics = measured([{"w": update} for update in updates], shares)
        assert metrics["gradient_diversity"] == pytest.approx(diversity, rel=1e-9)


def test_updates_that_cancel_have_a_norm_but_no_diversity():
    _, metrics = measured([{"w": sign * torch.ones(4)} for sign in (1.0, -1.0, 1.0, -1.0)])
    assert metrics == pytest.approx({"update_norm": 2.0, "mean_update_norm": 0.0, "update_cosine": -1 / 3})
    assert measured([["a", "text"]] * 4, aggregator=collect()) == ([["a", "text"]] * 4, {})


def test_the_mean_cosine_is_that_of_all_pairs_whatever_their_lengths():
    updates = [torch.randn(7, generator=torch.Generator().manual_seed(n)) * 10.0**n for n in range(4)]
    units = [update / update.norm() for update in updates]
    wanted = sum(float(units[i] @ units[j]) for i in range(4) for j in range(4) if i != j) / 12
    for shares in (1, 3):
        _, metrics = measured([{"w": update} for update in updates], shares)
        assert metrics["update_cosine"] == pytest.approx(wanted, abs=1e-6)
        assert metrics["mean_update_norm"] == pytest.approx(float(sum(updates).norm()) / 4, rel=1e-6)
    _, still = measured([{"w": x} for x in (torch.ones(2), torch.zeros(2), 3 * torch.ones(2), torch.zeros(2))])
    assert still["update_cosine"] == pytest.approx(1.0)  # who did not move points nowhere
    _, alone = measured([{"w": x} for x in (torch.ones(2), *[torch.zeros(2)] * 3)])
    assert "update_cosine" not in alone


@pytest.mark.parametrize("exam", [Exam("fedavg"), Exam("scaffold"), Exam("fedavg", "blobs", group=3)], ids=str)
def test_measuring_changes_nothing_and_does_not_depend_on_the_shares(exam):
    plain = train(exam.task(), exam.make(), exam.backend())
    found = [train(exam.task(), exam.make(), measuring(exam.backend(shares))) for shares in (1, 3, 7)]
    for history in found:
        assert_same_bits(history[-1].state, plain[-1].state)
        assert [r.metrics for r in history] == [r.metrics for r in found[0]]
        assert all(1 / len(SIZES) - 1e-9 < r.metrics["gradient_diversity"] for r in history)


def test_a_run_writes_it_down_if_it_is_asked_to(tmp_path):
    made = experiment(Exam("fedavg"), num_rounds=2, diversity=True)
    list(train_in(made, tmp_path, SerialBackend(made.task)))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert ["gradient_diversity" in line for line in lines] == [False, True, True]
