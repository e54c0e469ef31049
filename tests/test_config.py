"""Configuration: overrides win, types are checked, and components keep the conventions that make them configurable."""

import inspect
import string
from textwrap import dedent
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedray import config
from fedray.aggregators import Aggregator, mean
from fedray.catalogue import DEFAULTS, KINDS, components, kind_of, top_level
from fedray.errors import ConfigError, DataError
from fedray.experiment import plan
from fedray.local_training import LocalTraining
from fedray.options import documented, options_of, parameters, summary, type_name, written
from fedray.runs import shipped

YAML = """\
seed: 0
rounds: 5
cohort: 3
task:
  name: classification
  data: {name: digits}
  partition: {name: dirichlet, num_clients: 10, alpha: 0.5}
  model: {name: mlp, hidden: [8]}
algorithm: {name: fedprox, mu: 0.5, local_lr: 0.3, batch_size: 64}
backend: {name: serial, num_shares: 2}
"""


# overrides


def read(*overrides: str, text: str = YAML) -> dict[str, Any]:
    return config.read(OmegaConf.to_container(OmegaConf.create(text)), overrides)


def test_overrides_win_over_the_file_and_the_last_one_over_those_before():
    values = read("rounds=7", "task.partition.alpha=2", "rounds=9", "evaluate_every=3")
    assert (values["rounds"], values["task"]["partition"]["alpha"], values["evaluate_every"]) == (9, 2, 3)
    assert values["cohort"] == 3


def test_options_without_a_name_are_those_of_the_default():
    unnamed = YAML[: YAML.index("backend:")]
    made = read("backend.num_workers=2", "sampler.replace=true", text=unnamed)
    assert made["backend"] == {"name": "ray", "num_workers": 2}
    assert made["sampler"] == {"name": "uniform", "replace": True}
    assert read(text=unnamed + "backend: {threads: 2}")["backend"] == {"name": "ray", "threads": 2}
    assert read("backend.threads=2", text=unnamed + "backend: serial")["backend"] == {"name": "serial", "threads": 2}
    defaults = {name: option.default for name, option in options_of(top_level()).items()}
    assert defaults["sampler"] is components("samplers")[DEFAULTS["sampler"]]
    assert type(defaults["backend"]) is type(components("backends")[DEFAULTS["backend"]]())
    assert defaults["backend"].launch.__qualname__.startswith(components("backends")[DEFAULTS["backend"]].__name__)


def test_an_override_replaces_a_list_and_can_reach_into_it():
    assert read("task.model.hidden=[32,16]")["task"]["model"]["hidden"] == [32, 16]
    assert read("task.model.hidden=[]")["task"]["model"]["hidden"] == []
    assert read("task.model.hidden[0]=9")["task"]["model"]["hidden"] == [9]


@pytest.mark.parametrize("text", ["algorithm=fedavg", "algorithm={name: fedavg}"])
def test_naming_a_component_starts_from_its_own_defaults(text):
    values = read(text)
    assert config.build(algorithm_type(), values["algorithm"], "algorithm")
    assert values["algorithm"] in ("fedavg", {"name": "fedavg"})


def test_naming_a_component_anew_replaces_the_whole_mapping():
    assert read("algorithm={name: fedprox, mu: 0.1}")["algorithm"] == {"name": "fedprox", "mu": 0.1}


@pytest.mark.parametrize(
    "overrides",
    [
        ("algorithm=scaffold", "algorithm.server_lr=0.5"),
        ("algorithm.server_lr=0.5", "algorithm=scaffold"),  # wider ones first, whatever their order
    ],
)
def test_options_can_follow_a_name_alone(overrides):
    assert read(*overrides)["algorithm"] == {"name": "scaffold", "server_lr": 0.5}


def test_options_can_be_added_to_a_name_alone_in_the_file():
    text = YAML.replace("{name: serial, num_shares: 2}", "serial")
    assert read("backend.num_shares=3", text=text)["backend"] == {"name": "serial", "num_shares": 3}


@pytest.mark.parametrize("order", [1, -1])
def test_changing_the_name_keeps_what_the_new_component_has_too(order):
    overrides = ["algorithm.name=scaffold", "algorithm.server_lr=0.5"][::order]
    expected = {"name": "scaffold", "local_lr": 0.3, "batch_size": 64, "server_lr": 0.5}
    assert read(*overrides)["algorithm"] == expected


def test_changing_the_name_drops_an_option_of_the_same_name_and_another_type():
    assert read("task.model.name=cnn")["task"]["model"] == {"name": "cnn"}  # its `hidden` is no list
    assert read("task.model.hidden=4", "task.model.name=cnn")["task"]["model"] == {"name": "cnn", "hidden": 4}
    assert read("task.partition.name=iid")["task"]["partition"] == {"name": "iid", "num_clients": 10}


