"""What is trained on a frozen part of a model: its activations are computed once, and nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from problems import PROBLEMS

from fedray import runs
from fedray.algorithm import Client
from fedray.backends.serial import SerialBackend
from fedray.evaluation import evaluate
from fedray.experiment import plan
from fedray.frozen import past_frozen
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.models.pretrained import Images
from fedray.sweep import sweep

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.saved(tiny_models.vit(), tmp_path_factory.mktemp("vit"))


def _counted(seen: list[int], forward: Any) -> Any:
    def counted(self: Images, tower: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return forward(self, tower, x)

    return counted


def test_with_a_frozen_backbone_every_example_passes_it_once(folder, monkeypatch):
    values = tiny_models.configuration(folder, method="head") | {"rounds": 4, "cohort": 4, "group": 1}
    made = plan(values).experiment
    seen: list[int] = []
    backend = SerialBackend(made.task)
    monkeypatch.setattr(Images, "__call__", _counted(seen, Images.__call__))
    state = made.algorithm.init(Learner(made.task, "cpu").params())
    before = sum(seen)  # trials of single examples
    cohort = [Client(id=i, seed=i, slot=i) for i in range(4)]
    for _ in range(3):
        state, _ = made.algorithm.apply(state, cohort, backend)
        evaluate(made.task, state.params, backend)
    assert sum(seen) - before == sum(made.task.sizes[:4]) + made.task.num_test_examples


def test_trials_of_a_sweep_share_activations(folder, tmp_path, monkeypatch):
    values = tiny_models.configuration(folder, method="head") | {"cohort": 6}
    seen: list[int] = []
    monkeypatch.setattr(Images, "__call__", _counted(seen, Images.__call__))
    [first, second] = sweep(values, ["algorithm.local_lr=0.1,0.2"], tmp_path / "sweep")
    assert (first.error, second.error) == ("", "")
    assert sum(count for count in seen if count >= 20) == 120 + 60  # fewer are trials of the model
    alone = runs.run(values, ["algorithm.local_lr=0.2"], tmp_path / "alone").folder
    assert sum(count for count in seen if count >= 20) == 2 * (120 + 60)
    assert (second.trial.folder / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


def test_examples_from_elsewhere_pass_the_backbone_like_the_clients_own(folder):
    """Such as synthetic ones, or those of an attack."""
    task = plan(tiny_models.configuration(folder, method="head")).experiment.task
    learner = Learner(task, "cpu")
    assert learner.task is not task
    given, client = task.examples(1), Client(id=1, seed=3)
    assert given["x"].dtype == torch.uint8
    start = learner.params()
    own = learner.train(start, client, LocalTraining())
    other = learner.train(start, client, LocalTraining(), examples=given)
    for name, p in own.params.items():
        assert torch.equal(other.params[name], p)
    found, wanted = (learner.evaluate(own.params, examples) for examples in (given, learner.task.examples(1)))
    assert torch.equal(found["confusion"], wanted["confusion"])
    assert torch.equal(learner.features(own.params, given), learner.task.examples(1)["x"])


LAST = {"name": "last_blocks", "count": 1}


@pytest.mark.parametrize("method", ["head", LAST], ids=str)
@pytest.mark.parametrize("kind", ["vit", "dinov2", "clip"])
def test_a_frozen_backbone_on_the_way_changes_nothing_but_rounding(kind, method, tmp_path, monkeypatch):
    folder = tiny_models.saved(getattr(tiny_models, kind)(), tmp_path)
    made = plan(tiny_models.configuration(folder, method=method)).experiment
    learner = Learner(made.task, "cpu")
    assert learner.task is not made.task  # it begins after what is frozen
    local, client = LocalTraining(local_lr=0.05, batch_size=8, local_epochs=2), Client(id=1, seed=3)
    cached = learner.train(learner.params(), client, local)
    tests = learner.test(cached.params)
    monkeypatch.setattr("fedray.learner.past_frozen", lambda task, model: (task, model))
    whole = Learner(made.task, "cpu")
    assert whole.params().keys() == learner.params().keys()
    plain = whole.train(whole.params(), client, local)
    for name, p in plain.params.items():
        torch.testing.assert_close(cached.params[name], p, rtol=1e-4, atol=1e-5)
    assert tests == pytest.approx(whole.test(cached.params), rel=1e-4)


def test_blocks_before_the_first_trained_one_are_passed_once(folder, monkeypatch):
    made = plan(tiny_models.configuration(folder, method=LAST) | {"group": 1}).experiment
    learner = Learner(made.task, "cpu")
    before = {name for name, _ in made.task.model().named_parameters()}
    left = {name for name, _ in learner.model.named_parameters()}
    assert {name.split(".")[2] for name in before - left} == {"embeddings", "layers"}
    assert {name.split(".")[3] for name in left if ".layers." in name} == {"2"}
    seen: list[int] = []
    monkeypatch.setattr(Images, "__call__", _counted(seen, Images.__call__))
    local = LocalTraining(local_lr=0.05, batch_size=8, local_epochs=3)
    for client in (Client(id=1, seed=3), Client(id=2, seed=4), Client(id=1, seed=5)):
        learner.train(learner.params(), client, local)
    assert sum(seen) == sum(made.task.sizes[1:3])


@pytest.mark.parametrize("method", ["full", "bias", "prompt", "adapter", "lora"])
def test_where_something_is_trained_from_the_first_block_on_nothing_is_cut_off(folder, method):
    made = plan(tiny_models.configuration(folder, method=method)).experiment
    assert Learner(made.task, "cpu").task is made.task


def test_a_model_that_is_more_than_its_head_on_its_features_is_left_whole():
    class Doubled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = torch.nn.Linear(4, 4).requires_grad_(False)
            self.head = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(2 * self.features(x))

    class OfDoubled:
        def __getattr__(self, name: str) -> Any:
            return getattr(PROBLEMS["blobs"](), name)

        def model(self) -> torch.nn.Module:
            torch.manual_seed(0)
            return Doubled()

    task: Any = OfDoubled()
    model = task.model()
    assert past_frozen(task, model) == (task, model)
