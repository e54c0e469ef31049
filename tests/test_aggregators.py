"""Every aggregator is a fold that can be split, and computes what its paper defines, here written out slowly."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from problems import LOCAL, OPTIONS, SIZES, Exam, assert_same_bits, copy, initial, make, regression, train

from fedray.aggregators import (
    AGGREGATORS,
    Aggregator,
    collect,
    krum,
    mean,
    median,
    multi_krum,
    norm_bound,
    total,
    trimmed_mean,
    with_members,
)
from fedray.algorithm import Client, ClientResult
from fedray.algorithms.fedavg import fedavg
from fedray.backends.serial import SerialBackend
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.trees import flatten

ALL = {name: AGGREGATORS[name](**OPTIONS.get(name, {})) for name in AGGREGATORS} | {
    "total": total(),
    "collect": collect(),
}
every = pytest.mark.parametrize("name", ALL)
Member = tuple[Client, ClientResult]


def cohort(count: int = 7, seed: int = 0) -> list[Member]:
    draw = torch.Generator().manual_seed(seed)

    def update() -> dict[str, Any]:
        return {"w": torch.randn(3, 2, generator=draw), "b": {"c": torch.randn(4, generator=draw)}}

    return [(Client(id=10 * k, seed=0, slot=k), ClientResult(update(), k % 3 + 1)) for k in range(count)]


def fold(rule: Aggregator, members: Sequence[Member]) -> Any:
    acc = rule.zero()
    for client, result in members:
        acc = rule.accumulate(acc, client, result)
    return acc


def aggregate(rule: Aggregator, members: Sequence[Member]) -> Any:
    return rule.report(fold(rule, members))


def updates(*values: float) -> list[Member]:
    return [(Client(k, 0, slot=k), ClientResult({"w": torch.tensor([value])}, 1)) for k, value in enumerate(values)]


# The contract


@every
@pytest.mark.parametrize("seed", range(5))
def test_merging_the_folds_of_any_partition_is_the_fold_of_all(name: str, seed: int):
    rule, members, shuffle = ALL[name], cohort(), random.Random(seed)
    expected = aggregate(rule, members)
    parts: list[list[Member]] = [[] for _ in range(4)]
    for member in shuffle.sample(members, len(members)):
        shuffle.choice(parts).append(member)
    whole = rule.zero()
    for part in parts:
        whole = rule.merge(whole, fold(rule, part)) if shuffle.random() < 0.5 else rule.merge(fold(rule, part), whole)
    assert_same_bits(rule.report(whole), expected)


@every
def test_zero_is_neutral_and_fresh(name: str):
    rule, members = ALL[name], cohort()
    expected = aggregate(rule, members)
    assert_same_bits(rule.report(rule.merge(rule.zero(), fold(rule, members))), expected)
    assert_same_bits(rule.report(rule.merge(fold(rule, members), rule.zero())), expected)


@every
def test_updates_are_not_written_to(name: str):
    members = cohort()
    before = [copy(result.update) for _, result in members]
    aggregate(ALL[name], members)
    assert_same_bits([copy(result.update) for _, result in members], before)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_aggregate_has_the_shapes_and_types_of_an_update(name: str):
    members = cohort()
    kinds = {path: (leaf.shape, leaf.dtype) for path, leaf in copy(members[0][1].update).items()}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in copy(aggregate(ALL[name], members)).items()} == kinds


@pytest.mark.parametrize("name", AGGREGATORS)
def test_if_all_agree_the_aggregate_is_what_they_say(name: str):
    [(_, result), *_] = cohort()
    alike = {path: 0.01 * leaf for path, leaf in copy(result.update).items()}
    members = [(Client(k, 0, slot=k), ClientResult(alike, k + 1)) for k in range(6)]
    torch.testing.assert_close(aggregate(ALL[name], members), alike, rtol=1e-6, atol=2.0**-36)


# Definitions


def stacked(members: Sequence[Member]) -> torch.Tensor:
    return torch.stack([flatten(result.update).double() for _, result in members])


def check(rule: Aggregator, members: Sequence[Member], expected: torch.Tensor) -> None:
    torch.testing.assert_close(flatten(aggregate(rule, members)).double(), expected, rtol=1e-6, atol=1e-7)


def test_mean_is_weighted():
    members = cohort()
    weights = torch.tensor([result.weight for _, result in members], dtype=torch.float64)
    check(mean(), members, weights @ stacked(members) / weights.sum())


def test_mean_of_numbers_and_total():
    members = [(Client(k, 0), ClientResult({"steps": k, "x": torch.tensor([k])}, k + 1)) for k in range(3)]
    assert aggregate(mean(), members) == {"steps": 8 / 6, "x": torch.tensor([8 / 6])}
    assert aggregate(total(), members) == ({"steps": 8.0, "x": torch.tensor([8.0])}, 6.0)


@pytest.mark.parametrize("weights", [(0, 0), (1, -1)])
def test_a_mean_needs_weight(weights: tuple[int, int]):
    members = [(Client(k, 0), ClientResult({"x": torch.ones(1)}, w)) for k, w in enumerate(weights)]
    with pytest.raises(ValueError, match=r"the weights of the cohort sum to 0.0; a mean needs a positive sum"):
        aggregate(mean(), members)


def test_members_come_in_the_order_of_the_cohort_and_without_what_they_keep():
    members = [(replace(client, state={"kept": torch.ones(2)}), result) for client, result in cohort()]
    rule = with_members(mean())
    found, clients = rule.report(rule.merge(fold(rule, members[4:]), fold(rule, members[3::-1])))
    assert clients == [client for client, _ in cohort()]
    assert_same_bits(found, aggregate(mean(), members))


def test_collect_keeps_the_order_of_the_cohort():
    members = cohort()
    assert_same_bits(aggregate(collect(), members[::-1]), [result.update for _, result in members])
    assert aggregate(collect(len), members) == len(members)


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_median_is_pythons_median_of_every_coordinate(count: int):
    import statistics

    members = cohort(count)
    check(
        median(), members, torch.tensor([statistics.median(column) for column in stacked(members).T.tolist()]).double()
    )


@pytest.mark.parametrize(
    ("count", "trim", "cut"), [(7, 0.3, 2), (10, 0.1, 1), (10, 0.0, 0), (5, 0.49, 2), (1, 0.4, 0), (100, 0.29, 29)]
)
def test_trimmed_mean_leaves_the_extremes_of_every_coordinate_out(count: int, trim: float, cut: int):
    members = cohort(count)
    inner = [sorted(column)[cut : count - cut] for column in stacked(members).T.tolist()]
    check(
        trimmed_mean(trim), members, torch.tensor([sum(column) / len(column) for column in inner], dtype=torch.float64)
    )


def krum_scores(vectors: list[list[float]], f: int) -> list[float]:
    """Blanchard et al., 2017: the sum over the n − f − 2 closest of the others, of the squared distance."""
    n = len(vectors)
    scores = []
    for i in range(n):
        squared = [sum((a - b) ** 2 for a, b in zip(vectors[i], vectors[j], strict=True)) for j in range(n) if j != i]
        scores.append(min(sum(closest) for closest in combinations(squared, n - f - 2)))
    return scores


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "f"), [(3, 0), (5, 1), (7, 1), (7, 2), (9, 3)])
def test_krum_chooses_the_update_with_the_least_score(count: int, f: int, seed: int):
    members = cohort(count, seed)
    scores = krum_scores(stacked(members).tolist(), f)
    best = members[scores.index(min(scores))][1].update
    assert_same_bits(aggregate(krum(f), members), best)
    for selected in (1, 2, 3):
        chosen = sorted(range(count), key=lambda i: scores[i])[:selected]
        check(multi_krum(f, selected), members, stacked([members[i] for i in chosen]).mean(0))


def test_krum_breaks_ties_by_the_order_of_the_cohort():
    members = updates(0.0, 1.0, 2.0, 3.0, 4.0)
    assert aggregate(krum(1), members)["w"] == aggregate(krum(1), members[::-1])["w"] == 1.0  # 1, 2 and 3 score alike


@pytest.mark.parametrize(("f", "count"), [(0, 2), (1, 4), (2, 6)])
def test_krum_refuses_a_cohort_in_which_liars_could_win(f: int, count: int):
    message = rf"num_byzantine is {f} in a cohort of {count}; Krum needs at least {2 * f + 3} clients a round"
    for rule in (krum(f), multi_krum(f, 2)):
        with pytest.raises(ValueError, match=message):
            aggregate(rule, cohort(count))
        aggregate(rule, cohort(2 * f + 3))


def test_norm_bound_scales_long_updates_and_leaves_short_ones():
    members, bound = cohort(), 2.8
    vectors, weights = (
        stacked(members),
        torch.tensor([float(result.weight) for _, result in members], dtype=torch.float64),
    )
    norms = vectors.norm(dim=1)
    assert (norms < bound).any()
    assert (norms > bound).any()
    bounded = vectors * (bound / norms).clamp_max(1.0)[:, None]
    check(norm_bound(bound), members, weights @ bounded / weights.sum())
    assert flatten(aggregate(norm_bound(0.5), members)).norm() <= 0.5 + 1e-6


def test_norm_bound_of_nothing_is_nothing():
    assert aggregate(norm_bound(1.0), updates(0.0, 0.0))["w"] == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trimmed_mean(0.5), "trim is 0.5; it must be at least 0 and below 0.5"),
        (lambda: trimmed_mean(-0.1), "trim is -0.1; it must be at least 0 and below 0.5"),
        (lambda: krum(-1), "num_byzantine is -1; it must be at least 0"),
        (lambda: multi_krum(1, 0), "num_selected is 0; it must be at least 1"),
        (lambda: norm_bound(0.0), "max_norm is 0.0; it must be > 0"),
        (lambda: norm_bound(math.nan), "max_norm is nan; it must be > 0"),
    ],
)
def test_impossible_options_are_named(make: Callable[[], Aggregator], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


# Clients that lie


def lying(rule: Aggregator, liars: Sequence[int], lie: Callable[[Any], Any]) -> Aggregator:
    """The same rule, over updates of which some have been tampered with."""

    def accumulate(acc: Any, client: Client, result: ClientResult) -> Any:
        told = lie(result.update) if client.id in liars else result.update
        return rule.accumulate(acc, client, replace(result, update=told))

    return replace(rule, accumulate=accumulate)


LIES: dict[str, Callable[[Any], Any]] = {
    "backwards": lambda update: {name: -20 * x for name, x in update.items()},
    "huge": lambda update: {name: torch.full_like(x, 500.0) for name, x in update.items()},
    "not a number": lambda update: {name: torch.full_like(x, math.nan) for name, x in update.items()},
}


def loss_after_training(rule: Aggregator, num_rounds: int = 12) -> float:
    task = regression(spread=0.0)
    algorithm = fedavg(
        local=LocalTraining(local_lr=0.1, batch_size=4, local_steps=4), aggregator=rule, weighting="uniform"
    )
    history = train(task, algorithm, SerialBackend(task), num_rounds, cohort=len(SIZES))
    state = history[-1].state if history else initial(task, algorithm)
    return Learner(task, "cpu").test(state.params)["test_loss"]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(
    "rule", [krum(2), multi_krum(2, 3), median(), trimmed_mean(0.25)], ids=["krum", "multi", "median", "trim"]
)
def test_robust_rules_train_in_spite_of_liars(rule: Aggregator, lie: str):
    untrained = loss_after_training(mean(), 0)
    assert loss_after_training(lying(rule, [3, 5], LIES[lie])) < 0.1 * untrained


def test_the_mean_does_not():
    untrained = loss_after_training(mean(), 0)
    assert loss_after_training(mean()) < 0.1 * untrained
    assert loss_after_training(lying(mean(), [3], LIES["huge"])) > untrained
    with pytest.raises(Exception, match="training diverged"):
        loss_after_training(lying(mean(), [3], LIES["not a number"]))


def test_a_bounded_norm_limits_what_a_liar_can_do():
    assert loss_after_training(lying(norm_bound(1.0), [3], LIES["huge"])) < 0.5 * loss_after_training(
        lying(mean(), [3], LIES["huge"])
    )


def test_robust_rules_reach_every_algorithm_that_lets_one_choose():
    exam = Exam("scaffold", aggregator="median")
    assert train(exam.task(), exam.make(), exam.backend())


def test_a_rule_made_of_another_is_asked_for_every_client_of_a_group():
    asked = []
    inner = mean()

    def accumulate(acc: Any, client: Client, result: ClientResult) -> Any:
        asked.append(client.id)
        return inner.accumulate(acc, client, result)

    assert inner.accumulate_group is not None
    exam = Exam("fedavg", "blobs", group=3)
    algorithm = make("fedavg", local=LOCAL, aggregator=replace(inner, accumulate=accumulate))
    train(exam.task(), algorithm, exam.backend(), 1)
    assert len(asked) == 7
