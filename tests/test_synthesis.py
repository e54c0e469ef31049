"""Prompts, requests, the cache, generators and the pool: the same samples whoever makes them."""

import functools
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import SIZES, Exam, assert_same_bits, make, pictures, scribbler, synthesis, train
from tiny_models import drawn, language_model, stable_diffusion

from fedray.algorithms.fedavg import fedavg
from fedray.backends.serial import SerialBackend, in_turn
from fedray.data.hub import hub
from fedray.errors import ConfigError, DataError
from fedray.generate import generate
from fedray.learner import Learner
from fedray.ledger import Ledger, MeteredBackend
from fedray.local_training import LocalTraining
from fedray.synthesis.captions import captioning, class_level, instance_level
from fedray.synthesis.central import CentralTraining
from fedray.synthesis.diffusion_models import class_conditional, diffusion
from fedray.synthesis.fingerprints import fingerprint
from fedray.synthesis.generator import Generator, png, wav
from fedray.synthesis.prompts import Prompt, expanded, hit_rate, listed, styled, template
from fedray.synthesis.requests import batches, of_classes, of_prompts
from fedray.synthesis.synthesize import Synthesis, examples, synthesize

CLASSES = ("top", "middle", "bottom")
BOOK = template(CLASSES, ["a {}", "the {}"])


def serially(make: Any, items: Any, pool: Any) -> Iterator[tuple[int, Any]]:
    yield from in_turn(make, items, "cpu")


def never(make: Any, items: Any, pool: Any) -> Iterator[tuple[int, Any]]:
    raise AssertionError("something is generated again")
    yield


# --- prompts and requests


def test_prompts_name_their_classes():
    assert template(["cat"], ["a {}", "one {}"], negative="bad")[0] == [
        Prompt("a cat", "bad"),
        Prompt("one cat", "bad"),
    ]
    assert template(["a", "b"], names=["an apple", "a bee"])[1] == [Prompt("a photo of a a bee")]
    assert styled(["cat"], ["quickdraw"]) == [[Prompt("a black and white drawing of cat", "colorful, painting")]]
    assert hit_rate([[Prompt("A Cat"), Prompt("dog")], [Prompt("dog")]], ["cat", "dog"]) == 0.75
    with pytest.raises(ValueError, match=r"templates has 'a cat', which has no \{\} for the name"):
        template(["cat"], ["a cat"])
    with pytest.raises(ValueError, match="names has 1 entries, but there are 2 classes: a, b"):
        template(["a", "b"], names=["x"])


def test_listed_prompts_say_what_their_file_lacks(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"cat": ["a cat", "cats"], "dog": []}))
    assert listed(["cat"], str(file)) == [[Prompt("a cat"), Prompt("cats")]]
    with pytest.raises(DataError, match=r"no prompts for the class 'cow'; it has cat, dog"):
        listed(["cow"], str(file))
    with pytest.raises(DataError, match="empty list for dog"):
        listed(["dog"], str(file))
    file.write_text("[")
    with pytest.raises(DataError, match="cannot be read as"):
        listed(["cat"], str(file))


def test_a_larger_set_contains_the_smaller_one():
    small, large = (of_classes(BOOK, [count] * 3, 5, [1.0, 2.0]) for count in (4, 9))
    assert set(small) < set(large)
    assert {request.guidance for request in large} == {1.0, 2.0}
    assert {request.prompt for request in large if request.label == 1} == {"a middle", "the middle"}
    assert len({request.seed for request in large}) == 27
    assert of_classes(BOOK, [4] * 3, 6, [1.0, 2.0]) != small


def test_prompts_give_the_same_samples_whoever_sent_them_in_whatever_order():
    said = [("a top", 0), ("a middle", 1), ("a top", 0)]
    requests = of_prompts(said, 2, seed=0)
    assert requests == of_prompts(said[::-1], 2, seed=0)
    assert len(requests) == len({request.seed for request in requests}) == 6
    assert [len(batch) for batch in batches(requests, 3)] == [3, 1, 2]


