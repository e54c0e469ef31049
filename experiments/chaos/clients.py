"""FedAvg whose clients hang, or are killed: each of some, once."""

import os
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

from fedray.algorithm import Client, FederatedAlgorithm
from fedray.algorithms.fedavg import fedavg
from fedray.local_training import LocalTraining

SHARE = 0.02  # of all updates


def hanging_fedavg(*, local: LocalTraining = LocalTraining()) -> FederatedAlgorithm:
    """Some updates never end.

    Args:
        local: Local training.
    """
    return _faulty(local, "hangs")


def mortal_fedavg(*, local: LocalTraining = LocalTraining()) -> FederatedAlgorithm:
    """Some updates end with their process.

    Args:
        local: Local training.
    """
    return _faulty(local, "dies")


def _faulty(local: LocalTraining, fault: str) -> FederatedAlgorithm:
    algorithm = fedavg(local=local)

    def apply(state, cohort, backend):
        return algorithm.apply(state, cohort, _Faulty(backend, fault))

    return replace(algorithm, apply=apply)


class _Faulty:
    """A backend whose client updates meet their fate first."""

    def __init__(self, backend, fault):
        self.backend, self.fault = backend, fault

    def map_reduce(self, client_update, *arguments, **options):
        fault = self.fault

        def update(learner, broadcast, client):
            meet_fate(client, fault)
            return client_update(learner, broadcast, client)

        return self.backend.map_reduce(update, *arguments, **{**options, "grouped": False})


def meet_fate(client: Client, fault: str) -> None:
    """Whoever is chosen hangs or dies, the first time; where FEDRAY_CHAOS names no folder, nothing happens."""
    folder = os.environ.get("FEDRAY_CHAOS")
    seed = os.environ.get("FEDRAY_CHAOS_SEED")
    if not folder or random.Random(f"{seed} {client.round} {client.id}").random() > SHARE:
        return
    try:
        (Path(folder) / f"died-{client.round}-{client.id}").touch(exist_ok=False)
    except FileExistsError:
        return
    if fault == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3600)
