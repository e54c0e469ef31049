"""Laws that every algorithm keeps: whatever cannot matter to the result does not change a bit of it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    BASIC,
    EXAMS,
    GROUPED,
    LOCAL,
    SIZES,
    STATEFUL,
    VARIANTS,
    Altered,
    Exam,
    Problem,
    assert_same_bits,
    blobs,
    chooses_aggregator,
    copy,
    differ,
    exams,
    failing,
    initial,
    outcome,
    parts,
    reference,
    regression,
    train,
)

from fedray.aggregators import AGGREGATORS, mean
from fedray.algorithm import Client, ClientResult
from fedray.algorithms import ALGORITHMS
from fedray.backends.serial import SerialBackend
from fedray.errors import FedrayError
from fedray.evaluation import evaluate
from fedray.learner import Learner
from fedray.ledger import Ledger, MeteredBackend
from fedray.local_training import LocalTraining
from fedray.rounds import clients, rounds
from fedray.samplers import Population, Selection


def test_every_algorithm_and_aggregator_sits_the_exams():
    assert {exam.algorithm for exam in BASIC} == set(ALGORITHMS)
    assert {exam.aggregator or "mean" for exam in EXAMS} == set(AGGREGATORS)
    assert {exam.algorithm for exam in EXAMS if exam.aggregator} == {a for a in ALGORITHMS if chooses_aggregator(a)}


def test_every_algorithm_whose_clients_may_train_together_is_examined_so():
    asked = set()
    for exam in BASIC:

        class Spy(Altered):
            def map_reduce(self, *args: Any, grouped: bool = False, **options: Any) -> Any:
                asked.update([exam.algorithm] if grouped else [])  # noqa: B023 - used at once
                return self.backend.map_reduce(*args, **options)

        train(exam.task(), exam.make(), Spy(exam.backend(), lambda update: update), 1)
    assert asked - set(VARIANTS) == {exam.algorithm for exam in GROUPED} - set(VARIANTS)


# What cannot matter


@exams(EXAMS)
@pytest.mark.parametrize("num_shares", [2, 3, 7, 9])
def test_the_number_of_shares_changes_nothing(exam: Exam, num_shares: int):
    assert_same_bits(outcome(exam, exam.backend(num_shares)), reference(exam))


@exams(EXAMS)
def test_the_order_and_the_grouping_of_clients_change_nothing(exam: Exam, monkeypatch: pytest.MonkeyPatch):
    shuffle = random.Random(str(exam))

    def deal(cohort: Sequence[Client], _: int) -> list[list[Client]]:
        order = shuffle.sample(cohort, len(cohort))
        cut = shuffle.randrange(len(order) + 1)
        return shuffle.choice([[order[::-1]], [[client] for client in order], [order[:cut], [], order[cut:]]])

    expected = reference(exam)
    monkeypatch.setattr("fedray.backends.serial.balance", deal)
    assert_same_bits(outcome(exam, exam.backend()), expected)


@exams(EXAMS)
def test_same_seed_same_bytes_and_other_seed_other_bytes(exam: Exam):
    torch.manual_seed(123)  # whatever the process did before
    again = outcome(exam, exam.backend())
    assert_same_bits(again, reference(exam))
    [other] = train(exam.task(), exam.make(), exam.backend(), 1, seed=1)
    assert other.metrics != reference(exam)[1][0]
    if exam.algorithm != "local_only":  # whose server learns nothing
        assert differ(other.state, reference(exam)[0][0])


@exams(STATEFUL)
def test_a_second_run_on_the_same_backend_starts_from_nothing(exam: Exam):
    backend = exam.backend()
    outcome(exam, backend, seed=5)
    assert_same_bits(outcome(exam, backend), reference(exam))


@exams(GROUPED)
@pytest.mark.parametrize(
    "local",
    [
        LOCAL,
        replace(LOCAL, local_steps=5),
        replace(LOCAL, max_grad_norm=0.5, weight_decay=0.1, local_momentum=0.9),
        replace(LOCAL, local_momentum=0.5, local_nesterov=True),
        replace(LOCAL, local_optimizer="adam", local_lr=0.01, weight_decay=0.1),
    ],
    ids=["plain", "steps", "clip", "nesterov", "adam"],
)
def test_training_together_computes_what_training_alone_does_but_for_rounding(exam: Exam, local: LocalTraining):
    try:
        algorithm = exam.make(local)
    except ValueError as error:
        if "is defined for" not in str(error):  # plain SGD, or at least SGD
            raise
        pytest.skip(str(error))
    for together, alone in zip(
        train(exam.task(), algorithm, exam.backend()),
        train(exam.task(), algorithm, SerialBackend(exam.task())),
        strict=True,
    ):
        assert together.metrics == pytest.approx(alone.metrics, rel=1e-3)
        torch.testing.assert_close(copy(together.state), copy(alone.state), rtol=1e-3, atol=1e-4)


@exams([*STATEFUL, *GROUPED])
def test_what_a_client_keeps_holds_no_more_memory_than_it_needs(exam: Exam):
    for _, leaf in parts(reference(exam)[2]):
        if isinstance(leaf, torch.Tensor):
            assert leaf.untyped_storage().nbytes() == leaf.numel() * leaf.element_size()


@exams(BASIC)
def test_training_leaves_the_callers_random_numbers_and_its_own_arguments_alone(exam: Exam):
    algorithm, task = exam.make(), exam.task()
    state = initial(task, algorithm)
    before, generator = copy(state), torch.get_rng_state()
    backend = SerialBackend(task)
    loop = rounds(algorithm, state, backend, Population(task.sizes), 7)
    first = next(loop)
    after_first, kept = copy(first.state), copy(backend.client_states)
    next(loop)
    assert_same_bits(copy(state), before)
    assert_same_bits(copy(first.state), after_first)
    assert all(torch.equal(leaf, copy(kept)[path]) for path, leaf in parts(kept) if torch.is_tensor(leaf))
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_clients_random_numbers_do_not_depend_on_who_went_before():
    def update(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
        return ClientResult({"noise": torch.randn(3)}, 1.0)

    cohort = clients(Selection(tuple(range(9))), Population(np.array(SIZES)), 0, 1)
    draws = [SerialBackend(regression(), n).map_reduce(update, None, cohort, mean())[0] for n in (1, 3, 9)]
    assert_same_bits(draws[0], draws[1])
    assert_same_bits(draws[0], draws[2])


def test_a_client_meets_what_it_kept_only_where_state_is_kept():
    def update(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
        state = {"seen": torch.ones(())} if broadcast["keeps"] else None
        return ClientResult({"known": float(client.state is not None)}, 1.0, state=state)

    cohort, backend = clients(Selection((0, 3)), Population(np.array(SIZES)), 0, 1), SerialBackend(regression())
    for keeps, known in ((True, 0.0), (True, 1.0), (False, 0.0), (True, 1.0)):
        found, _ = backend.map_reduce(update, {"keeps": keeps}, cohort, mean(), keeps_state=keeps)
        assert found["known"] == known


def test_a_client_drawn_twice_counts_twice():
    task, algorithm = regression(), Exam("scaffold").make()
    population, state = Population(task.sizes), initial(task, Exam("scaffold").make())
    outcomes = []
    for shares in (1, 2, 5):
        backend = SerialBackend(task, shares)
        cohort = clients(Selection((3, 4, 3, 8, 3)), population, 0, 1)
        outcomes.append((algorithm.apply(state, cohort, backend), backend.client_states))
    assert_same_bits(outcomes[0], outcomes[1])
    assert_same_bits(outcomes[0], outcomes[2])


# Evaluation


@pytest.mark.parametrize("make_task", [regression, blobs])
def test_evaluation_in_shards_is_evaluation_of_the_whole(
    make_task: Callable[[], Problem], monkeypatch: pytest.MonkeyPatch
):
    task = make_task()
    params = Learner(task, "cpu").params()
    whole = Learner(task, "cpu").test(params)
    monkeypatch.setattr("fedray.evaluation.SHARD", 3)
    shards = [evaluate(task, params, MeteredBackend(SerialBackend(task, n, "cpu"), Ledger()))[0] for n in (1, 2, 7, 9)]
    assert all(shard == shards[0] for shard in shards)
    assert shards[0] == pytest.approx(whole, rel=1e-6)


def test_evaluation_never_goes_on_with_a_part_of_the_test_set():
    task = blobs()

    def broken(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        raise RuntimeError("no such column")

    backend = SerialBackend(replace(task, losses=broken), on_client_error="drop")
    with pytest.raises(FedrayError, match="no such column"):
        evaluate(task, Learner(task, "cpu").params(), backend)


def test_one_failed_shard_ends_the_evaluation(monkeypatch: pytest.MonkeyPatch):
    task = blobs()
    monkeypatch.setattr("fedray.evaluation.SHARD", 3)
    backend = Altered(SerialBackend(task, on_client_error="drop"), failing(4))
    with pytest.raises(FedrayError, match="1 of 7 parts of the test set"):
        evaluate(task, Learner(task, "cpu").params(), backend)
