"""What a federation would have sent, counted by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import BASIC, GROUPED, LOCAL, SIZES, SYNTHETIC, Exam, initial, regression, train

from fedray import training
from fedray.aggregators import AGGREGATORS, mean
from fedray.algorithm import Client, ClientResult
from fedray.algorithms.fedavg import fedavg
from fedray.backends.serial import SerialBackend
from fedray.evaluation import evaluate
from fedray.experiment import Experiment
from fedray.learner import Learner
from fedray.ledger import Ledger, MeteredBackend, payload_bytes
from fedray.rounds import clients
from fedray.samplers import Population, Selection

MODEL = 4 * (3 + 1)  # float32 weights and bias of the linear regression
PERCEPTRON = 4 * (4 * 6 + 6 + 6 * 3 + 3)
ADAPTED = 4 * (3 * (4 + 6) + 3 * (6 + 5) + 5 * 3 + 3)  # factors of rank 3 of two layers, and a head
MASKED = 4 * (4 * 12 + 12 * 3)  # the scores
POINTS = 4 * (6 + 129)  # a generator and a discriminator
COHORT = 7

# bytes of one client's (update, broadcast), by what the papers say is sent
SENT = {
    "fedavg": (1, 1, 0),
    "fedprox": (1, 1, 0),
    "fedavgm": (1, 1, 0),
    "fedadagrad": (1, 1, 0),
    "fedadam": (1, 1, 0),
    "fedyogi": (1, 1, 0),
    "scaffold": (2, 2, 0),  # the control variate, too
    "fednova": (1, 1, 8),  # and ‖a_i‖₁, a number
    "feddyn": (1, 1, 0),
    "moon": (1, 1, 0),
    "fedbuff": (1, 1, 0),
    "dp_fedavg": (1, 1, 0),
    "fedlora": (1, 1, 0),  # whose other rules are counted in test_averaging.py
    "prism": (0, 1, 11),  # a bit for each of 84 weights, and scores
    "dp_fedavg_gan": (0, 1, 4 * 129),  # the discriminator alone; md_gan is counted in test_gan.py
    "local_only": (0, 0, 0),
    "centralized": (0, 0, 0),
}


@pytest.mark.parametrize(
    "exam",
    [e for e in (*BASIC, *GROUPED) if e.algorithm not in (*SYNTHETIC, "md_gan") and not e.averaging],
    ids=str,
)
def test_a_round_costs_what_the_algorithm_sends(exam: Exam):
    up, down, extra = SENT[exam.algorithm]
    sizes = {"regression": MODEL, "blobs": PERCEPTRON, "adapted": ADAPTED, "masked": MASKED, "points": POINTS}
    size = sizes[exam.problem]
    ledger = Ledger()
    train(exam.task(), exam.make(), MeteredBackend(exam.backend(3), ledger), 2)
    assert ledger.entry() == {
        "bytes_up": 2 * COHORT * (up * size + extra),
        "bytes_down": 2 * COHORT * down * size,
        "bytes_up_total": 2 * COHORT * (up * size + extra),
        "bytes_down_total": 2 * COHORT * down * size,
    }


@pytest.mark.parametrize("rule", AGGREGATORS)
def test_the_aggregator_does_not_change_what_is_sent(rule: str):
    exam, ledger = Exam("fedavg", aggregator=rule), Ledger()
    train(exam.task(), exam.make(), MeteredBackend(exam.backend(), ledger), 1)
    assert (ledger.up, ledger.down) == (COHORT * MODEL, COHORT * MODEL)


def failing(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
    if client.id in (2, 4):
        raise RuntimeError("the battery is empty")
    return ClientResult({"x": torch.zeros(5), "n": 3}, 1)


@pytest.mark.parametrize("num_shares", [1, 2, 5])
def test_a_client_that_fails_has_received_and_does_not_send(num_shares: int):
    ledger = Ledger()
    backend = MeteredBackend(SerialBackend(regression(), num_shares, on_client_error="drop"), ledger)
    cohort = clients(Selection((1, 2, 3, 4, 5)), Population(np.array(SIZES)), 0, 1)
    backend.map_reduce(failing, {"w": torch.zeros(100, dtype=torch.float16)}, cohort, mean())
    assert (ledger.up, ledger.down) == (3 * (20 + 8), 5 * 200)


def test_a_round_that_fails_costs_nothing():
    ledger = Ledger()
    backend = MeteredBackend(SerialBackend(regression()), ledger)
    with pytest.raises(Exception, match="the battery is empty"):
        backend.map_reduce(failing, None, [Client(2, 0)], mean())
    assert ledger == Ledger()


def test_what_is_not_metered_costs_nothing():
    task, ledger = regression(), Ledger()
    backend = MeteredBackend(SerialBackend(task), ledger)
    evaluate(task, Learner(task, "cpu").params(), backend)
    backend.map_reduce(failing, torch.zeros(9), [Client(1, 0)], mean(), metered=False)
    backend.map(lambda learner, item: item, [torch.zeros(9)])
    assert ledger == Ledger()


def test_rounds_are_counted_one_by_one_and_in_total():
    ledger = Ledger(up_total=1000, down_total=2000)
    for exchanges in (2, 1):
        ledger.open_round()
        for _ in range(exchanges):
            ledger.book(up=30, down=[7, 7, 7])
        ledger.book_dropped(2)  # who received every broadcast of the round
        assert (ledger.up, ledger.down) == (exchanges * 30, exchanges * 7 * 5)
    assert ledger.entry() == {"bytes_up": 30, "bytes_down": 35, "bytes_up_total": 1090, "bytes_down_total": 2105}


@pytest.mark.parametrize(
    ("tree", "size"),
    [
        (None, 0),
        ({}, 0),
        (torch.zeros(3, 5), 60),
        (torch.zeros(0), 0),
        (torch.tensor(1.0), 4),
        (torch.zeros(10, dtype=torch.bfloat16), 20),
        (torch.zeros(10, dtype=torch.bool), 10),
        (torch.zeros(10, dtype=torch.int64)[::2], 40),  # what is sent, not what lies in memory
        (torch.zeros(1).expand(10), 40),
        (3, 8),
        (0.5, 8),
        (True, 8),
        ("größer", 8),
        ({"a": {"b": torch.zeros(2), "c": 1}, "d": None}, 16),
        ([torch.zeros(2), (1, "ab")], 18),
    ],
)
def test_the_bytes_of_a_payload(tree: Any, size: int):
    assert payload_bytes(tree) == size


def test_what_has_no_size_cannot_be_sent():
    with pytest.raises(
        TypeError, match="a set cannot be sent; send tensors, numbers, text, and dicts or lists of them"
    ):
        payload_bytes({"x": {1, 2}})


@pytest.mark.parametrize(
    "make", [lambda: fedavg(local=LOCAL), lambda: Exam("scaffold").make()], ids=["fedavg", "scaffold"]
)
def test_the_metrics_of_a_run_carry_the_bytes_with_clients_that_dropped_out(make: Callable, tmp_path: Path):
    def sampler(population: Population, cohort: int, rng: Any, round: int) -> Selection:
        return Selection(tuple(range(cohort)), dropped=tuple(range(cohort, cohort + round)))

    made = Experiment(
        task=regression(), algorithm=make(), sampler=sampler, rounds=3, cohort=5, seed=0,
        evaluate_every=1, checkpoint_every=2, keep_checkpoints=1,
    )  # fmt: skip
    list(training.train(made, tmp_path, SerialBackend(made.task)))
    each = MODEL * (2 if "c" in vars(initial(made.task, made.algorithm)) else 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["bytes_up"] for line in lines] == [0, *[5 * each] * 3]
    assert [line["bytes_down"] for line in lines] == [0, 6 * each, 7 * each, 8 * each]
    assert [line["bytes_up_total"] for line in lines] == [0, 5 * each, 10 * each, 15 * each]
    assert [line["bytes_down_total"] for line in lines] == [0, 6 * each, 13 * each, 21 * each]
    assert [line["clients_sampled"] for line in lines[1:]] == [6, 7, 8]
    assert [line["clients_failed"] for line in lines[1:]] == [1, 2, 3]
