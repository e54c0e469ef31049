"""Two of Ray Tune's schedulers, kept to what runs with checkpoints, a last round and restored searches need."""

from pathlib import Path
from typing import Any

from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from fedray.report.read import read_metrics, scalars


class Halving(ASHAScheduler):
    """Successive halving that, in a search that is restored, knows what trials had reached before."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Ray Tune does not keep a scheduler's memory; the run folders do."""
        super().on_trial_add(tune_controller, trial)
        if trial.storage.trial_dir_name is None:
            return  # it is new
        known: dict[str, float] = {}
        for record in read_metrics(Path(trial.storage.trial_fs_path) / "run" / "metrics.jsonl"):
            known |= scalars(record)
            self.on_trial_result(tune_controller, trial, known)


class Population(PopulationBasedTraining):
    """Population based training that compares only where there are checkpoints, and not in the last round."""

    def __init__(self, rounds: int, **options: Any) -> None:
        super().__init__(**options)
        self._rounds = rounds

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """What becomes of a trial after a round."""
        if result["round"] % self._perturbation_interval or result["round"] >= self._rounds:
            return str(self.CONTINUE)
        return str(super().on_trial_result(tune_controller, trial, result))
