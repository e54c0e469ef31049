"""The papers' own configurations, on tiny models of the same classes."""

from pathlib import Path

import numpy as np
import pytest
from needs import needs_espeak
from safetensors.torch import load_file
from tiny_models import language_model, saved, stable_diffusion, vit

from fedray import config
from fedray.data import Dataset
from fedray.data.dataset import make_dataset
from fedray.errors import ConfigError
from fedray.runs import run, shipped
from fedray.synthesis.captions import domain_level

SMALL = ["task.data={name: subset, of: digits, train: 200, test: 40}", "backend=serial", "evaluate_every=0"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"pipeline": stable_diffusion(folder), "language": language_model(folder / "lm")}


def final(name: str, overrides: list[str], tmp_path: Path) -> dict[str, float]:
    return run(shipped()[name], [*SMALL, f"algorithm.cache={tmp_path / 'cache'}", *overrides], tmp_path / "run").final


def test_gpt_fls_configuration_runs_with_the_authors_steps_in_the_authors_order(models, tmp_path):
    asked = [
        f"algorithm.prompts.path={models['language']}",
        "algorithm.prompts.count=3",
        "algorithm.prompts.max_tokens=3",
    ]
    asked += [f"algorithm.prompts.cache={tmp_path / 'prompts'}", f"algorithm.generator.path={models['pipeline']}"]
    asked += ["algorithm.generator.size=8", "algorithm.generator.steps=2", "algorithm.generator.precision=float32"]
    asked += ["rounds=2", "cohort=2", "task.partition={name: iid, num_clients: 4}", "algorithm.volume=0.1"]
    asked += ["algorithm.central_epochs=1", "task.model={name: mlp, hidden: [8]}", "task.augment=none"]
    found = final("gpt_fl/paper", asked, tmp_path)
    assert found["synthetic_samples"] == 20
    assert found["gradient_diversity"] > 0
    assert found["round"] == 2


def test_fgls_configuration_runs_one_shot_and_goes_on(models, tmp_path):
    asked = [
        f"algorithm.generator.path={models['pipeline']}",
        "algorithm.generator.size=8",
        "algorithm.generator.steps=2",
    ]
    asked += [
        "algorithm.generator.precision=float32",
        "algorithm.per_prompt=2",
        "algorithm.central_epochs=1",
        "rounds=2",
    ]
    asked += ["task.model={name: mlp, hidden: [8]}", "task.augment=none", "algorithm.server_epochs=1"]
    found = final("fgl/paper", asked, tmp_path)
    assert found["synthetic_samples"] == 20
    assert found["round"] == 2


