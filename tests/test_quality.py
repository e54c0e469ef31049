"""Quality of synthetic pictures: laws of the distances, the extractors and their cache, and the command."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needs import asset
from scipy import linalg

from fedray.cli import main
from fedray.data.datasets import digits
from fedray.data.partitions import iid
from fedray.errors import DataError
from fedray.learner import Learner
from fedray.metrics import extractors
from fedray.metrics.extractors import Extractor, features, inception, representations, torchscript, transformer
from fedray.metrics.quality import frechet_distance, kernel_distance, prdc
from fedray.models.nets import mlp
from fedray.quality import quality
from fedray.synthesis.generator import png
from fedray.synthesis.requests import Request
from fedray.synthesis.sets import read_set
from fedray.synthesis.store import write_table
from fedray.tasks.classification import classification

DRAW = np.random.default_rng(0)
REAL = DRAW.normal(size=(400, 6)) @ DRAW.normal(size=(6, 6))


def test_the_frechet_distance_of_normals_is_the_formulas():
    mean, std = np.array([1.0, -2.0, 0.5]), np.array([0.5, 2.0, 3.0])
    a, b = DRAW.normal(size=(200_000, 3)), mean + std * DRAW.normal(size=(200_000, 3))
    assert frechet_distance(a, b) == pytest.approx((mean**2).sum() + ((1 - std) ** 2).sum(), rel=0.02)


def test_a_set_is_at_no_distance_from_itself_and_distances_are_symmetric():
    other = REAL + 1.0
    assert frechet_distance(REAL, REAL) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(REAL, other) == pytest.approx(6.0)  # a shift by one in each of six directions
    assert frechet_distance(REAL, 2 * REAL) == pytest.approx(frechet_distance(2 * REAL, REAL))
    assert kernel_distance(REAL, other) == pytest.approx(kernel_distance(other, REAL))
    assert prdc(REAL, REAL) == {
        "precision": 1.0,
        "recall": 1.0,
        "density": pytest.approx(1.2, abs=0.05),
        "coverage": 1.0,
    }


def test_the_frechet_distance_of_fewer_features_than_dimensions_is_finite():
    few = DRAW.normal(size=(5, 40))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert np.isfinite(frechet_distance(few, DRAW.normal(size=(7, 40))))


def test_the_kernel_distance_is_the_double_sum():
    a, b = REAL[:30], REAL[30:70] * 1.5
    kernel = lambda x, y: (x @ y / 6 + 1) ** 3  # noqa: E731
    own = [np.mean([kernel(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    cross = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(own) - 2 * cross)


def test_the_kernel_distance_of_one_distribution_is_near_zero():
    halves = [kernel_distance(*np.split(DRAW.normal(size=(200, 6)), 2)) for _ in range(40)]
    assert abs(np.mean(halves)) < 3 * np.std(halves) / np.sqrt(40)


def test_precision_sees_what_is_unreal_and_recall_what_is_missing():
    real = np.concatenate([DRAW.normal(size=(200, 4)), DRAW.normal(size=(200, 4)) + 50])
    half, wrong = DRAW.normal(size=(300, 4)), DRAW.normal(size=(300, 4)) + 200
    found = prdc(real, half)
    assert found["precision"] > 0.9
    assert found["recall"] == pytest.approx(0.5, abs=0.05)
    assert found["coverage"] == pytest.approx(0.5, abs=0.05)
    assert set(prdc(real, wrong).values()) == {0.0}
    assert prdc(real, np.concatenate([half, wrong]))["precision"] == pytest.approx(0.5, abs=0.05)


def test_what_cannot_be_compared_says_so():
    with pytest.raises(ValueError, match=r"shapes \(400, 6\) and \(3, 5\); they must be \(n, d\)"):
        kernel_distance(REAL, np.zeros((3, 5)))
    with pytest.raises(ValueError, match="k is 5; it must be between 1 and 2, as there are few fake features"):
        prdc(REAL, REAL[:3])
    with pytest.raises(ValueError, match="at least two features"):
        frechet_distance(REAL, REAL[:1])


def judge() -> Learner:
    model: Any = partial(mlp, hidden=[5])
    return Learner(classification(0, data=digits(), partition=partial(iid, num_clients=1), model=model), "cpu")


def test_a_classifiers_features_are_those_of_its_own_inputs():
    learner, data = judge(), digits()
    x = data.test["x"][:200]
    extract = representations(learner, learner.params(), "judge")
    wanted = learner.model.features((torch.from_numpy(np.array(x)).float() / 255 - data.mean[0]) / data.std[0])
    np.testing.assert_allclose(extract(x), wanted.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_scripted_network_gets_colours_of_0_to_255(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    torch.jit.script(Mean()).save(tmp_path / "mean.pt")
    x = np.full((2, 1, 4, 4), 100, np.uint8)
    np.testing.assert_allclose(torchscript(str(tmp_path / "mean.pt"), size=8)(x), np.full((2, 3), 100.0), rtol=1e-5)


class Inception(torch.nn.Module):
    """What the file of FID's Inception takes and returns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        pooled = self.weight * x.mean((2, 3))
        return pooled if return_features else pooled.softmax(1)


