"""The step within the backward pass: the same step as with the gradient, whatever a model does with its weights."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from problems import PROBLEMS
from torch import nn

from fedray import dense
from fedray.algorithm import Client
from fedray.dense import StepInBackward
from fedray.groups import Group
from fedray.learner import Columns, Learner
from fedray.local_training import LocalTraining
from fedray.trees import Params

LOCAL = LocalTraining(local_lr=0.2, local_epochs=3, batch_size=8, shuffle=False)  # each batch has all examples


class Perceptron(nn.Module):
    """Dense layers that ``between`` does something with."""

    def __init__(self, between: Callable[["Perceptron", torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.between(self, self.first(x)))


MODELS: dict[str, Callable[[Perceptron, torch.Tensor], torch.Tensor]] = {
    "as it is": lambda model, h: model.middle(h.tanh()),
    "relu in place": lambda model, h: F.relu(model.middle(h.relu_()), inplace=True),
    "twice": lambda model, h: model.middle(model.middle(h).tanh()),
    "read by a function, too": lambda model, h: F.linear(model.middle(h), model.middle.weight).tanh(),
    "read after it": lambda model, h: model.middle(F.linear(h, model.middle.weight).tanh()),
    "in three dimensions": lambda model, h: model.middle(h.view(-1, 1, 6).expand(-1, 5, 6)).mean(1),
    "unused": lambda model, h: h.tanh(),
}


def penalised(model: nn.Module, batch: Columns) -> torch.Tensor:
    return plain(model, batch) + 0.1 * model.middle.weight.square().sum()


def adversarial(model: nn.Module, batch: Columns) -> torch.Tensor:
    x = batch["x"].clone().requires_grad_()
    (away,) = torch.autograd.grad(F.cross_entropy(model(x), batch["y"]), x)
    return plain(model, {**batch, "x": (x + 0.3 * away.sign()).detach()})


def with_steep_slopes(model: nn.Module, batch: Columns) -> torch.Tensor:
    x = batch["x"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).logsumexp(1).sum(), x, create_graph=True)
    return plain(model, batch) + slope.square().sum(1)


def plain(model: nn.Module, batch: Columns) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def in_steps_of_gradients(task: object, local: LocalTraining) -> Params:
    model, examples = task.model(), task.examples(4)
    for _ in range(local.local_epochs):
        loss = task.loss(model, examples)
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                if g is not None:
                    p -= local.local_lr * g
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.fixture(autouse=True)
def small_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_LEAST", 1)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the backward pass made the step of a weight, each time that it could have."""
    made, make = list[bool](), StepInBackward.make
    monkeypatch.setattr(StepInBackward, "make", lambda *args: made.append(make(*args)) or made[-1])
    return made


@pytest.mark.parametrize("loss", [plain, penalised, adversarial, with_steep_slopes])
@pytest.mark.parametrize("between", MODELS)
def test_it_is_the_step_of_the_gradient(between, loss, steps):
    task = replace(PROBLEMS["blobs"](), build=lambda: Perceptron(MODELS[between]), losses=loss)
    learner = Learner(task, "cpu")
    for _ in range(2):  # one client leaves nothing behind for the next
        trained = learner.train(learner.task.model().state_dict(), Client(4, 0), LOCAL).params
        for name, p in in_steps_of_gradients(task, LOCAL).items():
            torch.testing.assert_close(trained[name], p, rtol=1e-5, atol=1e-6)
    assert any(steps) == (loss in (plain, penalised))  # the others multiply by each weight twice


def test_two_layers_with_one_weight_wait_for_its_whole_gradient(steps):
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
        model[2].weight = model[0].weight
        return model

    task = replace(PROBLEMS["blobs"](), build=build)
    learner = Learner(task, "cpu")
    trained = learner.train(learner.params(), Client(4, 0), LOCAL).params
    for name, p in in_steps_of_gradients(task, LOCAL).items():
        torch.testing.assert_close(trained[name], p, rtol=1e-5, atol=1e-6)
    assert steps == [True, False, False] * LOCAL.local_epochs


def test_a_group_steps_early_as_its_members_do(steps):
    learner = Learner(PROBLEMS["blobs"](), "cpu")
    start, members = learner.params(), (Client(4, 0), Client(8, 0))  # the second one has a quarter of the examples
    together = learner.train(start, Group(members, None), LOCAL).params
    assert steps == [True] * 2 * LOCAL.local_epochs
    for k, client in enumerate(members):
        for name, p in learner.train(start, client, LOCAL).params.items():
            torch.testing.assert_close(together[name][k], p, rtol=1e-5, atol=1e-6)


def test_whoever_changes_a_gradient_is_heard():
    def build() -> nn.Module:
        model = nn.Linear(4, 3)
        model.weight.register_hook(torch.zeros_like)
        return model

    learner = Learner(replace(PROBLEMS["blobs"](), build=build), "cpu")
    start = learner.params()
    trained = learner.train(start, Client(4, 0), LOCAL).params
    assert torch.equal(trained["weight"], start["weight"])
    assert not torch.equal(trained["bias"], start["bias"])


def test_what_is_not_trained_stays(steps):
    learner = Learner(PROBLEMS["blobs"](), "cpu")
    start = learner.params()
    trained = learner.train(start, Client(4, 0), LOCAL, only={"features.0.bias", "head.weight"}).params
    assert {name for name, p in trained.items() if not torch.equal(p, start[name])} == {
        "features.0.bias",
        "head.weight",
    }
    assert steps == [True] * LOCAL.local_epochs


@pytest.mark.parametrize(
    "options", [{"local_momentum": 0.5}, {"weight_decay": 0.1}, {"max_grad_norm": 1.0}, {"local_optimizer": "adam"}]
)
def test_only_plain_sgd_steps_early(options, steps):
    learner = Learner(PROBLEMS["blobs"](), "cpu")
    learner.train(learner.params(), Client(4, 0), replace(LOCAL, **options))
    assert not any(steps)