def test_what_clients_say_is_about_their_examples():
    data = pictures().data
    rows = np.arange(4)  # classes 0, 1, 2, 0
    assert class_level(data, rows) == [("A photo of top", 0), ("A photo of middle", 1), ("A photo of bottom", 2)]
    said = instance_level(data, rows)
    assert [label for _, label in said] == [0, 1, 2, 0]
    assert all(text.startswith(CLASSES[label]) and text.endswith(("dark", "grey")) for text, label in said)
    with pytest.raises(ConfigError, match=r"template is 'x'; it must have \{\}"):
        class_level(data, rows, "x")


def test_sentences_of_a_language_model_are_remembered_and_none_stands_twice(tmp_path):
    language_model(tmp_path / "lm")
    options = {"count": 6, "max_tokens": 5, "instruction": "write {}", "cache": str(tmp_path / "cache")}
    book = expanded(["cat", "dog"], str(tmp_path / "lm"), **options)
    assert [len(set(prompts)) for prompts in book] == [6, 6]
    assert book == expanded(["cat", "dog"], str(tmp_path / "lm"), **(options | {"cache": str(tmp_path / "other")}))
    assert book != expanded(["cat", "dog"], str(tmp_path / "lm"), **options, seed=1)
    (tmp_path / "lm" / "model.safetensors").unlink()  # who is asked again needs no model
    fingerprint.cache_clear()
    with pytest.raises(DataError, match="cannot be loaded as a language model"):
        expanded(["cat", "dog"], str(tmp_path / "lm"), **options)


def test_captions_of_a_model_are_one_for_each_picture(tmp_path):
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
    )

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "a", "dark", "bag"]))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    both = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    text = {**both, "vocab_size": 8, "bos_token_id": 4, "sep_token_id": 3, "pad_token_id": 0, "encoder_hidden_size": 8}
    config = BlipConfig(
        text_config={**text, "max_position_embeddings": 32},
        vision_config={**both, "image_size": 8, "patch_size": 4},
        image_text_hidden_size=8,
    )
    drawn(BlipForConditionalGeneration, config).save_pretrained(tmp_path / "blip")
    images = BlipImageProcessor(size={"height": 8, "width": 8})
    BlipProcessor(images, tokenizer).save_pretrained(tmp_path / "blip")
    captions = captioning(pictures().data, np.arange(5), str(tmp_path / "blip"), max_tokens=3, batch_size=2)
    assert len(captions) == 5
    assert captions == captioning(pictures().data, np.arange(5), str(tmp_path / "blip"), max_tokens=3, batch_size=5)
    with pytest.raises(DataError, match="cannot be loaded as a captioning model"):
        captioning(pictures().data, np.arange(5), str(tmp_path))


# --- the cache


def test_nothing_is_generated_twice_and_the_number_of_actors_is_not_felt(tmp_path):
    way = Synthesis(scribbler(), cache=str(tmp_path))
    requests = of_classes(BOOK, [6] * 3, 0)
    first = synthesize(way, requests, serially)
    assert synthesize(way, requests, never).samples == first.samples

    def backwards(make: Any, items: Any, pool: Any) -> Iterator[tuple[int, Any]]:
        function = make("cpu")
        yield from reversed([(number, function(item)) for number, item in enumerate(items)])

    other = synthesize(replace(way, cache=str(tmp_path / "other")), requests, backwards)
    assert other.samples == first.samples
    assert len(set(first.samples)) == 18
    columns = examples(first, (1, 6, 6), way)
    assert columns["x"].shape == (18, 1, 6, 6)
    assert all(picture[0, 2 * label].mean() > 100 for picture, label in zip(columns["x"], columns["y"], strict=True))


