"""Differential privacy: what is clipped, what noise is drawn, and what the accountant says of it."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from problems import (
    LOCAL,
    PROBLEMS,
    SIZES,
    Problem,
    assert_same_bits,
    blobs,
    copy,
    differ,
    images,
    initial,
    make,
    quadratic,
    regression,
    slopes,
    train,
)

from fedray.algorithm import Client
from fedray.algorithms import ALGORITHMS
from fedray.backends.serial import SerialBackend
from fedray.errors import ConfigError
from fedray.execution import Execution
from fedray.experiment import plan
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.per_example import one_by_one, together
from fedray.privacy import MECHANISMS, Mechanism, clipped_sum, dp_client, dp_sgd, fedpeft_noise
from fedray.trees import flatten, squared_norm, subtract

WHOLE = replace(LOCAL, batch_size=100, local_epochs=1, local_lr_decay=1.0)  # every batch is all that a client has


def private(privacy: Mechanism, local: LocalTraining = LOCAL, **options: Any) -> Any:
    return make("dp_fedavg", local=local, privacy=privacy, **options)


def step(task: Problem, privacy: Mechanism | None, local: LocalTraining = WHOLE, client: int = 4) -> Any:
    """What one client comes to, and where it started."""
    learner = Learner(task, "cpu")
    start = learner.params()
    return start, learner.train(start, Client(client, seed=11), local, privacy=privacy)


def gradients(task: Problem, client: int = 4) -> list[list[torch.Tensor]]:
    """Every example's own gradient, by a plain loop."""
    model = task.model().train()
    rows = task.examples(client)
    return [
        list(
            torch.autograd.grad(task.loss(model, {k: v[i : i + 1] for k, v in rows.items()}), list(model.parameters()))
        )
        for i in range(len(rows["y"]))
    ]


# Every example's own gradient


@pytest.mark.parametrize("make_task", [regression, blobs], ids=lambda task: task.__name__)
def test_gradients_in_one_pass_are_those_of_a_loop(make_task):
    task = make_task()
    learner = Learner(task, "cpu")
    rows, batch_of = torch.arange(8), learner.ready(task.examples(4))
    trained = dict(learner.model.named_parameters())
    plain = learner._gradients(trained, 32, None)
    expected = [torch.stack(each) for each in zip(*gradients(task), strict=True)]
    for losses, found in (
        together(learner.stacked(), trained, trained, task.losses, batch_of, rows),
        one_by_one(plain, batch_of, rows),
    ):
        torch.testing.assert_close(losses, task.losses(task.model(), task.examples(4)))
        torch.testing.assert_close(list(found), expected)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("peft")
    return tiny_models.saved(tiny_models.vit(), tmp_path_factory.mktemp("vit"))


@pytest.mark.parametrize("method", ["head", "bias", "layernorm", "lora", "adapter", "prompt"])
def test_fine_tuned_parts_have_every_examples_own_gradient(folder, method: str):
    chosen = {"name": method, "dropout": 0.0} if method == "prompt" else method
    learner = Learner(plan(tiny_models.configuration(folder, method=chosen)).experiment.task, "cpu")
    learner.model.train()
    rows, batch_of = torch.arange(5), learner.ready(learner.task.examples(0))
    trained = dict(learner._trained)
    plain = learner._gradients(trained, 32, None)
    found = learner._examples_gradients(trained, plain, None)(batch_of, rows)
    expected = one_by_one(plain, batch_of, rows)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(list(found[1]), list(expected[1]), rtol=1e-4, atol=1e-5)
    assert learner._is_stackable is (method != "prompt")  # whose layer has parameters of its own kind


def test_every_gradient_is_clipped_over_all_tensors_together():
    draw = torch.Generator().manual_seed(0)
    each = [torch.randn(5, 3, 2, generator=draw), torch.randn(5, 4, generator=draw)]
    vectors = torch.cat([g.flatten(1) for g in each], 1)
    norms = vectors.norm(dim=1)
    bound = float(norms.median())
    assert (norms < bound).any()  # a small one stays as it is
    expected = sum(v * min(1.0, bound / float(v.norm())) for v in vectors)
    torch.testing.assert_close(flatten(dict(enumerate(clipped_sum(each, bound)))), expected)


