"""Quality of synthetic pictures: laws of the distances, and the extractors."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedray.data.datasets import digits
from fedray.metrics.extractors import classifier, torchscript, transformer
from fedray.metrics.quality import frechet_distance, kernel_distance, prdc
from fedray.models.nets import mlp

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


def test_a_classifiers_features_are_those_of_its_own_inputs():
    data = digits()
    model = mlp(data.input_shape, data.num_classes, hidden=[5])
    extract = classifier(data, model, dict(model.state_dict()))
    x = data.test["x"][:200]
    wanted = model.features((torch.from_numpy(np.array(x)).float() / 255 - data.mean[0]) / data.std[0])
    np.testing.assert_allclose(extract(x), wanted.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_scripted_network_gets_colours_of_0_to_255(tmp_path):
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3))

    torch.jit.script(Mean()).save(tmp_path / "mean.pt")
    x = np.full((2, 1, 4, 4), 100, np.uint8)
    np.testing.assert_allclose(torchscript(str(tmp_path / "mean.pt"), size=8)(x), np.full((2, 3), 100.0), rtol=1e-5)


def test_a_real_transformer_tells_digits_from_noise():
    folder = os.environ.get("FEDRAY_ASSETS")
    if folder is None or not (Path(folder) / "dinov2-small").exists():
        pytest.skip("needs dinov2-small: set FEDRAY_ASSETS to the folder that has it")
    extract = transformer(str(Path(folder) / "dinov2-small"), layer=4, size=28)
    one, other = digits().test["x"][:40], digits().train["x"][:40]
    noise = DRAW.integers(0, 256, one.shape).astype(np.uint8)
    features = [extract(x) for x in (one, other, noise)]
    assert features[0].shape == (40, 384)
    assert frechet_distance(features[0], features[1]) < frechet_distance(features[0], features[2]) / 3