def test_who_is_interrupted_goes_on_where_it_was(tmp_path):
    way = Synthesis(scribbler(2), cache=str(tmp_path))
    requests = of_classes(BOOK, [6] * 3, 0)

    def dying(make: Any, items: Any, pool: Any) -> Iterator[tuple[int, Any]]:
        for number, result in in_turn(make, items, "cpu"):
            if number == 4:
                raise RuntimeError("the power is gone")
            yield number, result

    with pytest.raises(RuntimeError, match="power"):
        synthesize(way, requests, dying)
    asked = []

    def rest(make: Any, items: Any, pool: Any) -> Iterator[tuple[int, Any]]:
        asked.extend(items)
        yield from in_turn(make, items, "cpu")

    resumed = synthesize(way, requests, rest)
    assert len(asked) == 9 - 4
    assert resumed.samples == synthesize(replace(way, cache=str(tmp_path / "b")), requests, serially).samples


def test_a_damaged_file_is_generated_again(tmp_path, caplog):
    way = Synthesis(scribbler(), cache=str(tmp_path))
    requests = of_classes(BOOK, [4] * 3, 0)
    first = synthesize(way, requests, serially)
    file = sorted(tmp_path.rglob("*.parquet"))[0]
    file.write_bytes(file.read_bytes()[:50])
    assert synthesize(way, requests, serially).samples == first.samples
    assert "is damaged" in caplog.text
    assert synthesize(way, requests, never).samples == first.samples


def test_everything_that_a_sample_depends_on_is_in_its_name(tmp_path):
    made = []

    def counting(make: Any, items: Any, pool: Any) -> Iterator[tuple[int, Any]]:
        made.append(len(items))
        yield from in_turn(make, items, "cpu")

    requests = of_classes(BOOK, [4] * 3, 0)
    base = Synthesis(scribbler(), cache=str(tmp_path))
    settings = {**base.generator.settings, "weights": "other"}
    others = [
        (base, requests),
        (replace(base, generator=replace(base.generator, settings=settings)), requests),
        (base, of_classes(BOOK, [4] * 3, 1)),
        (base, of_classes(BOOK, [4] * 3, 0, [2.0])),
        (base, of_classes(template(CLASSES, ["a {}", "my {}"]), [4] * 3, 0)),
    ]
    for way, wanted in others:
        synthesize(way, wanted, counting)
    assert made[:4] == [3, 3, 3, 3]
    assert made[4] > 0
    for way, wanted in others:
        synthesize(way, wanted, never)


def test_withheld_samples_are_counted_and_left_out(tmp_path, caplog):
    def load(device: str) -> Any:
        return lambda batch: [None if request.seed % 2 else png(np.zeros((6, 6, 1))) for request in batch]

    way = Synthesis(Generator({"prude": 1}, load, 4), cache=str(tmp_path))
    requests = of_classes(BOOK, [8] * 3, 0)
    made = synthesize(way, requests, serially)
    odd = sum(request.seed % 2 for request in requests)
    assert 0 < odd < 24
    assert made.metrics == {"synthetic_samples": 24.0 - odd, "withheld": float(odd)}
    assert f"withheld {odd} of 24 samples" in caplog.text
    assert len(examples(made, (1, 6, 6), way)["y"]) == 24 - odd
    with pytest.raises(DataError, match="withheld every sample"):
        examples(replace(made, samples=[None] * 24), (1, 6, 6), way)
    with pytest.raises(DataError, match=r"makes images, but an example has shape \(100,\)"):
        examples(made, (100,), way)


def test_sounds_are_cut_or_padded_and_resampled(tmp_path):
    def load(device: str) -> Any:
        return lambda batch: [wav(np.sin(np.arange(1600) / 5), 16000) for _ in batch]

    way = Synthesis(Generator({"hum": 1}, load, 4, "audio"), sample_rate=8000, cache=str(tmp_path))
    made = synthesize(way, of_classes(BOOK, [1] * 3, 0), serially)
    x = examples(made, (1000,), way)["x"]
    assert x.shape == (3, 1000)
    assert x.dtype == np.float32
    assert np.abs(x[:, :800]).max() > 0.9
    assert not x[:, 800:].any()


