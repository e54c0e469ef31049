"""peft's own format: what a run leaves loads in peft, and what peft saved starts a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from serial_runs import without_page
from test_pretrained import normalised, pictures

from fedray import cli
from fedray.errors import ConfigError, DataError
from fedray.experiment import plan
from fedray.export import export
from fedray.learner import Learner
from fedray.models.clip import clip
from fedray.models.pretrained import pretrained
from fedray.peft import METHODS
from fedray.runs import run

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.saved(tiny_models.vit(), tmp_path_factory.mktemp("vit"))


def finished(values: dict[str, Any], out: Path) -> Path:
    with without_page():
        return run(values, out=out).folder


@pytest.fixture(scope="module")
def lora_run(folder, tmp_path_factory) -> Path:
    method = {"name": "lora", "rank": 2, "alpha": 3.0}
    return finished(tiny_models.configuration(folder, method=method), tmp_path_factory.mktemp("runs") / "lora")


@pytest.fixture
def adapter(lora_run, tmp_path) -> Path:
    return export(lora_run, tmp_path / "adapter")


def final_model(folder: Path) -> tuple[Any, torch.nn.Module, torch.Tensor]:
    from fedray import config

    task = plan(config.read(folder / "config.yaml")).experiment.task
    learner = Learner(task, "cpu")
    model = learner.load(load_file(folder / "model.safetensors")).eval()
    return task, model, task.prepare(task.test_examples(0, 8), None)["x"]


@pytest.mark.parametrize("method", [{"name": "lora", "rank": 2, "alpha": 3.0}, {"name": "ia3"}], ids=["lora", "ia3"])
@pytest.mark.parametrize("make", [tiny_models.vit, tiny_models.dinov2], ids=["vit", "dinov2"])
@pytest.mark.parametrize("layer", [None, 2])
def test_peft_loads_what_a_run_leaves(method, make, layer, tmp_path):
    from transformers import AutoModel

    values = tiny_models.configuration(tiny_models.saved(make(), tmp_path / "base"), method=method, layer=layer)
    done = finished(values, tmp_path / "run")
    assert cli.main(["export", str(done), str(tmp_path / "adapter")]) == 0
    base = AutoModel.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    _, model, x = final_model(done)
    call = model.features._call
    pixels = x.expand(-1, 3, -1, -1) * torch.tensor(call.scale).view(-1, 1, 1) + torch.tensor(call.shift).view(-1, 1, 1)
    if layer is None:
        torch.testing.assert_close(model.features(x), loaded(pixel_values=pixels).last_hidden_state[:, 0])
    sent = load_file(done / "model.safetensors")
    theirs = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
    ours = {
        name.replace("features.trunk", "base_model.model").replace(".default", ""): t
        for name, t in sent.items()
        if not name.startswith("head.")
    }
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    head = load_file(tmp_path / "adapter" / "head.safetensors")
    assert all(torch.equal(head[name], sent[f"head.{name}"]) for name in ("weight", "bias"))


def test_peft_loads_clips_image_tower_into_the_whole_model(tmp_path):
    from transformers import AutoModel

    base = tiny_models.saved(tiny_models.clip(), tmp_path / "base")
    done = finished(tiny_models.configuration(base, name="clip", method="lora"), tmp_path / "run")
    loaded = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), export(done, tmp_path / "adapter")).eval()
    adapted = [name for name, _ in loaded.named_parameters() if "lora_" in name]
    assert adapted
    assert all(".vision_model." in name for name in adapted)
    assert not (tmp_path / "adapter" / "head.safetensors").exists()  # there is no trained head
    _, model, x = final_model(done)
    call = model.features.tower._call
    pixels = x.expand(-1, 3, -1, -1) * torch.tensor(call.scale).view(-1, 1, 1) + torch.tensor(call.shift).view(-1, 1, 1)
    torch.testing.assert_close(model.features(x), loaded.get_image_features(pixel_values=pixels).pooler_output)
    again = clip(pictures(), path=str(base), method=METHODS["lora"], adapter=str(tmp_path / "adapter"))
    for name, p in final_model(done)[1].named_parameters():
        if p.requires_grad:
            assert torch.equal(p, again.get_parameter(name))


def test_a_run_starts_from_what_another_exported(folder, lora_run, adapter):
    method = {"name": "lora", "rank": 2, "alpha": 3.0}
    task = plan(tiny_models.configuration(folder, method=method, adapter=str(adapter))).experiment.task
    start, end = Learner(task, "cpu").params(), load_file(lora_run / "model.safetensors")
    assert start.keys() == end.keys()
    assert all(torch.equal(start[name], end[name]) for name in end)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_run_starts_from_what_peft_saved(folder, tmp_path, kind):
    """A folder of peft's own making, with a head, of a ViTForImageClassification."""
    from transformers import ViTForImageClassification

    torch.manual_seed(1)
    whole = ViTForImageClassification.from_pretrained(folder, num_labels=3).eval()
    options = {"modules_to_save": ["classifier"], "target_modules": ["q_proj", "v_proj"]}
    if kind == "lora":
        settings = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **options)
    else:
        settings = peft.IA3Config(feedforward_modules=[], init_ia3_weights=False, **options)
    theirs = peft.get_peft_model(whole, settings).eval()
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    chosen = {"rank": 2} if kind == "lora" else {"targets": ["q_proj", "v_proj"], "feedforward": []}
    method = lambda trunk: METHODS[kind](trunk, **chosen)  # noqa: E731
    data = pictures((3, 8, 8))
    model = pretrained(data, path=str(folder), method=method, adapter=str(tmp_path)).eval()
    call, x = model.features._call, normalised(data)
    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (call.scale, call.shift))
    torch.testing.assert_close(model(x), theirs(pixel_values=x * scale + shift).logits)


