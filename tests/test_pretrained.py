"""Pre-trained classifiers: what goes in, strict loading, and federated runs that send and change nothing else."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import torch.nn.functional as F
from needs import asset
from safetensors.torch import load_file, save_file
from serial_runs import measured, without_page

from fedray import cli
from fedray.algorithm import Client
from fedray.backends.ray import workers
from fedray.data.dataset import Dataset
from fedray.errors import ConfigError, DataError
from fedray.experiment import plan
from fedray.groups import Group
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.models import hugging_face
from fedray.models.pretrained import pretrained
from fedray.peft import METHODS
from fedray.runs import run

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.saved(tiny_models.vit(), tmp_path_factory.mktemp("vit"))


@pytest.fixture
def own_copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "vit"))


def pictures(shape: tuple[int, ...] = (1, 8, 8)) -> Dataset:
    rng = np.random.default_rng(0)
    part = {"x": rng.integers(0, 256, (6, *shape), np.uint8), "y": np.arange(6) % 3}
    mean, std = [0.1, 0.2, 0.3][: shape[0]], [0.5, 0.6, 0.7][: shape[0]]
    return Dataset("pictures", part, part, ("a", "b", "c"), tuple(mean), tuple(std))


def normalised(data: Dataset) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return (torch.from_numpy(np.array(data.train["x"])) / 255 - mean) / std


# --- what goes in and comes out ---


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 5, 6), (3, 20, 20)])
def test_a_tower_sees_pixels_as_it_was_trained_with(folder, shape):
    data = pictures(shape)
    model = pretrained(data, path=str(folder), method=METHODS["head"], mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4]).eval()
    pixels = torch.from_numpy(np.array(data.train["x"])).float() / 255
    if shape[1:] != (8, 8):
        pixels = F.interpolate(pixels, (8, 8), mode="bilinear", antialias=True)
    pixels = pixels.expand(-1, 3, -1, -1)
    wanted = (pixels - torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(-1, 1, 1)
    expected = tiny_models.vit()(pixel_values=wanted).last_hidden_state[:, 0]
    torch.testing.assert_close(model.features(normalised(data)), expected, rtol=1e-4, atol=1e-5)


def test_forward_is_head_of_features(folder):
    data = pictures()
    model = pretrained(data, path=str(folder)).eval()
    z = model.features(normalised(data))
    assert z.shape == (6, 8)
    assert torch.equal(model(normalised(data)), model.head(z))
    assert {name.partition(".")[0] for name, _ in model.named_parameters()} == {"features", "head"}


def test_a_model_says_what_it_was_normalised_with(own_copy):
    assert hugging_face.own_moments(str(own_copy), "vit")[0] == (0.5, 0.5, 0.5)
    assert hugging_face.own_moments(str(own_copy), "dinov2")[0] == (0.485, 0.456, 0.406)
    assert hugging_face.own_moments(str(own_copy), "clip")[0] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    says = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (own_copy / "preprocessor_config.json").write_text(json.dumps(says))
    hugging_face.own_moments.cache_clear()
    assert hugging_face.own_moments(str(own_copy), "vit") == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@pytest.mark.parametrize("make", [tiny_models.vit, tiny_models.dinov2, tiny_models.clip])
def test_towers_take_other_sizes_and_pool_as_told(make, tmp_path):
    path, data = str(tiny_models.saved(make(), tmp_path)), pictures((3, 16, 12))
    x = normalised(data)
    for method in ("head", "prompt"):
        made = {p: pretrained(data, path=path, method=METHODS[method], image_size=16, pool=p) for p in ("cls", "mean")}
        features = {p: model.eval().features(x) for p, model in made.items()}
        assert all(z.shape == (6, 8) for z in features.values())
        assert not torch.allclose(features["cls"], features["mean"])
        assert made["mean"].features._call.patches == 16


def test_a_masked_autoencoder_is_read_as_the_vit_that_its_encoder_is(tmp_path):
    plain, data = tiny_models.mae(), pictures()
    model = pretrained(data, path=str(tiny_models.saved(plain, tmp_path)), mean=[0.5] * 3, std=[0.5] * 3).eval()
    call, x = model.features._call, normalised(data).expand(-1, 3, -1, -1)
    pixels = x * torch.tensor(call.scale).view(-1, 1, 1) + torch.tensor(call.shift).view(-1, 1, 1)
    in_order = torch.arange(4.0).expand(len(x), -1)  # the mask's noise: no patch is dropped, none is moved
    expected = plain.vit(pixels, noise=in_order).last_hidden_state[:, 0]
    torch.testing.assert_close(model.features(normalised(data)), expected)
    assert not any("decoder" in name for name, _ in model.named_parameters())


def test_features_of_an_earlier_layer_leave_the_later_ones_out(folder):
    data = pictures()
    model = pretrained(data, path=str(folder), layer=2, method=METHODS["full"]).eval()
    assert not any("layers.2" in name for name, _ in model.named_parameters())
    plain = tiny_models.vit()
    x = model.features._call  # the pixels, as the tower sees them
    pixels = normalised(data).expand(-1, 3, -1, -1) * torch.tensor(x.scale).view(-1, 1, 1)
    hidden = plain.embeddings(pixels + torch.tensor(x.shift).view(-1, 1, 1))
    for block in plain.layers[:2]:
        hidden = block(hidden)
    torch.testing.assert_close(model.features(normalised(data)), plain.layernorm(hidden)[:, 0])


def test_random_weights_follow_the_seed_and_are_none_of_the_saved_ones(folder):
    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        model = pretrained(pictures(), path=str(folder), weights="random")
        return torch.nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


# --- loading ---


def test_a_model_is_read_once_a_process_and_its_frozen_part_is_held_once(own_copy):
    path, data = str(own_copy), pictures()
    torch.manual_seed(0)
    first = pretrained(data, path=path, method=METHODS["lora"])
    (own_copy / "model.safetensors").unlink()
    torch.manual_seed(0)
    second = pretrained(data, path=path, method=METHODS["lora"])
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name  # the second drew what the first drew, though only that one read a file
        assert (a.data_ptr() == b.data_ptr()) == (not a.requires_grad), name


def test_what_was_written_in_place_is_read_again(own_copy):
    path, data = str(own_copy), pictures()
    first = pretrained(data, path=path, method=METHODS["head"])
    before = first.features.trunk.layernorm.weight.clone()
    with torch.no_grad():
        first.features.trunk.layernorm.weight.add_(1)
    assert torch.equal(pretrained(data, path=path).features.trunk.layernorm.weight, before)


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def renamed(tensors: dict[str, torch.Tensor]) -> None:
    """Every tensor under a name that no version of transformers knows."""
    for name in list(tensors):
        tensors[f"module.base_encoder.{name}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("layernorm.weight"),
            "is not what its config.json says: its weights lack layernorm.weight; restore",
        ),
        (lambda t: t.update({"surplus.weight": torch.zeros(2)}), "a ViTModel has no place for surplus.weight; restore"),
        (renamed, r"its weights lack embeddings\.cls_token, .* and \d+ more"),
        (lambda t: t.update({"layernorm.bias": torch.zeros(3)}), "cannot be loaded: .*size mismatch|.*mismatch"),
    ],
    ids=["missing", "unexpected", "renamed", "misshapen"],
)
def test_tensors_that_do_not_fit_are_an_error(own_copy, change, message):
    rewrite(own_copy, change)
    with pytest.raises(DataError, match=message):
        pretrained(pictures(), path=str(own_copy))


def test_a_checkpoint_with_another_head_and_without_a_pooler_is_taken(tmp_path):
    from transformers import ViTForImageClassification

    model = tiny_models.drawn(ViTForImageClassification, tiny_models.vit().config)
    made = pretrained(pictures(), path=str(tiny_models.saved(model, tmp_path)))
    for (name, a), (_, b) in zip(made.features.trunk.named_parameters(), model.vit.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_names_of_older_transformers_are_converted(own_copy):
    on_disk = load_file(own_copy / "model.safetensors").keys()
    assert any("attention.attention.query" in name for name in on_disk)  # what save_pretrained writes for ViT
    made = pretrained(pictures(), path=str(own_copy)).features.trunk
    plain = tiny_models.vit()
    assert torch.equal(made.layers[1].attention.q_proj.weight, plain.layers[1].attention.q_proj.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 10}, "image_size is 10; it must be a multiple of 4, the size of a patch"),
        ({"layer": 4}, "layer is 4; it must be between 1 and 3"),
        ({"mean": [0.5]}, r"mean is \[0.5\]; it must be 3 numbers"),
        ({"std": [0.5, 0.0, 0.5]}, r"std is \[0.5, 0.0, 0.5\]; it must be 3 numbers, and deviations positive"),
        (
            {"path": "nowhere/to/be/found"},
            "nowhere/to/be/found has no model configuration .*; give a hub id, or a folder",
        ),
    ],
)
def test_impossible_options_say_what_to_do(folder, options, message):
    with pytest.raises(ValueError, match=message):
        pretrained(pictures(), **({"path": str(folder)} | options))


def test_a_model_of_images_refuses_what_is_none(folder, tmp_path):
    part = {"x": np.zeros((4, 5), np.float32), "y": np.arange(4)}
    vectors = Dataset("vectors", part, part, tuple("abcd"), (0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"path names a model of images; vectors has examples of shape \(5,\)"):
        pretrained(vectors, path=str(folder))
    saved = tiny_models.saved(tiny_models.clip().text_model, tmp_path)
    with pytest.raises(ValueError, match="path names a CLIPTextModel, which takes no images"):
        pretrained(pictures(), path=str(saved))


# --- runs ---


def test_mistakes_say_where_they_stand(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(json.dumps(tiny_models.configuration(folder, method="lora")))
    for override, message in {
        "task.model.method.rank=0": "task.model.method.rank is 0; it must be >= 1",
        "task.model.method=lorra": "task.model.method.name is 'lorra'; did you mean 'lora'?",
        "task.model.image_size=9": "task.model.image_size is 9; it must be a multiple of 4",
        "task.data.train=0": "task.data.train is 0; it must be between 1 and",
    }.items():
        assert cli.main(["run", "run.yaml", override]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"coop", "soft_prompt"}))
def test_only_what_is_trained_travels_and_only_that_changes(name, folder, tmp_path):
    values = tiny_models.configuration(folder, method=name)
    task = plan(values).experiment.task
    before = {key: p.detach().clone() for key, p in task.model().named_parameters()}
    with without_page():
        done = run(values, out=tmp_path / "run")
    after = load_file(done.folder / "model.safetensors")
    chosen = {key: p for key, p in task.model().named_parameters() if p.requires_grad}
    assert after.keys() == chosen.keys()
    assert {"head.weight", "head.bias"} <= chosen.keys()
    size = sum(p.numel() * p.element_size() for p in chosen.values())
    for record in done.metrics[1:]:
        assert record["bytes_up"] == record["bytes_down"] == 3 * size
    assert not torch.equal(after["head.weight"], before["head.weight"])
    assert all(torch.equal(p, before[key]) for key, p in task.model().named_parameters())  # what all models share


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"coop", "soft_prompt"}))
def test_training_leaves_the_frozen_part_as_it_was_to_the_bit(name, folder):
    learner = Learner(plan(tiny_models.configuration(folder, method=name)).experiment.task, "cpu")
    before = {key: p.detach().clone() for key, p in learner.model.named_parameters()}
    learner.train(learner.params(), Client(id=1, seed=1), LocalTraining(local_lr=0.1, weight_decay=0.1))
    for key, p in learner.model.named_parameters():
        assert torch.equal(p, before[key]) == (not p.requires_grad), key


@pytest.mark.parametrize("name", ["bias", "lora", "prompt"])
def test_the_number_of_shares_changes_no_byte(name, folder, tmp_path):
    results = []
    for shares in (1, 2, 3):
        values = tiny_models.configuration(folder, method=name)
        values["backend"]["num_shares"] = shares
        with without_page():
            done = run(values, out=tmp_path / str(shares))
        results.append(((done.folder / "model.safetensors").read_bytes(), measured(done.folder)))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", ["bias", "lora", "adapter"])
def test_clients_train_together_as_they_do_alone_but_for_rounding(name, tmp_path):
    folder = tiny_models.saved(tiny_models.vit(hidden_dropout_prob=0.0), tmp_path / "vit")
    learner = Learner(plan(tiny_models.configuration(folder, method=name)).experiment.task, "cpu")
    start, local = learner.params(), LocalTraining(local_lr=0.05, batch_size=8)
    members = (Client(id=0, seed=5), Client(id=3, seed=6))
    together = learner.train(start, Group(members, None), local)
    for k, client in enumerate(members):
        alone = learner.train(start, client, local)
        for key, p in alone.params.items():
            torch.testing.assert_close(together.params[key][k], p, rtol=1e-3, atol=1e-4)


def test_a_transformer_trained_with_its_class_token_says_that_clients_train_one_by_one(tmp_path):
    folder = tiny_models.saved(tiny_models.vit(hidden_dropout_prob=0.0), tmp_path / "vit")
    values = tiny_models.configuration(folder, method="full")
    assert plan(values).experiment.execution.group == 1
    with pytest.raises(ConfigError, match=r"group is 2.*Embeddings\) has params that cannot be stacked; set group=1"):
        plan({**values, "group": 2})


def test_ray_workers_compute_the_same(folder, tmp_path, ray_local):
    results = []
    for backend in ({"name": "serial"}, {"name": "ray", "num_workers": 2}):
        values = tiny_models.configuration(folder, method="bias") | {"backend": backend}
        with without_page():
            results.append((run(values, out=tmp_path / backend["name"]).folder / "model.safetensors").read_bytes())
    assert results[0] == results[1]


def mapping_of_a_frozen_tensor(learner: Learner, _: int) -> str:
    """The line of the memory map that the largest frozen tensor lies in."""
    address = max((p for p in learner.model.parameters() if not p.requires_grad), key=torch.numel).data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= address < last:
            return line
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the memory map is read from Linux's /proc")
def test_a_frozen_backbone_is_held_once_for_all_workers_of_a_node(tmp_path, ray_local):
    folder = tiny_models.saved(tiny_models.vit(intermediate_size=20_000), tmp_path / "vit")  # small ones are not shared
    task = plan(tiny_models.configuration(folder, method="bias")).experiment.task
    with workers(task, cohort=2, num_workers=2) as backend:
        found = backend.map(mapping_of_a_frozen_tensor, [0, 1])
    assert all("plasma" in line or "/dev/shm" in line for line in found), found
    assert "plasma" not in mapping_of_a_frozen_tensor(Learner(task, "cpu"), 0)


def test_moon_compares_the_features_of_a_pre_trained_model(folder, tmp_path):
    values = tiny_models.configuration(folder, method="bias")
    values["algorithm"]["name"] = "moon"
    with without_page():
        assert run(values, out=tmp_path / "run").finished


def test_without_transformers_a_message_says_what_to_install(monkeypatch, folder):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedray\[peft\]'"):
        pretrained(pictures(), path=str(folder))


def test_a_real_model_is_what_transformers_makes_of_it():
    from transformers import AutoModel

    path, data = asset("dinov2-small"), pictures((3, 28, 28))
    plain = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    model = pretrained(data, path=path, method=METHODS["lora"], image_size=28).eval()
    assert model.head.in_features == 384
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 12 * 2 * 2 * 8 * 384 + 3 * 385
    scale, shift = (torch.tensor(v).view(-1, 1, 1) for v in (model.features._call.scale, model.features._call.shift))
    x = normalised(data)
    expected = plain(pixel_values=x * scale + shift).pooler_output
    torch.testing.assert_close(model.features(x), expected)
