"""Every expected number below is worked out by hand from Reddi et al. 2021, Algorithm 2."""

import math

import pytest
import torch

from fedray.server_optimizers import SERVER_OPTIMIZERS, ServerOptimizer, adagrad, adam, momentum, sgd, yogi
from fedray.trees import leaves


def trajectory(optimizer: ServerOptimizer, gradients: list[float], start: float = 10.0) -> list[float]:
    params = {"x": torch.tensor(start, dtype=torch.float64)}
    state = optimizer.init(params)
    xs = []
    for g in gradients:
        params, state = optimizer.apply({"x": torch.tensor(g, dtype=torch.float64)}, state, params)
        xs.append(params["x"].item())
    return xs


def test_sgd_descends_by_lr_times_gradient():
    assert trajectory(sgd(lr=0.5), [4, 2, -8]) == [8, 7, 11]


def test_momentum_accumulates_velocity():
    # v = 4, 0.5*4+2 = 4, 0.5*4-8 = -6
    assert trajectory(momentum(lr=0.5, beta=0.5), [4, 2, -8]) == [8, 6, 9]


def test_adagrad_sums_squares_from_tau_squared():
    # tau = 3: sqrt(v) = sqrt(9+16) = 5, sqrt(25+144) = 13, sqrt(169+7056) = 85
    expected = [10 - 4 / 8, 10 - 4 / 8 - 12 / 16, 10 - 4 / 8 - 12 / 16 - 84 / 88]
    assert trajectory(adagrad(lr=1.0, tau=3.0), [4, 12, 84]) == pytest.approx(expected, rel=1e-14)


def test_adagrad_first_moment():
    # beta1 = 1/2: m = 2, 1+6 = 7, 3.5+42 = 45.5; the same v as above
    expected = [10 - 2 / 8, 10 - 2 / 8 - 7 / 16, 10 - 2 / 8 - 7 / 16 - 45.5 / 88]
    assert trajectory(adagrad(lr=1.0, beta1=0.5, tau=3.0), [4, 12, 84]) == pytest.approx(expected, rel=1e-14)


def test_adam_has_no_bias_correction():
    # beta2 = 1/2, tau = 1: v = (1+49)/2 = 25, (25+1225)/2 = 625, (625+30625)/2 = 15625 = 125²
    # beta1 = 1/2: m = 3.5, 1.75+17.5 = 19.25, 9.625-87.5 = -77.875
    steps = [3.5 / 6, 19.25 / 26, -77.875 / 126]
    expected = [10 - 2 * sum(steps[: i + 1]) for i in range(3)]
    assert trajectory(adam(lr=2.0, beta1=0.5, beta2=0.5, tau=1.0), [7, 35, -175]) == pytest.approx(expected, rel=1e-14)


def test_adam_is_not_torch_adam():
    x = torch.tensor(10.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.1, betas=(0.9, 0.99), eps=1e-3)
    x.grad = torch.tensor(7.0, dtype=torch.float64)
    optimizer.step()
    ours = trajectory(adam(lr=0.1, beta1=0.9, beta2=0.99, tau=1e-3), [7.0])[0]
    assert x.item() == pytest.approx(9.9, abs=1e-4)  # bias correction: the first step is lr
    # v = 0.99 tau² + 0.01 * 49, m = 0.7
    assert ours == pytest.approx(10 - 0.07 / (math.sqrt(0.99e-6 + 0.49) + 1e-3), rel=1e-14)
    assert abs(ours - x.item()) > 1e-4


def test_yogi_trajectory():
    # tau = 2, beta2 = 1/2: v = 4 + 64/2 = 36 (64 > 4); stays 36 (g² = 36); 36 - 16/2 = 28 (16 < 36)
    # beta1 = 1/2: m = 4, 2+3 = 5, 2.5+2 = 4.5
    steps = [4 / 8, 5 / 8, 4.5 / (math.sqrt(28) + 2)]
    expected = [10 - sum(steps[: i + 1]) for i in range(3)]
    assert trajectory(yogi(lr=1.0, beta1=0.5, beta2=0.5, tau=2.0), [8, 6, 4]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("g", "sign"), [(0.5, -1), (1.0, 0), (3.0, +1), (-3.0, +1)])
