"""The ``tune:`` section of a configuration: which options are searched, from what they are drawn, and who goes on."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import OmegaConf

from fedray.backends.ray.schedulers import Scheduler, Search, fifo, random
from fedray.config import convert, nearest
from fedray.errors import ConfigError
from fedray.options import options_of


@dataclass(frozen=True)
class Distribution:
    """What an option is drawn from.

    Attributes:
        name: One of `DISTRIBUTIONS`.
        arguments: Its arguments, in order.
        examples: All values of a choice, or the ends of a range: what is checked before anything starts.
    """

    name: str
    arguments: tuple[Any, ...]
    examples: tuple[Any, ...]


def uniform(low: float, high: float) -> list[Any]:
    """A number between low and high."""
    return _ordered(low, high)


def quniform(low: float, high: float, step: float) -> list[Any]:
    """The same, rounded to a multiple of the step."""
    if not step > 0:
        raise ValueError(f"step is {step}; it must be > 0")
    return _ordered(low, high)


def loguniform(low: float, high: float) -> list[Any]:
    """A number between low and high, each order of magnitude as likely as another."""
    return _positive(low, high)


def randint(low: int, high: int) -> list[Any]:
    """A whole number from low to high, without high."""
    if not low < high:
        raise ValueError(f"high is {high}; it must be above low ({low}), because high itself is not drawn")
    return [low, high - 1]


def lograndint(low: int, high: int) -> list[Any]:
    """The same, each order of magnitude as likely as another."""
    return randint(*_positive(low, high))


def choice(values: list[Any]) -> list[Any]:
    """One of the values."""
    return _some(values)


def grid(values: list[Any]) -> list[Any]:
    """Each of the values in turn: there are ``trials`` of every combination."""
    return _some(values)


def _ordered(low: float, high: float) -> list[Any]:
    if not low <= high:
        raise ValueError(f"nothing lies between {low} and {high}; write the smaller one first")
    return [low, high]


def _positive(low: float, high: float) -> list[Any]:
    if not low > 0:
        raise ValueError(f"low is {low}; it must be > 0")
    return _ordered(low, high)


def _some(values: list[Any]) -> list[Any]:
    if not values:
        raise ValueError("there is no value to take")
    return values


DISTRIBUTIONS: dict[str, Callable[..., list[Any]]] = {
    made.__name__: made for made in (choice, grid, loguniform, lograndint, quniform, randint, uniform)
}


@dataclass(frozen=True)
class Tuning:
    """What `fedray tune` searches, and how.

    Args:
        space: What each option is drawn from, by dotted key: {algorithm.local_lr: {loguniform: [0.001, 1]}}.
        metric: What trials are compared by: a number of a round's record.
        mode: Whether more of it is better, or less.
        trials: How many; with a grid, how many of every combination.
        scheduler: Who goes on.
        search: How the options are drawn.
        seed: The seed of what is drawn.
        num_cpus: CPUs that a trial's own process reserves, fractions allowed.
        num_gpus: GPUs that it reserves, fractions allowed.
        max_concurrent: Trials at a time; null for as many as fit.
        retries: How often a trial that failed goes on from its checkpoint.
    """

    space: dict[str, Any]
    metric: str = "test_accuracy"
    mode: Literal["max", "min"] = "max"
    trials: int = 10
    scheduler: Scheduler = fifo
    search: Search = random
    seed: int = 0
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    max_concurrent: int | None = None
    retries: int = 1

    def __post_init__(self) -> None:
        least = {"trials": 1, "seed": 0, "num_cpus": 0, "num_gpus": 0, "max_concurrent": 1, "retries": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} is {value}; it must be >= {smallest}")
        if not isinstance(self.space, Mapping) or not self.space:
            raise ValueError("space is empty; give an option something to be drawn from: {cohort: {choice: [5, 10]}}")
        _ = self.distributions

    @property
    def distributions(self) -> dict[str, Distribution]:
        """The space, checked.

        Raises:
            ConfigError: an unknown distribution, or arguments that it does not take.
        """
        return {str(key): distribution(value, f"tune.space.{key}") for key, value in self.space.items()}


def distribution(value: Any, where: str) -> Distribution:
    """The distribution that ``{name: arguments}`` stands for."""
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"{where} is {value!r}; it must be one distribution, such as {{loguniform: [0.001, 1]}}")
    [(name, given)] = value.items()
    if name not in DISTRIBUTIONS:
        raise ConfigError(f"{where}: there is no distribution {name!r}; {nearest(str(name), DISTRIBUTIONS)}")
    options = list(options_of(DISTRIBUTIONS[name]).values())
    arguments = [given] if len(options) == 1 else given
    if not isinstance(arguments, list | tuple) or len(arguments) != len(options):
        wanted = ", ".join(option.name for option in options)
        raise ConfigError(f"{where}: {name} is {given!r}; it must be [{wanted}]")
    converted = [
        convert(argument, option.annotation, f"{where}.{name}.{option.name}" if len(options) > 1 else f"{where}.{name}")
        for argument, option in zip(arguments, options, strict=True)
    ]
    try:
        return Distribution(name, tuple(converted), tuple(DISTRIBUTIONS[name](*converted)))
    except ValueError as error:
        raise ConfigError(f"{where}.{name}: {error}") from None


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """A key and its distribution, as they are written on the command line.

    >>> parse("algorithm.local_lr=loguniform(1e-3, 1)"), parse("cohort=choice(5,10)")
    (('algorithm.local_lr', {'loguniform': [0.001, 1]}), ('cohort', {'choice': [5, 10]}))
    """
    found = re.fullmatch(r"([^=\s]+)=(\w+)\((.*)\)", text.strip(), re.DOTALL)
    if not found:
        raise ConfigError(f"{text!r} is not key=distribution(...); for example algorithm.local_lr=loguniform(1e-3,1)")
    try:
        arguments = OmegaConf.to_container(OmegaConf.create(f"[{found[3]}]"))
    except Exception as error:  # YAML's and OmegaConf's errors share no base class
        raise ConfigError(f"{text!r} cannot be read: {' '.join(str(error).split())}") from None
    return found[1], {found[2]: arguments}
