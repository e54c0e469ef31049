"""Attacks: what memorises is caught, what never saw the data is not."""

import json

import numpy as np
import pytest
from scipy.stats import norm
from tiny_models import save_tokenizer

from fedray import attack
from fedray.cli import main
from fedray.errors import ConfigError, DataError
from fedray.local_training import LocalTraining
from fedray.metrics.membership import confidence, halves, judge, scores
from fedray.runs import run

LOCAL = LocalTraining(local_lr=0.1, local_epochs=30, local_momentum=0.9)


def values(**changes):
    return {
        "rounds": 4,
        "cohort": 2,
        "evaluate_every": 0,
        "task": {
            "name": "classification",
            "data": {"name": "subset", "of": "digits", "train": 200, "test": 200},
            "partition": {"name": "iid", "num_clients": 2},
            "model": {"name": "mlp", "hidden": [64]},
        },
        "algorithm": {"name": "fedavg", "local_lr": 0.1, "local_epochs": 30, "local_momentum": 0.9},
        "backend": "serial",
    } | changes


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    return run(values(), out=tmp_path_factory.mktemp("attack") / "memory").folder


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    little = {"name": "fedavg", "local_lr": 1e-9, "local_steps": 1}
    return run(values(rounds=1, algorithm=little), out=tmp_path_factory.mktemp("attack") / "stranger").folder


def test_the_confidence_is_the_log_odds_of_the_class():
    logits = np.random.default_rng(0).normal(size=(50, 4)) * 5
    y = np.arange(50) % 4
    p = np.exp(logits)[np.arange(50), y] / np.exp(logits).sum(1)
    np.testing.assert_allclose(confidence(logits, y), np.log(p / (1 - p)), rtol=1e-8)
    assert np.isfinite(confidence(np.array([[1000.0, 0.0]]), np.array([0])))


