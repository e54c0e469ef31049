"""Who takes part in a round: pure functions of (population, cohort size, this round's generator, round)."""

import csv
import json
import math
import zipfile
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedray.errors import DataError


@dataclass(frozen=True, eq=False)
class Population:
    """All clients.

    Attributes:
        sizes: examples of each client, integers of shape (num_clients,).
    """

    sizes: np.ndarray

    @property
    def num_clients(self) -> int:
        """How many clients there are."""
        return len(self.sizes)


@dataclass(frozen=True)
class Selection:
    """Who was chosen for a round.

    Attributes:
        clients: positions of those who take part, in order.
        dropped: those who were sent the model and return nothing that is used.
        staleness: of each who takes part, how many rounds have ended since it started; empty for none.
        horizon: how many rounds before this one's end the oldest model is from which anybody still trains.
        finished: virtual seconds at the end of the round; None without a schedule.
        told: further numbers for the round's metrics.
        traffic: bytes up and down for each client that the virtual time counts with.
    """

    clients: tuple[int, ...]
    dropped: tuple[int, ...] = ()
    staleness: tuple[int, ...] = ()
    horizon: int = 0
    finished: float | None = None
    told: dict[str, int] = field(default_factory=dict)
    traffic: tuple[int, int] | None = None


def uniform(
    population: Population, cohort: int, rng: np.random.Generator, _round: int, /, replace: bool = False
) -> Selection:
    """Every client equally likely, without replacement unless you ask for it.

    Source: McMahan et al., arXiv:1602.05629, algorithm 1.

    Args:
        replace: draw with replacement: a client may take part several times in a round.
    """
    _check(population, cohort, 1 if replace else cohort)
    return Selection(tuple(rng.choice(population.num_clients, cohort, replace=replace).tolist()))


def weighted(
    population: Population,
    cohort: int,
    rng: np.random.Generator,
    _round: int,
    /,
    path: str | None = None,
    replace: bool = False,
) -> Selection:
    """Clients drawn in proportion to their number of examples, or to weights from a file.

    Without replacement, one after the other among those left. With it: Li et al., arXiv:1812.06127, algorithm 2.

    Args:
        path: file of one weight per client (.npy, .npz, .json or .csv); null takes the number of examples.
        replace: draw with replacement: a client may take part several times in a round.
    """
    _check(population, cohort, 1 if replace else cohort)
    weights = population.sizes.astype(np.float64)
    if path is not None:
        rows = _matrix(path, population.num_clients)
        if len(rows) != 1:
            raise DataError(f"{path} has {len(rows)} rows; weights are one number per client")
        weights = rows[0]
        if weights.min() < 0:
            raise DataError(f"{path} holds a negative weight {weights.min():g}; weights must be >= 0")
    possible = int(np.count_nonzero(weights))
    if possible < (1 if replace else cohort):
        raise ValueError(
            f"cohort is {cohort}; only {possible} of {population.num_clients} clients have a weight above 0"
        )
    chosen = rng.choice(population.num_clients, cohort, replace=replace, p=weights / weights.sum())
    return Selection(tuple(chosen.tolist()))


def round_robin(population: Population, cohort: int, _rng: np.random.Generator, round: int, /) -> Selection:
    """Clients in turn: the next ``cohort`` of them each round, from the first again after the last."""
    _check(population, cohort, cohort)
    start = (round - 1) * cohort
    return Selection(tuple((start + i) % population.num_clients for i in range(cohort)))


def availability(
    population: Population,
    cohort: int,
    rng: np.random.Generator,
    round: int,
    /,
    probability: float | None = None,
    path: str | None = None,
) -> Selection:
    """Uniform among the clients that are there: some are away in a round, by chance or by a trace file.

    If fewer than ``cohort`` are there, all of them take part. Give one of the two options; a trace may have a single
    row, a chance per client.

    Args:
        probability: chance of each client to be there, anew each round.
        path: trace (.npy, .npz, .json, .csv), rounds × clients, repeated: 1 there, 0 away, between them the chance.
    """
    _check(population, cohort, 1)
    if (probability is None) == (path is None):
        raise ValueError(f"probability is {probability} and path is {path}; give one of them")
    if path is not None:
        trace = _matrix(path, population.num_clients)
        if trace.min() < 0 or trace.max() > 1:
            wrong = trace.min() if trace.min() < 0 else trace.max()
            raise DataError(f"{path} holds {wrong:g}; a trace has 0 (away), 1 (there) or a chance between them")
        chance = trace[(round - 1) % len(trace)]
    else:
        assert probability is not None
        if not 0 < probability <= 1:
            raise ValueError(f"probability is {probability}; it must be > 0 and <= 1")
        chance = np.full(population.num_clients, probability)
    there = np.flatnonzero(rng.random(population.num_clients) < chance)
    if len(there) == 0:
        source = f"probability {probability}" if path is None else path
        raise ValueError(f"cohort is {cohort}; in round {round} no client is there ({source})")
    return Selection(tuple(rng.choice(there, min(cohort, len(there)), replace=False).tolist()))