# --- generators


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("pipeline"))


def test_a_pipeline_makes_the_same_sample_from_a_seed_and_hears_prompt_guidance_and_noise(pipeline):
    from PIL import Image

    generator = diffusion(str(pipeline), steps=2, size=8, batch_size=4)
    requests = of_classes(template(CLASSES, ["a {}"], negative="x"), [2] * 3, 0, [1.0, 5.0])
    samples = generator.load("cpu")(requests)
    assert samples == generator.load("cpu")(requests)
    assert len(set(samples)) == len(requests)
    assert all(Image.open(io.BytesIO(sample)).size == (8, 8) for sample in samples)
    for change in ({"prompt": "another"}, {"guidance": 3.0}, {"seed": 1}, {"negative": "y"}):
        request = replace(requests[0], guidance=4.0)
        one, other = generator.load("cpu")([request]), generator.load("cpu")([replace(request, **change)])
        assert one != other, change


def test_a_pipeline_is_known_by_what_is_in_its_folder(pipeline, tmp_path):
    import shutil

    copy = shutil.copytree(pipeline, tmp_path / "copy")
    assert diffusion(str(copy), steps=2).settings == diffusion(str(pipeline), steps=2).settings
    (copy / "unet" / "config.json").write_text((copy / "unet" / "config.json").read_text() + " ")
    fingerprint.cache_clear()
    assert diffusion(str(copy), steps=2).settings != diffusion(str(pipeline), steps=2).settings


