"""A terminal gets a live picture, everything else plain lines; both say the same of a round."""

import io
import re
import sys
from itertools import pairwise

import pytest

from fedray.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Time that goes on by ``step`` seconds at each look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = -step, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def record(number: int, evaluated: bool = True) -> dict:
    numbers = {
        "round": number,
        "train_loss": 2.0 / number,
        "clients_sampled": 10,
        "clients_failed": 0,
        "bytes_up_total": 1_000_000 * number,
        "bytes_down_total": 2_000_000 * number,
        "seconds": 0.5,
    }
    return numbers | ({"test_loss": 2.5 / number, "test_accuracy": 1 - 1 / number} if evaluated else {})


def plain(records: list[dict], total: int, start: int = 0, step: float = 0.0) -> list[str]:
    stream = io.StringIO()
    with progress(total, start, stream, Clock(step)) as show:
        for one in records:
            show(one)
    return stream.getvalue().splitlines()


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def show_all(records: list[dict], total: int, start: int = 0) -> str:
        stream = Terminal()
        with progress(total, start, stream, Clock(1.0)) as show:
            for one in records:
                show(one)
        return stream.getvalue()

    return show_all


def test_a_plain_line_says_all_of_a_round():
    (line,) = plain([record(5)], total=20, step=10)
    assert line == (
        "round  5/20  loss 0.4000  test loss 0.5000  accuracy 0.8000  20 clients/s  15.0 MB  elapsed 0:10  left 0:30"
    )


def test_every_evaluated_round_has_its_line_and_no_control_sequence():
    lines = plain([record(number) for number in range(1, 21)], total=20)
    assert [line.split("  ")[0].split()[-1] for line in lines[9:]] == [f"{number}/20" for number in range(10, 21)]
    assert len(lines) == 20
    assert "\x1b" not in "".join(lines)
    assert "\r" not in "".join(lines)


def test_rounds_without_evaluation_are_written_at_most_once_a_second():
    records = [record(number, evaluated=number == 50) for number in range(1, 101)]
    lines = plain(records, total=100, step=0.125)
    written = [int(re.match(r"round +(\d+)/", line)[1]) for line in lines]
    assert {1, 50, 100} <= set(written)
    assert len(written) < 20
    assert all(later - earlier >= 8 for earlier, later in pairwise(written) if later not in (50, 100))


def test_a_resumed_run_counts_its_pace_from_where_it_started():
    (line,) = plain([record(12)], total=20, start=10, step=6)
    assert "elapsed 0:06  left 0:24" in line


def test_odd_records_are_shown():
    lines = plain(
        [
            {"round": 0, "test_accuracy": 0.1, "seconds": 0.0, "clients_sampled": 0},
            record(1) | {"train_loss": float("nan"), "test_loss": None, "clients_failed": 3},
        ],
        total=2,
    )
    assert lines[0] == "round 0/2  accuracy 0.1000  elapsed 0:00  left ?"
    assert "loss nan  test loss nan" in lines[1]
    assert "3 failed" in lines[1]


def test_no_rich_without_a_terminal(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert len(plain([record(1)], total=1)) == 1


def test_a_dumb_terminal_gets_plain_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with progress(1, stream=stream, clock=Clock(0.0)) as show:
        show(record(1))
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().startswith("round 1/1  loss 2.0000")


def test_a_terminal_gets_one_picture_that_is_redrawn(live):
    text = live([record(number) for number in range(1, 21)], total=20)
    assert "\x1b[" in text
    words = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    last = words[words.rindex("round") :]
    assert "round 20/20" in last
    assert "━" in last
    assert "0:00 left" in last
    for fact in ("loss 0.1000", "test loss 0.1250", "accuracy 0.9500", "20 clients/s", "60.0 MB"):
        assert fact in last


def test_the_picture_keeps_the_last_evaluation(live):
    words = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", live([record(4), record(5, evaluated=False)], total=8))
    assert "accuracy 0.7500" in words[words.rindex("round") :]


def test_an_interrupt_gives_the_cursor_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), progress(9, stream=stream):
        raise KeyboardInterrupt
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")
