"""Two of Ray Tune's schedulers, with what checkpoints, a last round, seeds and restored searches ask of them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from fedray.report.read import read_metrics, scalars
from fedray.seeds import seed_for


def number_of(trial: Any) -> int:
    """A trial's place in the order in which they were drawn."""
    return int(trial.experiment_tag.partition("_")[0])


@contextmanager
def _seeded(*of: Any) -> Iterator[None]:
    """The generators that Ray Tune's schedulers draw from, which they share with everybody, seeded for a while."""
    before = random.getstate(), np.random.get_state()
    seed = seed_for(*of)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


class Halving(ASHAScheduler):
    """Successive halving that, in a search that is restored, knows what trials had reached before."""

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(stop_last_trials=False, **options)  # they end by themselves, when their model is written
        self._seed = seed

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune does not keep a scheduler's memory; the run folders do."""
        with _seeded(self._seed, "bracket", number_of(trial)):
            super().on_trial_add(tune_controller, trial)
        if trial.storage.trial_dir_name is None:
            return  # it is new
        known: dict[str, float] = {}
        for record in read_metrics(Path(trial.storage.trial_fs_path) / "run" / "metrics.jsonl"):
            known |= scalars(record)
            self.on_trial_result(tune_controller, trial, known)


class Population(PopulationBasedTraining):
    """Population based training that compares all at once, where there are checkpoints, and not in the last round."""

    def __init__(self, seed: int, rounds: int, **options: Any) -> None:
        super().__init__(synch=True, **options)
        self._seed, self._rounds = seed, rounds

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """What becomes of a trial after a round."""
        if result["round"] % self._perturbation_interval or result["round"] >= self._rounds:
            return str(self.CONTINUE)
        with _seeded(self._seed, "population", result["round"]):
            return str(super().on_trial_result(tune_controller, trial, result))

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Nobody waits for a trial that has failed for good."""
        super().on_trial_error(tune_controller, trial)
        others = [self._trial_state[other] for other in tune_controller.get_live_trials() if other is not trial]
        if not trial.should_recover() and all(o.last_train_time >= self._next_perturbation_sync for o in others):
            self._next_perturbation_sync += self._perturbation_interval
