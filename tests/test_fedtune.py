"""FedTune's study: few-shot pools, what the frozen text tower makes of zero shots, and what is compared with what."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from safetensors.torch import load_file
from serial_runs import without_page

from fedray import config
from fedray.experiment import plan
from fedray.learner import Learner
from fedray.metrics.accuracy import own_accuracy
from fedray.runs import run
from fedray.sweep import sweep

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
FOLDER = Path(__file__).parents[1] / "experiments" / "fedtune"
METHODS = {"prompt": ("prompts",), "adapter": ("adapter",), "lora": ("lora_A", "lora_B"), "bias": ("bias",)}
GROUPS = ("animals", "food", "travel")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    """Pictures of 24 × 24 pixels of unbalanced classes, which two vendors have drawn."""
    draw = np.random.default_rng(0)
    code = np.repeat(np.arange(60), 2)
    group = np.minimum(code % 4, 2)
    x = draw.integers(0, 120, (120, 24, 24, 3), dtype=np.uint8)
    x[np.arange(120), :, :, group] += 100
    columns = {"domain": np.tile([0, 1], 60), "code": np.array([f"u{c}" for c in code])}
    name = np.array([f"{GROUPS[g]} {c}" for g, c in zip(group, code, strict=True)])
    path = tmp_path_factory.mktemp("emoji") / "emoji64.npz"
    np.savez(path, x=x, group=group, groups=np.array(GROUPS), name=name, **columns)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    return tiny_models.saved(tiny_models.clip(), tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def study(emoji, clip) -> Any:
    """The shipped configuration on tiny data, with further overrides."""

    def values(*overrides: str) -> dict[str, Any]:
        small = ["shots=4", "task.data.test=20", "task.data.of.public=20", "task.partition.num_clients=3", "cohort=3"]
        paths = [f"emoji={emoji}", f"path={clip}"]
        return config.read(FOLDER / "small.yaml", [*small, *paths, *overrides])

    return values


def trained(values: dict[str, Any]) -> set[str]:
    return set(Learner(plan(values).experiment.task, "cpu").params())


@pytest.mark.parametrize("shots", [1, 4, 7])
def test_the_clients_together_hold_k_pictures_of_each_class_and_each_picture_once(study, shots):
    task = plan(study(f"shots={shots}")).experiment.task
    assert np.bincount(task.data.train["y"], minlength=3).tolist() == [shots] * 3
    indices = task.holdings()["indices"]
    assert sorted(indices) == list(range(3 * shots))
    assert task.holdings()["label_counts"].sum(0).tolist() == [shots] * 3


def test_no_emoji_of_the_recipe_is_at_a_client_or_in_the_test(study, emoji):
    recipe = OmegaConf.load(FOLDER / "recipes" / "emoji.yaml")
    whole = OmegaConf.load(FOLDER / "small.yaml").task.data.of
    assert recipe.data.public == whole.public
    assert {k: v for k, v in recipe.data.of.items() if k != "path"} == {
        k: v for k, v in whole.of.items() if k != "path"
    }
    values = study("task.data.per_class=null")
    private = plan(values).experiment.task.data
    values["task"]["data"]["of"]["part"] = "public"
    public = plan(values).experiment.task.data
    seen = set(public.train["code"])
    assert len(seen) == 20
    assert not seen & set(private.train["code"])
    assert not seen & set(private.test["code"])
    assert not set(private.train["code"]) & set(private.test["code"])


@pytest.mark.parametrize(("method", "marks"), METHODS.items())
@pytest.mark.parametrize("kind", ["clip", "pretrained"])
def test_only_the_methods_tensors_of_the_image_tower_travel_and_a_new_head(study, kind, method, marks):
    names = trained(study(f"method={method}", f"kind={kind}"))
    head = {name for name in names if name.startswith("head.")}
    assert head == (set() if kind == "clip" else {"head.weight", "head.bias"})
    tower = "features.tower.trunk." if kind == "clip" else "features.trunk."
    assert names - head
    assert all(name.startswith(tower) and any(mark in name for mark in marks) for name in names - head)


@pytest.mark.parametrize("method", ["bias", "adapter", "lora", "layernorm", "full"])
def test_round_0_is_zero_shot_by_explicit_cosines(study, clip, tmp_path, method):
    """Pictures and texts through transformers' own model, and their cosines by hand."""
    values = study(f"method={method}", "rounds=1")
    with without_page():
        first = run(values, out=tmp_path / "run").metrics[0]
    task, plain = plan(values).experiment.task, transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    texts = tokenizer([f"a photo of a {name}" for name in GROUPS], padding=True, truncation=True, return_tensors="pt")
    x = torch.from_numpy(np.array(task.data.test["x"])).float() / 255
    x = F.interpolate(x, (8, 8), mode="bilinear", align_corners=False, antialias=True)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)))
    with torch.no_grad():
        v = plain.get_image_features(pixel_values=(x - mean) / std).pooler_output
        t = plain.get_text_features(input_ids=texts["input_ids"]).pooler_output
    cosine = F.cosine_similarity(v[:, None], t[None], dim=-1)
    hits = cosine.argmax(1).numpy() == task.data.test["y"]
    assert first["round"] == 0
    assert first["test_accuracy"] == pytest.approx(hits.mean())


