"""Local training, against loops written out with ``torch.optim``."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import LOCAL, SIZES, Problem, assert_same_bits, blobs, images, regression
from torch import nn

from fedray.algorithm import EVERYONE, Client
from fedray.errors import ConfigError
from fedray.groups import Group
from fedray.learner import Columns, Learner
from fedray.local_training import LocalTraining
from fedray.trees import Params

LARGEST = SIZES.index(max(SIZES))  # 8 examples
CLIENT = Client(LARGEST, seed=7)


def learner_of(task: Problem) -> Learner:
    return Learner(task, "cpu")


def by_hand(
    task: Problem,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    batches: list[Columns],
    max_grad_norm: float | None = None,
) -> tuple[Params, float]:
    """The params after a step on each batch, and the mean loss of all examples."""
    model = task.model()
    optimizer = make_optimizer(model.parameters())
    total = 0.0
    for batch in batches:
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        total += loss.item() * len(batch["y"])
    params = {name: p.detach() for name, p in model.named_parameters()}
    return params, total / sum(len(batch["y"]) for batch in batches)


def in_order(task: Problem, client: int, size: int, epochs: int) -> list[Columns]:
    examples = task.examples(client)
    length = len(examples["y"])
    return [
        {name: column[start : start + size] for name, column in examples.items()}
        for _ in range(epochs)
        for start in range(0, length, size)
    ]


OPTIMIZERS: dict[str, tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": ({}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "nesterov": (
        {"local_momentum": 0.9, "local_nesterov": True, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    "momentum": ({"local_momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "decay": ({"weight_decay": 0.2}, lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2)),
    "both": (
        {"local_momentum": 0.5, "weight_decay": 0.2},
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, weight_decay=0.2),
    ),
    "adam": ({"local_optimizer": "adam", "weight_decay": 0.2}, lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.2)),
    "adamw": (
        {"local_optimizer": "adamw", "weight_decay": 0.2},
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.2),
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("task", [regression(), blobs()], ids=["regression", "blobs"])
@pytest.mark.parametrize("epochs", [1, 3])
def test_training_is_torchs_optimizer_step_by_step(name: str, task: Problem, epochs: int):
    options, make_optimizer = OPTIMIZERS[name]
    local = LocalTraining(local_lr=0.1, batch_size=3, local_epochs=epochs, shuffle=False, **options)
    learner = learner_of(task)
    for _ in range(2):  # an optimizer's state is new each time
        result = learner.train(learner_of(task).params(), CLIENT, local)
        expected, loss = by_hand(task, make_optimizer, in_order(task, LARGEST, 3, epochs))
        torch.testing.assert_close(result.params, expected, rtol=1e-6, atol=1e-7)
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert (result.num_steps, result.num_examples) == (3 * epochs, 8)


@pytest.mark.parametrize("max_norm", [0.01, 0.5, 1e6])
@pytest.mark.parametrize("name", ["both", "adam"])
def test_clipping_is_torchs(max_norm: float, name: str):
    task, (options, make_optimizer) = blobs(), OPTIMIZERS[name]
    local = LocalTraining(local_lr=0.1, batch_size=3, shuffle=False, max_grad_norm=max_norm, **options)
    result = learner_of(task).train(learner_of(task).params(), CLIENT, local)
    expected, _ = by_hand(task, make_optimizer, in_order(task, LARGEST, 3, 1), max_norm)
    torch.testing.assert_close(result.params, expected, rtol=1e-4, atol=1e-6)  # torch adds 1e-6 to the norm


def test_one_full_batch_is_one_step():
    task = blobs()
    local = LocalTraining(local_lr=0.1, batch_size=1000)
    result = learner_of(task).train(learner_of(task).params(), CLIENT, local)
    expected, loss = by_hand(task, OPTIMIZERS["sgd"][1], [task.examples(LARGEST)])
    torch.testing.assert_close(result.params, expected, rtol=1e-5, atol=1e-6)  # shuffled, so summed in another order
    assert result.num_steps == 1
    assert result.loss == pytest.approx(loss, rel=1e-5)


def test_a_correction_and_a_proximal_term_are_added_to_every_gradient():
    task, mu = regression(), 0.7
    start = learner_of(task).params()
    correction = {name: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for name, p in start.items()}
    local = LocalTraining(
        local_lr=0.1, batch_size=3, local_epochs=2, shuffle=False, local_momentum=0.5, max_grad_norm=1.0
    )

    def loss(model: nn.Module, batch: Columns) -> torch.Tensor:
        extra = sum(
            (p * correction[name]).sum() + mu / 2 * (p - start[name]).square().sum()
            for name, p in model.named_parameters()
        )
        return task.loss(model, batch) + extra

    terms = learner_of(task).train(start, CLIENT, local, correction=correction, proximal=mu)
    written_out = learner_of(task).train(start, CLIENT, local, loss=loss)
    torch.testing.assert_close(terms.params, written_out.params, rtol=1e-5, atol=1e-6)
    plain, _ = by_hand(task, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5), in_order(task, LARGEST, 3, 2), 1.0)
    assert not torch.allclose(terms.params["weight"], plain["weight"], atol=1e-3)


def batches_seen(local: LocalTraining, client: Client = CLIENT) -> list[list[int]]:
    """The rows of every batch that the loss meets."""
    task, seen = regression(), list[list[int]]()
    examples = {**task.examples(client.id), "row": torch.arange(len(task.examples(client.id)["y"]))}

    def loss(model: nn.Module, batch: Columns) -> torch.Tensor:
        seen.append(batch["row"].tolist())
        return task.loss(model, batch)

    result = learner_of(task).train(learner_of(task).params(), client, local, loss=loss, examples=examples)
    assert result.num_steps == len(seen)
    return seen


@pytest.mark.parametrize("size", [1, 3, 4, 8, 100])
def test_every_epoch_covers_every_example_once(size: int):
    seen = batches_seen(LocalTraining(batch_size=size, local_epochs=3))
    per_epoch = -(-8 // size)
    epochs = [seen[i : i + per_epoch] for i in range(0, len(seen), per_epoch)]
    assert len(epochs) == 3
    assert all(sorted(row for batch in epoch for row in batch) == list(range(8)) for epoch in epochs)
    assert all(len(batch) == min(size, 8) for epoch in epochs for batch in epoch[:-1])
    if size > 1:
        assert len({tuple(map(tuple, epoch)) for epoch in epochs}) == 3  # each in a new order


def test_without_shuffling_examples_come_as_they_are_stored():
    assert (
        batches_seen(LocalTraining(batch_size=3, local_epochs=2, shuffle=False)) == [[0, 1, 2], [3, 4, 5], [6, 7]] * 2
    )


def test_the_order_depends_on_the_seed_alone():
    local = LocalTraining(batch_size=3, local_epochs=2)
    assert batches_seen(local) == batches_seen(local)
    assert batches_seen(local) != batches_seen(local, replace(CLIENT, seed=8))
    assert [row for batch in batches_seen(local) for row in batch] == [
        row for batch in batches_seen(replace(local, batch_size=5)) for row in batch
    ]


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_steps_go_on_where_an_epoch_ends(steps: int):
    many = batches_seen(LocalTraining(batch_size=3, local_epochs=9))
    assert batches_seen(LocalTraining(batch_size=3, local_steps=steps, local_epochs=5)) == many[:steps]


def test_the_learning_rate_decays_after_every_round():
    task, start = regression(), learner_of(regression()).params()
    for round, lr in [(1, 0.1), (2, 0.05), (4, 0.0125)]:
        decayed = learner_of(task).train(
            start, replace(CLIENT, round=round), LocalTraining(local_lr=0.1, local_lr_decay=0.5)
        )
        fixed = learner_of(task).train(start, CLIENT, LocalTraining(local_lr=lr))
        assert_same_bits(decayed.params, fixed.params)


def test_everyone_holds_all_examples():
    result = learner_of(regression()).train(learner_of(regression()).params(), Client(EVERYONE, 0), LOCAL)
    assert result.num_examples == sum(SIZES)


# The model is scratch space


def test_training_does_not_write_to_its_start_and_its_result_is_its_own():
    learner = learner_of(blobs())
    start = learner.params()
    before = {name: p.clone() for name, p in start.items()}
    first = learner.train(start, CLIENT, LOCAL).params
    kept = {name: p.clone() for name, p in first.items()}
    learner.train(first, Client(1, 3), LOCAL)
    assert_same_bits(start, before)
    assert_same_bits(first, kept)
    assert not any(p.requires_grad for p in first.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_a_client_gets_does_not_depend_on_who_went_before(name: str):
    local = LocalTraining(local_lr=0.1, batch_size=3, **OPTIMIZERS[name][0])
    used, start = learner_of(images()), learner_of(images()).params()
    for client in range(3):
        used.train(start, Client(client, 5), local)
    used.evaluate(start, images().test)
    torch.manual_seed(99)
    assert_same_bits(used.train(start, CLIENT, local).params, learner_of(images()).train(start, CLIENT, local).params)


def test_dropout_and_augmentation_follow_the_clients_seed():
    start = learner_of(images()).params()
    local = LocalTraining(local_lr=0.1, batch_size=100, shuffle=False)
    results = [
        learner_of(images()).train(start, Client(LARGEST, seed), local).params["head.bias"] for seed in (1, 1, 2)
    ]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_evaluation_and_features_have_no_dropout_no_augmentation_and_no_graph():
    task = images()
    learner = learner_of(task)
    params = learner.params()
    model = task.model().eval()
    with torch.no_grad():
        torch.testing.assert_close(learner.evaluate(params, task.test), task.evaluate(model, task.test))
        torch.testing.assert_close(learner.features(params, task.test), model.features(task.test["x"]))  # type: ignore[operator]
        assert learner.test(params) == pytest.approx(task.summarize(task.evaluate(model, task.test))[0])
    assert not learner.features(params, task.test).requires_grad


def test_evaluation_in_blocks_is_evaluation_of_all(monkeypatch: pytest.MonkeyPatch):
    learner, params = learner_of(blobs()), learner_of(blobs()).params()
    whole = learner.test(params)
    monkeypatch.setattr("fedray.learner._BLOCK", 3)
    assert learner.test(params) == pytest.approx(whole, rel=1e-6)
    assert learner.features(params, blobs().test).shape == (20, 6)


def test_what_is_frozen_is_neither_trained_nor_sent():
    def build() -> nn.Module:
        model = nn.Linear(3, 1)
        model.bias.requires_grad_(False)
        return model

    learner = learner_of(replace(regression(), build=build))
    bias = learner.model.bias.clone()  # type: ignore[operator]
    result = learner.train(learner.params(), CLIENT, LOCAL)
    assert list(result.params) == ["weight"]
    assert torch.equal(learner.model.bias, bias)  # type: ignore[arg-type]


def test_params_that_are_not_the_models_are_refused():
    learner = learner_of(regression())
    with pytest.raises(ValueError, match=r"the params differ from the model's in \['bias', 'biases'\]"):
        learner.load({"weight": torch.zeros(1, 3), "biases": torch.zeros(1)})


def test_a_client_without_examples_is_refused():
    empty = {"x": torch.zeros(0, 3), "y": torch.zeros(0)}
    with pytest.raises(ValueError, match="there are no examples to train on"):
        learner_of(regression()).train(learner_of(regression()).params(), CLIENT, LOCAL, examples=empty)


# Statistics that a model keeps


def with_batch_norm(momentum: float | None = 0.1, average: bool = True) -> Problem:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.Linear(4, 1))

    return replace(regression(), build=build, average_buffers=average)


def test_batch_norm_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"the model's 1 is BatchNorm1d, .*norm: group.*task.batch_norm=average"):
        learner_of(with_batch_norm(average=False))


@pytest.mark.parametrize("momentum", [0.1, None])  # None averages over all batches so far, which it counts
def test_averaged_statistics_are_sent_and_not_left_for_the_next_client(momentum: float | None):
    task = with_batch_norm(momentum)
    used, start = learner_of(task), learner_of(task).params()
    assert {"1.running_mean", "1.running_var"} < start.keys()
    local = LocalTraining(batch_size=4, local_epochs=2)
    first = used.train(start, CLIENT, local).params
    assert not torch.equal(first["1.running_mean"], start["1.running_mean"])
    assert_same_bits(used.train(start, CLIENT, local).params, first)
    assert_same_bits(used.evaluate(start, task.test), learner_of(task).evaluate(start, task.test))


class Counting(nn.Module):
    """A layer that keeps something from step to step, which nobody averages."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps.add_(1)
        return self.linear(x) / (1 + self.steps)


