"""A whole run as one value: the top level of a configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fedray import backends, config, groups
from fedray.algorithm import FederatedAlgorithm
from fedray.backends import Launcher
from fedray.errors import ConfigError, DataError
from fedray.execution import ONE_BY_ONE, Execution
from fedray.learner import Learner, Task
from fedray.ledger import payload_bytes
from fedray.rounds import Sampler, Select, draw
from fedray.samplers import Population, uniform
from fedray.schedules import Scene, Schedule
from fedray.search import Tuning
from fedray.sharing import once
from fedray.trackers import TrackerFactory
from fedray.trees import Params

_LEAST = {"rounds": 1, "cohort": 1, "seed": 0, "evaluate_every": 0, "checkpoint_every": 0, "keep_checkpoints": 1}


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
    schedule: Schedule | None = None
    lockstep: bool = False  # whoever has a record in hand finds the checkpoint whole, and nobody writing

    def select(self, params: Params) -> Select | None:
        """The schedule of a run that trains these params; None without one."""
        if self.schedule is None:
            return None
        payload, asynchronous = payload_bytes(params), self.algorithm.asynchronous
        return self.schedule(Scene(self.population, self.cohort, self.sampler, self.seed, payload, asynchronous))

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
    schedule: Schedule | None = None,
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
        schedule: What happens when, in virtual time; null for rounds without time.
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
    counts = {"rounds": rounds, "cohort": cohort, "seed": seed, "evaluate_every": evaluate_every}
    _check_counts({**counts, "checkpoint_every": checkpoint_every, "keep_checkpoints": keep_checkpoints})
    if isinstance(task, config.Configured):
        task = once("task", (task.asked, seed), partial(task, seed))
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
        schedule,
    )
    draw(made.population, cohort, sampler, seed, 1)  # and so does a sampler that cannot draw,
    state = algorithm.init(learner.params())  # and an algorithm that cannot train such a model
    if (select := made.select(state.params)) is not None:
        select(1)
    return Plan(made, backend, trackers or (), tune)


def _check_counts(counts: Mapping[str, Any]) -> None:
    for name, least in _LEAST.items():
        if name in counts and counts[name] < least:
            raise ValueError(f"{name} is {counts[name]}; it must be >= {least}")


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
        group = 1 if execution.compile else groups.suggested_size(task, cohort)
    elif group > 1 and (reason := groups.obstacle(task, task.model())) is not None:
        raise ValueError(f"group is {group}, but clients of this task cannot train in one call: {reason}; set group=1")
    return replace(execution, group=group).with_format(model, "cpu", "cuda")


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


def check(values: Mapping[str, Any]) -> None:
    """Find the mistakes of a configuration that show without its data and models, which may be elsewhere.

    Raises:
        ConfigError: what is wrong, where it stands, and what to do.
    """
    arguments = config.check(experiment, values, "", "the configuration", dry=True)
    try:
        _check_counts(arguments)
    except ValueError as error:
        raise ConfigError(str(error)) from error