@pytest.mark.parametrize("kind", ["clip", "pretrained"])
def test_the_three_settings_train_as_many_epochs_on_the_same_pool(study, tmp_path, kind):
    found, pools = {}, []
    for setting in ("fedavg", "local_only", "centralized"):
        values = study(f"setting={setting}", f"kind={kind}")
        assert values["rounds"] * values["algorithm"]["local_epochs"] == 20
        pools.append(plan(values).experiment.task.holdings()["data_crc32"].tolist())
        values["rounds"], values["algorithm"]["local_epochs"] = 1, 1
        with without_page():
            found[setting] = run(values, out=tmp_path / setting).final
    assert pools[0] == pools[1] == pools[2]
    assert found["fedavg"]["bytes_up"] > 0
    assert found["local_only"]["bytes_up"] == found["centralized"]["bytes_up"] == 0
    assert found["local_only"]["worst_test_accuracy"] <= found["local_only"]["test_accuracy"]
    assert found["local_only"]["worst_own_accuracy"] <= found["local_only"]["own_accuracy"]


def test_one_command_compares_the_settings_and_the_table_says_what_they_came_to(study, tmp_path):
    values = study("rounds=1", "algorithm.local_epochs=1", "method=bias")
    with without_page():
        outcomes = sweep(values, ["algorithm.name=fedavg,local_only,centralized", "seed=0,1"], tmp_path)
    assert not [outcome.error for outcome in outcomes if outcome.error]
    place = importlib.util.spec_from_file_location("fedtune_table", FOLDER / "table.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    head, _, row = module.table(tmp_path).splitlines()
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    final = {outcome.trial.folder.name: outcome.final for outcome in outcomes}
    runs = [final[f"algorithm.name=fedavg,seed={seed}"]["test_accuracy"] for seed in (0, 1)]
    assert cells["federated"].startswith(f"{np.mean(runs):.3f} ± {np.std(runs, ddof=1):.3f}")
    worst = [final[f"algorithm.name=local_only,seed={seed}"]["worst_test_accuracy"] for seed in (0, 1)]
    assert cells["worst alone"].startswith(f"{np.mean(worst):.3f}")
    assert "–" not in row


def test_own_accuracy_is_accuracy_on_a_test_set_of_ones_own_shares():
    """A test set that is drawn again with the client's shares, by counting."""
    draw = np.random.default_rng(1)
    confusion, counts = draw.integers(1, 9, (4, 4)), np.array([3, 0, 1, 6])
    every = [(true, guess) for true in range(4) for guess in range(4) for _ in range(confusion[true, guess])]
    resampled = [(t, g) for t, g in every for _ in range(counts[t] * 1000 // confusion[t].sum())]
    hits = np.mean([t == g for t, g in resampled])
    assert own_accuracy(confusion, counts) == pytest.approx(hits, abs=0.01)
    np.testing.assert_allclose(own_accuracy(confusion, confusion.sum(1)), confusion.trace() / confusion.sum())
    together = own_accuracy(confusion, np.stack([counts, confusion.sum(1)]))
    assert together.tolist() == [own_accuracy(confusion, counts), own_accuracy(confusion, confusion.sum(1))]


def test_a_class_without_test_examples_has_no_part_in_ones_own_accuracy():
    confusion = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 4]])
    assert own_accuracy(confusion, np.array([2, 100, 2])) == 0.75
    assert np.isnan(own_accuracy(confusion, np.array([0, 5, 0])))


def test_the_papers_configuration_runs_on_a_clip_of_its_kind(clip, tmp_path):
    """With pictures of handwritten digits instead of CIFAR-10, and a CLIP of a few thousand parameters."""
    tiny = [f"path={clip}", "rounds=1", "cohort=2", "shots=5", "backend.name=serial", "task.partition.num_clients=2"]
    data = "task.data={name: subset, of: digits, per_class: 5, test: 30}"
    values = config.read(FOLDER / "paper.yaml", [*tiny, data, "task.augment=none"])
    with without_page():
        done = run(values, out=tmp_path / "run")
    assert done.final["test_accuracy"] <= 1
    assert all(".bias" in name for name in load_file(done.folder / "model.safetensors"))


def test_the_recipe_makes_a_clip_that_a_run_starts_from(study, emoji, tmp_path):
    sizes = ["vision.size=24", "vision.width=16", "vision.layers=1", "vision.heads=2", "text.width=16", "text.layers=1"]
    sizes += ["text.heads=2", "embedding=8", "training.steps=2", "training.batch=8", "data.public=20", "text.length=12"]
    command = [sys.executable, str(FOLDER / "train.py"), str(FOLDER / "recipes" / "emoji.yaml"), str(tmp_path / "made")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    overrides = [*sizes, f"data.of.path={emoji}", "leave_out={domain: [1]}", "text.vocabulary=600"]
    subprocess.run([*command, *overrides], check=True, capture_output=True, env=environment)
    said = OmegaConf.load(tmp_path / "made" / "trained.json")
    assert said.pictures == 20  # of twenty emoji, by one of the two vendors
    made = Learner(plan(study(f"path={tmp_path / 'made'}")).experiment.task, "cpu")
    metrics = made.test(made.params())
    assert 0 <= metrics["test_accuracy"] <= 1
