"""What each algorithm is where its paper says that it is something simpler, and its update rule written out."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import (
    LOCAL,
    SIZES,
    Exam,
    Problem,
    assert_same_bits,
    blobs,
    initial,
    make,
    quadratic,
    regression,
    slopes,
    train,
)
from torch import nn

from fedray.algorithm import EVERYONE, Client, FederatedAlgorithm
from fedray.algorithms.fednova import gradient_weight
from fedray.backends.serial import SerialBackend
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.rounds import clients
from fedray.samplers import Population, Selection
from fedray.server_optimizers import momentum
from fedray.trees import Params


def states(
    task: Problem, algorithm: FederatedAlgorithm, num_rounds: int, cohort: int | None = None
) -> tuple[list[Any], SerialBackend]:
    backend = SerialBackend(task)
    history = train(task, algorithm, backend, num_rounds, cohort or len(task.sizes))
    return [r.state for r in history], backend


def final(task: Problem, algorithm: FederatedAlgorithm, num_rounds: int = 3, cohort: int | None = None) -> Params:
    return states(task, algorithm, num_rounds, cohort)[0][-1].params


def one_round(task: Problem, algorithm: FederatedAlgorithm, *who: int) -> Any:
    cohort = clients(Selection(who), Population(task.sizes), 0, 1)
    return algorithm.apply(initial(task, algorithm), cohort, SerialBackend(task))[0]


CURVATURES = [[1.0, 4.0], [3.0, 0.5], [2.0, 1.0]]
OPTIMA = [[1.0, -2.0], [-1.0, 3.0], [5.0, 0.0]]
QUADRATIC = quadratic(CURVATURES, OPTIMA)
A, B = torch.tensor(CURVATURES, dtype=torch.float64), torch.tensor(OPTIMA, dtype=torch.float64)
OPTIMUM = (A * B).sum(0) / A.sum(0)  # of the mean loss
TO_THE_END = LocalTraining(local_lr=0.25, local_steps=150)  # the local problem is solved


# FedAvg


def test_one_client_with_one_full_batch_is_a_step_of_sgd():
    task, local = blobs(), LocalTraining(local_lr=0.1, batch_size=1000)
    model = task.model()
    task.loss(model, task.examples(4)).backward()
    expected = {name: (p - 0.1 * p.grad).detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(one_round(task, make("fedavg", local=local), 4).params, expected, rtol=1e-5, atol=1e-6)


def test_the_mean_of_one_client_is_what_it_trained():
    task, algorithm = blobs(), make("fedavg", local=LOCAL)
    [client] = clients(Selection((4,)), Population(task.sizes), 0, 1)
    trained = Learner(task, "cpu").train(Learner(task, "cpu").params(), client, LOCAL).params
    state = one_round(task, algorithm, 4)
    for name, p in trained.items():
        assert (state.params[name] - p).abs().max() <= 2.0**-37 + 2.0**-24 * p.abs().max()


def test_clients_weigh_as_many_as_their_examples_or_one():
    task = quadratic(CURVATURES, OPTIMA, [1, 3, 6])
    n = torch.tensor([[1.0], [3.0], [6.0]], dtype=torch.float64)
    by_examples = one_round(task, make("fedavg", local=TO_THE_END), 0, 1, 2).params["w"]
    torch.testing.assert_close(by_examples, (n * B).sum(0) / n.sum(), rtol=0, atol=1e-7)
    local, whole = replace(TO_THE_END, batch_size=4), torch.tensor([[4.0], [4.0], [8.0]], dtype=torch.float64)
    by_batches = one_round(task, make("fedavg", local=local, weighting="batches"), 0, 1, 2).params["w"]
    torch.testing.assert_close(by_batches, (whole * B).sum(0) / whole.sum(), rtol=0, atol=1e-7)
    uniform = one_round(task, make("fedavg", local=TO_THE_END, weighting="uniform"), 2, 0, 1).params["w"]
    torch.testing.assert_close(uniform, B.mean(0), rtol=0, atol=1e-7)


SAME_AS_FEDAVG: dict[str, tuple[str, dict[str, Any]]] = {
    "fedprox without its term": ("fedprox", {"mu": 0.0}),
    "momentum without memory": ("fedavg", {"server_optimizer": momentum(1.0, 0.0)}),
    "fedavgm without memory": ("fedavgm", {"beta": 0.0}),
    "moon without its term": ("moon", {"mu": 0.0}),
}


@pytest.mark.parametrize("case", SAME_AS_FEDAVG)
def test_reductions_to_fedavg_to_the_bit(case: str):
    name, options = SAME_AS_FEDAVG[case]
    task = blobs()
    assert_same_bits(
        final(task, make(name, local=LOCAL, **options), 3, 7), final(task, make("fedavg", local=LOCAL), 3, 7)
    )


ADAPTIVE = {"server_lr": 0.1, "beta1": 0.9, "beta2": 0.99, "tau": 0.01}


@pytest.mark.parametrize(
    ("name", "options", "step"),
    [
        ("fedavgm", {"server_lr": 0.5, "beta": 0.9}, lambda g: 0.5 * g),
        ("fedadagrad", {"server_lr": 0.1, "tau": 0.01}, lambda g: 0.1 * g / ((1e-4 + g**2).sqrt() + 0.01)),
        ("fedadam", ADAPTIVE, lambda g: 0.01 * g / ((0.99e-4 + 0.01 * g**2).sqrt() + 0.01)),
        ("fedyogi", ADAPTIVE, lambda g: 0.01 * g / ((1e-4 - 0.01 * g**2 * (1e-4 - g**2).sign()).sqrt() + 0.01)),
    ],
)
def test_fedopt_steps_with_the_mean_update(name: str, options: dict[str, float], step: Any):
    task, plain = regression(), Exam("fedavg").make()
    start = initial(task, plain).params
    g = {key: start[key] - p for key, p in one_round(task, plain, 1, 4, 6).params.items()}
    moved = one_round(task, make(name, local=LOCAL, **options), 1, 4, 6).params
    torch.testing.assert_close(moved, {key: start[key] - step(g[key]) for key in g}, rtol=1e-4, atol=1e-6)


# FedProx


@pytest.mark.parametrize("mu", [0.5, 3.0])
def test_fedprox_solves_the_regularised_local_problem(mu: float):
    start = {"w": torch.tensor([10.0, -10.0], dtype=torch.float64)}
    y = Learner(QUADRATIC, "cpu").train(start, Client(1, 0), TO_THE_END, proximal=mu).params["w"]
    torch.testing.assert_close(y, (A[1] * B[1] + mu * start["w"]) / (A[1] + mu), rtol=0, atol=1e-7)
    assert ((y - start["w"]).abs() < (B[1] - start["w"]).abs()).all()  # pulled towards the server
    round_trip = one_round(QUADRATIC, make("fedprox", local=TO_THE_END, mu=mu), 0, 1, 2).params["w"]
    torch.testing.assert_close(round_trip, (A * B / (A + mu)).mean(0), rtol=0, atol=1e-7)


# FedNova


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("tau", [1, 2, 7])
def test_the_gradient_weight_is_how_far_unit_gradients_go(rho: float, tau: int):
    velocity = moved = 0.0
    for _ in range(tau):
        velocity = rho * velocity + 1.0
        moved += velocity
    assert gradient_weight(tau, rho) == pytest.approx(moved, rel=1e-12)
    weights = [(1 - rho ** (tau - k)) / (1 - rho) for k in range(tau)]  # a_i of the paper
    assert gradient_weight(tau, rho) == pytest.approx(sum(weights), rel=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize("server_lr", [1.0, 0.5])
def test_fednova_weighs_directions_by_examples_however_many_steps_were_made(rho: float, server_lr: float):
    directions, sizes, lr = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [1, 4, 10], 0.01
    task = slopes(directions, sizes)
    local = LocalTraining(local_lr=lr, batch_size=2, local_epochs=2, local_momentum=rho)
    a = [gradient_weight(tau, rho) for tau in (2, 4, 10)]
    p, g = torch.tensor(sizes, dtype=torch.float64) / 15, torch.tensor(directions, dtype=torch.float64)
    tau_effective = float(p @ torch.tensor(a, dtype=torch.float64))
    moved = one_round(task, make("fednova", local=local, server_lr=server_lr), 0, 1, 2).params["w"]
    torch.testing.assert_close(moved, -server_lr * lr * tau_effective * (p @ g), rtol=0, atol=1e-8)
    biased = one_round(task, make("fedavg", local=local), 0, 1, 2).params["w"]
    torch.testing.assert_close(biased, -lr * ((p * torch.tensor(a, dtype=torch.float64)) @ g), rtol=0, atol=1e-8)
    assert (biased - moved).abs().max() > 1e-3


def test_fednova_with_equal_numbers_of_steps_is_fedavg():
    local = replace(LOCAL, local_steps=5, local_momentum=0.5)
    task = blobs()
    torch.testing.assert_close(
        final(task, make("fednova", local=local), 3, 7),
        final(task, make("fedavg", local=local), 3, 7),
        rtol=1e-5,
        atol=1e-6,
    )


def test_fednova_knows_sgd_only():
    with pytest.raises(ValueError, match="local_optimizer is adam; fednova is defined for sgd only"):
        make("fednova", local=LocalTraining(local_optimizer="adam"))


# SCAFFOLD


def kept(backend: SerialBackend, num_clients: int, like: Params) -> list[Params]:
    """What every client keeps; zeros at first."""
    zeros = {name: torch.zeros_like(p) for name, p in like.items()}
    return [backend.client_states.committed.get(i, (0, zeros))[1] for i in range(num_clients)]


@pytest.mark.parametrize("cohort", [9, 4])
def test_scaffolds_server_variate_is_the_mean_of_all_clients(cohort: int):
    task, algorithm = blobs(), make("scaffold", local=LOCAL)
    backend = SerialBackend(task)
    for finished in train(task, algorithm, backend, 5, cohort):
        state = finished.state
    controls = kept(backend, len(SIZES), state.c)
    expected = {name: torch.stack([c[name] for c in controls]).mean(0) for name in state.c}
    torch.testing.assert_close(state.c, expected, rtol=1e-5, atol=1e-6)
    assert all(c.abs().max() > 1e-3 for c in state.c.values())


def test_scaffold_as_its_paper_writes_it():
    """Algorithm 1, option II, as loops over the clients."""
    task, lr, steps, server_lr = QUADRATIC, 0.05, 4, 0.7
    local = LocalTraining(local_lr=lr, local_steps=steps)
    algorithm = make("scaffold", 3, local=local, server_lr=server_lr)
    x, c, c_i = torch.zeros(2).double(), torch.zeros(2).double(), torch.zeros(3, 2).double()
    state, backend = initial(task, algorithm), SerialBackend(task)
    for number, who in enumerate([(0, 1), (2, 1), (0, 2), (1,), (0, 1, 2)], start=1):
        state, _ = algorithm.apply(state, clients(Selection(who), Population(task.sizes), 0, number), backend)
        backend.client_states.commit()
        moves, changes = [], []
        for i in who:
            y = x.clone()
            for _ in range(steps):
                y -= lr * (A[i] * (y - B[i]) - c_i[i] + c)
            plus = c_i[i] - c + (x - y) / (steps * lr)
            moves.append(y - x)
            changes.append(plus - c_i[i])
            c_i[i] = plus
        x = x + server_lr * torch.stack(moves).mean(0)
        c = c + len(who) / 3 * torch.stack(changes).mean(0)
        torch.testing.assert_close((state.params["w"], state.c["w"]), (x, c), rtol=0, atol=1e-8)
        torch.testing.assert_close(torch.stack([k["w"] for k in kept(backend, 3, state.c)]), c_i, rtol=0, atol=1e-8)


def test_scaffold_with_one_client_is_fedavg():
    """Its c_i is then c, but for the rounding of c to 2^-36."""
    local = replace(LOCAL, local_lr_decay=1.0)
    single = replace(blobs(), clients=blobs().clients[4:5])
    torch.testing.assert_close(
        final(single, make("scaffold", 1, local=local), 4),
        final(single, make("fedavg", local=local), 4),
        rtol=1e-5,
        atol=1e-6,
    )


def test_scaffolds_first_round_is_fedavg_with_equal_weights():
    task = blobs()
    scaffold, fedavg = (one_round(task, algorithm, 1, 4, 6).params for algorithm in (
        make("scaffold", local=LOCAL), make("fedavg", local=LOCAL, weighting="uniform")
    ))  # fmt: skip
    assert_same_bits(scaffold, fedavg)


@pytest.mark.parametrize(
    "options", [{"local_momentum": 0.9}, {"weight_decay": 0.1}, {"max_grad_norm": 1.0}, {"local_optimizer": "adam"}]
)
def test_scaffold_refuses_what_its_control_variates_do_not_allow_for(options: dict[str, Any]):
    with pytest.raises(ValueError, match="scaffold is defined for plain SGD only"):
        make("scaffold", local=LocalTraining(**options))


# FedDyn


@pytest.mark.parametrize("cohort", [3, 2])
def test_feddyn_keeps_the_gradients_of_its_local_solutions(cohort: int):
    """The first-order condition: ∇L_i(θ_i) − ∇_i + α(θ_i − θ) = 0, so the new ∇_i is ∇L_i(θ_i)."""
    alpha = 0.5
    algorithm = make("feddyn", 3, local=TO_THE_END, alpha=alpha)
    theta, h, grads = torch.zeros(2).double(), torch.zeros(2).double(), torch.zeros(3, 2).double()
    backend = SerialBackend(QUADRATIC)
    for finished in train(QUADRATIC, algorithm, backend, 4, cohort):
        who = list(finished.selection.clients)
        solution = (A * B + grads + alpha * theta) / (A + alpha)
        grads[who] = (A * (solution - B))[who]
        moved = (solution - theta)[who]
        h = h - alpha / 3 * moved.sum(0)
        theta = solution[who].mean(0) - h / alpha
        torch.testing.assert_close((finished.state.params["w"], finished.state.h["w"]), (theta, h), rtol=0, atol=1e-6)
        torch.testing.assert_close(h, grads.mean(0), rtol=0, atol=1e-12)  # h is the mean of all ∇_i
    torch.testing.assert_close(
        torch.stack([k["w"] for k in kept(backend, 3, finished.state.h)]), grads, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", ["feddyn", "scaffold"])
@pytest.mark.parametrize("cohort", [3, 2])
def test_drift_is_corrected_where_fedavgs_is_not(name: str, cohort: int):
    local = LocalTraining(local_lr=0.2, local_steps=5)
    options = {"alpha": 1.0} if name == "feddyn" else {}
    corrected = final(QUADRATIC, make(name, 3, local=local, **options), 30, cohort)["w"]
    torch.testing.assert_close(corrected, OPTIMUM, rtol=0, atol=1e-3)
    drifted = final(QUADRATIC, make("fedavg", local=local), 30, 3)["w"]
    assert (drifted - OPTIMUM).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("feddyn", {"alpha": 0.0}, "alpha is 0.0; it must be > 0"),
        ("moon", {"mu": -1.0}, "mu is -1.0; it must be >= 0"),
        ("moon", {"temperature": 0.0}, "temperature is 0.0; it must be > 0"),
        ("fedprox", {"mu": -1.0}, "mu is -1.0; it must be >= 0"),
        ("fedavg", {"proximal": -1.0}, "proximal is -1.0; it must be >= 0"),
    ],
)
def test_impossible_options_are_named(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(name, local=LOCAL, **options)


# MOON


def test_moon_contrasts_with_the_global_and_the_previous_model():
    """Li et al., 2021, equation 3, with the fixed models run beside the trained one in every step."""
    task, mu, temperature, who = blobs(), 2.0, 0.5, (4, 6)
    algorithm = make(
        "moon", local=LocalTraining(local_lr=0.1, batch_size=3, shuffle=False), mu=mu, temperature=temperature
    )
    population, backend = Population(task.sizes), SerialBackend(task)
    state, previous = initial(task, algorithm), dict.fromkeys(who, task.model())
    for number in (1, 2, 3):
        fixed, trained = task.model(), {i: task.model() for i in who}
        for model in (fixed, *trained.values()):
            model.load_state_dict(state.params)
        for i, model in trained.items():
            optimizer, examples = torch.optim.SGD(model.parameters(), lr=0.1), task.examples(i)
            for x, y in zip(examples["x"].split(3), examples["y"].split(3), strict=True):
                z, *others = (m.features(x) for m in (model, fixed, previous[i]))  # type: ignore[operator]
                closeness = torch.stack([torch.cosine_similarity(z, other.detach()) for other in others])
                contrastive = -(closeness / temperature).log_softmax(0)[0].mean()
                optimizer.zero_grad()
                (nn.functional.cross_entropy(model(x), y) + mu * contrastive).backward()
                optimizer.step()
        state, _ = algorithm.apply(state, clients(Selection(who), population, 0, number), backend)
        backend.client_states.commit()
        expected = {
            name: (8 * trained[4].state_dict()[name] + 6 * trained[6].state_dict()[name]) / 14 for name in state.params
        }
        torch.testing.assert_close(state.params, expected, rtol=1e-4, atol=1e-6)
        previous = trained


# Baselines


def test_local_only_with_one_client_is_centralised_training_on_its_examples():
    single = replace(blobs(), clients=blobs().clients[4:5])
    _, backend = states(single, make("local_only", local=LOCAL), 4)
    assert_same_bits(backend.client_states.committed[0][1], final(single, make("centralized", local=LOCAL), 4))


def test_centralised_training_is_a_loop_of_sgd():
    task, rounds = blobs(), 3
    local = LocalTraining(local_lr=0.1, batch_size=10, local_epochs=2, shuffle=False)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    everything = task.examples(EVERYONE)
    for _ in range(2 * rounds):
        for start in range(0, sum(SIZES), 10):
            optimizer.zero_grad()
            task.loss(model, {name: column[start : start + 10] for name, column in everything.items()}).backward()
            optimizer.step()
    expected = {name: p.detach() for name, p in model.named_parameters()}
    torch.testing.assert_close(final(task, make("centralized", local=local), rounds), expected, rtol=1e-5, atol=1e-6)


def test_local_only_reports_its_own_models():
    task, backend = blobs(), SerialBackend(blobs())
    history = train(task, make("local_only", local=LOCAL), backend, 2, len(SIZES))
    tests = [Learner(task, "cpu").test(kept) for _, kept in backend.client_states.committed.values()]
    accuracies = [test["test_accuracy"] for test in tests]
    assert history[-1].metrics["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert history[-1].metrics["worst_test_accuracy"] == min(accuracies)
    assert history[-1].metrics["test_loss"] == pytest.approx(np.mean([test["test_loss"] for test in tests]))


def test_fedavg_with_one_step_of_everybody_is_a_step_on_all_examples():
    task, local = blobs(), LocalTraining(local_lr=0.1, batch_size=1000)
    torch.testing.assert_close(
        final(task, make("fedavg", local=local), 3),
        final(task, make("centralized", local=local), 3),
        rtol=1e-5,
        atol=1e-6,
    )
