"""What clients compute and send with: speeds, bandwidths, and when they are there; all in virtual time."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedray.errors import DataError

MBIT = 1e6 / 8  # bytes


@dataclass(frozen=True, eq=False)
class Devices:
    """The devices of a population; arrays of shape (num_clients,).

    Attributes:
        speed: examples a second, forward and backward.
        upload: bytes a second.
        download: bytes a second.
        latency: seconds before each transfer.
        presence: when each is there; None for always.
    """

    speed: np.ndarray
    upload: np.ndarray
    download: np.ndarray
    latency: np.ndarray
    presence: "Presence | None" = None

    def seconds(self, ids: np.ndarray, examples: np.ndarray, up: float, down: float) -> np.ndarray:
        """How long these clients take to receive ``down`` bytes, train on so many examples, and send ``up`` bytes."""
        transfers = down / self.download[ids] + up / self.upload[ids] + 2 * self.latency[ids]
        return transfers + examples / self.speed[ids]

    def there(self, now: float) -> np.ndarray:
        """Who is there, as sorted ids."""
        return np.arange(len(self.speed)) if self.presence is None else self.presence.there(now)

    def leave(self, ids: np.ndarray, now: float) -> np.ndarray:
        """When these, who are there, leave: seconds of virtual time, infinite for never."""
        return np.full(len(ids), np.inf) if self.presence is None else self.presence.leave(ids, now)

    def next_arrival(self, now: float) -> float:
        """When somebody is there who is away now."""
        return now if self.presence is None else self.presence.next_arrival(now)


@dataclass(frozen=True, eq=False)
class Presence:
    """Intervals within a period that is repeated for ever; an interval may reach into the next period.

    Attributes:
        owner: client of each interval.
        start: seconds, within the period.
        end: seconds, after the start by less than a period.
        period: seconds.
    """

    owner: np.ndarray
    start: np.ndarray
    end: np.ndarray
    period: float

    def there(self, now: float) -> np.ndarray:
        """Who is there, as sorted ids."""
        return np.unique(self.owner[np.isfinite(self._left(now))])

    def leave(self, ids: np.ndarray, now: float) -> np.ndarray:
        """When they leave; it is now for those who are away."""
        left = self._left(now)
        last: dict[int, float] = {}
        for owner, seconds in zip(self.owner.tolist(), left.tolist(), strict=True):
            last[owner] = max(last.get(owner, 0.0), seconds if np.isfinite(seconds) else 0.0)
        return now + np.array([last.get(int(id), 0.0) for id in ids])

    def next_arrival(self, now: float) -> float:
        """When the next interval begins."""
        wait = (self.start - now) % self.period
        # a little later, lest rounding put the moment before the interval
        return now + float(np.where(wait == 0, self.period, wait).min()) + 1e-9 * self.period

    def _left(self, now: float) -> np.ndarray:
        """Seconds that each interval still lasts; not finite if it does not."""
        at = now % self.period
        inside = [(self.start <= moment) & (moment < self.end) for moment in (at, at + self.period)]
        return np.where(inside[0], self.end - at, np.where(inside[1], self.end - at - self.period, np.nan))


@dataclass(frozen=True)
class Availability:
    """When devices are there.

    Args:
        available: Share of the time in which a device is there: one stretch a period, at an hour of its own.
        period: Seconds until it is repeated; a day.
    """

    available: float = 1.0
    period: float = 86400.0

    def __post_init__(self) -> None:
        if not 0 < self.available <= 1:
            raise ValueError(f"available is {self.available}; it must be > 0 and <= 1")
        if not self.period > 0:
            raise ValueError(f"period is {self.period}; it must be > 0")

    def draw(self, num_clients: int, rng: np.random.Generator) -> Presence | None:
        """The presence of a population."""
        if self.available == 1:
            return None
        start = rng.random(num_clients) * self.period
        return Presence(np.arange(num_clients), start, start + self.available * self.period, self.period)


DevicesBuilder = Callable[[int, np.random.Generator], Devices]


def uniform(
    num_clients: int,
    rng: np.random.Generator,
    /,
    availability: Availability = Availability(),
    speed: float = 100.0,
    upload: float = 10.0,
    download: float = 50.0,
    latency: float = 0.1,
) -> Devices:
    """All clients have the same device.

    Args:
        availability: When they are there.
        speed: Examples a second, forward and backward.
        upload: Mbit/s.
        download: Mbit/s.
        latency: Seconds before each transfer.
    """
    rows = np.tile([speed, upload, download, latency], (num_clients, 1))
    return _devices(rows, availability.draw(num_clients, rng))


def lognormal(
    num_clients: int,
    rng: np.random.Generator,
    /,
    availability: Availability = Availability(),
    speed: float = 100.0,
    speed_sigma: float = 0.8,
    upload: float = 10.0,
    download: float = 50.0,
    bandwidth_sigma: float = 0.8,
    latency: float = 0.1,
) -> Devices:
    """Speeds and bandwidths drawn from log-normal distributions; up and down go together.

    Args:
        availability: When they are there.
        speed: Median of examples a second, forward and backward.
        speed_sigma: Standard deviation of its logarithm.
        upload: Median in Mbit/s.
        download: Median in Mbit/s.
        bandwidth_sigma: Standard deviation of their logarithm.
        latency: Seconds before each transfer.
    """
    for name, sigma in (("speed_sigma", speed_sigma), ("bandwidth_sigma", bandwidth_sigma)):
        if sigma < 0:
            raise ValueError(f"{name} is {sigma}; it must be >= 0")
    compute = np.exp(speed_sigma * rng.standard_normal(num_clients))
    network = np.exp(bandwidth_sigma * rng.standard_normal(num_clients))
    rows = np.stack([speed * compute, upload * network, download * network, np.full(num_clients, latency)], axis=1)
    return _devices(rows, availability.draw(num_clients, rng))


def tiers(
    num_clients: int,
    rng: np.random.Generator,
    /,
    speed: list[float],
    upload: list[float],
    download: list[float],
    shares: list[float] | None = None,
    availability: Availability = Availability(),
    latency: float = 0.1,
) -> Devices:
    """A few classes of devices, dealt at random.

    Args:
        speed: Examples a second of each class, forward and backward.
        upload: Mbit/s of each class.
        download: Mbit/s of each class.
        shares: Share of the clients in each class; null for equal ones.
        availability: When they are there.
        latency: Seconds before each transfer.
    """
    shares = shares or [1.0] * len(speed)
    for name, values in (("upload", upload), ("download", download), ("shares", shares)):
        if len(values) != len(speed):
            raise ValueError(f"{name} has {len(values)} classes, speed has {len(speed)}; give one number for each")
    if min(shares) < 0 or not sum(shares) > 0:
        raise ValueError(f"shares is {shares}; they must be >= 0, and one of them above")
    ends = np.round(np.cumsum(shares) / sum(shares) * num_clients).astype(int)
    kind = rng.permutation(np.searchsorted(ends, np.arange(num_clients), side="right"))
    rows = np.stack([speed, upload, download, [latency] * len(speed)], axis=1)[kind]
    return _devices(rows, availability.draw(num_clients, rng))


def profiles(
    num_clients: int,
    rng: np.random.Generator,
    /,
    path: str,
    presence: str | None = None,
    availability: Availability = Availability(),
) -> Devices:
    """Measured devices from a file, and when they are there from another one.

    Args:
        path: CSV with the columns speed (examples a second), upload, download (Mbit/s) and latency (seconds): a row for
            each client, or fewer rows or more, which are then dealt at random.
        presence: CSV with the columns device (a row of ``path``, counted from 0), start and end (seconds within the
            period): a row for each stretch in which the device is there.
        availability: When they are there, without such a file; its period holds for both.
    """
    columns = ("speed", "upload", "download", "latency")
    rows = _columns(path, columns)
    device = np.arange(num_clients) if len(rows) == num_clients else rng.integers(len(rows), size=num_clients)
    if presence is None:
        return _devices(rows[device], availability.draw(num_clients, rng))
    stretches = _columns(presence, ("device", "start", "end"))
    if (
        not ((stretches[:, 1] >= 0) & (stretches[:, 1] < stretches[:, 2])).all()
        or (stretches[:, 2] - stretches[:, 1] > availability.period).any()
    ):
        raise DataError(f"{presence} has a stretch that does not end after it starts, or is longer than the period")
    place = {int(row): stretches[stretches[:, 0] == row, 1:] for row in np.unique(device)}
    owner = np.concatenate([np.full(len(place[int(row)]), client) for client, row in enumerate(device)])
    times = np.concatenate([place[int(row)] for row in device])
    if not len(owner):
        raise DataError(f"{presence} has no stretch for any of the {num_clients} clients")
    return _devices(rows[device], Presence(owner.astype(int), times[:, 0], times[:, 1], availability.period))


def _devices(rows: np.ndarray, presence: Presence | None) -> Devices:
    """From examples a second, Mbit/s up and down, and seconds of latency, of shape (num_clients, 4)."""
    for name, column in zip(("speed", "upload", "download"), rows.T, strict=False):
        if not (column > 0).all():
            raise ValueError(f"{name} is {column.min():g}; it must be > 0")
    if not (rows[:, 3] >= 0).all():
        raise ValueError(f"latency is {rows[:, 3].min():g}; it must be >= 0")
    return Devices(rows[:, 0], rows[:, 1] * MBIT, rows[:, 2] * MBIT, rows[:, 3], presence)


def _columns(path: str, names: tuple[str, ...]) -> np.ndarray:
    try:
        with Path(path).expanduser().open(newline="") as file:
            rows = [[float(row[name]) for name in names] for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; give a CSV file with the columns {', '.join(names)}") from None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); it must have the columns {', '.join(names)}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    return np.array(rows)


DEVICES: dict[str, Callable[..., Devices]] = {
    "uniform": uniform,
    "lognormal": lognormal,
    "tiers": tiers,
    "profiles": profiles,
}
