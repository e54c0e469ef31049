"""Federated LoRA with a rule for its averages: FedIT (Zhang et al., 2024) and those that mend it.

Clients train the factors of W + s·B·A; `fedray.peft.averaging` says what becomes of them. Whatever else is trained,
such as a head, is averaged as in FedAvg. What follows from the pre-trained model and a seed is known to all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fedray.aggregators import collect, with_members
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.errors import ConfigError
from fedray.learner import Learner
from fedray.local_training import LocalTraining, Weighting
from fedray.peft.averaging import Averaging, fedit, weighted
from fedray.peft.factors import cut, filled, is_base, layers_of, merge, num_bytes, role
from fedray.seeds import seed_for
from fedray.trees import Params

_WEIGHED = replace(
    collect(), accumulate=lambda acc, client, result: {**acc, client.slot: (result.update, float(result.weight))}
)


@dataclass(frozen=True)
class ServerState:
    """What is trained, with the frozen weights that were changed, and what the clients have of both.

    Attributes:
        params: The trained params, and every frozen weight that is no longer the pre-trained model's.
        met: The round in which each client last took part, 0 for never; shape (num_clients,).
        residuals: Bytes of all changes of frozen weights up to each round, as factors; shape (rounds + 1,).
    """

    params: Params
    met: torch.Tensor
    residuals: torch.Tensor


def fedlora(
    num_clients: int,
    /,
    *,
    local: LocalTraining,
    averaging: Averaging = fedit(),
    ranks: list[int] | None = None,
    weighting: Weighting = "examples",
) -> FederatedAlgorithm:
    """LoRA with a rule for its averages: FedIT, FFA-LoRA, RoLoRA, FedEx-LoRA, FLoRA, FlexLoRA.

    Args:
        num_clients: The size of the population.
        local: How a client trains.
        averaging: What becomes of the factors.
        ranks: Ranks of the clients, dealt out in turn, at most the model's own; null for the model's own.
        weighting: What a client weighs: its examples, these rounded up to whole batches (FedPEFT's code), or one.
    """
    if ranks is not None and (not ranks or min(ranks) < 1):
        raise ValueError(f"ranks is {ranks}; it must be a list of ranks of at least 1, or null")

    def own(params: Params, client: Client) -> Params:
        return params if ranks is None else cut(params, ranks[client.id % len(ranks)])

    def client_update(learner: Learner, x: Params, client: Client) -> ClientResult:
        # components beyond a client's rank are zero in both factors, and so have no gradient
        start = filled(own(x, client), x)
        names = {name for name in x if not is_base(name) and role(name) in (None, *averaging.trained(client.round))}
        y = learner.train(start, client, local, only=names)
        weight = local.weight(y.num_examples, weighting)
        update = {name: p for name, p in y.params.items() if name in names}
        return ClientResult(own(update, client), weight, {"train_loss": y.loss})

    def init(params: Params) -> ServerState:
        largest = max((p.shape[0] for name, p in params.items() if role(name) == "A"), default=0)
        if not largest:
            only_b = any(role(name) == "B" for name in params)
            problem = "trains B alone, whose mean is exact" if only_b else "has none"
            remedy = "task.model.method.factors=AB, or algorithm.name=fedavg" if only_b else "task.model.method=lora"
            raise ConfigError(f"fedlora averages the factors of LoRA, and this model {problem}; give {remedy}")
        if ranks is not None and max(ranks) > largest:
            raise ConfigError(f"algorithm.ranks is {ranks}; the model's rank is {largest}, see task.model.method.rank")
        return ServerState(params, torch.zeros(num_clients, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))

    def received(state: ServerState, client: Client) -> int:
        """Bytes that a client lacks: trained params, and changes of frozen weights or, if less, these weights."""
        since, x = int(state.met[client.id]), state.params
        rounds = range(since, client.round) if since else (1, 2)  # a newcomer lacks whatever is ever trained
        changed = {None, *(r for r in averaging.sent if any(r in averaging.trained(at) for at in rounds))}
        trained = {name: p for name, p in x.items() if not is_base(name) and role(name) in changed}
        missed = int(state.residuals[-1] - state.residuals[max(since - 1, 0)])
        return num_bytes(own(trained, client).values()) + min(missed, num_bytes(x[name] for name in x if is_base(name)))

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        x, lacks = state.params, partial(received, state)
        [layers] = backend.map(lambda learner, params: layers_of(learner.load(params)), [x])
        (results, members), metrics = backend.map_reduce(
            client_update, x, cohort, with_members(_WEIGHED), grouped=ranks is None, received=lacks
        )
        sent, p = [filled(y, x) for y, _ in results], [w / sum(w for _, w in results) for _, w in results]
        new = {name: weighted([y[name] for y in sent], p).to(x[name].dtype) for name in sent[0] if not role(name)}
        generator = torch.Generator().manual_seed(seed_for("factors", *(client.seed for client in members)))
        changed, size, errors = merge(averaging, layers, x, sent, p, generator)
        met = state.met.index_fill(0, torch.tensor([client.id for client in members]), cohort[0].round)
        residuals = torch.cat([state.residuals, state.residuals[-1:] + size])
        return ServerState({**x, **new, **changed}, met, residuals), {**metrics, **errors}

    return FederatedAlgorithm(init, apply)