def test_inception_gives_pooled_features_of_colours_from_a_file_or_from_its_place_on_the_web(tmp_path, monkeypatch):
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    x = np.full((2, 1, 4, 4), 100, np.uint8)
    wanted = np.full((2, 3), 200.0)
    np.testing.assert_allclose(inception(str(tmp_path / "inception.pt"))(x), wanted, rtol=1e-5)
    asked = []

    def fetch(url: str, to: str, progress: bool) -> None:
        asked.append(url)
        Path(to).write_bytes((tmp_path / "inception.pt").read_bytes())

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        np.testing.assert_allclose(inception()(x), wanted, rtol=1e-5)
    assert asked == [extractors.INCEPTION]
    (tmp_path / "hub" / "checkpoints" / "inception-2015-12-05.pt").unlink()

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(DataError, match=r"cannot be fetched \(no route to host\); bring the file here and give"):
        inception()
    (tmp_path / "broken.pt").write_text("no network")
    with pytest.raises(DataError, match=r"broken\.pt is no network that torch\.jit has saved"):
        inception(str(tmp_path / "broken.pt"))
    with pytest.raises(DataError, match=r"float32 of shape \(7,\); this extractor takes pictures"):
        inception(str(tmp_path / "inception.pt"))(np.zeros((3, 7), np.float32))


# --- features are computed once


def counting(identity: list[Any], calls: list[int]) -> Extractor:
    def extract(x: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        return x.reshape(len(x), -1)[:, :3].astype(np.float32)

    return Extractor("first pixels", identity, extract)


def test_features_are_computed_once_for_the_same_network_and_the_same_pictures(tmp_path, caplog):
    x, calls = digits().test["x"][:20], list[int]()
    for identity in (["a"], ["a"], ["b"]):  # the third has other weights
        found = features(counting(identity, calls), x, tmp_path)
        np.testing.assert_array_equal(found, x.reshape(20, -1)[:, :3])
    assert calls == [20, 20]
    features(counting(["a"], calls), x.copy(), tmp_path)  # known by content
    assert calls == [20, 20]
    changed = x.copy()
    changed[3, 0, 4, 4] ^= 1
    features(counting(["a"], calls), changed, tmp_path)
    features(counting(["a"], calls), x.reshape(20, 1, 4, 16), tmp_path)
    features(counting(["a"], calls), x, None)
    assert calls == [20] * 5
    assert len(list(tmp_path.iterdir())) == 4
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    features(counting(["a"], calls), x, tmp_path)
    assert len(calls) == 6
    assert "is damaged" in caplog.text


def test_a_network_is_known_by_its_weights(tmp_path):
    learner = judge()
    params = learner.params()
    one, same = (representations(learner, params, name).identity for name in ("a", "b"))
    assert one == same
    params["head.bias"][0] += 1e-6
    assert representations(learner, params, "a").identity != one


# --- agreement with other implementations


def test_the_frechet_distance_agrees_with_the_formula_by_a_matrix_root():
    one, other = REAL, 1.3 * REAL @ linalg.hadamard(8)[:6, :6] / 3 + 0.2
    root = linalg.sqrtm(np.cov(one.T) @ np.cov(other.T)).real
    wanted = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(np.cov(one.T) + np.cov(other.T) - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(wanted, rel=1e-9)


class Flat(torch.nn.Module):
    """Pixels as features, for libraries that take an extractor."""

    num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :6].to(torch.float64)


def test_torchmetrics_comes_to_the_same_distances():
    fid = pytest.importorskip("torchmetrics.image.fid")
    kid = pytest.importorskip("torchmetrics.image.kid")
    real, fake = (DRAW.integers(low, 255, (100, 3, 1, 2)).astype(np.uint8) for low in (0, 90))
    for metric, ours in (
        (fid.FrechetInceptionDistance(feature=Flat(), normalize=False), frechet_distance),
        (kid.KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=100), kernel_distance),
    ):
        metric.set_dtype(torch.float64)
        for pictures, is_real in ((real, True), (fake, False)):
            metric.update(torch.from_numpy(pictures), real=is_real)
        theirs = metric.compute()
        theirs = float(theirs[0] if isinstance(theirs, tuple) else theirs)
        assert ours(real.reshape(100, 6), fake.reshape(100, 6)) == pytest.approx(theirs, rel=1e-4)


def test_the_authors_of_density_and_coverage_come_to_the_same():
    package = pytest.importorskip("prdc")
    fake = DRAW.normal(size=(300, 6)) @ DRAW.normal(size=(6, 6))
    assert prdc(REAL, fake, k=4) == pytest.approx(package.compute_prdc(REAL, fake, nearest_k=4))


# --- the command