def test_no_buffer_is_left_for_the_next_client():
    task = replace(regression(), build=Counting)
    used, start = learner_of(task), learner_of(task).params()
    first = used.train(start, CLIENT, LOCAL).params
    assert_same_bits(used.train(start, CLIENT, LOCAL).params, first)
    assert used.test(start) == learner_of(task).test(start)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({name: 0}, f"{name} is 0; it must be > 0")
            for name in ("local_lr", "local_epochs", "batch_size", "local_steps")
        ),
        ({"local_lr": -0.1}, "local_lr is -0.1; it must be > 0"),
        ({"local_lr": float("nan")}, "local_lr is nan; it must be > 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; it must be > 0"),
        ({"local_lr_decay": 0.0}, "local_lr_decay is 0.0; it must be > 0"),
        ({"local_momentum": 1.0}, "local_momentum is 1.0; it must be at least 0 and below 1"),
        ({"local_nesterov": True}, "local_nesterov is true; it needs local_momentum above 0"),
        ({"local_momentum": 0.5, "local_optimizer": "adam"}, "local_momentum is 0.5; adam has no such option"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0; it must be >= 0"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; it must be >= 0"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        LocalTraining(**options)


# Many clients in one call


def test_a_member_with_corrupt_examples_does_not_spoil_the_others():
    task = regression()
    broken = replace(
        task, clients=({name: column * float("nan") for name, column in task.clients[0].items()}, *task.clients[1:])
    )
    group = Group(tuple(Client(k, seed=k) for k in range(4)), None)  # of unequal sizes, so that batches are filled up
    start = learner_of(task).params()
    whole, spoilt = (learner_of(t).train(start, group, LOCAL).params for t in (task, broken))
    for name in start:
        assert torch.equal(spoilt[name][1:], whole[name][1:])
        assert spoilt[name][0].isnan().all()
