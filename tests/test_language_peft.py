"""A causal language model tuned by PEFT: what travels, what LoRA's averages do to it, and peft's own format."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file
from serial_runs import measured, without_page

from fedray import config
from fedray.errors import DataError
from fedray.experiment import plan
from fedray.export import export
from fedray.learner import Learner
from fedray.models import LANGUAGE_MODELS
from fedray.peft import METHODS
from fedray.runs import run

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
LORA = {"name": "lora", "rank": 2, "alpha": 3.0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, word in {"ann": "spam ", "bob": "ham and ", "cy": "eggs ", "dee": "beans. "}.items():
        (folder / f"{name}.txt").write_text(word * 40)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A GPT-2 of bytes, with dropout and a head that is tied to its embeddings."""
    path = tmp_path_factory.mktemp("gpt2")
    settings = transformers.GPT2Config(vocab_size=256, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    tiny_models.drawn(transformers.GPT2LMHeadModel, settings).save_pretrained(path)
    return path


def configuration(folder: Path, texts: Path, method: Any, **algorithm: Any) -> dict[str, Any]:
    return {
        "seed": 3,
        "rounds": 2,
        "cohort": 3,
        "task": {
            "name": "language_modeling",
            "data": {"name": "text", "path": str(texts), "length": 16},
            "model": {"name": "causal_lm", "path": str(folder), "method": method},
        },
        "algorithm": {"name": "fedavg", "local_optimizer": "adam", "local_lr": 0.02, "batch_size": 4, **algorithm},
        "backend": {"name": "serial"},
        "checkpoint_every": 0,
    }


def finished(values: dict[str, Any], out: Path) -> Any:
    with without_page():
        return run(values, out=out)


def trained(folder: Path, method: str) -> dict[str, torch.nn.Parameter]:
    model = LANGUAGE_MODELS["causal_lm"](256, 16, path=str(folder), method=METHODS[method])
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_only_the_named_tensors_travel(folder, texts, tmp_path):
    """Of 2 blocks of width 16, whose queries, keys and values are one layer of 16 x 48."""
    done = finished(configuration(folder, texts, LORA), tmp_path / "run")
    saved = load_file(done.folder / "model.safetensors")
    at = "trunk.transformer.h.{}.attn.c_attn.lora_{}.default.weight"
    assert set(saved) == {at.format(block, role) for block in (0, 1) for role in "AB"}
    assert done.final["bytes_up"] == done.final["bytes_down"] == 3 * 2 * 4 * 2 * (16 + 48)
    assert done.final["perplexity"] == math.exp(done.final["test_loss"])
    losses = [record["test_loss"] for record in done.metrics]
    assert losses[2] < losses[1] < losses[0]


def test_lora_starts_from_the_pretrained_model(folder):
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    model = LANGUAGE_MODELS["causal_lm"](256, 16, path=str(folder), method=METHODS["lora"]).eval()
    tokens = torch.randint(256, (2, 16))
    torch.testing.assert_close(model(tokens), plain(tokens).logits)


@pytest.mark.parametrize("method", ["bias", "layernorm", "lora", "ia3", "last_blocks"])
def test_every_method_that_knows_of_language_models_leaves_the_embeddings_alone(folder, method):
    chosen = trained(folder, method)
    assert chosen
    assert not [name for name in chosen if "wte" in name or "wpe" in name or "lm_head" in name]


def test_the_frozen_part_does_not_drop_out(folder):
    model = LANGUAGE_MODELS["causal_lm"](256, 16, path=str(folder), method=METHODS["lora"]).train()
    tokens = torch.randint(256, (2, 16))
    assert torch.equal(model(tokens), model(tokens))
    whole = LANGUAGE_MODELS["causal_lm"](256, 16, path=str(folder)).train()
    assert not torch.equal(whole(tokens), whole(tokens))


def test_models_share_what_is_frozen_and_nothing_that_is_trained(folder):
    def made(method: str) -> dict[str, torch.nn.Parameter]:
        return dict(LANGUAGE_MODELS["causal_lm"](256, 16, path=str(folder), method=METHODS[method]).named_parameters())

    one, two, whole = made("bias"), made("bias"), made("full")
    frozen = "trunk.transformer.wte.weight"
    assert one[frozen].data_ptr() == two[frozen].data_ptr() != whole[frozen].data_ptr()
    for name, p in one.items():
        if p.requires_grad:
            assert p.data_ptr() != two[name].data_ptr()


@pytest.mark.parametrize("averaging", ["fedit", "ffa", "rolora", "fedex", "flora", "flexlora"])
def test_what_a_run_leaves_is_a_model_of_peft(folder, texts, tmp_path, averaging):
    """With every rule, those that change frozen weights (which GPT-2 stores transposed) too."""
    values = configuration(folder, texts, LORA, name="fedlora", averaging=averaging)
    done = finished(values, tmp_path / "run")
    learner = Learner(plan(config.read(done.folder / "config.yaml")).experiment.task, "cpu")
    model = learner.load(load_file(done.folder / "model.safetensors")).eval()
    export(done.folder, tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "head.safetensors").exists()
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    tokens = torch.randint(256, (2, 16))
    torch.testing.assert_close(model(tokens), theirs(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)


SOFT = {"name": "soft_prompt", "length": 4}


def test_a_soft_prompt_of_real_tokens_is_these_tokens(folder):
    made = LANGUAGE_MODELS["causal_lm"](256, 12, path=str(folder), method=partial(METHODS["soft_prompt"], length=4))
    model, tokens = made.eval(), torch.randint(256, (3, 12))
    before = torch.randint(256, (4,))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model.get_parameter("trunk.soft_prompt.embedding.weight").copy_(plain.get_input_embeddings()(before))
        whole = plain(torch.cat([before.expand(3, -1), tokens], 1)).logits[:, 4:]
        torch.testing.assert_close(model(tokens), whole)


@pytest.mark.parametrize("start", ["vocabulary", "random"])
def test_a_soft_prompt_alone_travels_learns_and_is_peft_s(folder, texts, tmp_path, start):
    values = configuration(folder, texts, {**SOFT, "start": start})
    values["task"]["data"]["length"] = 12
    done = finished(values, tmp_path / "run")
    saved = load_file(done.folder / "model.safetensors")
    assert {name: tuple(p.shape) for name, p in saved.items()} == {"trunk.soft_prompt.embedding.weight": (4, 16)}
    assert done.final["bytes_up"] == 3 * 4 * 4 * 16
    losses = [record["test_loss"] for record in done.metrics]
    assert losses[2] < losses[1] < losses[0]
    learner = Learner(plan(config.read(done.folder / "config.yaml")).experiment.task, "cpu")
    vocabulary = learner.model.get_parameter("trunk.transformer.wte.weight")
    first = learner.params()["trunk.soft_prompt.embedding.weight"]
    assert all((vocabulary == vector).all(1).any() for vector in first) == (start == "vocabulary")
    model = learner.load(saved).eval()
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(export(done.folder, tmp_path / "adapter")).eval()
    tokens = torch.randint(256, (2, 12))
    torch.testing.assert_close(model(tokens), theirs(input_ids=tokens).logits[:, 4:], rtol=1e-4, atol=1e-5)
    values["task"]["model"]["adapter"] = str(tmp_path / "adapter")
    [begun] = Learner(plan(values).experiment.task, "cpu").params().values()
    assert torch.equal(begun, saved["trunk.soft_prompt.embedding.weight"])
    values["task"]["model"]["method"]["length"] = 3
    with pytest.raises(DataError, match=r"length is 4, while method\.length is 3"):
        Learner(plan(values).experiment.task, "cpu")


def test_a_soft_prompt_takes_the_places_of_tokens(folder):
    with pytest.raises(ValueError, match="up to 16 tokens; the data have 16, and the soft prompt 20"):
        trained(folder, "soft_prompt")
    with pytest.raises(ValueError, match="length is 0; it must be >= 1"):
        LANGUAGE_MODELS["causal_lm"](256, 12, path=str(folder), method=partial(METHODS["soft_prompt"], length=0))


def test_a_run_starts_from_what_another_exported(folder, texts, tmp_path):
    values = configuration(folder, texts, LORA)
    done = finished(values, tmp_path / "run")
    export(done.folder, tmp_path / "adapter")
    values["task"]["model"]["adapter"] = str(tmp_path / "adapter")
    start = Learner(plan(values).experiment.task, "cpu").params()
    assert all(torch.equal(start[name], p) for name, p in load_file(done.folder / "model.safetensors").items())


@pytest.mark.parametrize("method", [LORA, SOFT], ids=lambda method: method["name"])
def test_the_shares_change_nothing(folder, texts, tmp_path, method):
    results = []
    for shares in (1, 2):
        values = configuration(folder, texts, method)
        values["task"]["data"]["length"] = 12
        values["backend"]["num_shares"] = shares
        done = finished(values, tmp_path / str(shares))
        results.append(((done.folder / "model.safetensors").read_bytes(), measured(done.folder)))
    assert results[0] == results[1]


def test_a_method_that_a_language_model_has_not_says_what_to_do(folder):
    with pytest.raises(ValueError, match="method is head, but a language model is not given a new head"):
        trained(folder, "head")
    with pytest.raises(ValueError, match="visual prompts are for vision Transformers"):
        trained(folder, "prompt")
    with pytest.raises(DataError, match="nowhere has no model configuration"):
        LANGUAGE_MODELS["causal_lm"](256, 16, path="./nowhere")