@pytest.mark.parametrize("make_task", [regression, blobs, lambda: quadratic([[1.0, 2.0]], [[3.0, -1.0]], [5])])
def test_a_step_of_dp_sgd_is_the_mean_of_clipped_gradients(make_task):
    task = make_task()
    client = min(4, len(task.clients) - 1)
    bound = 0.7
    start, y = step(task, dp_sgd(bound, 0.0), client=client)
    each = gradients(task, client)
    clipped = [[g * min(1.0, bound / math.sqrt(squared_norm(dict(enumerate(gs))))) for g in gs] for gs in each]
    mean = [sum(gs) / len(each) for gs in zip(*clipped, strict=True)]
    assert any(squared_norm(dict(enumerate(gs))) > bound**2 for gs in each)
    for (name, x), g in zip(start.items(), mean, strict=True):
        torch.testing.assert_close(y.params[name], x - WHOLE.local_lr * g)


def test_parts_of_a_batch_come_to_the_whole(monkeypatch):
    _, whole = step(blobs(), dp_sgd(0.5, 1.0))
    monkeypatch.setattr("fedray.per_example._AT_ONCE", 150)  # two or three examples at a time
    _, parts = step(blobs(), dp_sgd(0.5, 1.0))
    torch.testing.assert_close(parts.params, whole.params)


def test_a_layer_that_cannot_be_stacked_is_differentiated_example_by_example():
    torch.manual_seed(5)
    _, y = step(images(), dp_sgd(0.5, 0.0))  # with dropout
    _, again = step(images(), dp_sgd(0.5, 0.0))
    assert_same_bits(y.params, again.params)
    start, loose = step(images(), dp_sgd(1e6, 0.0))
    assert 0 < squared_norm(subtract(start, y.params)) < squared_norm(subtract(start, loose.params))
    assert squared_norm(subtract(start, y.params)) <= (WHOLE.local_lr * 0.5) ** 2 * 1.0001


# Batches


