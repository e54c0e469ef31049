"""MD-GAN (Hardy et al., 2019, Algorithm 1): one generator at the server, and a discriminator at each client.

The server makes k batches of pictures; client n receives two of them, X_d and X_g. It trains its D_n to tell its own
pictures from X_d, and sends the feedback F_n = ∂J(X_g)/∂x, as many numbers as X_g has; the server descends along
1/N·Σ_n F_n·∂x/∂w. Every so many rounds clients hand their discriminators on to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from fedray.adversarial import (
    GeneratorTraining,
    descend,
    discriminator_of,
    first,
    made_of,
    pictures,
    swap,
    taken_for_real,
    told_apart,
)
from fedray.aggregators import collect, with_members
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.learner import Learner
from fedray.local_training import LocalTraining
from fedray.seeds import seed_for
from fedray.trees import Params


@dataclass(frozen=True)
class ServerState:
    """The params, of which only the generator's are ever trained here, and Adam's moments of them."""

    params: Params
    moments: Params


def md_gan(
    *,
    local: LocalTraining,
    generator: GeneratorTraining = GeneratorTraining(),
    batches: int = 2,
    swap_every: int | None = 60,
) -> FederatedAlgorithm:
    """One generator, and discriminators that wander among clients; a round is one step of all (Hardy et al., 2019).

    Args:
        local: How a client trains its discriminator, on one batch each round; Adam's moments stay with the client.
        generator: How the server trains the generator.
        batches: k, batches of generated pictures in a round, which clients share.
        swap_every: Rounds after which the clients of a cohort swap discriminators; null for never.
    """
    for name, value in (("batches", batches), ("swap_every", swap_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be >= 1")

    def client_update(learner: Learner, made: torch.Tensor, client: Client) -> ClientResult:
        x_g, x_d = made[client.slot % batches], made[(client.slot + 1) % batches]
        kept = first(learner) if client.state is None else client.state
        d, moments = kept["discriminator"], {name: m.clone() for name, m in kept.get("moments", {}).items()}
        held, draw = learner.task.examples(client.id), torch.Generator().manual_seed(seed_for(client.seed, "rows"))
        rows = torch.randperm(len(held["x"]), generator=draw)[: local.batch_size]
        y = learner.train(
            learner.params() | d,  # whatever generator is in the scratch model has no part in this
            client,
            local,
            loss=partial(told_apart, fake=x_d),
            examples={name: column[rows] for name, column in held.items()},
            only=d,
            moments=None if local.local_optimizer == "sgd" else moments,
        )
        x = x_g.clone().requires_grad_()
        loss = taken_for_real(learner.load(y.params), x)
        [feedback] = torch.autograd.grad(loss, [x])
        state = {"discriminator": discriminator_of(y.params), **({"moments": moments} if moments else {})}
        return ClientResult(feedback, 1, {"train_loss": y.loss, "generator_loss": loss.item()}, state)

    def improve(learner: Learner, item: tuple[ServerState, list[int], torch.Tensor]) -> tuple[Params, Params, float]:
        state, seeds, feedback = item

        def loss(model: torch.nn.Module) -> torch.Tensor:  # whose gradient in the pictures is the feedback
            return (pictures(learner, model, seeds, local.batch_size) * feedback).sum()

        return descend(learner, state.params, state.moments, generator, [loss])

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        seeds = [seed_for(cohort[0].seed, "batch", i) for i in range(batches)]
        [made] = backend.map(made_of, [(state.params, seeds, local.batch_size)])
        each = made[0].numel() * made.element_size() * min(batches, 2)
        (sent, members), metrics = backend.map_reduce(
            client_update, made, cohort, with_members(collect()), keeps_state=True, received=lambda _: each
        )
        feedback = torch.zeros_like(made)
        for client, of_client in zip(members, sent, strict=True):
            feedback[client.slot % batches] += of_client / len(members)
        [(params, moments, _)] = backend.map(improve, [(state, seeds, feedback)])
        if swap_every is not None and cohort[0].round % swap_every == 0:
            swap(members, backend)
        return ServerState(params, moments), metrics

    def init(params: Params) -> ServerState:
        discriminator_of(params)  # a model that has none says so now
        return ServerState(params, {})

    return FederatedAlgorithm(init, apply)
