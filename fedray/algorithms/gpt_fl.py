"""GPT-FL (Zhang et al., 2023, arXiv:2306.02210): federated learning from a model that was trained on synthetic data.

1. The server learns the names of all clients' labels. 2. Prompts are made of them, and a generator makes samples of the
prompts. 3. A model is trained on the samples in one place. 4. Any algorithm of federated learning goes on from there.
Steps 1 to 3 are round 1, so that the model of round 1 is the one of synthetic data only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedray.aggregators import collect
from fedray.algorithm import Backend, Client, ClientResult, FederatedAlgorithm, Metrics
from fedray.learner import Learner
from fedray.synthesis.central import CentralTraining, about, train_centrally
from fedray.synthesis.prompts import PromptWriter, hit_rate, template
from fedray.synthesis.requests import of_classes
from fedray.synthesis.synthesize import Synthesis, examples, synthesize


def gpt_fl(
    num_clients: int,
    /,
    *,
    base: FederatedAlgorithm,
    synthesis: Synthesis,
    central: CentralTraining,
    prompts: PromptWriter = template,
    volume: float = 1.0,
) -> FederatedAlgorithm:
    """Federated learning from a model trained on synthetic data (GPT-FL, Zhang et al., 2023).

    Args:
        num_clients: How many clients there are.
        base: The federated algorithm that goes on from round 2.
        synthesis: How synthetic data come to be.
        central: How the server trains on them.
        prompts: What the generator is asked for, for each class.
        volume: Synthetic examples for each real one that the clients hold, all classes alike.
    """
    if not volume > 0:
        raise ValueError(f"volume is {volume}; it must be > 0")

    def labels(learner: Learner, _: None, client: Client) -> ClientResult:
        task: Any = learner.task
        present = set(task.examples(client.id)["y"].tolist())
        return ClientResult([task.data.classes[label] for label in sorted(present)], 1)

    def start(state: Any, cohort: Sequence[Client], backend: Backend) -> tuple[Any, Metrics]:
        everyone = [Client(id, 0, slot=id) for id in range(num_clients)]
        sent, _ = backend.map_reduce(labels, None, everyone, collect())
        [(classes, shape, num_real)] = backend.map(about, [None])
        known = [name for name in classes if any(name in names for names in sent)]
        [book] = backend.map(lambda _, names: prompts(names), [known])
        counts = [round(volume * num_real / len(known))] * len(known)
        requests = of_classes(book, counts, synthesis.synthesis_seed, synthesis.guidances or ())
        made = synthesize(synthesis, requests, backend.stream)
        columns = examples(made, shape, synthesis)
        columns["y"] = np.array([classes.index(name) for name in known])[columns["y"]]
        params, metrics = train_centrally(
            state.params, columns, central, backend, cohort[0].seed, central.central_epochs
        )
        return base.init(params), {**made.metrics, **metrics, "prompt_hits": hit_rate(book, known)}

    def apply(state: Any, cohort: Sequence[Client], backend: Backend) -> tuple[Any, Metrics]:
        return (start if cohort[0].round == 1 else base.apply)(state, cohort, backend)

    return FederatedAlgorithm(base.init, apply)