def test_fgls_domains_are_what_clients_say_of_them(models, tmp_path):
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (80, 3, 8, 8)).astype(np.uint8)
    np.savez(
        tmp_path / "d.npz",
        x=x,
        y=np.array(["cat", "dog"])[np.arange(80) % 2],
        domain=np.array(["sketch", "real"])[np.arange(80) // 40],
    )
    asked = [f"task.data={{name: npz, path: {tmp_path / 'd.npz'}}}", "task.partition={name: by_column, column: domain}"]
    asked += ["algorithm.prompts={name: class_level, template: 'a {by} of a {}', by: domain}", "cohort=2", "rounds=1"]
    asked += [
        f"algorithm.generator.path={models['pipeline']}",
        "algorithm.generator.size=8",
        "algorithm.generator.steps=2",
    ]
    asked += ["algorithm.generator.precision=float32", "algorithm.per_prompt=3", "algorithm.central_epochs=1"]
    asked += ["task.model={name: mlp, hidden: [8]}", "task.augment=none"]
    found = final("fgl/paper", asked, tmp_path)
    assert found["prompts"] == 4
    assert found["synthetic_samples"] == 12
    assert found["bytes_up"] == sum(
        2 + len(f"a {by} of a {name}") for by in ("sketch", "real") for name in ("cat", "dog")
    )


def test_a_clients_words_for_its_domain_are_fgls_own_or_the_template(tmp_path):
    columns = {
        "x": np.zeros((4, 1, 2, 2), np.uint8),
        "y": np.array([0, 0, 1, 1]),
        "domain": np.array(["quickdraw", "clipart", "night", "night"]),
    }
    data = make_dataset("d", columns, columns, ("cat", "dog"))
    assert domain_level(data, np.arange(4)) == [
        ("cat, clippart, cartoon style, single object.", 0),
        ("a black and white drawing of cat", 0),
        ("a night picture of dog", 1),
    ]
    with pytest.raises(ConfigError, match=r"template is 'x'; it must have \{\} and \{by\}"):
        domain_level(data, np.arange(4), template="x")
    with pytest.raises(ConfigError, match="by is 'style'; d has the columns domain, x, y"):
        domain_level(data, np.arange(4), by="style")


def test_accuracy_is_told_by_domain(tmp_path):
    draw = np.random.default_rng(1)
    brightness = np.array([40, 130, 220])[np.arange(90) % 3]
    x = np.clip(brightness[:, None, None, None] + draw.integers(-20, 20, (90, 1, 6, 6)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "d.npz", x=x, y=np.arange(90) // 3 % 2)
    task = {
        "name": "classification",
        "data": {"name": "described", "of": {"name": "npz", "path": str(tmp_path / "d.npz")}},
        "partition": {"name": "by_column", "column": "domain"},
        "domains": "domain",
        "model": "mlp",
    }
    values = {"rounds": 1, "cohort": 3, "task": task, "algorithm": {"name": "fedavg"}, "backend": "serial"}
    made = run(values, [], tmp_path / "run")
    domains = {name: made.final[f"test_accuracy/{name}"] for name in ("bright", "dark", "grey")}
    assert made.final["domain_accuracy"] == pytest.approx(sum(domains.values()) / 3)
    held = config.read(tmp_path / "run" / "config.yaml")["task"]["data"]
    test = config.build(Dataset, held, "data").test["domain"]
    sizes = np.array([(test == name).sum() for name in domains])
    assert made.final["test_accuracy"] == pytest.approx(np.average(list(domains.values()), weights=sizes))
    with pytest.raises(ConfigError, match="domains is 'style'; d has the columns domain, x, y"):
        run({**values, "task": {**task, "domains": "style"}}, [], tmp_path / "other")


@needs_espeak
def test_the_experiment_of_spoken_digits_runs_on_sounds(tmp_path):
    draw = np.random.default_rng(0)
    sounds = draw.normal(size=(60, 4000)).astype(np.float32)
    names = np.array([str(k) for k in range(10)])[np.arange(60) % 10]
    np.savez(tmp_path / "s.npz", x=sounds, y=names, speaker=np.array(["a", "b", "c"])[np.arange(60) // 20])
    asked = [
        f"task.data={{name: npz, path: {tmp_path / 's.npz'}}}",
        "rounds=2",
        "cohort=2",
        "algorithm.central_epochs=1",
    ]
    found = final("gpt_fl/audio", asked, tmp_path)
    assert found["synthetic_samples"] == 10 * round(0.5 * 48 / 10)


@pytest.mark.parametrize("name", ["gpt_fl/small", "fgl/small", "fgl/domains", "prism/small"])
def test_the_small_experiments_give_clients_no_picture_that_a_generator_saw(name):
    text = str(config.read(shipped()[name]))
    assert "'part': 'private'" in text
    assert "'public': 20000" in text


@pytest.mark.parametrize("row", ["bias_8", "prompt_8", "shufflenet_8"])
def test_fedpefts_communication_table_has_rows_of_two_networks(row, tmp_path):
    """The authors' optimizer, weights of clients and augmentation, on a ViT and a ShuffleNet without their weights."""
    tiny = [f"path={saved(vit(), tmp_path / 'vit')}", "shufflenet=null", "backend=serial", "evaluate_every=0"]
    tiny += ["task.data={name: subset, of: digits, train: 200, test: 40}", "rounds=1", "algorithm.local_epochs=1"]
    tiny += ["populations.n64_c8={clients: 8, cohort: 2}"]
    found = run(shipped()["fedpeft/paper"], [*tiny, f"row={row}"], tmp_path / "run")
    sent = {name: tensor.shape for name, tensor in load_file(found.folder / "model.safetensors").items()}
    assert found.final["bytes_up_total"] == 4 * 2 * sum(shape.numel() for shape in sent.values())
    assert any("running_mean" in name for name in sent) == (row == "shufflenet_8")
