"""DP-FedAvgGAN and MD-GAN: what they learn, what crosses the network, who holds which discriminator, and privacy."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import SIZES, Exam, assert_same_bits, generation_of_digits, initial, make, points, train
from torch import nn

from fedray.adversarial import GeneratorTraining, discriminator_of, swap, taken_for_real, told_apart
from fedray.algorithm import Client
from fedray.backends.serial import SerialBackend
from fedray.errors import ConfigError
from fedray.experiment import plan
from fedray.learner import Learner
from fedray.ledger import Ledger, MeteredBackend
from fedray.local_training import LocalTraining
from fedray.models.image_generators import resnet_gan, resnet_generator
from fedray.privacy import dp_client
from fedray.rounds import clients
from fedray.runs import run
from fedray.samplers import Population, Selection

ADAM = LocalTraining(local_optimizer="adam", local_lr=5e-3, local_beta1=0.5, batch_size=64)
FAST = GeneratorTraining(generator_lr=1e-2)
DISCRIMINATOR = 4 * 129  # bytes


def plane(per_client: int = 200, num_clients: int = 4) -> Any:
    """Points around (2, -1) with deviations 0.5 and 1.5, enough to learn from."""
    draw = torch.Generator().manual_seed(5)
    spread, centre = torch.tensor([0.5, 1.5]), torch.tensor([2.0, -1.0])
    held = [centre + spread * torch.randn(per_client, 2, generator=draw) for _ in range(num_clients)]
    return replace(points(), clients=tuple({"x": x, "y": torch.zeros(len(x))} for x in held))


# what they learn


LEARNERS = {
    "dp_fedavg_gan": ({"privacy": dp_client(5.0, 0.0), "generator_steps": 10}, replace(ADAM, local_steps=10), 60),
    "md_gan": ({"swap_every": 10}, ADAM, 400),
}


@pytest.mark.parametrize("name", LEARNERS)
def test_a_tiny_gan_learns_the_mean_and_the_spread_of_a_law(name: str):
    task, (options, local, num_rounds) = plane(), LEARNERS[name]
    algorithm = make(name, 4, local=local, generator=FAST, **options)
    history = train(task, algorithm, SerialBackend(task), num_rounds, cohort=4)
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    learner = Learner(task, "cpu")

    def made(params: Any) -> torch.Tensor:
        with torch.no_grad():
            return learner.load(params)(z)

    before, after = made(learner.params()), torch.stack([made(r.state.params) for r in history[-20:]])
    assert (before.mean(0) - torch.tensor([2.0, -1.0])).norm() > 1.5
    assert (after.mean((0, 1)) - torch.tensor([2.0, -1.0])).norm() < 0.4
    # a small discriminator sees spreads less sharply than means; 0.5 and 1.5 are the data's
    deviations = after.std(1).mean(0)
    assert 0.2 < deviations[0] < 1.0
    assert 0.9 < deviations[1] < 2.1


def test_the_losses_are_those_of_the_paper():
    model = points().model()
    x, fake = torch.randn(5, 2), torch.randn(7, 2)
    real, made = (torch.sigmoid(model.discriminator(t)) for t in (x, fake))
    expected = -real.log().mean() - (1 - made[:5]).log().mean()
    torch.testing.assert_close(told_apart(model, {"x": x}, fake), expected)
    torch.testing.assert_close(taken_for_real(model, fake), -made.log().mean())
    told_apart(model, {"x": x}).backward()
    assert all(p.grad is None for p in model.generator.parameters())  # pictures are given, not trained through
    assert all(p.grad is not None for p in model.discriminator.parameters())


# DP-FedAvgGAN


def test_only_the_discriminator_is_trained_by_clients_and_only_the_generator_by_the_server():
    task = points()
    start = Learner(task, "cpu").params()
    still = GeneratorTraining(generator_lr=1e-30)
    [only_d] = train(task, make("dp_fedavg_gan", local=ADAM, generator=still), SerialBackend(task), 1)
    frozen = replace(ADAM, local_lr=1e-30)
    [only_g] = train(task, make("dp_fedavg_gan", local=frozen, privacy=dp_client(1.0, 0.0)), SerialBackend(task), 1)
    for name, p in start.items():
        trained, other = (only_g, only_d) if name.startswith("generator.") else (only_d, only_g)
        assert not torch.equal(trained.state.params[name], p)
        assert torch.equal(other.state.params[name], p)


def test_the_updates_of_the_discriminator_are_clipped_all_together():
    task, start = points(), discriminator_of(Learner(points(), "cpu").params())
    algorithm = make("dp_fedavg_gan", local=replace(ADAM, local_lr=0.5), privacy=dp_client(0.01, 0.0))
    [finished] = train(task, algorithm, SerialBackend(task), 1)
    moved = [finished.state.params[name] - p for name, p in start.items()]
    assert 0 < float(torch.cat([m.flatten() for m in moved]).norm()) <= 0.01 * (1 + 1e-6)


def test_epsilon_is_dp_fedavgs():
    found = {}
    for name, task in (("dp_fedavg_gan", points()), ("dp_fedavg", Exam("dp_fedavg").task())):
        algorithm = make(name, local=replace(ADAM, local_lr=0.01), privacy=dp_client(1.0, 2.0))
        found[name] = [r.metrics["epsilon"] for r in train(task, algorithm, SerialBackend(task), 3)]
    assert found["dp_fedavg_gan"] == found["dp_fedavg"]
    assert 0 < found["dp_fedavg"][0] < found["dp_fedavg"][2]
    noiseless = make("dp_fedavg_gan", local=ADAM, privacy=dp_client(1.0, 0.0))
    [finished] = train(points(), noiseless, SerialBackend(points()), 1)
    assert finished.metrics["epsilon"] == float("inf")


# MD-GAN


def test_the_servers_step_is_that_of_the_mean_loss_of_all_discriminators():
    """Feedback is only another way to compute it: Algorithm 1 beside one loop over the clients."""
    task = points()
    algorithm = make("md_gan", local=ADAM, batches=3, generator=FAST)
    state, backend = initial(task, algorithm), SerialBackend(task)
    cohort = clients(Selection((4, 1, 6, 2, 7)), Population(task.sizes), 0, 1)
    found, _ = algorithm.apply(state, cohort, backend)
    kept = {c.id: backend.client_states.of(c)["discriminator"] for c in cohort}
    seen: list[Any] = []

    class Watched:
        def map(self, fn: Any, items: Any) -> Any:
            seen.append(items)
            return backend.map(fn, items)

        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

    algorithm.apply(state, cohort, Watched())  # type: ignore[arg-type]
    [(params, seeds, count)] = seen[0]
    model = task.model()
    model.load_state_dict(params)
    total = torch.zeros(())
    for client in cohort:
        torch.manual_seed(seeds[client.slot % 3])
        fake = model(torch.randn(count, 2))
        logits = torch.func.functional_call(model.discriminator, {
            name.removeprefix("discriminator."): p for name, p in kept[client.id].items()
        }, (fake,))  # fmt: skip
        total = total + F.softplus(-logits).mean() / len(cohort)
    adam = torch.optim.Adam(model.generator.parameters(), lr=1e-2, betas=(0.5, 0.999))
    total.backward()
    adam.step()
    for name, p in model.generator.named_parameters():
        torch.testing.assert_close(found.params[f"generator.{name}"], p.detach(), rtol=1e-4, atol=1e-6)


def discriminators(backend: SerialBackend, cohort: list[Client]) -> list[torch.Tensor]:
    return [
        torch.cat([p.flatten() for p in backend.client_states.of(client)["discriminator"].values()])
        for client in cohort
    ]


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_swap_is_a_permutation_in_which_nobody_keeps_its_own(size: int):
    task, algorithm = points(), make("md_gan", local=ADAM, swap_every=None)
    backend = SerialBackend(task, 3)
    cohort = clients(Selection(tuple(range(size))), Population(task.sizes), 0, 1)
    algorithm.apply(initial(task, algorithm), cohort, backend)
    before, moments = discriminators(backend, cohort), [backend.client_states.of(c)["moments"] for c in cohort]
    swap(cohort, backend)
    after = discriminators(backend, cohort)
    places = [[k for k, old in enumerate(before) if torch.equal(new, old)] for new in after]
    assert all(len(found) == 1 for found in places)
    assert sorted(found[0] for found in places) == list(range(size))
    assert size == 1 or all(found[0] != k for k, found in enumerate(places))
    assert_same_bits([backend.client_states.of(c)["moments"] for c in cohort], moments)


def test_discriminators_stay_where_they_are_until_it_is_time():
    task = points()
    with_swap, without = (
        train(task, make("md_gan", local=ADAM, swap_every=every), SerialBackend(task), 3, cohort=9)
        for every in (2, None)
    )
    for number, same in ((0, True), (1, True), (2, False)):
        a, b = (history[number].state.params["generator.0.weight"] for history in (with_swap, without))
        assert torch.equal(a, b) == same


def test_pictures_go_down_and_feedback_comes_up():
    for batches, seen in ((1, 1), (2, 2), (5, 2)):
        ledger, task = Ledger(), points()
        algorithm = make("md_gan", local=replace(ADAM, batch_size=4), batches=batches, swap_every=2)
        loop = MeteredBackend(SerialBackend(task), ledger)
        train(task, algorithm, loop, 1)
        one_batch = 4 * 2 * 4
        assert (ledger.up, ledger.down) == (7 * one_batch, 7 * seen * one_batch)
        swapped = Ledger()
        train(task, algorithm, MeteredBackend(SerialBackend(task), swapped), 2)
        assert swapped.up == 7 * (2 * one_batch + DISCRIMINATOR)
        assert swapped.down == 7 * (2 * seen * one_batch + DISCRIMINATOR)


def test_clients_keep_a_discriminator_of_their_own_and_its_moments():
    task, backend = points(), SerialBackend(points())
    train(task, make("md_gan", local=ADAM), backend, 3, cohort=len(SIZES))
    states = [state for _, state in backend.client_states.committed.values()]
    assert [float(state["moments"]["steps"]) for state in states] == [3.0] * len(SIZES)
    assert not torch.equal(*(state["discriminator"]["discriminator.0.weight"] for state in states[:2]))


# configurations


def configuration(cache: Any, algorithm: dict[str, Any], model: str = "resnet_gan") -> dict[str, Any]:
    return {
        "rounds": 2,
        "cohort": 3,
        "task": generation_of_digits(cache, {"name": model, "width": 4, "latent": 4}),
        "algorithm": algorithm,
        "backend": "serial",
    }


@pytest.mark.parametrize("name", ["dp_fedavg_gan", "md_gan"])
def test_a_configuration_runs_and_is_compared_as_any_generator(name: str, tmp_path: Any):
    adam = {"local_optimizer": "adam", "local_lr": 1e-3, "batch_size": 8}
    done = run(configuration(tmp_path / "cache", {"name": name, **adam}), out=tmp_path / "run")
    assert done.final["frechet_distance"] > 0
    assert done.final["generator_loss"] > 0


@pytest.mark.parametrize("name", ["dp_fedavg_gan", "md_gan"])
def test_a_task_without_a_discriminator_is_refused_with_what_to_do(name: str, tmp_path: Any):
    message = r"no such pair; set task.name=generation and task.model.name=resnet_gan"
    with pytest.raises(ConfigError, match=message):
        plan(configuration(tmp_path, {"name": name}, "resnet_generator"))
    with pytest.raises(ValueError, match=message):
        initial(Exam("fedavg").task(), make(name, local=ADAM))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dp_fedavg_gan", {"generator_steps": 0}, "generator_steps is 0; it must be >= 1"),
        ("md_gan", {"batches": 0}, "batches is 0; it must be >= 1"),
        ("md_gan", {"swap_every": 0}, "swap_every is 0; it must be >= 1"),
    ],
)
def test_impossible_options_are_named(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(name, local=ADAM, **options)
    with pytest.raises(ValueError, match="generator_lr is 0; it must be > 0"):
        GeneratorTraining(generator_lr=0)


def test_the_generator_beside_a_discriminator_is_the_plain_one():
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    gan = resnet_gan((1, 32, 32), width=4, latent=6, discriminator_width=3)
    assert count(gan.generator) == count(resnet_generator((1, 32, 32), width=4, latent=6))
    assert gan(torch.randn(2, 6)).shape == (2, 1, 32, 32)
    assert gan.discriminator(torch.randn(5, 1, 32, 32)).shape == (5,)
    x = torch.randn(3, 1, 32, 32)
    torch.testing.assert_close(gan.discriminator(x)[:1], gan.discriminator(x[:1]))  # no example sees another
