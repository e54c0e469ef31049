"""LoRA of which B alone is trained: what an algorithm does to B is done to the product, noise and server steps too."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from serial_runs import without_page

from fedray.experiment import plan
from fedray.export import export
from fedray.learner import Learner
from fedray.peft.factors import Layer, layers_of
from fedray.runs import run

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
B = {"name": "lora", "rank": 2, "alpha": 3.0, "factors": "B"}
BOTH = {**B, "factors": "AB"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.saved(tiny_models.vit(), tmp_path_factory.mktemp("vit"))


def values(folder: Path, method: Any, **algorithm: Any) -> dict[str, Any]:
    made = tiny_models.configuration(folder, method=method)
    made["algorithm"] = {**made["algorithm"], **algorithm}
    return made


def trained(folder: Path, out: Path, method: Any, **algorithm: Any) -> dict[str, torch.Tensor]:
    with without_page():
        return load_file(run(values(folder, method, **algorithm), out=out).folder / "model.safetensors")


def layers(folder: Path, method: Any) -> list[tuple[Layer, torch.Tensor]]:
    """The layers, each with its A as it was drawn."""
    learner = Learner(plan(values(folder, method)).experiment.task, "cpu")
    return [(layer, learner.model.get_parameter(layer.name("A")).detach()) for layer in layers_of(learner.model)]


def test_b_and_the_head_are_all_that_travels(folder, tmp_path):
    with without_page():
        done = run(values(folder, B), out=tmp_path / "run")
    names = set(load_file(done.folder / "model.safetensors"))
    assert names == {layer.name("B") for layer, _ in layers(folder, B)} | {"head.weight", "head.bias"}
    assert done.final["bytes_up"] == 3 * 4 * (6 * 8 * 2 + 8 * 10 + 10)  # 3 blocks, q and v, of width 8


def test_fedavg_of_b_is_fedlora_by_ffa(folder, tmp_path):
    ours = trained(folder, tmp_path / "b", B)
    theirs = trained(folder, tmp_path / "ffa", BOTH, name="fedlora", averaging="ffa")
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-5, atol=1e-6)
    for layer, a in layers(folder, B):
        assert torch.equal(a, theirs[layer.name("A")])


def test_the_server_adam_makes_its_step_on_b(folder, tmp_path):
    """From B = 0 a first step of Adam is η·(1 − β₁)·g / (√v + τ), with g what FedAvg would have subtracted."""
    first = {"rounds": 1}
    plainly, adam = values(folder, B), values(folder, B, name="fedadam", server_lr=0.1, tau=0.01)
    with without_page():
        mean = load_file(run(plainly | first, out=tmp_path / "mean").folder / "model.safetensors")
        found = load_file(run(adam | first, out=tmp_path / "adam").folder / "model.safetensors")
    for layer, _ in layers(folder, B):
        g = -mean[layer.name("B")]
        expected = -0.1 * (0.1 * g) / ((0.99 * 0.01**2 + 0.01 * g**2).sqrt() + 0.01)
        torch.testing.assert_close(found[layer.name("B")], expected, rtol=1e-4, atol=1e-6)


def noisy(folder: Path, out: Path, method: Any, noise: float) -> dict[str, torch.Tensor]:
    privacy = {"name": "dp_client", "max_norm": 1.0, "noise_multiplier": noise}
    made = values(folder, method, name="dp_fedavg", privacy=privacy) | {"rounds": 1}
    with without_page():
        return load_file(run(made, out=out).folder / "model.safetensors")


def test_the_noise_of_dp_is_linear_in_the_update_if_b_alone_is_trained_and_else_is_not(folder, tmp_path):
    """Three noises of one seed, in proportion 0 : 1 : 2, move s·B·A in proportion too, but s·(B + N)·(A + M) not."""
    pytest.importorskip("dp_accounting")
    bent: dict[str, float] = {}
    for name, method in {"B": B, "AB": BOTH}.items():
        runs = [noisy(folder, tmp_path / f"{name}{z}", method, z) for z in (0.0, 1.0, 2.0)]
        off, size = 0.0, 0.0
        for layer, a in layers(folder, method):
            none, one, two = (layer.scale * r[layer.name("B")] @ r.get(layer.name("A"), a) for r in runs)
            off, size = off + float((two - 2 * one + none).norm()), size + float((one - none).norm())
            if name == "B":
                spread = (runs[1][layer.name("B")] - runs[0][layer.name("B")]).std()
                assert 0.15 < spread < 0.6  # 1/3, from sixteen draws
        bent[name] = off / size
    assert bent["B"] < 1e-5
    assert bent["AB"] > 0.1


def test_epsilon_is_reported_and_does_not_depend_on_what_is_trained(folder, tmp_path):
    pytest.importorskip("dp_accounting")
    found = []
    for method in (B, BOTH):
        made = values(folder, method, name="dp_fedavg", privacy={"name": "dp_client", "noise_multiplier": 2.0})
        with without_page():
            found.append(run(made, out=tmp_path / method["factors"]).final["epsilon"])
    assert found[0] == found[1] > 0


def test_a_run_of_b_alone_is_saved_with_its_a(folder, tmp_path):
    saved = trained(folder, tmp_path / "run", B)
    tensors = load_file(export(tmp_path / "run", tmp_path / "adapter") / "adapter_model.safetensors")
    for layer, a in layers(folder, B):
        inside = layer.name("A").removeprefix("features.trunk.").replace(".default", "")
        assert torch.equal(tensors[f"base_model.model.{inside}"], a)
        inside = layer.name("B").removeprefix("features.trunk.").replace(".default", "")
        assert torch.equal(tensors[f"base_model.model.{inside}"], saved[layer.name("B")])
    made = values(folder, BOTH)  # and another run may go on with both
    made["task"]["model"]["adapter"] = str(tmp_path / "adapter")
    start = Learner(plan(made).experiment.task, "cpu").params()
    assert all(torch.equal(start[name], p) for name, p in saved.items())


@pytest.mark.parametrize(
    ("method", "algorithm", "message"),
    [
        (
            B,
            {"name": "fedlora"},
            "trains B alone, whose mean is exact; give task.model.method.factors=AB, or algorithm",
        ),
        (BOTH, {"name": "fedlora", "server_optimizer": "adam"}, "has no option 'server_optimizer'"),
        (BOTH, {"name": "fedlora", "privacy": "dp_client"}, "has no option 'privacy'"),
        ({**B, "factors": "A"}, {}, "factors is 'A'"),
    ],
)
def test_what_does_not_go_together_says_so(folder, method, algorithm, message):
    with pytest.raises(ValueError, match=message):
        plan(values(folder, method, **algorithm))
