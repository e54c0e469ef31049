"""Adversarial training (Goodfellow et al., 2014): what clients and servers do with a generator and a discriminator.

D learns to tell real pictures from generated ones, −log σ(D(x)) − log(1 − σ(D(G(z)))), and G to have its pictures taken
for real, by the non-saturating −log σ(D(G(z))).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fedray.aggregators import collect, with_members
from fedray.algorithm import Backend, Client, ClientResult
from fedray.learner import Columns, Learner, seed_draws
from fedray.local_training import LocalTraining, stepper
from fedray.models.pictures import generated
from fedray.seeds import seed_for
from fedray.trees import Params


@dataclass(frozen=True)
class GeneratorTraining:
    """How the server trains the generator: by Adam, whose moments it keeps.

    Args:
        generator_lr: Learning rate of the generator.
        generator_beta1: Decay of Adam's first moment.
    """

    generator_lr: float = 2e-4
    generator_beta1: float = 0.5

    def __post_init__(self) -> None:
        if not self.generator_lr > 0:
            raise ValueError(f"generator_lr is {self.generator_lr}; it must be > 0")
        if not 0 <= self.generator_beta1 < 1:
            raise ValueError(f"generator_beta1 is {self.generator_beta1}; it must be at least 0 and below 1")


def discriminator_of(params: Params) -> Params:
    """The discriminator's part of a GAN's params.

    Raises:
        ValueError: they are not a GAN's.
    """
    found = {name: p for name, p in params.items() if name.startswith("discriminator.")}
    if not found or not any(name.startswith("generator.") for name in params):
        raise ValueError(
            "this algorithm trains a generator against a discriminator, and the task's model is no such pair; "
            "set task.name=generation and task.model.name=resnet_gan"
        )
    return found


def told_apart(model: torch.nn.Module, batch: Columns, fake: torch.Tensor | None = None) -> torch.Tensor:
    """The discriminator's loss on real pictures, and as many generated ones: ``fake``, or new ones."""
    real, judge = batch["x"], model.discriminator
    if fake is None:
        with torch.no_grad():
            fake = generated(model, len(real))
    return F.softplus(-judge(real)).mean() + F.softplus(judge(fake[: len(real)])).mean()  # type: ignore[operator]


def taken_for_real(model: torch.nn.Module, fake: torch.Tensor) -> torch.Tensor:
    """The generator's loss on pictures that it made."""
    return F.softplus(-model.discriminator(fake)).mean()  # type: ignore[operator]


def pictures(learner: Learner, model: torch.nn.Module, seeds: Sequence[int], count: int) -> torch.Tensor:
    """A batch of ``count`` generated pictures for each seed, stacked; they follow from the seeds."""
    batches = []
    for seed in seeds:
        seed_draws(seed, learner.device)
        batches.append(generated(model, count))
    return torch.stack(batches)


def made_of(learner: Learner, item: tuple[Params, Sequence[int], int]) -> torch.Tensor:
    """`pictures` of some params, without what training needs of them."""
    params, seeds, count = item
    with torch.no_grad():
        return pictures(learner, learner.load(params).train(), seeds, count)


def first(learner: Learner) -> dict[str, Params]:
    """What a client begins with: a discriminator that follows from the run's seed, so that nobody has to send it."""
    return {"discriminator": discriminator_of(dict(learner.task.model().named_parameters()))}


def descend(
    learner: Learner,
    params: Params,
    moments: Params,
    training: GeneratorTraining,
    losses: Sequence[Callable[[torch.nn.Module], torch.Tensor]],
) -> tuple[Params, Params, float]:
    """Train the generator by a step of Adam for each loss; the discriminator stays as it is.

    Returns:
        The params, Adam's moments, and the mean loss.
    """
    model, moments, total = learner.load(params).train(), {name: m.clone() for name, m in moments.items()}, 0.0
    own = {name: p for name, p in model.named_parameters() if name.startswith("generator.") and p.requires_grad}
    adam = LocalTraining(local_optimizer="adam", local_lr=training.generator_lr, local_beta1=training.generator_beta1)
    step = stepper(list(own.values()), own, params, adam, 1, None, 0.0, moments=moments)
    for loss_of in losses:
        loss = loss_of(model)
        gradients = torch.autograd.grad(loss, list(own.values()))
        with torch.no_grad():
            step(gradients)
        total += loss.item()
    return learner.params(), moments, total / len(losses)


def swap(cohort: Sequence[Client], backend: Backend) -> None:
    """Let every client hand its discriminator on to another, in a circle in random order."""

    def give(learner: Learner, _: None, client: Client) -> ClientResult:
        assert client.state is not None
        return ClientResult(client.state["discriminator"], 1)

    def take(learner: Learner, given: dict[str, Params], client: Client) -> ClientResult:
        assert client.state is not None
        mine = {name: p.clone() for name, p in given[str(client.slot)].items()}
        return ClientResult(None, 1, state={**client.state, "discriminator": mine})

    (sent, members), _ = backend.map_reduce(give, None, cohort, with_members(collect()), keeps_state=True)
    order = torch.randperm(len(members), generator=torch.Generator().manual_seed(seed_for(members[0].seed, "swap")))
    slots = [members[i].slot for i in order.tolist()]
    given = {str(slot): sent[i] for slot, i in zip(slots[1:] + slots[:1], order.tolist(), strict=True)}
    each = sum(p.numel() * p.element_size() for p in sent[0].values())
    backend.map_reduce(take, given, members, collect(), keeps_state=True, received=lambda _: each)
