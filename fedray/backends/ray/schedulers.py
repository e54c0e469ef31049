"""Who of the trials of a search goes on, and how they are drawn: Ray Tune's schedulers and searches, by name.

Ray is imported when one of them is made, so that a configuration that names them can be read without it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedray.errors import ConfigError

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import SearchAlgorithm


@dataclass(frozen=True)
class Setting:
    """What the program knows of a search.

    Attributes:
        space: Ray Tune's domains, by dotted key.
        rounds: The last round of a trial.
        checkpoint_every: Rounds between checkpoints.
        seed: Of everything that is drawn.
    """

    space: Mapping[str, Any]
    rounds: int
    checkpoint_every: int
    seed: int


Scheduler = Callable[[Setting], "TrialScheduler"]
Search = Callable[[Setting], "SearchAlgorithm"]


def fifo(setting: Setting, /) -> Any:
    """Every trial goes on to its last round."""
    from ray.tune.schedulers import FIFOScheduler

    return FIFOScheduler()


def asha(setting: Setting, /, grace_period: int = 1, reduction_factor: int = 4, brackets: int = 1) -> Any:
    """Asynchronous successive halving: at rounds that grow by a factor, only the best part goes on (Li et al., 2020).

    Args:
        grace_period: The first round in which a trial can be stopped.
        reduction_factor: One of so many goes on; and so many times more rounds to the next decision.
        brackets: Groups of trials, each with a later first decision than the one before.
    """
    from fedray.backends.ray.scheduling import Halving

    _at_least(1, grace_period=grace_period, brackets=brackets)
    _at_least(2, reduction_factor=reduction_factor)
    if grace_period > setting.rounds:
        raise ValueError(f"grace_period is {grace_period}; a trial has only {setting.rounds} rounds")
    return Halving(
        setting.seed,
        time_attr="round",
        max_t=setting.rounds,
        grace_period=grace_period,
        reduction_factor=reduction_factor,
        brackets=brackets,
    )


def median(setting: Setting, /, grace_period: int = 1, min_trials: int = 3) -> Any:
    """A trial is stopped when its best is worse than the median of the others' running means (Golovin et al., 2017).

    Args:
        grace_period: Rounds before a trial can be stopped.
        min_trials: Trials that must have got as far before anybody is stopped.
    """
    from ray.tune.schedulers import MedianStoppingRule

    _at_least(1, grace_period=grace_period, min_trials=min_trials)
    return MedianStoppingRule(
        time_attr="round",
        grace_period=grace_period,
        min_samples_required=min_trials,
        min_time_slice=setting.rounds,  # nobody pauses to let others go first: that would cost rounds
    )


def pbt(setting: Setting, /, interval: int = 5, quantile: float = 0.25, resample: float = 0.25) -> Any:
    """Population based training: the worst go on from the best ones' checkpoints with options near theirs.

    Jaderberg et al., 2017. Options change in mid-run; only those of the algorithm, cohort and sampler can.

    Args:
        interval: Rounds between two comparisons; a multiple of checkpoint_every.
        quantile: The part of the trials that is replaced, and the part that it is replaced from.
        resample: The probability that an option is drawn anew, instead of multiplied by 0.8 or 1.2.
    """
    from fedray.backends.ray.scheduling import Population

    _at_least(1, interval=interval)
    if not 0 < quantile <= 0.5:
        raise ValueError(f"quantile is {quantile}; it must be above 0 and at most 0.5")
    if not 0 <= resample <= 1:
        raise ValueError(f"resample is {resample}; it must be between 0 and 1")
    if not setting.checkpoint_every or interval % setting.checkpoint_every:
        raise ValueError(
            f"interval is {interval}, checkpoint_every is {setting.checkpoint_every}; there must be a checkpoint to go "
            f"on from in every comparison: give checkpoint_every={interval}"
        )
    domains = {key: domain for key, domain in setting.space.items() if not isinstance(domain, Mapping)}  # not the grid
    for key in domains:
        if not key.startswith(("algorithm.", "cohort", "sampler.")) or key.endswith(".name"):
            raise ValueError(f"pbt changes options in mid-run, and {key} cannot change; fix it, or use asha")
    if not domains:
        raise ValueError("pbt has nothing to change; give tune.space a distribution that is no grid")
    return Population(
        setting.seed,
        setting.rounds,
        time_attr="round",
        perturbation_interval=interval,
        hyperparam_mutations=domains,
        quantile_fraction=quantile,
        resample_probability=resample,
        require_attrs=False,
    )


def random(setting: Setting, /) -> Any:
    """Every trial is drawn by itself; a grid is gone through."""
    from ray.tune.search import BasicVariantGenerator

    return BasicVariantGenerator(random_state=setting.seed)


def optuna(setting: Setting, /, startup_trials: int = 10) -> Any:
    """Optuna's tree-structured Parzen estimator: trials are drawn near those that were good (Bergstra et al., 2011).

    Args:
        startup_trials: Trials that are drawn at random before.
    """
    try:
        from optuna import logging
        from optuna.samplers import TPESampler
    except ImportError:
        raise ConfigError("Optuna is not installed; run: pip install 'fedray[optuna]'") from None
    from ray.tune.search.optuna import OptunaSearch

    _at_least(1, startup_trials=startup_trials)
    grids = [key for key, domain in setting.space.items() if isinstance(domain, Mapping)]
    if grids:
        raise ValueError(f"optuna draws, and {grids[0]} has a grid; use choice, or search=random")
    logging.set_verbosity(logging.WARNING)
    return OptunaSearch(sampler=TPESampler(n_startup_trials=startup_trials, seed=setting.seed))


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} is {value}; it must be >= {least}")


SCHEDULERS: dict[str, Callable[..., Any]] = {"asha": asha, "fifo": fifo, "median": median, "pbt": pbt}
SEARCHES: dict[str, Callable[..., Any]] = {"optuna": optuna, "random": random}