def test_changing_the_name_does_not_hide_an_option_that_was_wrong_before():
    values = read("algorithm.name=fedavg", text=YAML.replace("mu: 0.5", "mu: 0.5, nu: 1"))
    assert values["algorithm"] == {"name": "fedavg", "nu": 1, "local_lr": 0.3, "batch_size": 64}


def test_repeating_the_name_changes_nothing():
    assert read("algorithm.name=fedprox") == read()


def test_a_component_within_a_component_can_be_named_where_the_file_has_none():
    values = read("algorithm.aggregator.num_byzantine=1", "algorithm.aggregator.name=krum")
    assert values["algorithm"]["aggregator"] == {"name": "krum", "num_byzantine": 1}
    assert plan(values)
    values = read(
        "algorithm.aggregator.name=median", text=YAML.replace("mu: 0.5", "aggregator: {name: krum, num_byzantine: 1}")
    )
    assert values["algorithm"]["aggregator"] == {"name": "median"}


SWITCH = YAML.replace("name: fedprox, mu: 0.5", "name: '${method}'").replace("0.3", "'${lr.${method}}'")
SWITCH += "method: fedprox\nlr: {fedprox: 0.2, fedavg: 0.4}\n"


def test_a_variable_stands_for_its_value_and_is_no_part_of_the_configuration():
    for method, lr in {"fedprox": 0.2, "fedavg": 0.4}.items():
        values = read(f"method={method}", text=SWITCH)
        assert (values["algorithm"]["name"], values["algorithm"]["local_lr"]) == (method, lr)
        assert values.keys() == read().keys()
        assert plan(values)


def test_a_variable_is_no_mistake_when_an_override_takes_the_place_of_what_referred_to_it():
    values = {"row": "a", "rows": {"a": {"rounds": 3}, "b": {"rounds": 5}}, "rounds": "${rows.${row}.rounds}"}
    assert config.read(values, ["row=b"]) == {"rounds": 5}
    assert config.read(values, ["rounds=7"]) == {"rounds": 7}
    assert config.unresolved(values, ["rounds=7"]) == {"rounds": 7}


def test_an_override_may_stand_for_all_that_refers_to_a_variable():
    values = read("algorithm.local_lr=0.7", text=SWITCH)
    assert values["algorithm"]["local_lr"] == 0.7
    assert values.keys() == read().keys()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mehtod=fedavg", "the configuration has no option 'mehtod'"),
        ("method=fedag", "Interpolation key 'lr.fedag' not found; give algorithm.local_lr="),
        ("lr.fedprox=x", "algorithm.local_lr is 'x'; it must be a finite number"),
    ],
)
def test_what_nothing_refers_to_is_no_variable(override, message):
    with pytest.raises(ConfigError, match=message):
        plan(read(override, text=SWITCH))


def test_interpolations_are_resolved_after_the_overrides():
    text = YAML.replace("rounds: 5", "rounds: ${seed}")
    assert read("seed=4", text=text)["rounds"] == 4
    assert read("cohort=${rounds}")["cohort"] == 5
    assert read("algorithm.batch_size=${task.partition.num_clients}")["algorithm"]["batch_size"] == 10


def test_a_mapping_from_python_may_hold_paths_and_tuples(tmp_path):
    values = config.read({"path": tmp_path / "x", "hidden": (1, 2), "inner": {"path": tmp_path}})
    assert values == {"path": str(tmp_path / "x"), "hidden": [1, 2], "inner": {"path": str(tmp_path)}}


names = st.text(string.ascii_letters + string.digits + "_", min_size=1, max_size=6)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False),
    st.text(string.printable, max_size=8).filter(lambda text: "$" not in text and text != "???"),
    st.sampled_from(["1e3", "yes", "null", "0x10", "1_000", "2024-01-01", "~", "3", " x ", "é", "- a", "#", "a: b"]),
)
trees = st.dictionaries(
    names,
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner), max_leaves=6),
)


@settings(deadline=None, max_examples=30)
@given(trees)
def test_a_resolved_configuration_survives_the_run_folder(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(values)))
    again = config.read(path)
    assert again == values
    assert repr(again) == repr(values)  # 1 is not 1.0, nor true


# types


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (0.5, float, 0.5),
        (True, bool, True),
        ("a", str, "a"),
        (None, int | None, None),
        (3, int | None, 3),
        (3, float | None, 3.0),
        ("auto", int | Literal["auto"], "auto"),
        (3, int | Literal["auto"], 3),
        (3, float | Literal["auto"], 3.0),
        ([1, 2], list[int], [1, 2]),
        ([1, 2], list[float], [1.0, 2.0]),
        ([], list[int] | None, []),
        ("x", Literal["x", "y"], "x"),
        ({"a": 1}, Any, {"a": 1}),
    ],
)
def test_values_of_the_right_type_are_taken(value, annotation, expected):
    result = config.convert(value, annotation, "x")
    assert result == expected
    assert type(result) is type(expected)


