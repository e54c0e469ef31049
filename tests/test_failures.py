"""Clients that fail, or do what they must not."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    FEDERATED,
    GROUPED,
    LORA,
    SIZES,
    Altered,
    Exam,
    assert_same_bits,
    backend_for,
    copy,
    exams,
    experiment,
    failing,
    initial,
    parts,
    regression,
    train,
)

from fedray.aggregators import AGGREGATORS, mean
from fedray.algorithm import Client, ClientResult, FederatedAlgorithm
from fedray.backends.serial import SerialBackend
from fedray.errors import ClientError
from fedray.execution import Execution
from fedray.learner import Learner
from fedray.rounds import clients, rounds
from fedray.samplers import Population, Selection, uniform
from fedray.training import train as train_in


@exams(FEDERATED)
@pytest.mark.parametrize("num_shares", [1, 3])
def test_a_client_that_raises_leaves_all_state_alone_and_is_named(exam: Exam, num_shares: int):
    task, algorithm, backend = exam.task(), exam.make(), exam.backend(num_shares)
    population = Population(task.sizes)
    loop = rounds(algorithm, initial(task, algorithm), backend, population, len(SIZES))
    next(loop)
    second = next(loop)
    server, kept = copy(second.state), copy(backend.client_states)
    broken = rounds(algorithm, second.state, Altered(backend, failing(4)), population, len(SIZES), start=2)
    with pytest.raises(
        ClientError, match=r"^client 4 failed in round 3:\nTraceback(.|\n)*the battery is empty"
    ) as caught:
        next(broken)
    assert "in update" in str(caught.value)  # its own traceback, not ours
    assert_same_bits(copy(second.state), server)
    assert_same_bits(copy(backend.client_states), kept)
    third = next(rounds(algorithm, second.state, backend, population, len(SIZES), start=2))
    expected = train(task, algorithm, SerialBackend(task), 3, cohort=len(SIZES))[-1]
    assert_same_bits((third.state, third.metrics), (expected.state, expected.metrics))


@exams([*FEDERATED, *LORA, Exam("scaffold", "images"), Exam("scaffold", aggregator="median")])
def test_a_dropped_client_is_as_if_it_had_not_been_drawn(exam: Exam):
    task, algorithm, population = exam.task(), exam.make(), Population(np.array(SIZES))
    backend, without = SerialBackend(task, 2, on_client_error="drop"), SerialBackend(task)
    state = expected = initial(task, algorithm)
    for number in (1, 2, 3):
        cohort = clients(Selection((5, 2, 8, 4, 0, 3, 6)), population, 0, number)
        remaining = [client for client in cohort if client.id != 4]
        state, metrics = algorithm.apply(state, cohort, Altered(backend, failing(4)))
        expected, expected_metrics = algorithm.apply(expected, remaining, without)
        assert metrics.pop("clients_failed") == 1
        assert_same_bits((state, metrics), (expected, expected_metrics))
        backend.client_states.commit()
        without.client_states.commit()
    assert_same_bits(backend.client_states, without.client_states)


@exams(GROUPED)
def test_among_clients_that_train_together_only_the_one_that_fails_is_dropped(exam: Exam):
    task = exam.task()
    torn = replace(task, clients=tuple({**c, "x": c["x"][:, :2]} if i == 4 else c for i, c in enumerate(task.clients)))
    cohort = clients(Selection((5, 2, 8, 4, 0, 3, 6)), Population(task.sizes), 0, 1)
    algorithm, start = exam.make(), initial(task, exam.make())
    results = []
    for num_shares in (1, 2, 7):
        backend = SerialBackend(torn, num_shares, on_client_error="drop", execution=Execution(3))
        results.append((*algorithm.apply(start, cohort, backend), backend.client_states))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])
    remaining = [client for client in cohort if client.id != 4]
    expected, metrics = algorithm.apply(start, remaining, SerialBackend(task))
    assert results[0][1] == pytest.approx({**metrics, "clients_failed": 1}, rel=1e-4)
    torch.testing.assert_close(copy(results[0][0]), copy(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(ClientError, match=r"^client 4 failed in round 1:\nTraceback(.|\n)*mat1 and mat2 shapes"):
        algorithm.apply(start, cohort, SerialBackend(torn, 2, execution=Execution(3)))


def test_what_a_client_reports_wrongly_drops_its_update_too():
    def update(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
        metrics = {"train_loss": 1.0} if client.id != 3 else {"train_loss": "low"}
        return ClientResult({"x": torch.ones(2)}, 1 if client.id != 5 else float("nan"), metrics)  # type: ignore[dict-item]

    cohort = clients(Selection(tuple(range(9))), Population(np.array(SIZES)), 0, 1)
    for rule in ("mean", "median"):
        task = SerialBackend(regression(), on_client_error="drop")
        counting = replace(AGGREGATORS[rule](), report=lambda acc: acc)
        seen, metrics = task.map_reduce(update, None, cohort, counting)
        assert metrics == {"train_loss": 1.0, "clients_failed": 2.0}
        assert (seen[1] if rule == "mean" else len(seen)) == 7


def test_a_cohort_in_which_everybody_fails_ends_the_run_even_where_failures_are_dropped():
    task = regression()
    backend = SerialBackend(task, 2, on_client_error="drop")

    def alter(_: Any) -> Callable[..., ClientResult]:
        def update(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
            raise RuntimeError("the battery is empty")

        return update

    with pytest.raises(ClientError, match=r"^client \d failed in round 1, as did all 7 of the cohort:\n"):
        train(task, Exam("fedavg").make(), Altered(backend, alter))


def test_failures_are_counted_in_the_metrics_with_their_reasons(tmp_path: Path):
    made = replace(experiment(Exam("fedavg"), 2), sampler=uniform, cohort=9)
    records = list(train_in(made, tmp_path, Altered(backend_for(made, 2, on_client_error="drop"), failing(4))))
    assert [(r.get("clients_sampled"), r.get("clients_failed")) for r in records] == [(None, None), (9, 1), (9, 1)]
    lost = [{"client": 4, "why": "RuntimeError: the battery is empty"}]
    assert [r.get("dropped") for r in records] == [None, lost, lost]
    kept = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("dropped") for r in kept] == [None, lost, lost]


@exams(FEDERATED)
@pytest.mark.parametrize("on_client_error", ["raise", "drop"])
@pytest.mark.parametrize("then_fail", [False, True])
def test_a_client_that_writes_into_the_broadcast_is_caught(exam: Exam, on_client_error: Any, then_fail: bool):
    def alter(client_update: Callable[..., ClientResult]) -> Callable[..., ClientResult]:
        def update(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
            result = client_update(learner, broadcast, client)
            if client.id == 4:
                next(leaf for _, leaf in parts(broadcast)).add_(1)
                if then_fail:
                    raise RuntimeError("the battery is empty")
            return result

        return update

    task = exam.task()
    backend = Altered(SerialBackend(task, 2, on_client_error=on_client_error), alter)
    with pytest.raises(ClientError, match=r"client 4 wrote into the broadcast.*\n?.*`a \+ b` instead of `a.add_\(b\)`"):
        train(task, exam.make(), backend, 1, cohort=len(SIZES))


def test_a_broadcast_of_any_shape_is_guarded():
    def update(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
        broadcast[1][0]["x"].add_(1)
        return ClientResult({}, 1.0)

    with pytest.raises(ClientError, match="client 2 wrote into the broadcast"):
        SerialBackend(regression()).map_reduce(update, (1, [{"x": torch.zeros(2)}]), [Client(2, 0)], mean())


def test_a_client_that_writes_into_its_old_state_is_caught():
    def update(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
        state = {"x": torch.zeros(2)} if client.state is None else client.state
        state["x"].add_(1)
        return ClientResult({}, 1.0, state=state)

    backend = SerialBackend(regression())
    backend.map_reduce(update, None, [Client(2, 0)], mean(), keeps_state=True)
    with pytest.raises(ClientError, match="client 2 wrote into the state that it had kept"):
        backend.map_reduce(update, None, [Client(2, 0)], mean(), keeps_state=True)


def test_state_that_would_be_lost_is_refused():
    def update(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
        return ClientResult({}, 1.0, state={"x": torch.zeros(1)})

    with pytest.raises(ClientError, match=r"client 1 returned state, which would be lost; .*keeps_state=True"):
        SerialBackend(regression()).map_reduce(update, None, [Client(1, 0)], mean())


def test_state_is_met_again_within_a_round_and_forgotten_with_it():
    def count(learner: Learner, broadcast: Any, client: Client) -> ClientResult:
        seen = 0 if client.state is None else client.state["seen"]
        return ClientResult({"seen": float(seen)}, 1, state={"seen": seen + 1})

    backend, cohort = SerialBackend(regression(), 2), [Client(i, 0, slot=i) for i in range(3)]
    seen = [backend.map_reduce(count, None, cohort, mean(), keeps_state=True)[0]["seen"] for _ in range(3)]
    assert seen == [0, 1, 2]
    backend.client_states.discard()
    assert backend.map_reduce(count, None, cohort, mean(), keeps_state=True)[0]["seen"] == 0
    backend.client_states.commit()
    backend.map_reduce(count, None, cohort[:1], mean(), keeps_state=True)
    backend.client_states.discard()
    assert backend.map_reduce(count, None, cohort, mean(), keeps_state=True)[0]["seen"] == 1


def test_a_round_that_fails_halfway_keeps_nothing_of_its_first_half():
    def remember(learner: Learner, round: int, client: Client) -> ClientResult:
        if round == 2 and client.state == {"round": 2}:  # in the second half of the second round
            raise RuntimeError("the battery is empty")
        return ClientResult({}, 1, state={"round": round})

    def apply(state: Any, cohort: Sequence[Client], backend: SerialBackend) -> tuple[Any, dict[str, float]]:
        for _ in range(2):
            backend.map_reduce(remember, cohort[0].round, cohort, mean(), keeps_state=True)
        return state, {}

    task, backend = regression(), SerialBackend(regression(), 2)
    loop = rounds(FederatedAlgorithm(lambda params: params, apply), None, backend, Population(task.sizes), len(SIZES))
    next(loop)
    with pytest.raises(ClientError, match="failed in round 2"):
        next(loop)
    assert backend.client_states.staged == {}
    assert backend.client_states.committed == {i: (1, {"round": 1}) for i in range(len(SIZES))}