def test_each_example_is_in_a_poisson_batch_with_the_same_probability():
    local = LocalTraining(batch_size=5, local_steps=4000)
    batches = list(local.poisson_batches(20, torch.Generator().manual_seed(0)))
    sizes = np.array([len(rows) for rows in batches])
    counts = torch.cat(batches).bincount(minlength=20) / 4000
    assert len(batches) == 4000
    assert counts == pytest.approx([0.25] * 20, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert sizes.var() == pytest.approx(20 * 0.25 * 0.75, rel=0.1)  # of a binomial, not of a fixed size
    assert (sizes == 0).any()


def test_a_batch_without_examples_is_a_step_of_noise_alone():
    local = LocalTraining(batch_size=1, local_steps=30)
    start, y = step(regression(), dp_sgd(1.0, 0.0), local)
    assert y.num_steps == 30
    assert all(torch.isfinite(p).all() for p in y.params.values())
    assert differ(start, y.params)
    nobody = slopes([[0.0] * 50], [40])
    start, y = step(nobody, dp_sgd(1.0, 1.0), replace(local, local_steps=1), client=0)
    assert differ(start, y.params)


def test_sums_and_noise_are_divided_by_the_expected_size_of_a_batch():
    local = LocalTraining(local_lr=0.5, batch_size=10, local_steps=6)
    sizes = [len(rows) for rows in local.poisson_batches(40, torch.Generator().manual_seed(11))]  # the client's seed
    assert len(set(sizes)) > 3
    assert sum(sizes) != 60
    start, y = step(slopes([[3.0]], [40]), dp_sgd(100.0, 0.0), local, client=0)
    assert float(start["w"] - y.params["w"]) == pytest.approx(0.5 * 3.0 * sum(sizes) / 10)
    start, y = step(slopes([[0.0] * 20_000], [40]), dp_sgd(0.5, 3.0), local, client=0)
    assert float((start["w"] - y.params["w"]).std()) == pytest.approx(0.5 * 6**0.5 * 3.0 * 0.5 / 10, rel=0.03)


# Noise


@pytest.mark.parametrize(
    ("privacy", "std"),
    [
        (dp_sgd(0.5, 3.0), 3.0 * 0.5 / 8),  # of the sum, over the batch's eight examples
        (fedpeft_noise(), 2 * math.sqrt(2 * math.log(1250) / 5)),  # of the mean
    ],
    ids=["dp_sgd", "fedpeft_noise"],
)
def test_a_step_gets_noise_of_the_right_deviation(privacy: Mechanism, std: float):
    start, y = step(slopes([[0.0] * 20_000], [8]), privacy, client=0)
    noise = (start["w"] - y.params["w"]) / WHOLE.local_lr
    assert float(noise.std()) == pytest.approx(std, rel=0.03)
    assert abs(float(noise.mean())) < 4 * std / math.sqrt(20_000)


def test_the_servers_noise_has_the_right_deviation_and_is_new_every_round():
    task = slopes([[0.0] * 20_000] * 3, [1, 1, 1])
    rounds = train(task, private(dp_client(0.5, 3.0), num_clients=3), SerialBackend(task), 2, cohort=3)
    first = rounds[0].state.params["w"]
    second = rounds[1].state.params["w"] - first
    for noise in (first, second):
        assert float(noise.std()) == pytest.approx(3.0 * 0.5 / 3, rel=0.03)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.03


def test_a_clients_update_is_clipped_before_it_is_added():
    task = slopes([[30.0, 40.0], [0.03, 0.04]], [1, 1])
    local = replace(WHOLE, local_lr=1.0)
    [done] = train(task, private(dp_client(0.5, 0.0), local, num_clients=2), SerialBackend(task), 1, cohort=2)
    # one of norm 50 scaled to 0.5, one of norm 0.05 as it is
    assert done.state.params["w"].tolist() == pytest.approx([-(0.3 + 0.03) / 2, -(0.4 + 0.04) / 2])


def test_the_papers_noise_is_what_the_specification_says():
    assert fedpeft_noise(1.0, 5.0, 1e-3).std == pytest.approx(3.378, abs=5e-4)
    assert fedpeft_noise(1.0, 10.0, 1e-3).std == pytest.approx(2.3885, abs=5e-5)


def test_the_papers_noise_clips_nothing_and_claims_nothing():
    task = slopes([[3000.0, 4000.0]], [8])
    start, y = step(task, fedpeft_noise(), replace(WHOLE, local_lr=1.0), client=0)
    assert (start["w"] - y.params["w"]).tolist() == pytest.approx([3000.0, 4000.0], abs=20)
    task = regression()
    [done] = train(task, private(fedpeft_noise()), SerialBackend(task), 1)
    assert "epsilon" not in done.metrics
    assert "NOT" in (fedpeft_noise.__doc__ or "").partition("\n")[0]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ["dp_sgd", "fedpeft_noise"])
def test_noise_at_the_clients_does_not_depend_on_workers_or_groups(name: str, problem: str):
    task, algorithm = PROBLEMS[problem](), private(MECHANISMS[name]())
    one, *others = (
        [(r.state, r.metrics) for r in train(task, algorithm, SerialBackend(task, shares, execution=Execution(group)))]
        for shares, group in ((1, 1), (2, 1), (3, 4), (7, 1), (9, 3))
    )
    for other in others:
        assert_same_bits(one, other)
    assert differ(one[0][0], train(task, algorithm, SerialBackend(task), 1, seed=1)[0].state)