def test_the_score_is_the_likelihood_ratio_of_two_normals():
    draw = np.random.default_rng(1)
    n, models = 300, 40
    seen = np.array([draw.permutation(n) < n // 2 for _ in range(models)])
    shadows = draw.normal(size=(models, n)) + 2 * seen
    member = np.arange(n) < n // 2
    target = draw.normal(size=n) + 2 * member
    online, offline = (judge(scores(target, shadows, seen, kind), member) for kind in ("online", "offline"))
    best = judge(norm.logpdf(target, 2) - norm.logpdf(target), member)
    assert online.auc == pytest.approx(best.auc, abs=0.02)
    assert offline.auc == pytest.approx(norm.cdf(2 / np.sqrt(2)), abs=0.04)
    assert online.tpr_at[0.1] > 0.5
    blind = judge(draw.normal(size=n), member)
    assert blind.auc == pytest.approx(0.5, abs=0.08)
    with pytest.raises(ValueError, match="2 shadow models are too few"):
        scores(target, shadows[:2], seen[:2])


def test_a_model_that_memorises_is_caught_and_one_that_saw_nothing_is_not(memory, stranger):
    caught = attack.lira(memory, shadows=12, examples=300, local=LOCAL)
    assert caught.auc > 0.58
    assert json.loads((memory / "lira.json").read_text())["auc"] == caught.auc
    assert attack.lira(memory, shadows=12, examples=300, local=LOCAL) == caught
    missed = attack.lira(stranger, shadows=12, examples=300, local=LOCAL)
    assert abs(missed.auc - 0.5) < 0.08


def test_an_attack_leaves_its_curve_as_figures_and_as_a_page(memory):
    found = attack.lira(memory, shadows=6, examples=200, local=LOCAL)
    written = json.loads((memory / "lira.json").read_text())
    assert written["accuracy_of_members"] == 1.0 > written["accuracy_of_others"]
    assert (written["tpr"], written["auc_error"]) == (list(found.tpr), found.auc_error)
    page = (memory / "lira.html").read_text()
    assert f"{found.auc:.4f} ± {found.auc_error:.4f}" in page
    assert 'aria-label="ROC curve on logarithmic axes"' in page


def test_the_standard_error_is_the_spread_of_the_area_from_draw_to_draw():
    draw = np.random.default_rng(2)
    member = np.arange(300) < 120
    found = [judge(draw.normal(size=300) + 0.7 * member, member) for _ in range(300)]
    assert np.mean([one.auc_error for one in found]) == pytest.approx(np.std([one.auc for one in found]), rel=0.15)
    tied = judge(np.zeros(300), member)
    assert (tied.auc, tied.auc_error) == (0.5, 0.0)


def test_every_example_is_seen_by_half_of_the_shadow_models():
    """The fewest shadow models that are allowed are enough, whatever the seed: none is trained in vain."""
    for shadows in (4, 5, 16):
        seen = halves(shadows, 1000, np.random.default_rng(shadows))
        assert (seen.sum(0) == shadows // 2).all()
        assert abs(seen.mean(1) - shadows // 2 / shadows).max() < 0.1
        assert len({row.tobytes() for row in seen}) == shadows


def test_the_fewest_shadow_models_are_enough(memory):
    short = LocalTraining(local_lr=0.1, local_epochs=1)
    assert 0 < attack.lira(memory, shadows=4, examples=300, local=short).auc < 1


def test_the_command_prints_what_was_found(memory, capsys):
    assert (
        main(["attack", "lira", str(memory), "--shadows", "6", "--examples", "100", "--epochs", "2", "--offline"]) == 0
    )
    assert "AUC 0." in capsys.readouterr().out
    assert main(["attack", "neighbours", str(memory)]) == 2
    assert "neighbours needs --samples DIR" in capsys.readouterr().err
    assert main(["attack", "prompts", str(memory)]) == 2
    assert "is no run of algorithm.name=fgl" in capsys.readouterr().err


def test_mistakes_are_told(memory, tmp_path):
    with pytest.raises(ConfigError, match="shadows is 3; it must be >= 4"):
        attack.lira(memory, shadows=3)
    with pytest.raises(ConfigError, match="kind is 'both'; it must be online or offline"):
        attack.lira(memory, kind="both")
    with pytest.raises(ConfigError, match="examples is 10"):
        attack.lira(memory, examples=10)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"has no model\.safetensors"):
        attack.lira(tmp_path / "empty")


def test_copies_are_nearer_than_strangers(memory, tmp_path):
    from fedray.data.datasets import digits, subset
    from fedray.synthesis.generator import png
    from fedray.synthesis.requests import Request
    from fedray.synthesis.store import write_table

    data = subset(digits(), train=200, test=200)
    for name, pictures in (("copies", data.train["x"][:60]), ("others", digits().test["x"][-60:])):
        (tmp_path / name).mkdir()
        requests = [Request("a digit", "", i % 10, i) for i in range(60)]
        samples = [png(picture.transpose(1, 2, 0) / 255) for picture in pictures]
        write_table(tmp_path / name / "train-0.parquet", "image", requests, samples, data.classes)
    copies, others = (
        attack.neighbours(memory, tmp_path / name, cache=tmp_path / "cache") for name in ("copies", "others")
    )
    written = json.loads((memory / "neighbours.json").read_text())
    assert written["distance"] == others.distance.tolist()
    page = (memory / "neighbours.html").read_text()
    assert page.count("data:image/png") == 2 * 2 * 24
    assert f"{others.closer:.2%} of the synthetic" in page
    assert len(list((tmp_path / "cache").iterdir())) == 4  # private and test pictures once, and each set
    np.testing.assert_array_equal(copies.nearest, np.arange(60))
    assert copies.closer == 1.0
    assert copies.distance.max() < 1e-5
    assert others.closer < 0.2


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("A photo of woman", ["woman"]),
        ("a photo of two Beetles, dark", ["beetle"]),
        ("a pine_tree beside a man.", ["man", "pine_tree"]),
        ("buses and a T-shirt/top", ["bus", "T-shirt/top"]),
        ("nothing of the kind", []),
    ],
)
def test_a_class_is_named_by_its_whole_word_or_its_plural(text, classes):
    known = ["man", "woman", "bee", "beetle", "tree", "pine_tree", "bus", "T-shirt/top"]
    assert attack.named([text], known) == classes


def test_prompts_give_away_classes(tmp_path):
    algorithm = {
        "name": "fgl",
        "base": {"name": "fedavg"},
        "generator": {"name": "diffusion", "path": "shipped:fashion_mnist"},
    }
    folder = tmp_path / "fgl"
    folder.mkdir()
    from omegaconf import OmegaConf

    task = {**values()["task"], "partition": {"name": "shards", "num_clients": 5, "shards_per_client": 2}}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(values(task=task, algorithm=algorithm))))
    found = attack.prompts(folder)
    assert [one["client"] for one in found] == list(range(5))
    assert all(1 <= len(one["classes"]) <= 4 for one in found)
    assert all(one["bytes"] == one["prompts"] * len("A photo of 1") for one in found)
    assert json.loads((folder / "prompts.json").read_text()) == found
    own = [one["tokens"] for one in found]  # by the generator's own tokenizer
    save_tokenizer(tmp_path / "letters")  # every letter is a token
    by_letters = attack.prompts(folder, str(tmp_path / "letters"))
    assert [one["tokens"] for one in by_letters] == [one["prompts"] * len("Aphotoof1") for one in found]
    assert all(one["prompts"] <= few < one["tokens"] for few, one in zip(own, by_letters, strict=True))
    with pytest.raises(DataError, match="nowhere cannot be loaded as a tokenizer"):
        attack.prompts(folder, str(tmp_path / "nowhere"))
    elsewhere = algorithm | {"generator": {**algorithm["generator"], "path": "some/model-of-the-hub"}}
    assert attack._own_tokenizer(elsewhere["generator"]) is None
