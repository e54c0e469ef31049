"""A whole run as one value: the top level of a configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fedray import backends, config, groups
from fedray.algorithm import FederatedAlgorithm
from fedray.backends import Launcher
from fedray.errors import ConfigError, DataError
from fedray.learner import Learner, Task
from fedray.rounds import Sampler, draw
from fedray.samplers import Population, uniform
from fedray.trackers import TrackerFactory


@dataclass(frozen=True)
class Experiment:
    """What is trained, how, on whom, and for how long."""

    task: Task
    algorithm: FederatedAlgorithm
    sampler: Sampler
    rounds: int
    cohort: int
    seed: int
    evaluate_every: int
    checkpoint_every: int
    keep_checkpoints: int
    group: int
    profile: bool = False

    @property
    def population(self) -> Population:
        """Whom cohorts are drawn from."""
        return Population(self.task.sizes)


@dataclass(frozen=True)
class Plan:
    """An experiment, and what is around it: where it runs, and who follows it."""

    experiment: Experiment
    launcher: Launcher
    trackers: Sequence[TrackerFactory]


def experiment(
    *,
    task: Task,
    algorithm: FederatedAlgorithm,
    rounds: int,
    cohort: int,
    backend: Launcher = backends.on_ray(),
    sampler: Sampler = uniform,
    seed: int = 0,
    evaluate_every: int = 1,
    checkpoint_every: int = 5,
    keep_checkpoints: int = 2,
    group: int | Literal["auto"] = "auto",
    profile: bool = False,
    trackers: list[TrackerFactory] | None = None,
) -> Plan:
    """The top level of a configuration.

    Args:
        task: What is learnt from what, and who holds it.
        algorithm: The federated algorithm.
        rounds: Rounds of training.
        cohort: Clients sampled a round.
        backend: Where the clients run.
        sampler: How a cohort is drawn.
        seed: The seed of everything random.
        evaluate_every: Rounds between evaluations on the test set; 0 for only at the end.
        checkpoint_every: Rounds between checkpoints; 0 for only at the end.
        keep_checkpoints: How many of the newest checkpoints stay.
        group: Clients that train in one call, where the algorithm allows it; auto by a rule of the model's layers.
        profile: Keep what the workers' time went to, round by round, and draw it in the report.
        trackers: Where metrics are sent besides the run folder.
    """
    counts = {"rounds": (rounds, 1), "cohort": (cohort, 1), "seed": (seed, 0), "evaluate_every": (evaluate_every, 0)}
    counts |= {} if isinstance(group, str) else {"group": (group, 1)}
    counts |= {"checkpoint_every": (checkpoint_every, 0), "keep_checkpoints": (keep_checkpoints, 1)}
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be >= {least}")
    task = config.fill(task, seed)
    num_clients = len(task.sizes)
    algorithm = config.fill(algorithm, num_clients)
    learner = Learner(task, "cpu")  # a model that cannot be built says so now,
    size = _group_size(group, learner.task, cohort)
    made = Experiment(
        task,
        algorithm,
        sampler,
        rounds,
        cohort,
        seed,
        evaluate_every,
        checkpoint_every,
        keep_checkpoints,
        size,
        profile,
    )
    draw(made.population, cohort, sampler, seed, 1)  # and so does a sampler that cannot draw
    return Plan(made, backend, trackers or ())


def _group_size(group: int | Literal["auto"], task: Task, cohort: int) -> int:
    if isinstance(group, str):
        return groups.suggested_size(task, cohort)
    reason = groups.obstacle(task, task.model()) if group > 1 else None
    if reason is not None:
        raise ValueError(f"group is {group}, but clients of this task cannot train in one call: {reason}; set group=1")
    return group


def plan(values: Mapping[str, Any]) -> Plan:
    """Build everything that a configuration names; all of the user's mistakes show here, before anything starts.

    Raises:
        ConfigError: what is wrong, where it stands, and what to do.
    """
    arguments = config.check(experiment, values, "", "the configuration")
    try:
        return experiment(**arguments)
    except (ConfigError, DataError):
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
