"""DP-FedAvgGAN (Augenstein et al., 2020, Algorithm 1): a GAN whose discriminator is trained on clients, by DP-FedAvg.

Clients receive G and D, train D on their own pictures against G's, and send D − D_k, clipped; the server adds noise to
their sum. Then it trains G against the new D, without data, so that G is as private as D is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from fedray.adversarial import GeneratorTraining, descend, discriminator_of, pictures, taken_for_real, told_apart
from fedray.algorithm import Backend, Client, FederatedAlgorithm, Metrics
from fedray.algorithms.dp_fedavg import privately
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.privacy import Mechanism, dp_client
from fedray.seeds import seed_for
from fedray.server_optimizers import ServerOptimizer, sgd
from fedray.trees import Params


@dataclass(frozen=True)
class ServerState:
    """The state of DP-FedAvg, whose params are G and D, and Adam's moments of G."""

    base: Any
    moments: Params

    @property
    def params(self) -> Params:
        """The generator and the discriminator."""
        return self.base.params


def dp_fedavg_gan(
    num_clients: int,
    /,
    *,
    local: LocalTraining,
    generator: GeneratorTraining = GeneratorTraining(),
    generator_steps: int = 10,
    generator_batch_size: int = 64,
    privacy: Mechanism = dp_client(),
    server_optimizer: ServerOptimizer = sgd(1.0),
) -> FederatedAlgorithm:
    """A GAN by DP-FedAvg of its discriminator; the server trains the generator (Augenstein et al., 2020).

    Args:
        num_clients: The size of the population.
        local: How a client trains the discriminator.
        generator: How the server trains the generator.
        generator_steps: Steps of the generator in a round.
        generator_batch_size: Pictures of such a step.
        privacy: Who clips, and who adds noise; dp_client with noise_multiplier 0 for none.
        server_optimizer: What the server does with the mean update of the discriminator.
    """
    for name, value in (("generator_steps", generator_steps), ("generator_batch_size", generator_batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be >= 1")
    base = privately(num_clients, local, privacy, server_optimizer, loss=told_apart, part=discriminator_of)

    def improve(learner: Learner, item: tuple[Params, Params, int]) -> tuple[Params, Params, float]:
        params, moments, seed = item

        def loss(i: int, model: torch.nn.Module) -> torch.Tensor:
            return taken_for_real(model, pictures(learner, model, [seed_for(seed, i)], generator_batch_size)[0])

        return descend(learner, params, moments, generator, [partial(loss, i) for i in range(generator_steps)])

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        averaged, metrics = base.apply(state.base, cohort, backend)
        seed = seed_for(cohort[0].seed, "generator")
        [(params, moments, loss)] = backend.map(improve, [(averaged.params, state.moments, seed)])
        return ServerState(replace(averaged, params=params), moments), {**metrics, "generator_loss": loss}

    return FederatedAlgorithm(lambda params: ServerState(base.init(params), {}), apply)