# Reductions


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_without_clipping_and_noise_it_is_fedavg(optimizer: str):
    from fedray.server_optimizers import SERVER_OPTIMIZERS

    task, server = blobs(), SERVER_OPTIMIZERS[optimizer]()
    mine = train(task, private(dp_client(1e6, 0.0), server_optimizer=server), SerialBackend(task))
    fedavg = train(task, make("fedavg", local=LOCAL, server_optimizer=server, weighting="uniform"), SerialBackend(task))
    assert_same_bits(mine[-1].state.params, fedavg[-1].state.params)
    mine = train(task, private(dp_sgd(1e6, 0.0), WHOLE, weighting="examples"), SerialBackend(task))
    fedavg = train(task, make("fedavg", local=WHOLE), SerialBackend(task))
    torch.testing.assert_close(mine[-1].state.params, fedavg[-1].state.params, rtol=1e-5, atol=1e-6)


# The accountant


def published(q: float, sigma: float, steps: int, delta: float, classic: bool) -> float:
    """ε by the formula of Mironov, Talwar and Zhang (2019, section 3.3) for whole α, by hand.

    ``classic`` turns Rényi divergences into ε as Mironov (2017, Proposition 3) does, otherwise as Canonne, Kamath and
    Steinke (2020, Proposition 12), which is tighter.
    """
    found = []
    for a in range(2, 257):
        terms = [
            math.lgamma(a + 1) - math.lgamma(k + 1) - math.lgamma(a - k + 1)
            + k * math.log(q) + (a - k) * math.log1p(-q) + (k * k - k) / (2 * sigma**2)
            for k in range(a + 1)
        ]  # fmt: skip
        rdp = steps * float(np.logaddexp.reduce(terms)) / (a - 1)
        if classic:
            found.append(rdp + math.log(1 / delta) / (a - 1))
        else:
            found.append(rdp + math.log1p(-1 / a) - math.log(delta * a) / (a - 1))
    return min(found)


# of MNIST, 60,000 examples in batches of 256, δ = 1e-5: the table in the README of TensorFlow Privacy's tutorials
@pytest.mark.parametrize(("sigma", "epochs", "epsilon"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)])
def test_epsilon_of_examples_is_the_published_one(sigma: float, epochs: int, epsilon: float):
    q, steps = 256 / 60_000, epochs * 60_000 // 256
    assert published(q, sigma, steps, 1e-5, classic=True) == pytest.approx(epsilon, rel=0.005)
    ours = dp_sgd(1.0, sigma, 1e-5).epsilon_of_examples(q, steps)
    assert ours == pytest.approx(published(q, sigma, steps, 1e-5, classic=False), rel=1e-3)
    assert 0.75 * epsilon < ours < epsilon