def test_yogi_moves_v_towards_the_square_by_a_step_that_depends_on_g_alone(g: float, sign: int):
    optimizer = yogi(lr=1.0, beta2=0.9, tau=1.0)  # v starts at 1
    params = {"x": torch.tensor(0.0, dtype=torch.float64)}
    _, state = optimizer.apply({"x": torch.tensor(g, dtype=torch.float64)}, optimizer.init(params), params)
    assert state["v"]["x"].item() == pytest.approx(1 + sign * 0.1 * g**2, rel=1e-14)


def random_tree(generator: torch.Generator) -> dict:
    return {
        "w": torch.randn(3, 4, generator=generator, dtype=torch.float64),
        "b": torch.randn(3, generator=generator, dtype=torch.float64),
    }


def test_sgd_with_rate_one_gives_the_mean_of_the_clients():
    generator = torch.Generator().manual_seed(0)
    x, *clients = (random_tree(generator) for _ in range(6))
    mean = {name: torch.stack([y[name] for y in clients]).mean(0) for name in x}
    gradient = {name: torch.stack([x[name] - y[name] for y in clients]).mean(0) for name in x}
    optimizer = sgd(1.0)
    params, _ = optimizer.apply(gradient, optimizer.init(x), x)
    torch.testing.assert_close(params, mean, rtol=1e-14, atol=1e-14)


def test_momentum_with_beta_zero_is_sgd():
    assert trajectory(momentum(lr=0.3, beta=0.0), [4, 2, -8]) == trajectory(sgd(lr=0.3), [4, 2, -8])


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_a_step_changes_nothing_in_place_and_keeps_shapes_and_types(name: str):
    generator = torch.Generator().manual_seed(0)
    optimizer = SERVER_OPTIMIZERS[name]()
    params, g = random_tree(generator), random_tree(generator)
    state = optimizer.init(params)
    before = [leaf.clone() for leaf in leaves({"x": params, "g": g, "s": state})]
    new_params, new_state = optimizer.apply(g, state, params)
    again_params, again_state = optimizer.apply(g, state, params)
    torch.testing.assert_close([*leaves({"x": params, "g": g, "s": state})], before, rtol=0, atol=0)
    torch.testing.assert_close((new_params, new_state), (again_params, again_state), rtol=0, atol=0)
    assert {k: (v.shape, v.dtype) for k, v in new_params.items()} == {k: (v.shape, v.dtype) for k, v in params.items()}
    assert all(not torch.equal(new_params[k], params[k]) for k in params)


@pytest.mark.parametrize("name", SERVER_OPTIMIZERS)
def test_the_state_is_a_tree_of_tensors_in_the_shape_of_the_params(name: str):
    params = random_tree(torch.Generator().manual_seed(0))
    state = SERVER_OPTIMIZERS[name]().init(params)
    assert isinstance(state, dict)
    for moment in state.values():
        assert {k: v.shape for k, v in moment.items()} == {k: v.shape for k, v in params.items()}


@pytest.mark.parametrize(
    ("name", "option", "value", "allowed"),
    [
        *((name, "lr", value, "> 0") for name in SERVER_OPTIMIZERS for value in (0.0, -1.0, math.nan, math.inf)),
        *(("momentum", "beta", value, ">= 0 and < 1") for value in (-0.1, 1.0, math.nan)),
        *((name, "beta1", value, ">= 0 and < 1") for name in ("adagrad", "adam", "yogi") for value in (-0.1, 1.0)),
        *((name, "beta2", value, ">= 0 and < 1") for name in ("adam", "yogi") for value in (-0.1, 1.0)),
        *((name, "tau", value, "> 0") for name in ("adagrad", "adam", "yogi") for value in (0.0, -1.0)),
    ],
)
def test_impossible_options_are_named(name: str, option: str, value: float, allowed: str):
    with pytest.raises(ValueError, match=rf"^{option} is {value}; it must be {allowed}"):
        SERVER_OPTIMIZERS[name](**{option: value})
