"""Differential privacy: who clips, who adds noise, and what (ε, δ) it comes to.

Two mechanisms carry a guarantee, for another unit each: an example (`dp_sgd`, at the client), or a client with all that
it holds (`dp_client`, at the server). The third is the noise of FedPEFT's experiments, which carries none. ε is what
the library dp-accounting says by Rényi differential privacy; noise is drawn from seeds and is as reproducible as all
else, so it protects nobody from who knows the seed: this is a simulator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch

from fedray.errors import ConfigError
from fedray.trees import Tree, tree_map

Cohorts = Literal["uniform", "poisson", "any"]

_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024)  # α of the Rényi divergences, of which the best one counts


@dataclass(frozen=True)
class Mechanism:
    """Where noise is added, and how much.

    Attributes:
        unit: Whose contribution is bounded and hidden: an example's to every local step, or a client's to every round;
            None for nobody's, with noise on the mean gradient of every local step.
        max_norm: The largest Euclidean norm of a contribution.
        std: Deviation of the noise in each coordinate: of the sum of the contributions or, for nobody, of the mean.
        delta: δ.
        cohorts: What a client's guarantee supposes of how cohorts are drawn.
    """

    unit: Literal["example", "client"] | None
    max_norm: float
    std: float
    delta: float
    cohorts: Cohorts = "any"

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"max_norm is {self.max_norm}; it must be > 0")
        if not 0 < self.delta < 1:
            raise ValueError(f"delta is {self.delta}; it must be above 0 and below 1")

    @property
    def noise_multiplier(self) -> float:
        """z: the deviation in units of the largest norm."""
        return self.std / self.max_norm

    def epsilon_of_examples(self, rate: float, steps: int) -> float:
        """ε of the examples of a client that made ``steps`` steps, each on a share ``rate`` of them (Poisson).

        Two sets of examples are neighbours if one has an example more.
        """
        return _epsilon("poisson", self.noise_multiplier, rate, 1, steps, self.delta)

    def epsilon_of_clients(self, cohort: int, num_clients: int, rounds: int) -> float:
        """ε of the clients after ``rounds`` rounds of ``cohort`` out of ``num_clients``.

        Two populations are neighbours if one has a client more (poisson), or another in the place of one (uniform,
        any), who can move the sum by twice the largest norm.
        """
        z = self.noise_multiplier if self.cohorts == "poisson" else self.noise_multiplier / 2
        return _epsilon(self.cohorts, z, cohort / num_clients, num_clients, rounds, self.delta)


def dp_sgd(max_norm: float = 1.0, noise_multiplier: float = 1.0, delta: float = 1e-5) -> Mechanism:
    """DP-SGD at the clients (Abadi et al., 2016, Algorithm 1): protects every example, from the server too.

    Every local step takes each example with probability batch_size / n, clips each example's gradient, adds noise to
    their sum and divides it by the expected batch size.

    Args:
        max_norm: C, the largest Euclidean norm of an example's gradient.
        noise_multiplier: σ, deviation of the noise in units of C; 0 for none, and no guarantee.
        delta: δ, which should be well below one over the examples of a client.
    """
    return Mechanism("example", max_norm, _multiplied(noise_multiplier, max_norm), delta)


def dp_client(
    max_norm: float = 1.0, noise_multiplier: float = 1.0, delta: float = 1e-5, cohorts: Cohorts = "uniform"
) -> Mechanism:
    """DP-FedAvg (McMahan et al., 2018, Algorithm 1): protects a client with all that it holds; the server is trusted.

    Every client's update is clipped, all count the same, and the server adds noise to their sum. ``cohorts`` says what
    the guarantee rests on. `uniform`: the sampler is `uniform`, and who takes part is secret. `any`: nothing, as if
    every client took part in every round. `poisson`: every client takes part by a coin of its own, as papers suppose;
    the simulator draws cohorts of a fixed size, so that this ε is another system's.

    Args:
        max_norm: S, the largest Euclidean norm of an update.
        noise_multiplier: z, deviation of the noise on the sum in units of S; 0 for none, and no guarantee.
        delta: δ, which should be well below one over the number of clients.
        cohorts: How cohorts are drawn, for the accountant.
    """
    return Mechanism("client", max_norm, _multiplied(noise_multiplier, max_norm), delta, cohorts)


def fedpeft_noise(max_norm: float = 1.0, epsilon: float = 5.0, delta: float = 1e-3) -> Mechanism:
    """NOT differential privacy: the noise of FedPEFT's experiments (Sun et al., 2022), to compare with its figures.

    The mean gradient of every local step gets noise of σ = 2·C·√(2·ln(1.25/δ)/ε), and nothing is clipped, as in the
    released code. Nothing bounds what an example contributes, so no ε holds, and none is reported.

    Args:
        max_norm: C of the formula; nothing is clipped.
        epsilon: ε of the formula.
        delta: δ of the formula.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon}; it must be > 0")
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; it must be above 0 and below 1")
    return Mechanism(None, max_norm, 2 * max_norm * math.sqrt(2 * math.log(1.25 / delta) / epsilon), delta)


def noisy(tree: Tree, std: float, generator: torch.Generator) -> Tree:
    """A tree with independent noise N(0, std²) on every coordinate, drawn on the CPU, so that devices agree."""

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x + std * torch.randn(x.shape, generator=generator).to(x.device, x.dtype)

    return tree_map(leaf, tree) if std else tree


def clipped_sum(gradients: Sequence[torch.Tensor], max_norm: float) -> list[torch.Tensor]:
    """The sum of the examples' gradients, each scaled down to a largest norm over all tensors together.

    Args:
        gradients: Of every example, each of shape (n, ...).
        max_norm: The largest Euclidean norm.
    """
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factors = (max_norm / norms.clamp_min(1e-12)).clamp_max(1.0)
    return [torch.tensordot(factors, g, 1) for g in gradients]


def accounting() -> Any:
    """The library dp-accounting, or a message that says how to install it."""
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError:
        raise ConfigError(
            "dp_sgd and dp_client need the package 'dp-accounting': pip install 'fedray[privacy]'"
        ) from None
    return dp_accounting


@cache
def _epsilon(sampling: Cohorts, z: float, rate: float, population: int, times: int, delta: float) -> float:
    """ε of a Gaussian mechanism with noise z times the sensitivity, on samples of a population, so many times."""
    if not times:
        return 0.0
    if not z:
        return math.inf
    library = accounting()
    event, relations = library.GaussianDpEvent(z), library.NeighboringRelation
    if sampling == "poisson":
        event = library.PoissonSampledDpEvent(rate, event)
    elif sampling == "uniform":
        event = library.SampledWithoutReplacementDpEvent(population, round(rate * population), event)
    relation = relations.ADD_OR_REMOVE_ONE if sampling == "poisson" else relations.REPLACE_ONE
    accountant = library.rdp.RdpAccountant(_ORDERS, relation)
    return float(accountant.compose(library.SelfComposedDpEvent(event, times)).get_epsilon(delta))


def _multiplied(noise_multiplier: float, max_norm: float) -> float:
    if not noise_multiplier >= 0:
        raise ValueError(f"noise_multiplier is {noise_multiplier}; it must be >= 0")
    return noise_multiplier * max_norm


MECHANISMS = {"dp_sgd": dp_sgd, "dp_client": dp_client, "fedpeft_noise": fedpeft_noise}