def test_components_are_built_from_a_mapping_or_a_name():
    assert isinstance(config.convert("median", Aggregator, "x"), Aggregator)
    assert isinstance(config.convert({"name": "krum", "num_byzantine": 2}, Aggregator, "x"), Aggregator)


def test_options_of_local_training_stand_flat_beside_the_others():
    options = options_of(components("algorithms")["fedavg"])
    assert list(options)[:2] == ["local_lr", "local_epochs"]
    assert {option.group for option in options.values()} == {"local", None}
    assert "local" not in options


# every registered component keeps the conventions

COMPONENTS = [(kind, name) for kind in KINDS for name in components(kind)]


def algorithm_type() -> Any:
    from fedray.algorithm import FederatedAlgorithm

    return FederatedAlgorithm


@pytest.mark.parametrize(("kind", "name"), COMPONENTS)
def test_every_component_and_each_of_its_options_is_documented(kind, name):
    component = components(kind)[name]
    assert 10 < len(summary(component)) < 130
    assert summary(component).endswith(".")
    for option in options_of(component).values():
        assert len(option.doc) > 5, f"{option.name} of {name} has no line in its Args section"
    stale = documented(component).keys() - {parameter.name for parameter in parameters(component)}
    assert not stale, f"{name} documents {stale}, which it does not have"


@pytest.mark.parametrize(("kind", "name"), [*COMPONENTS, ("configuration", "config")])
def test_every_default_is_of_the_type_that_it_is_said_to_be(kind, name):
    component = top_level() if name == "config" else components(kind)[name]
    for option in options_of(component).values():
        assert option.annotation is not Any, f"{option.name} of {name} has no type"
        if not option.required and kind_of(option.annotation) is None:
            assert config.convert(option.default, option.annotation, option.name) == option.default
        assert type_name(option.annotation)
        assert option.required or written(option.default)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_known_by_the_type_of_the_parameter_that_takes_it(kind):
    from pkgutil import resolve_name

    assert kind_of(resolve_name(KINDS[kind][1])) == kind


def test_plain_types_are_no_components():
    assert [kind_of(annotation) for annotation in (int, str, float | None, list[int], Any, LocalTraining)] == [None] * 6


@pytest.mark.parametrize("name", shipped())
def test_shipped_experiments_name_only_what_exists(name):
    values = config.read(shipped()[name])
    try:
        assert plan(values)
    except DataError:  # the data are not here; all else was right, for data are read after the names are checked
        assert values["task"]["data"]["name"] != "digits"


def test_what_a_component_refuses_later_says_where_it_stands():
    sampler = config.convert({"name": "availability", "probability": 2}, sampler_type(), "sampler")
    with pytest.raises(ConfigError, match=r"^sampler\.probability is 2\.0; it must be > 0"):
        sampler(plan(read()).experiment.population, 3, np.random.default_rng(0), 1)


def sampler_type() -> Any:
    from fedray.rounds import Sampler

    return Sampler


def test_a_data_error_stays_one_and_says_where_the_data_are_named():
    with pytest.raises(DataError, match=r"^task\.data: no\.npz does not exist"):
        plan(read("task.data={name: npz, path: no.npz}"))


def test_signatures_are_read_from_functions_classes_and_partials():
    def component(a: "int", /, b: "float" = 1.0, *args: int, c: bool, **rest: int) -> None:
        """One line."""

    assert list(options_of(component)) == ["b", "c"]
    assert options_of(component)["b"].annotation is float
    assert options_of(component)["c"].required
    assert inspect.signature(LocalTraining).parameters.keys() == options_of(LocalTraining).keys()


def test_the_args_section_ends_where_the_indentation_does():
    def component() -> None:
        """Line.

        Args:
            a: one
                and more: of it.
            b: two

        Returns:
            c: not an option
        """

    component.__doc__ = dedent(component.__doc__ or "")
    assert documented(component) == {"a": "one and more: of it.", "b": "two"}


def test_defaults_are_shown_as_they_are_written():
    assert [written(value) for value in (None, True, 1.5, "x", [1], mean(), torch.relu)] == [
        "null",
        "true",
        "1.5",
        "x",
        "[1]",
        "built in",
        "relu",
    ]


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan")])
def test_a_number_must_be_finite(value):
    with pytest.raises(ConfigError, match=r"^x is -?(inf|nan|1\d*); it must be a finite number"):
        config.convert(value, float, "x")
