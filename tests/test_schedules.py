"""Virtual time: courses of events computed by hand, laws of every schedule, and what runs under them come to."""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from fedray.devices import DEVICES, MBIT, Availability, Devices, Presence
from fedray.errors import ConfigError, DataError
from fedray.experiment import plan
from fedray.report import read_run
from fedray.report.compare import reach
from fedray.rounds import draw
from fedray.runs import resume, run
from fedray.samplers import Population, round_robin, uniform, weighted
from fedray.schedules import Scene, Timing, buffered, synchronous

CONFIG = {
    "rounds": 6,
    "cohort": 4,
    "checkpoint_every": 2,
    "backend": "serial",
    "group": 1,
    "task": {
        "name": "classification",
        "data": {"name": "subset", "of": "digits", "train": 200},
        "partition": {"name": "iid", "num_clients": 20},
        "model": "softmax",
    },
    "algorithm": "fedavg",
}

SLOW_AND_FAST = {"name": "lognormal", "speed": 20, "available": 0.7, "period": 5}


def made_of(seconds, presence=None):
    """Devices of which client i takes so many seconds for a round in which it has one example."""

    def build(num_clients, rng):
        ones = np.ones(num_clients)
        return Devices(1 / np.array(seconds, dtype=float), ones, ones, 0 * ones, presence)

    return Timing(build, bytes_up=0, bytes_down=0)


def scene(num_clients, cohort, sampler=round_robin, asynchronous=True, seed=0):
    return Scene(Population(np.ones(num_clients, dtype=int)), cohort, sampler, seed, 0, asynchronous)


def course(select, rounds):
    return [select(number) for number in range(1, rounds + 1)]


# --- by hand ---


def test_a_round_lasts_as_long_as_its_slowest_client():
    first, second = course(synchronous(scene(4, 2), timing=made_of([1, 5, 2, 3])), 2)  # 0 and 1, then 2 and 3
    assert (first.clients, first.finished) == ((0, 1), 5)
    assert (second.clients, second.finished) == ((2, 3), 8)


def test_who_is_late_at_the_deadline_is_dropped():
    first, second = course(synchronous(scene(4, 2), timing=made_of([1, 5, 2, 3]), deadline=2), 2)
    assert (first.clients, first.dropped, first.finished, first.told["clients_late"]) == ((0,), (1,), 2, 1)
    assert (second.clients, second.dropped, second.finished) == ((2,), (3,), 4)


def test_of_more_than_are_needed_the_first_make_the_round():
    [first] = course(synchronous(scene(4, 2), timing=made_of([4, 5, 2, 3]), over_select=2), 1)
    assert (first.clients, first.dropped, first.finished) == ((2, 3), (0, 1), 3)


def test_a_round_without_anybody_is_tried_again():
    """Everybody is sent the model by turns, until somebody is in time: the third draw is that of clients 2 and 3."""
    select = synchronous(scene(4, 2, sampler=uniform), timing=made_of([9, 9, 9, 1]), deadline=2)
    [first] = course(select, 1)
    assert first.clients == (3,)
    assert first.finished == len(first.dropped) // 2 * 2 + 2  # each draw of two in vain takes until its deadline
    assert first.told["clients_late"] == len(first.dropped)


def test_a_deadline_that_nobody_keeps_is_an_error():
    with pytest.raises(ValueError, match=r"deadline is 2; .* no client of round 1 .* the fastest one takes 9 s"):
        synchronous(scene(2, 1), timing=made_of([9, 9]), deadline=2)(1)


def presence(*stretches, period):
    owner, start, end = (np.array(column) for column in zip(*stretches, strict=True))
    return Presence(owner, start.astype(float), end.astype(float), float(period))


def test_who_is_away_is_not_asked_and_who_leaves_is_dropped():
    """Client 0 is there from 0 to 4, client 1 from 2 to 10, of every 10 seconds; each needs 3."""
    timing = made_of([3, 3], presence((0, 0, 4), (1, 2, 10), period=10))
    first, second, third = course(synchronous(scene(2, 2, sampler=uniform), timing=timing), 3)
    assert (first.clients, first.dropped, first.finished) == ((0,), (), 3)
    assert set(second.clients) == {1}  # it can; client 0 leaves at 4, which ends the wait for it
    assert (second.dropped, second.finished, second.told["clients_left"]) == ((0,), 6, 1)
    assert (third.clients, third.finished) == ((1,), 9)