# --- mistakes ---


def edit(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rename(folder: Path, before: str, after: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name.replace(before, after): t for name, t in load_file(file).items()}, file)


def drop(folder: Path, part: str) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if part not in name}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, r=4), r"whose rank is 4, while method.rank is 2; give task.model.method.rank=4"),
        (lambda f: edit(f, lora_alpha=8), r"alpha is 8, while method.alpha is 3.0; give task.model.method.alpha=8"),
        (lambda f: edit(f, peft_type="IA3"), "of ia3; the method is lora: the two must agree"),
        (lambda f: edit(f, peft_type="VERA"), "of vera; the method is lora"),
        (lambda f: (f / "adapter_config.json").unlink(), "which has no adapter_config.json; give a folder"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "which has no adapter_model.safetensors"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is not JSON"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"torn"), "adapter_model.safetensors cannot be read"),
        (lambda f: rename(f, "layers.1.attention.q_proj", "x.attention.attention.query"), "before version 5"),
        (lambda f: drop(f, "layers.2.attention.v_proj.lora_B"), "lacks layers.2.attention.v_proj.lora_B.*targets"),
        (lambda f: rename(f, "layers.2", "layers.7"), r"lacks layers.2.attention.q_proj.lora_A.* and 3 more"),
        (lambda f: save_file({"weight": torch.zeros(4, 8), "bias": torch.zeros(4)}, f / "head.safetensors"),
         r"head.bias has shape \(4,\), this model's \(3,\)"),
        (lambda f: save_file({"weight": torch.zeros(3, 8)}, f / "head.safetensors"), r"has a head of \['weight'\]"),
    ],
)  # fmt: skip
def test_a_folder_that_does_not_fit_says_what_to_do(folder, adapter, tmp_path, damage, message):
    broken = Path(shutil.copytree(adapter, tmp_path / "broken"))
    (broken / "head.safetensors").unlink()  # of ten classes
    damage(broken)
    with pytest.raises(DataError, match=message):
        pretrained(
            pictures(),
            path=str(folder),
            method=lambda trunk: METHODS["lora"](trunk, rank=2, alpha=3.0),
            adapter=str(broken),
        )


def test_tensors_of_another_width_are_refused(adapter, tmp_path):
    wider = tiny_models.saved(tiny_models.vit(hidden_size=12), tmp_path / "wider")
    method = lambda trunk: METHODS["lora"](trunk, rank=2, alpha=3.0)  # noqa: E731
    with pytest.raises(DataError, match=r"has shape .*; the base model and the classes must be those"):
        pretrained(pictures(), path=str(wider), method=method, adapter=str(adapter))


def test_an_adapter_goes_with_the_methods_of_peft_only(folder, adapter):
    with pytest.raises(DataError, match="the method must be lora, ia3 or soft_prompt"):
        pretrained(pictures(), path=str(folder), method=METHODS["bias"], adapter=str(adapter))


def test_what_has_no_format_in_peft_is_not_exported(folder, tmp_path, capsys):
    done = finished(tiny_models.configuration(folder, method="bias"), tmp_path / "run")
    assert cli.main(["export", str(done), str(tmp_path / "adapter")]) == 2
    assert "not tuned by lora, ia3 or soft_prompt" in capsys.readouterr().err
    (done / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"has no model\.safetensors, which the last round writes; go on with"):
        export(done, tmp_path / "adapter")
    values = tiny_models.configuration(folder)
    values["task"]["model"] = "softmax"
    with pytest.raises(ConfigError, match="trained no pre-trained model"):
        export(finished(values, tmp_path / "other"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
