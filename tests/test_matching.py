"""Losses by features: what each is for equal and for shifted samples, and its gradients."""

import math
from typing import Any

import pytest
import torch

from fedray.tasks.matching import MATCHINGS, Matching, adam, discrepancy, mmd, moments, moving, mse


def features(count: int, seed: int, size: int = 5) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def begun(matching: Matching, real: torch.Tensor) -> dict[str, torch.Tensor]:
    mean, var = moments(real)
    return {name: t.clone() for name, t in matching.begin({"mean": mean, "var": var}, 0).items()}


def brute_force(real: torch.Tensor, fake: torch.Tensor, widths: list[float]) -> torch.Tensor:
    """The definition, pair by pair."""

    def k(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return sum(torch.exp(-(x - y).square().sum() / w) for w in widths) / len(widths)  # type: ignore[return-value]

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack([k(x, y) for x in a for y in b]).mean()

    return mean(real, real) + mean(fake, fake) - 2 * mean(real, fake)


def test_the_discrepancy_and_its_gradients_are_those_of_the_definition():
    real = features(6, 0).double() + 30  # far from the origin, where rounding would show
    widths = [0.5, 3.0, 11.0]
    ours, theirs = (features(4, 1).double().add(30.2).requires_grad_() for _ in range(2))
    found, expected = discrepancy(real, ours, widths), brute_force(real, theirs, widths)
    torch.testing.assert_close(found, expected)
    [a], [b] = (torch.autograd.grad(value, [x]) for value, x in ((found, ours), (expected, theirs)))
    torch.testing.assert_close(a, b)
    # by hand: ∂/∂f_i = 2/B'²·Σ_j k'(f_i, f_j) − 2/(B·B')·Σ_j k'(r_j, f_i), with k'(x, y) = −2/w·(x − y)·k
    x = ours.detach()
    by_hand = torch.zeros_like(x)
    for w in widths:
        for i in range(4):
            for others, weight in ((x, 2 / 16), (real, -2 / 24)):
                d = x[i] - others
                by_hand[i] += weight / 3 * (-2 / w * d * torch.exp(-d.square().sum(1, keepdim=True) / w)).sum(0)
    torch.testing.assert_close(a, by_hand)


def test_the_discrepancy_of_equal_samples_is_zero_and_of_shifted_ones_grows():
    real = features(20, 0)
    assert float(discrepancy(real, real.clone(), [1.0, 10.0])) == 0.0
    assert float(discrepancy(real, real[torch.randperm(20)], [1.0, 10.0])) == pytest.approx(0, abs=1e-6)
    shifted = [float(discrepancy(real, real + shift, [10.0])) for shift in (0.0, 0.2, 0.5, 1.0, 2.0)]
    assert shifted == sorted(shifted)
    assert shifted[0] == 0 < shifted[1]
    assert float(discrepancy(real, real + 1e3, [10.0])) <= 2


def test_a_discrepancy_sees_what_means_and_variances_do_not():
    two = torch.tensor([[-1.0], [1.0]]).repeat(500, 1)  # two points, against a normal with the same moments
    bell = torch.erfinv(2 * (torch.arange(1000) + 0.5) / 1000 - 1).mul(math.sqrt(2))[:, None]
    bell = (bell - bell.mean()) / bell.std() * two.std()
    assert float(mse().loss(begun(mse(), two), bell, lambda: two)) < 1e-8
    assert float(mmd().loss(begun(mmd(), two), bell, lambda: two)) > 0.01


def test_bandwidths_are_in_units_of_the_mean_squared_distance_of_a_clients_pictures():
    real, fake = features(50, 0), features(50, 1) + 0.3
    distances = torch.pdist(real).square().mean()
    torch.testing.assert_close(begun(mmd(), real)["scale"], distances)
    found = mmd([0.5, 2.0]).loss(begun(mmd(), real), fake, lambda: real)
    expected = discrepancy(real, fake, [0.5 * float(distances), 2.0 * float(distances)])
    torch.testing.assert_close(found, expected)
    scaled = mmd([0.5, 2.0]).loss(begun(mmd(), 7 * real), 7 * fake, lambda: 7 * real)
    torch.testing.assert_close(scaled, found)


@pytest.mark.parametrize("name", ["mse", "moving", "mmd"])
def test_descending_along_a_loss_brings_the_samples_together(name: str):
    matching, real = MATCHINGS[name](), features(64, 0)
    kept, fake = begun(matching, real), (2 * features(64, 1) + 1).requires_grad_()
    optimizer = torch.optim.Adam([fake], lr=0.05)
    before = (fake.mean(0) - real.mean(0)).norm()
    for _ in range(200):
        optimizer.zero_grad()
        matching.loss(kept, fake, lambda: real).backward()
        optimizer.step()
    assert (fake.mean(0) - real.mean(0)).norm() < 0.2 * before
    assert float((fake.detach().std(0) - real.std(0)).abs().max()) < 0.4


def test_a_moving_average_at_rate_one_is_none_and_else_remembers():
    real, first, second = features(9, 0), features(9, 1), features(9, 2)
    for fake in (first, second):
        torch.testing.assert_close(
            moving(1.0).loss(begun(moving(), real), fake, lambda: real),
            mse().loss(begun(mse(), real), fake, lambda: real),
        )
    kept = begun(moving(0.3), real)
    moving(0.3).loss(kept, first, lambda: real)
    moving(0.3).loss(kept, second, lambda: real)
    torch.testing.assert_close(kept["fake_mean"], 0.7 * first.mean(0) + 0.3 * second.mean(0))


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (moving, {"rate": 0.0}, r"rate is 0.0; it must be above 0 and at most 1"),
        (adam, {"lr": 0.0}, r"lr is 0.0; it must be > 0"),
        (mmd, {"bandwidths": []}, r"bandwidths is \[\]; give one or more, all > 0"),
    ],
)
def test_impossible_options_are_named(rule: Any, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        rule(**options)
