"""A checkpoint is whole or passed over, holds every state to the bit, and is never unpickled."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_same_bits

from fedray import checkpoint
from fedray.errors import DataError


@dataclass(frozen=True)
class Inner:
    moment: torch.Tensor
    steps: int
    note: str | None = None


@dataclass(frozen=True)
class State:
    params: dict[str, torch.Tensor]
    inner: Inner
    extra: Any = None


def state(extra: Any = None, value: float = 1.0) -> State:
    params = {"w": torch.full((2, 3), value), "b": torch.arange(3).to(torch.bfloat16)}
    return State(params, Inner(torch.tensor(0.1, dtype=torch.float64), 7), extra)


def identity(handle: Any) -> Any:
    return handle


def save(run: Path, round: int, what: Any, clients: dict[int, tuple[int, Any]] | None = None, keep: int = 2) -> None:
    checkpoint.write(run, round, what, clients or {}, identity, {"bytes_up_total": 3 * round}, keep)


def load(run: Path, template: Any = None) -> checkpoint.Checkpoint:
    found = checkpoint.read_newest(run, template if template is not None else state())
    assert found is not None
    return found


def folders(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def client_files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "client_states").iterdir())


# what comes back

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
    ).flatmap(lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: torch.ones(shape).to(dtype))),
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@settings(deadline=None, max_examples=40)
@given(trees, trees)
def test_every_tree_comes_back(tmp_path_factory, extra, kept):
    run = tmp_path_factory.mktemp("run")
    save(run, 3, state(extra), {5: (2, kept), 11: (3, None)})
    found = load(run)
    assert same(found.state.extra, extra)
    assert found.state.inner.note is None
    assert found.clients.keys() == {5, 11}
    assert found.clients[5][0] == 2
    assert same(found.clients[5][1], kept)
    assert (found.round, found.progress) == (3, {"bytes_up_total": 9})


def test_dataclasses_come_back_as_what_they_were(tmp_path):
    save(tmp_path, 1, state())
    found = load(tmp_path).state
    assert type(found) is State
    assert type(found.inner) is Inner
    assert_same_bits(found, state())


def test_dataclasses_within_dicts_lists_and_tuples_come_back(tmp_path):
    nested = state({"a": Inner(torch.ones(2), 1), "b": [Inner(torch.zeros(1), 2)], "c": (Inner(torch.ones(1), 3), 4)})
    save(tmp_path, 1, nested)
    found = load(tmp_path, nested).state
    assert type(found.extra["a"]) is type(found.extra["b"][0]) is type(found.extra["c"][0]) is Inner
    assert_same_bits(found, nested)


def test_views_aliases_and_tensors_with_gradients_come_back_as_values(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    parameter = torch.nn.Parameter(torch.ones(2))
    odd = {
        "column": base[:, 1],
        "transposed": base.T,
        "twice": [base, base],
        "expanded": torch.ones(1).expand(5),
        "p": parameter,
    }
    save(tmp_path, 1, state(odd), {0: (1, {"a": base[1:], "b": base[1:]})})
    found = load(tmp_path)
    assert_same_bits(found.state.extra, {**odd, "p": parameter.detach()})
    assert_same_bits(found.clients[0][1], {"a": base[1:], "b": base[1:]})
    found.state.extra["twice"][0].zero_()  # they share no memory: what comes back is an ordinary tensor each
    assert found.state.extra["twice"][1].sum() == base.sum()


def test_params_come_back_even_if_two_of_them_are_one_tensor(tmp_path):
    tied = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    params = {"a": tied, "b": tied, "half": tied.to(torch.bfloat16), "t": tied.T}
    checkpoint.write_params(tmp_path / "model.safetensors", params)
    assert_same_bits(checkpoint.read_params(tmp_path / "model.safetensors"), params)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_same_state_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save(tmp_path / name, 1, state(), {3: (1, {"x": torch.ones(2)})})
    for path in (tmp_path / "a").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


class Point(NamedTuple):
    x: int


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "a state holds a set, which cannot be checkpointed; use tensors"),
        (object(), "a state holds a object"),
        (b"bytes", "a state holds a bytes"),
        (Point(1), "a state holds a Point"),
        (lambda: 0, "a state holds a function"),
        (State, "a state holds a type"),
        ({1: 2}, r"a state has a dict with the keys \[1\]; only text can be a key"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_type(tmp_path, value, named):
    with pytest.raises(TypeError, match=named):
        save(tmp_path, 1, state(value))
    assert checkpoint.read_newest(tmp_path, state()) is None


def test_a_client_cannot_keep_a_dataclass_for_nothing_would_know_its_type_again(tmp_path):
    with pytest.raises(TypeError, match="a state holds a Inner, which cannot be checkpointed"):
        save(tmp_path, 1, state(), {0: (1, Inner(torch.ones(1), 1))})


# which checkpoint


def test_there_is_none_at_first(tmp_path):
    assert checkpoint.read_newest(tmp_path, state()) is None
    assert checkpoint.newest_round(tmp_path) == 0


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_are_kept(tmp_path, keep):
    for number in range(8, 13):  # over the change from one digit to two
        save(tmp_path, number, state(value=number), keep=keep)
    assert folders(tmp_path) == [f"{number:06d}" for number in range(13 - keep, 13)]
    assert load(tmp_path).state.params["w"][0, 0] == 12
    assert checkpoint.newest_round(tmp_path) == 12


CLIENTS = {0: (1, {"c": torch.ones(4)}), 1: (4, {"c": torch.zeros(4)})}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b'{"round": ')


def other_json(path: Path) -> None:
    path.write_text("[1, 2]")


def flip(where: float) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(where * (len(data) - 1))] ^= 1
        path.write_bytes(bytes(data))

    return spoil


def edit_round(path: Path) -> None:
    path.write_text(path.read_text().replace('"round": 4', '"round": 3'))


DAMAGES = [truncate, empty, garbage, Path.unlink, *(flip(where) for where in (0, 0.1, 0.4, 0.7, 1))]


@pytest.mark.parametrize(
    "name", ["checkpoints/000004/server.safetensors", "checkpoints/000004/state.json", "client_states/1-4.safetensors"]
)
@pytest.mark.parametrize("spoil", [*DAMAGES, other_json, edit_round])
def test_a_damaged_newest_one_falls_back_to_the_one_before(tmp_path, caplog, name, spoil):
    save(tmp_path, 2, state(value=2), {0: CLIENTS[0]})
    save(tmp_path, 4, state(value=4), CLIENTS)
    if spoil is edit_round and not name.endswith("json"):
        return
    spoil(tmp_path / name)
    with caplog.at_level(logging.WARNING, "fedray"):
        found = load(tmp_path)
    assert (found.round, found.clients.keys()) == (2, {0})
    assert found.state.params["w"][0, 0] == 2
    assert f"checkpoint {tmp_path / 'checkpoints' / '000004'} is damaged (" in caplog.text
    assert "trying the one before" in caplog.text


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    save(tmp_path, 1, state(), CLIENTS)
    for name in (
        "checkpoints/000001/state.json",
        "checkpoints/000001/server.safetensors",
        "client_states/0-1.safetensors",
    ):
        whole = (tmp_path / name).read_bytes()
        for at in range(0, len(whole), 13):
            (tmp_path / name).write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            with pytest.raises(DataError):
                checkpoint.read_newest(tmp_path, state())
        (tmp_path / name).write_bytes(whole)
    assert load(tmp_path).round == 1


def test_damage_to_what_two_checkpoints_share_is_damage_to_both(tmp_path):
    for number in (1, 2, 3):
        save(tmp_path, number, state(value=number), {0: (2, torch.ones(2))} if number > 1 else {}, keep=3)
    truncate(tmp_path / "client_states" / "0-2.safetensors")
    assert load(tmp_path).round == 1


def test_if_all_are_damaged_nothing_starts_again_by_itself(tmp_path):
    for number in (1, 2):
        save(tmp_path, number, state())
        truncate(tmp_path / "checkpoints" / f"{number:06d}" / "server.safetensors")
    with pytest.raises(
        DataError, match=r"no checkpoint in .*checkpoints can be read; remove that folder to start from"
    ):
        checkpoint.read_newest(tmp_path, state())


def test_a_state_of_another_algorithm_is_not_taken_for_this_ones(tmp_path):
    save(tmp_path, 1, state())
    with pytest.raises(DataError, match="no checkpoint"):
        checkpoint.read_newest(tmp_path, {"params": {}})


# what a killed write leaves


def test_leftovers_of_a_killed_write_are_ignored_and_then_removed(tmp_path):
    save(tmp_path, 2, state(value=2), CLIENTS)
    leftover = tmp_path / "checkpoints" / ".000003.part"
    leftover.mkdir()
    (leftover / "server.safetensors").write_bytes(b"half")
    (tmp_path / "client_states" / ".7-3.safetensors.part").write_bytes(b"half")
    (tmp_path / "client_states" / "7-3.safetensors").write_bytes(b"of a checkpoint that was never finished")
    assert load(tmp_path).round == 2
    assert checkpoint.newest_round(tmp_path) == 2
    save(tmp_path, 3, state(value=3), CLIENTS)
    assert folders(tmp_path) == ["000002", "000003"]
    assert client_files(tmp_path) == ["0-1.safetensors", "1-4.safetensors"]


def test_a_write_that_fails_half_way_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1, state(value=1), {0: CLIENTS[0]})
    with pytest.raises(TypeError):
        save(tmp_path, 2, state(object()), CLIENTS)
    assert load(tmp_path).round == 1
    save(tmp_path, 3, state(value=3), {0: CLIENTS[0]}, keep=1)
    assert folders(tmp_path) == ["000003"]
    assert client_files(tmp_path) == ["0-1.safetensors"]


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "x"
    checkpoint.replace_file(path, b"old")
    (tmp_path / ".x.part").write_bytes(b"what a killed write left")
    checkpoint.replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


# client states


def test_only_the_states_that_changed_are_fetched_and_written(tmp_path):
    fetched = []

    def fetch(handle: Any) -> Any:
        fetched.append(handle)
        return torch.full((2,), float(handle))

    def step(number: int, clients: dict[int, tuple[int, Any]]) -> None:
        checkpoint.write(tmp_path, number, state(), clients, fetch, {}, 2)

    step(1, {0: (1, 10), 1: (1, 11)})
    before = {name: (tmp_path / "client_states" / name).stat().st_mtime_ns for name in client_files(tmp_path)}
    step(2, {0: (1, 10), 1: (2, 12)})
    assert fetched == [10, 11, 12]
    assert client_files(tmp_path) == ["0-1.safetensors", "1-1.safetensors", "1-2.safetensors"]
    assert all((tmp_path / "client_states" / name).stat().st_mtime_ns == time for name, time in before.items())
    step(3, {0: (1, 10), 1: (2, 12)})
    assert client_files(tmp_path) == ["0-1.safetensors", "1-2.safetensors"]  # none needs 1-1 any more
    assert fetched == [10, 11, 12]
    assert {client: kept.tolist() for client, (_, kept) in load(tmp_path).clients.items()} == {
        0: [10.0] * 2,
        1: [12.0] * 2,
    }


def test_a_damaged_state_is_written_again_when_its_round_has_been_run_again(tmp_path):
    save(tmp_path, 2, state(value=2), {0: CLIENTS[0]})
    save(tmp_path, 4, state(value=4), CLIENTS)
    truncate(tmp_path / "client_states" / "1-4.safetensors")
    assert load(tmp_path).round == 2
    checkpoint.forget_after(tmp_path, 2)
    save(tmp_path, 4, state(value=4), CLIENTS)
    found = load(tmp_path)
    assert found.round == 4
    assert_same_bits(found.clients[1][1], CLIENTS[1][1])


@pytest.mark.parametrize(
    "where",
    [
        "../../outside.safetensors",
        "client_states/../outside.safetensors",
        "/etc/hostname",
        "outside.safetensors",
        "client_states/a/b",
    ],
)
def test_a_checkpoint_that_names_files_elsewhere_is_refused(tmp_path, caplog, where):
    run = tmp_path / "a" / "run"
    run.mkdir(parents=True)
    save(run, 1, state(), {0: CLIENTS[0]})
    kept = (run / "client_states" / "0-1.safetensors").read_bytes()
    for path in (tmp_path / "outside.safetensors", run / "outside.safetensors"):
        path.write_bytes(kept)
    path = run / "checkpoints" / "000001" / "state.json"
    document = json.loads(path.read_text())["checkpoint"]
    document["clients"]["0"]["file"] = where
    path.write_text(json.dumps({"sha256": checkpoint._sha256(json.dumps(document).encode()), "checkpoint": document}))
    with pytest.raises(DataError):
        checkpoint.read_newest(run, state())
    assert f"names {where}, which is outside of the run's folder" in caplog.text