def test_when_nobody_is_there_the_next_one_is_waited_for():
    timing = made_of([0.9], presence((0, 7, 9), period=10))
    first, second, third = course(synchronous(scene(1, 1), timing=timing), 3)
    assert [first.finished, second.finished, third.finished] == pytest.approx([7.9, 8.8, 17.9])
    assert third.told["clients_left"] == 1  # who is asked again at 8.8, and leaves at 9


def test_a_buffer_fills_in_the_order_of_the_events():
    """Two train at a time, of three clients who take 2, 3 and 10 seconds; the server steps at every second update."""
    select = buffered(scene(3, 2, sampler=round_robin), timing=made_of([2, 3, 10]), concurrency=2)
    first, second = course(select, 2)
    # 0 and 1 start at 0; 0 is done at 2, when 2 starts (0 may not from the same model); 1 is done at 3: step
    assert (first.clients, first.finished, first.staleness) == ((0, 1), 3, (0, 0))
    assert first.horizon == 1  # 2 trains from the model of the start
    # at 3 one of 0 and 1 starts from model 1, and when it is done the other: both are done long before 2 is, at 12
    assert sorted(second.clients) == [0, 1]
    assert (second.finished, second.staleness, second.horizon) == (8, (0, 0), 2)


def test_staleness_is_counted_in_steps():
    select = buffered(scene(3, 1), timing=made_of([1, 1, 2.5]), concurrency=3)
    rounds = course(select, 5)
    late = [(s.clients[0], s.staleness[0]) for s in rounds]
    # at 1 two are done: two steps, one by one; both start again from the newest model
    assert [s.finished for s in rounds[:2]] == [1, 1]
    assert late[1][1] == 1
    slow = next(late for late in late if late[0] == 2)
    assert slow == (2, 4)  # four steps, at 1, 1, 2 and 2, before it is done at 2.5


# --- laws ---

