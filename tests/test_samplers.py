"""Laws of samplers: pure, within range, and each one's own promise."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedray.errors import DataError
from fedray.samplers import (
    SAMPLERS,
    Population,
    availability,
    over_selection,
    round_robin,
    uniform,
    weighted,
)

TEN = Population(np.arange(1, 11))
OPTIONS = {"availability": {"probability": 0.7}}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", SAMPLERS)
@given(num_clients=st.integers(1, 60), seed=st.integers(0, 1000), round=st.integers(0, 100), data=st.data())
def test_a_selection_is_of_existing_clients_once_each_and_pure(name, num_clients, seed, round, data):
    cohort = data.draw(st.integers(1, num_clients))
    population = Population(np.arange(1, num_clients + 1))
    try:
        first = SAMPLERS[name](population, cohort, rng(seed), round, **OPTIONS.get(name, {}))
    except ValueError as error:
        if name not in ("availability", "over_selection"):
            raise error
        return
    chosen = first.clients + first.dropped
    assert 1 <= len(first.clients) <= cohort
    assert len(set(chosen)) == len(chosen)
    assert all(type(c) is int and 0 <= c < num_clients for c in chosen)
    assert first == SAMPLERS[name](population, cohort, rng(seed), round, **OPTIONS.get(name, {}))


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_impossible_cohort_is_named(name):
    with pytest.raises(ValueError, match=r"^cohort is 0; it must be >= 1"):
        SAMPLERS[name](TEN, 0, rng(), 0, **OPTIONS.get(name, {}))
    if name != "availability":
        with pytest.raises(ValueError, match=r"^cohort is 11; there are only 10 clients"):
            SAMPLERS[name](TEN, 11, rng(), 0)


def test_uniform_draws_every_client_equally_often():
    counts = np.bincount([c for seed in range(2000) for c in uniform(TEN, 3, rng(seed), 0).clients], minlength=10)
    assert np.abs(counts - 600).max() < 100  # five standard deviations


def test_with_replacement_a_client_may_come_twice():
    selection = uniform(TEN, 200, rng(), 0, replace=True)
    assert len(selection.clients) == 200
    assert set(selection.clients) == set(range(10))
    assert len(weighted(TEN, 200, rng(), 0, replace=True).clients) == 200


def test_weighted_draws_by_the_number_of_examples():
    counts = np.bincount(weighted(TEN, 55_000, rng(), 0, replace=True).clients, minlength=10)
    assert np.abs(counts / 1000 - TEN.sizes).max() < 0.5


def test_weights_of_zero_are_never_drawn():
    population = Population(np.array([0, 5, 0, 5]))
    assert set(weighted(population, 2, rng(), 0).clients) == {1, 3}
    with pytest.raises(ValueError, match=r"^cohort is 3; only 2 of 4 clients have a weight above 0"):
        weighted(population, 3, rng(), 0)


def write(path, rows):
    match path.suffix:
        case ".npy":
            np.save(path, np.array(rows))
        case ".npz":
            np.savez(path, np.array(rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".csv":
            path.write_text("\n".join(",".join(map(str, row)) for row in rows) + "\n")
    return str(path)


@pytest.mark.parametrize("ending", [".npy", ".npz", ".json", ".csv"])
def test_weights_and_traces_come_from_files(tmp_path, ending):
    path = write(tmp_path / f"weights{ending}", [[0.0] * 8 + [1.0, 3.0]])
    assert set(weighted(TEN, 2, rng(), 0, path=path).clients) == {8, 9}
    path = write(tmp_path / f"trace{ending}", [[1, 0] * 5, [0, 1] * 5, [0] * 9 + [1]])
    for t in range(1, 8):
        expected = [{0, 2, 4, 6, 8}, {1, 3, 5, 7, 9}, {9}][(t - 1) % 3]
        assert set(availability(TEN, 5, rng(t), t, path=path).clients) == expected
        assert set(availability(TEN, 2, rng(t), t, path=path).clients) <= expected


def test_one_row_is_a_chance_per_client(tmp_path):
    path = write(tmp_path / "chance.json", [1.0] * 5 + [0.0] * 4 + [0.5])
    seen = [set(availability(TEN, 10, rng(t), t, path=path).clients) for t in range(50)]
    assert all({0, 1, 2, 3, 4} <= s <= {0, 1, 2, 3, 4, 9} for s in seen)
    assert {len(s) for s in seen} == {5, 6}


def test_a_csv_may_have_one_number_a_line(tmp_path):
    path = write(tmp_path / "weights.csv", [[0.0]] * 8 + [[1.0]] * 2)
    assert set(weighted(TEN, 2, rng(), 0, path=path).clients) == {8, 9}
    with pytest.raises(DataError, match=r"two\.csv has 2 rows; weights are one number per client"):
        weighted(TEN, 2, rng(), 0, path=write(tmp_path / "two.csv", [[1] * 10] * 2))


def test_a_changed_trace_is_read_again(tmp_path):
    path = write(tmp_path / "trace.json", [[1] + [0] * 9])
    assert availability(TEN, 1, rng(), 0, path=path).clients == (0,)
    write(tmp_path / "trace.json", [[0] * 9 + [1.0]])
    assert availability(TEN, 1, rng(), 0, path=path).clients == (9,)


def test_nobody_there_is_an_error(tmp_path):
    path = write(tmp_path / "trace.csv", [[0] * 10])
    with pytest.raises(ValueError, match=r"^cohort is 3; in round 4 no client is there \(.*trace.csv\)"):
        availability(TEN, 3, rng(), 4, path=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "probability is None and path is None; give one of them"),
        ({"probability": 0.5, "path": "x.npy"}, "probability is 0.5 and path is x.npy; give one of them"),
        ({"probability": 0.0}, "probability is 0.0; it must be > 0 and <= 1"),
        ({"probability": 1.5}, "probability is 1.5; it must be > 0 and <= 1"),
        ({"probability": float("nan")}, "probability is nan; it must be"),
    ],
)
def test_an_impossible_availability_is_named(options, message):
    with pytest.raises(ValueError, match=r"^" + message):
        availability(TEN, 3, rng(), 0, **options)


def test_a_bad_file_names_itself(tmp_path):
    with pytest.raises(DataError, match=r"gone.npy does not exist"):
        availability(TEN, 3, rng(), 0, path=str(tmp_path / "gone.npy"))
    for name, content in (
        ("a.npy", b"junk"),
        ("a.npz", b"junk"),
        ("a.json", b"[1, "),
        ("a.csv", b"1,x"),
        ("a.txt", b"1"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} cannot be read as a matrix of numbers"):
            availability(TEN, 3, rng(), 0, path=str(tmp_path / name))
    with pytest.raises(DataError, match=r"short.json has shape \(1, 3\); it must have rows of 10 numbers"):
        availability(TEN, 3, rng(), 0, path=write(tmp_path / "short.json", [1, 0, 1]))
    with pytest.raises(DataError, match=r"high.json holds 2; a trace has 0"):
        availability(TEN, 3, rng(), 0, path=write(tmp_path / "high.json", [2] * 10))
    with pytest.raises(DataError, match=r"negative.json holds a negative weight -1"):
        weighted(TEN, 3, rng(), 0, path=write(tmp_path / "negative.json", [-1] * 10))
    with pytest.raises(DataError, match=r"nan.npy holds numbers that are not finite"):
        weighted(TEN, 3, rng(), 0, path=write(tmp_path / "nan.npy", [float("nan")] * 10))
    np.save(tmp_path / "pickled.npy", np.array([{}] * 10), allow_pickle=True)
    with pytest.raises(DataError, match=r"pickled.npy cannot be read"):
        weighted(TEN, 3, rng(), 0, path=str(tmp_path / "pickled.npy"))


def test_round_robin_visits_everybody_in_turn():
    rounds = [round_robin(TEN, 4, rng(), t).clients for t in range(1, 6)]
    assert rounds[0] == (0, 1, 2, 3)
    assert rounds[2] == (8, 9, 0, 1)
    assert sorted(c for r in rounds for c in r) == sorted([*range(10)] * 2)


def test_over_selection_uses_the_first_to_return():
    hundred = Population(np.ones(100, int))
    selection = over_selection(hundred, 10, rng(), 0, factor=1.3, dropout=0.0)
    assert (len(selection.clients), len(selection.dropped)) == (10, 3)
    assert len(over_selection(hundred, 10, rng(), 0, factor=1.1, dropout=0.0).dropped) == 1  # ceil(11.000000000000002)
    assert len(over_selection(hundred, 90, rng(), 0, factor=2.0, dropout=0.0).dropped) == 10
    sizes = [len(over_selection(hundred, 10, rng(seed), 0, factor=1.0, dropout=0.5).clients) for seed in range(200)]
    assert min(sizes) >= 1
    assert 4 < np.mean(sizes) < 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.9}, "factor is 0.9; it must be >= 1 and finite"),
        ({"factor": float("inf")}, "factor is inf; it must be >= 1 and finite"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be >= 0 and < 1"),
        ({"dropout": 0.999999}, "dropout is 0.999999; in round 0 all 4 selected clients dropped out"),
    ],
)
def test_an_impossible_over_selection_is_named(options, message):
    with pytest.raises(ValueError, match=r"^" + message):
        over_selection(TEN, 3, rng(), 0, **options)
