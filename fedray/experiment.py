"""A whole run as one value: the top level of a configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedray import backends, config, groups
from fedray.algorithm import FederatedAlgorithm
from fedray.backends import Launcher
from fedray.errors import ConfigError, DataError
from fedray.execution import ONE_BY_ONE, Execution
from fedray.learner import Learner, Task
from fedray.rounds import Sampler, draw
from fedray.samplers import Population, uniform
from fedray.search import Tuning
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
    execution: Execution = ONE_BY_ONE
    profile: bool = False
    diversity: bool = False
    lockstep: bool = False  # whoever has a record in hand finds the checkpoint whole, and nobody writing

    @property
    def population(self) -> Population:
        """Whom cohorts are drawn from."""
        return Population(self.task.sizes)


@dataclass(frozen=True)
class Plan:
    """An experiment, and what is around it: where it runs, who follows it, and what is searched."""

    experiment: Experiment
    launcher: Launcher
    trackers: Sequence[TrackerFactory]
    tune: Tuning | None = None


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
    execution: Execution = Execution(),
    profile: bool = False,
    diversity: bool = False,
    trackers: list[TrackerFactory] | None = None,
    tune: Tuning | None = None,
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
        execution: How clients are computed.
        profile: Keep what the workers' time went to, round by round, and draw it in the report.
        diversity: Measure the gradient diversity of each round's updates.
        trackers: Where metrics are sent besides the run folder.
        tune: What `fedray tune` searches, and how; a run only checks it.
    """
    counts = {"rounds": (rounds, 1), "cohort": (cohort, 1), "seed": (seed, 0), "evaluate_every": (evaluate_every, 0)}
    counts |= {"checkpoint_every": (checkpoint_every, 0), "keep_checkpoints": (keep_checkpoints, 1)}
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be >= {least}")
    task = config.fill(task, seed)
    num_clients = len(task.sizes)
    algorithm = config.fill(algorithm, num_clients)
    learner = Learner(task, "cpu")  # a model that cannot be built says so now,
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
        _resolved(execution, learner, cohort),
        profile,
        diversity,
    )
    draw(made.population, cohort, sampler, seed, 1)  # and so does a sampler that cannot draw,
    algorithm.init(learner.params())  # and an algorithm that cannot train such a model
    return Plan(made, backend, trackers or (), tune)


def _resolved(execution: Execution, learner: Learner, cohort: int) -> Execution:
    """With every ``auto`` replaced by what the rules choose.

    Raises:
        ValueError: clients of this task cannot be computed so.
    """
    task, model, group = learner.task, learner.model, execution.group
    reason = groups.dependence(task, model) if execution.compile else None
    if reason is not None:
        raise ValueError(f"compile is true, but this task's training step cannot be: {reason}; set compile=false")
    if group == "auto":
        group = groups.suggested_size(task, cohort)
    elif group > 1 and (reason := groups.obstacle(task, task.model())) is not None:
        raise ValueError(f"group is {group}, but clients of this task cannot train in one call: {reason}; set group=1")
    return replace(execution, group=group, channels_last=execution.puts_channels_last(model))


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