def test_epsilon_is_that_of_abadis_figure_2():
    """q = 0.01, σ = 4, δ = 1e-5, 100 epochs: 1.26 by the moments accountant (Abadi et al., 2016, section 5.1)."""
    assert published(0.01, 4.0, 10_000, 1e-5, classic=True) == pytest.approx(1.26, abs=0.005)
    ours = dp_sgd(1.0, 4.0, 1e-5).epsilon_of_examples(0.01, 10_000)
    assert ours == pytest.approx(published(0.01, 4.0, 10_000, 1e-5, classic=False), rel=1e-3)


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """The exact δ of one Gaussian mechanism (Balle and Wang, 2018, Theorem 8)."""
    phi = lambda x: (1 + math.erf(x / math.sqrt(2))) / 2  # noqa: E731
    return phi(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * phi(-0.5 / sigma - epsilon * sigma)


@pytest.mark.parametrize("privacy", [dp_client(2.0, 4.0, 1e-5), dp_client(2.0, 4.0, 1e-5, "any")])
def test_one_round_of_all_clients_is_one_gaussian_mechanism_that_anybody_can_move_by_twice_the_norm(privacy):
    epsilon = privacy.epsilon_of_clients(50, 50, 1)
    assert gaussian_delta(epsilon, 4.0 / 2) <= 1e-5 < gaussian_delta(0.85 * epsilon, 4.0 / 2)


def test_epsilon_of_clients_grows_with_rounds_and_cohorts_and_shrinks_with_secrecy():
    privacy = {cohorts: dp_client(1.0, 3.0, 1e-5, cohorts) for cohorts in ("any", "uniform", "poisson")}
    spent = {name: p.epsilon_of_clients(10, 1000, 20) for name, p in privacy.items()}
    assert spent["poisson"] < spent["uniform"] < spent["any"]
    assert spent["uniform"] < privacy["uniform"].epsilon_of_clients(20, 1000, 20)
    assert spent["uniform"] < privacy["uniform"].epsilon_of_clients(10, 1000, 21)
    assert privacy["any"].epsilon_of_clients(500, 1000, 20) == spent["any"]
    assert dp_client(2.0, 3.0).epsilon_of_clients(10, 1000, 20) == spent["uniform"]  # the norm does not matter


def test_without_noise_there_is_no_guarantee():
    assert dp_sgd(1.0, 0.0).epsilon_of_examples(0.1, 1) == math.inf
    assert dp_client(1.0, 0.0).epsilon_of_clients(10, 100, 1) == math.inf


def test_a_round_reports_the_largest_epsilon_of_any_client():
    task, privacy = regression(), dp_sgd(1.0, 2.0, 1e-3)
    local = replace(LOCAL, batch_size=2)
    done = train(task, private(privacy, local), SerialBackend(task), 4, cohort=3)
    taken, worst = dict.fromkeys(range(len(SIZES)), 0), []
    for finished in done:
        for client in finished.selection.clients:
            taken[client] += 1
        each = (
            privacy.epsilon_of_examples(min(1.0, 2 / n), taken[k] * math.ceil(n / 2) * 2) for k, n in enumerate(SIZES)
        )
        worst.append(max(each))
    assert [finished.metrics["epsilon"] for finished in done] == pytest.approx(worst)
    assert worst == sorted(worst)


def test_a_round_reports_the_epsilon_of_clients():
    task, privacy = regression(), dp_client(1.0, 2.0, 1e-3)
    done = train(task, private(privacy), SerialBackend(task), 3, cohort=4)
    expected = [privacy.epsilon_of_clients(4, len(SIZES), t) for t in (1, 2, 3)]
    assert [finished.metrics["epsilon"] for finished in done] == expected


# Mistakes


@pytest.mark.parametrize(
    ("make_it", "message"),
    [
        (lambda: dp_sgd(max_norm=0.0), "max_norm is 0.0; it must be > 0"),
        (lambda: dp_client(noise_multiplier=-1.0), "noise_multiplier is -1.0; it must be >= 0"),
        (lambda: dp_sgd(delta=1.0), "delta is 1.0; it must be above 0 and below 1"),
        (lambda: fedpeft_noise(delta=0.0), "delta is 0.0; it must be above 0 and below 1"),
        (lambda: fedpeft_noise(epsilon=0.0), "epsilon is 0.0; it must be > 0"),
        (lambda: private(dp_client(), weighting="examples"), "weighting is examples; dp_client needs uniform"),
    ],
)
def test_impossible_values_are_refused(make_it, message):
    with pytest.raises(ValueError, match=message):
        make_it()


def test_without_the_library_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'fedray\[privacy\]'"):
        private(dp_sgd())
    private(fedpeft_noise())  # which promises nothing, and accounts for nothing


def test_running_statistics_are_refused():
    normed = replace(
        blobs(), build=lambda: torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)), average_buffers=True
    )
    with pytest.raises(ValueError, match="BatchNorm's statistics are sent as they are; use a model with group norm"):
        step(normed, dp_sgd())


def test_the_servers_state_starts_with_nothing_spent():
    state = initial(regression(), private(dp_sgd()))
    assert (state.epsilon, state.largest, int(state.taken.sum())) == (0.0, 0, 0)
    assert copy(state)["/taken"].shape == (len(SIZES),)
    assert "dp_fedavg" in ALGORITHMS