def test_a_batch_that_does_not_fit_is_halved(pipeline, monkeypatch):
    from diffusers import StableDiffusionPipeline

    generator = diffusion(str(pipeline), steps=1, size=8, batch_size=4)
    requests = of_classes(template(CLASSES), [4, 0, 0], 0)
    call, sizes = StableDiffusionPipeline.__call__, []

    @functools.wraps(call)
    def cramped(self: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(options["prompt"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("no room")
        return call(self, *args, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", cramped)
    assert len(set(generator.load("cpu")(requests))) == 4
    assert sizes == [4, 2, 1, 1, 2, 1, 1]


def test_folders_that_hold_no_pipeline_say_so(pipeline, tmp_path):
    with pytest.raises(DataError, match=r"has no model_index\.json; give a hub id, or a folder"):
        diffusion(str(tmp_path))
    with pytest.raises(DataError, match=r"shipped:dogs is not shipped with fedray; there are .*shipped:fashion_mnist"):
        diffusion("shipped:dogs")
    with pytest.raises(DataError, match="the hub has no such pipeline or is unreachable or offline"):
        diffusion("nobody/nothing")
    with pytest.raises(ValueError, match="steps is 0; it must be >= 1"):
        diffusion(str(pipeline), steps=0)
    with pytest.raises(ConfigError, match="scheduler is 'Magic'; diffusers has no such class"):
        diffusion(str(pipeline), scheduler="Magic").load("cpu")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be loaded as a diffusers pipeline"):
        diffusion(str(tmp_path)).load("cpu")


def test_a_class_conditional_pipeline_sees_labels_and_no_prompts(tmp_path):
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(1)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=1,
            sample_size=4,
            in_channels=4,
            out_channels=8,
            norm_num_groups=4,
            patch_size=2,
        )
        for p in transformer.parameters():  # they are born without effect
            p.data.add_(0.2 * torch.randn_like(p))
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=4)
    DiTPipeline(transformer, vae, DDIMScheduler(steps_offset=1, clip_sample=False)).save_pretrained(tmp_path)
    generator = class_conditional(str(tmp_path), classes=[7, 5, 3], steps=2)
    [a] = of_classes(BOOK, [1, 0, 0], 0)
    same = replace(a, prompt="whatever")
    assert generator.load("cpu")([a]) == generator.load("cpu")([same]) != generator.load("cpu")([replace(a, label=1)])
    assert generator.settings["sees"] == "label"


# --- the algorithms


def test_the_first_round_is_synthetic_and_the_others_are_the_base_algorithms():
    for name in ("gpt_fl", "fgl"):
        exam, base = Exam(name, "pictures"), Exam("fedavg", "pictures")
        ledger = Ledger()
        backend = MeteredBackend(SerialBackend(exam.task()), ledger)
        first, second = train(exam.task(), exam.make(), backend)
        assert first.metrics["synthetic_samples"] > 0
        [alone] = train(exam.task(), base.make(), SerialBackend(exam.task()), 1)
        assert second.metrics.keys() == alone.metrics.keys()


def test_a_model_of_synthetic_data_knows_the_real_ones():
    central = CentralTraining(central_epochs=20, central_batch_size=8, central_lr=0.01)
    algorithm = make("gpt_fl", base=fedavg(local=LocalTraining()), synthesis=synthesis(), central=central)
    [first] = train(pictures(), algorithm, SerialBackend(pictures()), 1)
    assert Learner(pictures(), "cpu").test(first.state.params)["test_accuracy"] > 0.9


def test_clients_send_the_names_of_their_classes_or_prompts_and_nothing_else():
    data, partition = pictures().data, pictures().partition
    present = [set(data.train["y"][partition.client(client)].tolist()) for client in range(len(SIZES))]
    names = sum(len(data.classes[label]) for labels in present for label in labels)
    prompts = sum(len(f"A photo of {data.classes[label]}") + 2 for labels in present for label in labels)
    for name, sent in (("gpt_fl", names), ("fgl", prompts)):
        exam, ledger = Exam(name, "pictures"), Ledger()
        train(exam.task(), exam.make(), MeteredBackend(SerialBackend(exam.task()), ledger), 1)
        assert (ledger.up_total, ledger.down_total) == (sent, 0)


def test_the_server_goes_on_with_synthetic_data_after_every_round():
    options = {"base": fedavg(local=LocalTraining()), "synthesis": synthesis(), "per_prompt": 5}
    options["central"] = CentralTraining(central_epochs=1)
    runs = [
        train(pictures(), make("fgl", server_epochs=epochs, **options), SerialBackend(pictures()))[-1]
        for epochs in (0, 2, 2)
    ]
    assert "synthetic_loss" not in runs[0].metrics
    assert runs[1].metrics["synthetic_samples"] == 15
    assert_same_bits(runs[1].state, runs[2].state)
    assert not torch.equal(runs[0].state.params["head.weight"], runs[1].state.params["head.weight"])


# --- the command


def test_generate_writes_a_dataset_and_a_sheet(pipeline, tmp_path):
    values = {
        "generator": {"name": "diffusion", "path": str(pipeline), "steps": 1, "size": 8},
        "classes": list(CLASSES),
        "per_class": 2,
        "backend": "serial",
        "cache": str(tmp_path / "cache"),
    }
    synthetic, hits = generate(values, tmp_path / "out")
    assert hits == 1.0
    data = hub(str(tmp_path / "out"), test_fraction=0.5)
    assert data.classes == CLASSES
    assert len(data.train["y"]) + len(data.test["y"]) == 6 == len(synthetic.samples)
    assert (tmp_path / "out" / "sheet.html").read_text().count("<img") == 6
    with pytest.raises(ConfigError, match=r"out is not empty; choose another --out"):
        generate(values, tmp_path / "out")
    with pytest.raises(ConfigError, match="algorithm is not gpt_fl"):
        generate({"algorithm": {"name": "fgl"}}, tmp_path / "b")
    with pytest.raises(ConfigError, match="give either data or classes"):
        generate({key: value for key, value in values.items() if key != "classes"}, tmp_path / "b")
