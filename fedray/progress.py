"""What a run shows while it runs: a live display in a terminal, plain lines everywhere else."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

Show = Callable[[Mapping[str, Any]], None]  # called with the record of each round that is done


@contextmanager
def progress(
    total_rounds: int, start: int = 0, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Show]:
    """Show the rounds of a run: with rich on a terminal, as one line a round otherwise.

    A plain line is written for the first and the last round, for each evaluated one, and for others at most every
    second, without any control sequence.

    Args:
        total_rounds: the run's last round.
        start: the round that is already done; more than 0 when a run is resumed.
        stream: where to write; standard error if not given.
        clock: seconds that only grow.

    >>> from io import StringIO
    >>> log = StringIO()
    >>> with progress(20, stream=log, clock=lambda: 0.0) as show:
    ...     show({"round": 1, "train_loss": 2.25, "test_accuracy": 0.5, "bytes_up_total": 1e6, "seconds": 0.0})
    >>> print(log.getvalue(), end="")
    round  1/20  loss 2.2500  accuracy 0.5000  1.0 MB  elapsed 0:00  left 0:00
    """
    stream = sys.stderr if stream is None else stream
    live = stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    with (_live if live else _plain)(total_rounds, start, stream, clock) as show:
        yield show


@contextmanager
def _plain(total: int, start: int, stream: TextIO, clock: Callable[[], float]) -> Iterator[Show]:
    begun = trained = clock()
    written = -math.inf
    digits = len(str(total))

    def show(record: Mapping[str, Any]) -> None:
        nonlocal written, trained
        now, done = clock(), int(record["round"])
        if done <= start:
            trained = now  # starting up tells nothing about the pace
        if "test_accuracy" in record or "test_loss" in record or done == total or now - written >= 1:
            written = now
            times = [f"elapsed {_duration(now - begun)}", f"left {_duration(_left(done, start, total, now - trained))}"]
            stream.write("  ".join([f"round {done:>{digits}}/{total}", *_facts(record), *times]) + "\n")
            stream.flush()

    yield show


@contextmanager
def _live(total: int, start: int, stream: TextIO, clock: Callable[[], float]) -> Iterator[Show]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    begun = trained = clock()
    done, facts = start, ["starting"]

    def picture() -> Group:
        now = clock()
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(no_wrap=True)
        line.add_column(ratio=1)
        line.add_column(no_wrap=True, justify="right")
        line.add_row(
            Text(f"round {done}/{total}", style="bold"),
            ProgressBar(total=max(total, 1), completed=done),
            Text(f"{_duration(now - begun)} elapsed, {_duration(_left(done, start, total, now - trained))} left"),
        )
        return Group(line, Text("   ".join(facts), style="cyan"))

    def show(record: Mapping[str, Any]) -> None:
        nonlocal done, facts, trained
        done = int(record["round"])
        if done <= start:
            trained = clock()
        evaluated.update({key: record[key] for key in ("test_loss", "test_accuracy") if key in record})
        facts = _facts({**evaluated, **record})

    evaluated: dict[str, Any] = {}  # a round without evaluation goes on showing the last one's
    # the picture is asked for several times a second, so that the clock runs on during a long round
    with Live(get_renderable=picture, console=Console(file=stream), refresh_per_second=4):
        yield show


def _facts(record: Mapping[str, Any]) -> list[str]:
    """What there is to say about a round, in the order of interest; a number that the record lacks is left out."""
    numbers = (("loss", "train_loss"), ("test loss", "test_loss"), ("accuracy", "test_accuracy"))
    facts = [f"{name} {_number(record[key])}" for name, key in numbers if key in record]
    if record.get("clients_sampled") and record.get("seconds"):
        facts.append(f"{record['clients_sampled'] / record['seconds']:.3g} clients/s")
    if record.get("clients_failed"):
        facts.append(f"{record['clients_failed']} failed")
    sent = [record[key] for key in ("bytes_up_total", "bytes_down_total") if key in record]
    return [*facts, f"{sum(sent) / 1e6:,.1f} MB"] if sent else facts


def _number(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4f}"


def _left(round: int, start: int, total: int, elapsed: float) -> float:
    """Seconds to the last round at the pace so far; nan before the first."""
    return elapsed / (round - start) * (total - round) if round > start else math.nan


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _duration(75), _duration(3700), _duration(math.nan)
    ('1:15', '1:01:40', '?')
    """
    if math.isnan(seconds):
        return "?"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
