"""FGL (Zhang, Qi and Zhao, 2023, arXiv:2306.16064): clients send prompts; the server learns from what they stand for.

Round 1, one-shot: every client sends prompts, of its classes or of its examples; the server generates samples of all
prompts and trains a model on them. Further rounds, if any: federated averaging of clients' private examples from there,
after each of which the server may go on with the synthetic ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fedray.aggregators import collect
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.learner import Learner
from fedray.synthesis.captions import ClientPrompts, class_level
from fedray.synthesis.central import CentralTraining, about, train_centrally
from fedray.synthesis.requests import of_prompts
from fedray.synthesis.synthesize import Synthesis, examples, synthesize
from fedray.trees import Params


@dataclass(frozen=True)
class ServerState:
    """The state of the base algorithm, and the prompts that came in round 1, each with its label."""

    base: Any
    prompts: Sequence[Sequence[Any]]

    @property
    def params(self) -> Params:
        """The model."""
        return self.base.params


def fgl(
    num_clients: int,
    /,
    *,
    base: FederatedAlgorithm,
    synthesis: Synthesis,
    central: CentralTraining,
    prompts: ClientPrompts = class_level,
    union: Literal["distinct", "all"] = "distinct",
    per_prompt: int = 400,
    negative: str = "low quality, low resolution",
    server_epochs: int = 0,
) -> FederatedAlgorithm:
    """Prompts instead of weights (Federated Generative Learning, Zhang, Qi and Zhao, 2023).

    Args:
        num_clients: How many clients there are.
        base: The federated algorithm of the rounds after the first.
        synthesis: How synthetic data come to be.
        central: How the server trains on them in round 1.
        prompts: What a client sends.
        union: Whether equal prompts of several clients (or examples) count once, or as often as they were sent.
        per_prompt: Samples of each prompt.
        negative: What no picture should be.
        server_epochs: Passes over the synthetic data that the server makes after each further round.
    """
    if per_prompt < 1:
        raise ValueError(f"per_prompt is {per_prompt}; it must be >= 1")
    if server_epochs < 0:
        raise ValueError(f"server_epochs is {server_epochs}; it must be >= 0")

    def describe(learner: Learner, _: None, client: Client) -> ClientResult:
        task: Any = learner.task
        said = prompts(task.data, task.partition.client(client.id))
        labels = torch.tensor([label for _, label in said], dtype=torch.int16)
        return ClientResult({"prompts": [text for text, _ in said], "labels": labels}, 1)

    def train(
        params: Params, said: Sequence[Sequence[Any]], seed: int, epochs: int, backend: Backend
    ) -> tuple[Params, Metrics]:
        wanted = [(str(text), int(label)) for text, label in said]
        requests = of_prompts(wanted, per_prompt, synthesis.synthesis_seed, negative, synthesis.guidances or ())
        made = synthesize(synthesis, requests, backend.stream)
        [(_, shape, _)] = backend.map(about, [None])
        trained, metrics = train_centrally(params, examples(made, shape, synthesis), central, backend, seed, epochs)
        return trained, {**made.metrics, **metrics}

    def one_shot(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        everyone = [Client(id, 0, slot=id) for id in range(num_clients)]
        sent, _ = backend.map_reduce(describe, None, everyone, collect())
        said = [pair for one in sent for pair in zip(one["prompts"], one["labels"].tolist(), strict=True)]
        said = sorted(set(said)) if union == "distinct" else said
        params, metrics = train(state.params, said, cohort[0].seed, central.central_epochs, backend)
        return ServerState(base.init(params), said), {**metrics, "prompts": float(len(said))}

    def apply(state: ServerState, cohort: Sequence[Client], backend: Backend) -> tuple[ServerState, Metrics]:
        if cohort[0].round == 1:
            return one_shot(state, cohort, backend)
        averaged, metrics = base.apply(state.base, cohort, backend)
        if not server_epochs:
            return replace(state, base=averaged), metrics
        params, more = train(averaged.params, state.prompts, cohort[0].seed, server_epochs, backend)
        return replace(state, base=replace(averaged, params=params)), {**metrics, **more}

    return FederatedAlgorithm(lambda params: ServerState(base.init(params), []), apply)
