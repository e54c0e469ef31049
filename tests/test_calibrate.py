"""Calibration: every way that it times can be configured, and only a gain is proposed."""

from dataclasses import asdict, replace

import pytest
import torch
from test_execution import configuration

from fedray import calibrate as module
from fedray import cli
from fedray.calibrate import Calibration, calibrate
from fedray.execution import Execution
from fedray.experiment import plan


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):  # which takes seconds, and is tried elsewhere
    monkeypatch.setattr(torch._inductor, "standalone_compile", lambda program, *_, **__: program)


@pytest.fixture(scope="module")
def found() -> Calibration:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._inductor, "standalone_compile", lambda program, *_, **__: program)
        return calibrate(configuration(cohort=4, task=dict(configuration()["task"], model="cnn")))


def test_every_way_can_be_configured_and_each_is_timed_once(found):
    ways = [timing.execution for timing in found.timings]
    assert len(ways) == len(set(ways))
    assert {way.compile for way in ways} == {way.channels_last for way in ways} == {False, True}
    values = configuration(cohort=4, task=dict(configuration()["task"], model="cnn"))
    for timing in found.timings:
        assert plan({**values, **asdict(timing.execution)}).experiment.execution == timing.execution
        assert timing.seconds > 0
    made = plan(values).experiment
    assert found.configured.execution == made.execution.with_format(made.task.model(), "cpu")
    assert found.configured.execution.channels_last is True


def test_only_a_gain_is_proposed(found):
    one = replace(found.configured, seconds=1.0)
    slightly, clearly = (replace(one, execution=Execution(2), seconds=seconds) for seconds in (0.99, 0.5))
    assert Calibration((slightly, one), one).proposal == one
    assert Calibration((clearly, one), one).proposal == clearly


def test_the_command_prints_a_line_for_each_way_and_what_to_copy(capsys, monkeypatch):
    monkeypatch.setattr(module, "_WORTH", 0)
    arguments = ["quickstart", "cohort=8", "backend=serial"]
    assert cli.main(["calibrate", *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:-1]].count("group=4") == 1
    assert sum("as configured" in line for line in printed) == 1
    assert printed[-1] == "nothing is worth a change"
    monkeypatch.setattr(Calibration, "proposal", property(lambda self: self.timings[0]))
    assert cli.main(["calibrate", *arguments, "group=1"]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()[1:]
    settings = first.partition("  ")[0].strip()
    wanted = f"proposed: fedray run {' '.join(arguments)} group=1 {settings}"
    assert last == ("nothing is worth a change" if "as configured" in first else wanted)
