"""CLIP as a classifier: the text tower's logits, zero-shot evaluation, learnt prompts."""

from pathlib import Path

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from serial_runs import measured, without_page
from test_pretrained import normalised, pictures

from fedray.experiment import plan
from fedray.learner import Learner
from fedray.models.clip import clip
from fedray.peft import METHODS
from fedray.runs import run

pytest.importorskip("transformers")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.saved(tiny_models.clip(), tmp_path_factory.mktemp("clip"))


def tokens(folder: Path, *texts: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)(list(texts), padding=True, return_tensors="pt")["input_ids"]


def test_logits_are_scaled_cosines_of_image_and_text(folder):
    data, plain = pictures((3, 8, 8)), tiny_models.clip()
    model = clip(data, path=str(folder), template="{} ok", method=METHODS["bias"]).eval()
    call = model.features.tower._call
    scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in (call.scale, call.shift))
    x = normalised(data)
    texts = tokens(folder, "a ok", "b ok", "c ok")
    assert texts.shape == (3, 5)
    out = plain(input_ids=texts, pixel_values=x * scale + shift)
    torch.testing.assert_close(model(x), out.logits_per_image, rtol=1e-4, atol=1e-5)
    v, t = out.image_embeds, out.text_embeds
    expected = plain.logit_scale.exp() * F.cosine_similarity(v[:, None], t[None], dim=-1)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(x), model.head(model.features(x)))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"head", "coop", "soft_prompt"}))
def test_only_the_image_tower_is_tuned_and_nothing_of_the_head(name, folder):
    model = clip(pictures(), path=str(folder), method=METHODS[name])
    chosen = [key for key, p in model.named_parameters() if p.requires_grad]
    assert chosen
    assert all(key.startswith("features.tower.trunk.") for key in chosen)


def test_round_0_is_zero_shot_classification(folder, tmp_path):
    values = tiny_models.configuration(folder, name="clip", method="prompt")
    with without_page():
        done = run(values, out=tmp_path / "run")
    task = plan(values).experiment.task
    first, last = done.metrics[0], done.metrics[-1]
    test = task.test_examples(0, 60)
    zero_shot = clip(task.data, path=str(folder), method=METHODS["full"]).eval()
    zero_shot_logits = zero_shot(task.prepare(test, None)["x"])
    # visual prompts are random at the start, so that round 0 of another method is the reference
    values["task"]["model"]["method"] = "bias"
    task = plan(values).experiment.task
    learner = Learner(task, "cpu")
    metrics = learner.test(learner.params())
    assert metrics["test_accuracy"] == pytest.approx(float((zero_shot_logits.argmax(1) == test["y"]).float().mean()))
    assert first["round"] == 0
    assert last["train_loss"] > 0


def test_learnt_prompts_stand_between_the_start_and_the_class_name(folder):
    """With the context set to the embeddings of real letters, coop is the fixed prompt of these letters."""
    data, plain = pictures((3, 8, 8)), tiny_models.clip()
    model = clip(data, path=str(folder), method=lambda trunk: METHODS["coop"](trunk, length=3)).eval()
    chosen = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert list(chosen) == ["head.encoder.text_model.embeddings.token_embedding.context"]
    [context] = chosen.values()
    assert context.shape == (3, 8)
    written = tokens(folder, "xyz")[0, 1:4]
    names = tokens(folder, "a.", "b.", "c.")
    whole = torch.cat([names[:, :1], written.expand(3, -1), names[:, 1:]], 1)
    with torch.no_grad():
        context.copy_(plain.text_model.embeddings.token_embedding.weight[written])
    expected = plain.get_text_features(input_ids=whole).pooler_output
    torch.testing.assert_close(model.head.encoder(), expected)
    x = normalised(data)
    scale = plain.logit_scale.exp()
    logits = scale * F.normalize(model.features(x), dim=-1) @ F.normalize(expected, dim=-1).T
    torch.testing.assert_close(model(x), logits)


def test_learnt_prompts_are_all_that_a_run_sends(folder, tmp_path):
    values = tiny_models.configuration(folder, name="clip", method={"name": "coop", "length": 4})
    results = []
    for shares in (1, 2):
        values["backend"]["num_shares"] = shares
        with without_page():
            done = run(values, out=tmp_path / str(shares))
        results.append(((done.folder / "model.safetensors").read_bytes(), measured(done.folder)))
    assert results[0] == results[1]
    assert done.final["bytes_up"] == done.final["bytes_down"] == 3 * 4 * 8 * 4
    losses = [record["test_loss"] for record in done.metrics]
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "a photo"}, "template is 'a photo'; it must hold {}, the place of a class's name"),
        ({"method": METHODS["head"]}, "method is head, but CLIP's head is its text, which is not trained"),
        (
            {"method": lambda t: METHODS["coop"](t, length=30)},
            "length is 30; it must be between 1 and 20, the room left",
        ),
        ({"method": lambda t: METHODS["coop"](t, length=0)}, "length is 0; it must be between 1 and 20"),
    ],
)
def test_impossible_options_say_what_to_do(folder, options, message):
    with pytest.raises(ValueError, match=message):
        clip(pictures(), **({"path": str(folder)} | options))


def test_another_model_than_clip_is_refused(tmp_path):
    path = tiny_models.saved(tiny_models.vit(), tmp_path)
    with pytest.raises(ValueError, match="path names a model of type vit; it must be clip"):
        clip(pictures(), path=str(path))


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    path = tiny_models.saved(tiny_models.clip(), tmp_path)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (path / file).unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        clip(pictures(), path=str(path))