SCHEDULES = {
    "synchronous": lambda scene, timing: synchronous(scene, timing=timing),
    "deadline": lambda scene, timing: synchronous(scene, timing=timing, deadline=30.0, over_select=1.5),
    "buffered": lambda scene, timing: buffered(scene, timing=timing, concurrency=min(7, scene.population.num_clients)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", [uniform, weighted])
@settings(deadline=None, max_examples=30)
@given(num_clients=st.integers(5, 30), seed=st.integers(0, 10**6), data=st.data())
def test_a_course_of_events_is_a_pure_function_and_time_only_grows(name, sampler, num_clients, seed, data):
    cohort = data.draw(st.integers(1, 5))
    sizes = np.random.default_rng(seed).integers(1, 50, num_clients)
    made = Scene(Population(sizes), cohort, sampler, seed, 10_000, True)
    available = data.draw(st.sampled_from([1.0, 0.6]))

    def timing(n, rng):
        return DEVICES["lognormal"](n, rng, availability=Availability(available, 60.0))

    try:
        rounds = course(SCHEDULES[name](made, Timing(timing)), 12)
    except ValueError as error:
        if available == 1 or "clients leave too early" not in str(error):
            raise
        reject()  # a handful of clients may never be there for long enough, and that is said
    assert rounds == course(SCHEDULES[name](made, Timing(timing)), 12)
    resumed = SCHEDULES[name](made, Timing(timing))
    assert [resumed(number) for number in (8, 9, 12)] == [rounds[7], rounds[8], rounds[11]]
    times = [selection.finished for selection in rounds]
    assert times == sorted(times)
    for number, selection in enumerate(rounds, 1):
        assert 1 <= len(selection.clients) <= cohort
        late = selection.staleness or (0,) * len(selection.clients)
        assert all(0 <= steps < number for steps in late)
        assert len(set(zip(selection.clients, late, strict=True))) == len(late)  # nobody twice from the same model
    for before, after in itertools.pairwise(rounds):
        assert max(after.staleness, default=0) <= before.horizon  # so the models that are needed were kept


@pytest.mark.parametrize("available", [0.3, 0.8])
@given(now=st.floats(0, 1000))
def test_who_is_there_leaves_later_and_the_share_is_kept(available, now):
    there = Availability(available, 50.0).draw(4000, np.random.default_rng(0))
    ids = there.there(now)
    assert abs(len(ids) / 4000 - available) < 0.05
    assert (there.leave(ids, now) > now).all()
    assert (there.leave(ids, now) <= now + 50 * available + 1e-6).all()
    assert now < there.next_arrival(now) <= now + 50.001


def test_without_anything_that_takes_time_or_drops_cohorts_are_those_without_a_schedule():
    population = Population(np.arange(1, 41))
    plain = [draw(population, 6, uniform, 3, number) for number in range(1, 6)]
    made = Scene(population, 6, uniform, 3, 1000, True)
    timing = Timing(DEVICES["uniform"], passes=0.0)
    for select in (synchronous(made, timing=timing, deadline=1e9), buffered(made, timing=timing, concurrency=6)):
        assert [selection.clients for selection in course(select, 5)] == [selection.clients for selection in plain]


def test_what_is_faster_is_over_earlier():
    def last(**options):
        return course(synchronous(scene(20, 5, uniform), timing=Timing(**options)), 10)[-1].finished

    slow = last(devices=DEVICES["lognormal"])
    assert last(devices=DEVICES["lognormal"], passes=3.0) > slow
    assert last(devices=DEVICES["lognormal"], bytes_up=10**7) > slow


# --- devices ---


def rng():
    return np.random.default_rng(0)


def test_tiers_are_dealt_by_their_shares():
    made = DEVICES["tiers"](
        10, rng(), speed=[1.0, 2.0, 3.0], upload=[1.0] * 3, download=[8.0] * 3, shares=[5.0, 3.0, 2.0]
    )
    assert np.bincount(made.speed.astype(int)).tolist() == [0, 5, 3, 2]
    assert (made.download == 8 * MBIT).all()


def test_lognormal_devices_have_the_median_that_was_asked_for():
    made = DEVICES["lognormal"](20_000, rng(), speed=40.0, upload=8.0)
    assert np.median(made.speed) == pytest.approx(40, rel=0.03)
    assert np.median(made.upload) == pytest.approx(1e6, rel=0.03)
    assert np.log(made.speed).std() == pytest.approx(0.8, rel=0.03)


def test_a_rounds_seconds_are_those_of_transfers_training_and_latency():
    made = DEVICES["uniform"](3, rng(), speed=10.0, upload=8.0, download=80.0, latency=0.5)
    seconds = made.seconds(np.array([1]), np.array([20]), up=2e6, down=1e7)
    assert seconds == pytest.approx(2 * 0.5 + 2 + 1 + 2)


def test_profiles_come_from_a_file_with_their_presence(tmp_path):
    (tmp_path / "devices.csv").write_text("speed,upload,download,latency\n1,8,8,0\n2,8,8,0\n")
    (tmp_path / "there.csv").write_text("device,start,end\n0,0,10\n1,50,60\n")
    made = DEVICES["profiles"](
        2, rng(), str(tmp_path / "devices.csv"), str(tmp_path / "there.csv"), Availability(period=100.0)
    )
    assert made.speed.tolist() == [1, 2]
    assert [made.there(now).tolist() for now in (5, 55, 20, 105)] == [[0], [1], [], [0]]
    assert made.next_arrival(20) == pytest.approx(50)
    many = DEVICES["profiles"](50, rng(), str(tmp_path / "devices.csv"))
    assert set(many.speed) == {1, 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "speed,upload\n1,2\n",
            r"devices\.csv cannot be read .*must have the columns speed, upload, download, latency",
        ),
        ("speed,upload,download,latency\n", r"devices\.csv has no rows"),
        ("speed,upload,download,latency\n0,1,1,0\n", r"speed is 0; it must be > 0"),
    ],
)
def test_profiles_that_cannot_be_used_say_why(tmp_path, text, message):
    (tmp_path / "devices.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        DEVICES["profiles"](2, rng(), str(tmp_path / "devices.csv"))
    with pytest.raises(DataError, match=r"nowhere\.csv does not exist; give a CSV file with the columns speed"):
        DEVICES["profiles"](2, rng(), str(tmp_path / "nowhere.csv"))


# --- runs ---


def model(folder):
    return (folder / "model.safetensors").read_bytes()


BUFFERED = {"algorithm": "fedbuff", "schedule": {"name": "buffered", "concurrency": 9, "devices": SLOW_AND_FAST}}


def test_fedbuff_without_staleness_is_fedavg_to_the_bit(tmp_path):
    schedule = {"name": "buffered", "concurrency": 4, "passes": 0, "devices": "uniform"}
    run({**CONFIG, "algorithm": {"name": "fedavg", "weighting": "uniform"}}, out=tmp_path / "fedavg")
    run({**CONFIG, "algorithm": "fedbuff", "schedule": schedule}, out=tmp_path / "fedbuff")
    run({**CONFIG, "algorithm": "fedbuff"}, out=tmp_path / "none")
    assert model(tmp_path / "fedavg") == model(tmp_path / "fedbuff") == model(tmp_path / "none")


def test_staleness_weighs_less_unless_its_exponent_is_0(tmp_path):
    for exponent in (0.0, 0.5):
        algorithm = {"name": "fedbuff", "staleness_exponent": exponent}
        run({**CONFIG, **BUFFERED, "algorithm": algorithm}, out=tmp_path / str(exponent))
    assert model(tmp_path / "0.0") != model(tmp_path / "0.5")


@pytest.mark.parametrize(
    "changes", [BUFFERED, {"schedule": {"name": "synchronous", "deadline": 2.0, "devices": SLOW_AND_FAST}}]
)
def test_a_run_in_virtual_time_that_is_resumed_comes_to_the_same_bytes(tmp_path, changes):
    run({**CONFIG, **changes}, out=tmp_path / "whole")
    run({**CONFIG, **changes}, ["rounds=3"], tmp_path / "parts")
    resume(tmp_path / "parts", ["rounds=6"])
    assert model(tmp_path / "whole") == model(tmp_path / "parts")
    keys = ("virtual_seconds", "staleness", "clients_left", "clients_failed")
    whole, parts = (
        [[record.get(key) for key in keys] for record in read_run(tmp_path / name).metrics]
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert read_run(tmp_path / "whole").final["virtual_seconds"] > 0


def test_models_that_nobody_needs_any_more_are_forgotten():
    made = plan({**CONFIG, **BUFFERED}).experiment
    from fedray.backends.serial import SerialBackend
    from fedray.learner import Learner
    from fedray.rounds import rounds

    state = made.algorithm.init(Learner(made.task).params())
    select = made.select(state.params)
    loop = rounds(
        made.algorithm, state, SerialBackend(made.task), made.population, 4, made.sampler, made.seed, select=select
    )
    for finished in (next(loop) for _ in range(20)):
        assert len(finished.state.models) <= finished.selection.horizon + 1
    assert "0" not in finished.state.models


def test_accuracy_against_virtual_seconds_is_in_the_report(tmp_path):
    done = run({**CONFIG, **BUFFERED}, out=tmp_path / "a")
    first = next(record for record in done.metrics if record["test_accuracy"] >= 0.3)
    assert reach(done.record, 0.3)[3] == first["virtual_seconds"]
    assert "virtual seconds" in (tmp_path / "a" / "report.html").read_text()


def test_bytes_that_are_not_those_of_the_algorithm_are_told(tmp_path, caplog):
    schedule = {"name": "synchronous", "bytes_up": 10}
    run({**CONFIG, "rounds": 1, "algorithm": "scaffold", "schedule": schedule}, out=tmp_path / "a")
    record = json.loads((tmp_path / "a" / "metrics.jsonl").read_text().splitlines()[1])
    assert f"set schedule.bytes_up={record['bytes_up'] // 4}" in caplog.text
    assert f"set schedule.bytes_down={record['bytes_down'] // 4}" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"schedule": {"name": "buffered", "concurrency": 5}},
            "schedule buffered mixes updates .* algorithm.name=fedbuff",
        ),
        ({"algorithm": "fedbuff", "schedule": "buffered"}, "schedule .* lacks concurrency"),
        (
            {**BUFFERED, "schedule": {"name": "buffered", "concurrency": 99}},
            "concurrency is 99; there are only 20 clients",
        ),
        ({"schedule": {"name": "synchronous", "deadline": 0}}, "schedule.deadline is 0"),
        ({"schedule": {"name": "synchronous", "over_select": 0.5}}, r"over_select is 0.5; it must be >= 1"),
        ({"schedule": {"name": "synchronous", "passes": -1}}, r"passes is -1.0; it must be >= 0"),
        (
            {"schedule": {"name": "synchronous", "devices": {"name": "uniform", "available": 2}}},
            "available is 2.0; it must",
        ),
        ({"schedule": {"name": "synchronous", "devices": {"name": "uniform", "speed": 0}}}, "speed is 0"),
        ({"schedule": "synchron"}, "did you mean 'synchronous'"),
    ],
)
def test_mistakes_show_before_anything_starts(changes, message):
    with pytest.raises(ConfigError) as caught:
        plan({**CONFIG, **changes})
    assert re.search(message, str(caught.value)), str(caught.value)


def test_a_schedule_can_be_taken_away_again():
    assert plan({**CONFIG, "schedule": None}).experiment.select({}) is None
    assert replace(plan({**CONFIG, **BUFFERED}).experiment, schedule=None).select({}) is None