def written(folder: Path, x: np.ndarray, y: np.ndarray, classes: tuple[str, ...]) -> Path:
    folder.mkdir()
    requests = [Request(f"a {classes[label]}", "", int(label), number) for number, label in enumerate(y)]
    samples = [png(picture.transpose(1, 2, 0) / 255) for picture in x]
    write_table(folder / "train-00000-of-00001.parquet", "image", requests, samples, classes)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    data, folder = digits(), tmp_path_factory.mktemp("sets")
    half = data.train["x"][1000:], data.train["y"][1000:]
    draw = np.random.default_rng(3)
    return {
        "real": written(folder / "real", *half, data.classes),
        "mislabelled": written(folder / "mislabelled", half[0], (half[1] + 1) % 10, data.classes),
        "noise": written(
            folder / "noise", draw.integers(0, 256, half[0].shape).astype(np.uint8), half[1], data.classes
        ),
    }


def values(folder: Path, **changes: Any) -> dict[str, Any]:
    options = {"data": "digits", "model": "mlp", "central_epochs": 10, "central_lr": 0.01, "real": 700}
    return options | {"cache": str(folder)} | changes


def test_real_pictures_are_as_good_as_real_and_others_are_not(sets, tmp_path):
    found = {name: quality(folder, values(tmp_path / "cache")) for name, folder in sets.items()}
    real, mislabelled, noise = (found[name] for name in sets)
    assert real["train_on_synthetic"] > 0.85
    assert abs(real["train_on_synthetic"] - real["train_on_real"]) < 0.08
    assert real["label_hits"] == pytest.approx(
        np.average(list(real["label_hits_of"].values()), weights=np.bincount(digits().train["y"][1000:]))
    )
    assert real["label_hits"] > 0.85
    assert mislabelled["train_on_synthetic"] < 0.1
    assert mislabelled["label_hits"] < 0.1
    assert noise["train_on_synthetic"] < 0.4
    assert mislabelled["synthetic_to_test"] == real["synthetic_to_test"]  # distances do not see labels
    assert real["synthetic_to_test"]["frechet_distance"] < noise["synthetic_to_test"]["frechet_distance"] / 10
    assert noise["synthetic_to_test"]["precision"] < 0.2 < 0.8 < real["synthetic_to_test"]["precision"]
    other = real["real_to_test"]
    assert other["frechet_distance"] == pytest.approx(real["synthetic_to_test"]["frechet_distance"], rel=0.6)
    assert real["extractor"].startswith("substitute: this model, trained on 700 real examples")


def test_the_command_takes_an_experiment_and_an_extractor(sets, tmp_path, capsys):
    torch.jit.script(Inception()).save(tmp_path / "inception.pt")
    config = tmp_path / "run.yaml"
    task = {"name": "classification", "data": "digits", "model": "mlp", "partition": {"name": "iid", "num_clients": 2}}
    config.write_text(json.dumps({"rounds": 1, "cohort": 1, "task": task, "algorithm": "fedavg"}))
    extractor = ["extractor.name=inception", f"extractor.path={tmp_path / 'inception.pt'}"]
    further = ["central_epochs=1", "real=700", f"cache={tmp_path}", "--out", str(tmp_path / "found.json")]
    assert main(["quality", str(sets["real"]), str(config), *extractor, *further]) == 0
    printed = capsys.readouterr().out
    assert "438 samples for digits" in printed
    assert "features: Inception-v3 of FID" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"train on synthetic, test on real  {found['train_on_synthetic']:.4f}" in printed
    assert main(["quality", str(sets["real"]), str(config), "extractor=inceptoin"]) == 2
    assert "did you mean 'inception'?" in capsys.readouterr().err
    assert main(["quality", str(sets["real"]), str(config), "real=0"]) == 2
    assert "real is 0; it must be >= 1" in capsys.readouterr().err


def test_sets_that_do_not_fit_the_data_say_so(sets, tmp_path):
    data = digits()
    read = read_set(str(sets["real"]), data)
    for name in ("x", "y"):
        np.testing.assert_array_equal(read[name], data.train[name][1000:])
    large = np.zeros((20, 1, 12, 12), np.uint8)
    large[:, :, 2:10, 2:10] = data.train["x"][:20]
    folder = written(tmp_path / "large", large, data.train["y"][:20], data.classes)
    cut = read_set(str(folder), data, fit="crop")
    np.testing.assert_array_equal(cut["x"], data.train["x"][:20])
    assert read_set(str(folder), data)["x"].shape == (20, 1, 8, 8)
    with pytest.raises(DataError, match="has the classes a, b; digits has 0, 1"):
        read_set(str(written(tmp_path / "odd", large[:4], np.array([0, 1, 0, 1]), ("a", "b"))), data)
    small = written(tmp_path / "small", large[:, :, :4, :4], data.train["y"][:20], data.classes)
    with pytest.raises(DataError, match=r"has uint8 samples of shape \(1, 4, 4\), but digits has uint8 of shape"):
        read_set(str(small), data, fit="crop")


def test_a_real_transformer_tells_digits_from_noise():
    extract = transformer(asset("dinov2-small"), layer=4, size=28)
    one, other = digits().test["x"][:40], digits().train["x"][:40]
    noise = DRAW.integers(0, 256, one.shape).astype(np.uint8)
    features = [extract(x) for x in (one, other, noise)]
    assert features[0].shape == (40, 384)
    assert frechet_distance(features[0], features[1]) < frechet_distance(features[0], features[2]) / 3