def over_selection(
    population: Population,
    cohort: int,
    rng: np.random.Generator,
    round: int,
    /,
    factor: float = 1.3,
    dropout: float = 0.1,
) -> Selection:
    """More clients than needed are sent the model; some drop out, and the first to return make up the cohort.

    Uniform without replacement, ceil(factor·cohort) clients or all there are; who returns when is random. Late ones
    are dropped too; if too few return, the cohort is smaller.
    Source: Bonawitz et al., arXiv:1902.01046, section 9 (they select 130 %).

    Args:
        factor: clients selected per client needed.
        dropout: chance of each selected client to drop out.
    """
    _check(population, cohort, cohort)
    if not (factor >= 1 and math.isfinite(factor)):
        raise ValueError(f"factor is {factor}; it must be >= 1 and finite")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be >= 0 and < 1")
    wanted = math.ceil(_round_off(factor * cohort))
    selected = rng.choice(population.num_clients, min(wanted, population.num_clients), replace=False)
    stays = rng.random(len(selected)) >= dropout
    clients, late = np.split(selected[stays], [cohort])
    if len(clients) == 0:
        raise ValueError(f"dropout is {dropout}; in round {round} all {len(selected)} selected clients dropped out")
    return Selection(tuple(clients.tolist()), (*late.tolist(), *selected[~stays].tolist()))


def _round_off(number: float) -> float:
    """A product of decimal fractions without its last binary digits, lest ceil(1.1 * 10) be 12."""
    return round(number, 9)


def _check(population: Population, cohort: int, needed: int) -> None:
    if cohort < 1:
        raise ValueError(f"cohort is {cohort}; it must be >= 1")
    if needed > population.num_clients:
        raise ValueError(f"cohort is {cohort}; there are only {population.num_clients} clients")


def _matrix(path: str, num_clients: int) -> np.ndarray:
    """A file of numbers as float64 of shape (rows, num_clients)."""
    file = Path(path).expanduser()
    try:
        stat = file.stat()
        matrix = _read(file, stat.st_mtime_ns, stat.st_size)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give an .npy, .npz, .json or .csv file") from None
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as a matrix of numbers ({error})") from error
    matrix = matrix.T if matrix.shape == (num_clients, 1) else matrix  # one number a line is a row, too
    if matrix.ndim != 2 or matrix.shape[1] != num_clients or len(matrix) == 0:
        raise DataError(f"{path} has shape {matrix.shape}; it must have rows of {num_clients} numbers, one per client")
    if not np.isfinite(matrix).all():
        raise DataError(f"{path} holds numbers that are not finite")
    return matrix


@lru_cache(maxsize=4)
def _read(file: Path, _modified: int, _size: int) -> np.ndarray:
    """Read once, not once a round; a changed file has another key."""
    match file.suffix:
        case ".npy":
            content = np.load(file, allow_pickle=False)
        case ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                if len(arrays.files) != 1:
                    raise ValueError(f"it holds {len(arrays.files)} arrays where one is needed")
                content = arrays[arrays.files[0]]
        case ".json":
            content = json.loads(file.read_text())
        case ".csv":
            with file.open(newline="") as text:
                content = [row for row in csv.reader(text) if row]
        case other:
            raise ValueError(f"its ending is {other!r}; known are .npy, .npz, .json, .csv")
    matrix = np.atleast_2d(np.array(content, dtype=np.float64))
    matrix.flags.writeable = False
    return matrix


SAMPLERS = {
    "uniform": uniform,
    "weighted": weighted,
    "round_robin": round_robin,
    "availability": availability,
    "over_selection": over_selection,
}
