"""Configuration: YAML and ``key=value`` overrides, checked against the signatures of what they configure.

A constructor's signature is its schema, so an option is declared, typed, defaulted and documented once, where it
is used. Two conventions do the rest:

* **Positional-only parameters** (before ``/``) come from the program; configuration sets the others. A component
  that has positional-only parameters is configured into a function of them.
* A parameter whose type is a **component** (a dataset, an aggregator ...) takes a mapping with a ``name``, or a name
  alone; one whose type is a frozen dataclass of options (`LocalTraining`) takes its fields flat, beside the others.

An override replaces all that the file has under its key, so ``algorithm=fedprox`` starts from FedProx's defaults.
``algorithm.name=fedprox`` is gentler: the file's options stay, but for those that FedProx does not have in the same
type. Wider overrides are applied before narrower ones, whatever their order.

A top-level key that is no option, but to which another value refers (``${method}``), is a variable: it stands for its
value where it is referred to, and is no part of the configuration.
"""

import difflib
import importlib
import inspect
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedray import catalogue
from fedray.catalogue import Registry
from fedray.errors import ConfigError, DataError
from fedray.options import options_of, parameters, path_of, section_of, type_name, written
from fedray.sharing import once


def read(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A configuration as plain values: the file (or mapping), the overrides on top, interpolations resolved.

    Raises:
        ConfigError: the file cannot be read, or an override is not ``key=value``.
    """
    config = _merged(source, overrides)
    variables = _variables(config)
    try:
        resolved = cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except OmegaConfBaseException as error:
        key = error.full_key
        raise ConfigError(f"{key} cannot be resolved: {_one_line(error)}; give {key}=...") from None
    return {key: value for key, value in resolved.items() if key not in variables}


def unresolved(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The same with variables and interpolations as they stand, so that further overrides reach all that they set."""
    return cast(dict[str, Any], OmegaConf.to_container(_merged(source, overrides), resolve=False))


def _merged(source: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> DictConfig:
    where = "the configuration" if isinstance(source, Mapping) else str(source)
    with _explained(f"{where} cannot be read"):
        config = OmegaConf.create(_plain(source)) if isinstance(source, Mapping) else OmegaConf.load(source)
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{where} holds a list; a configuration is a mapping of keys to values")
    variables = _variables(config)
    for text in sorted(overrides, key=lambda text: text.partition("=")[0].removesuffix(".name").count(".")):
        with _explained(f"the override {text!r} cannot be read"):
            _override(config, text)
    for key, name in catalogue.DEFAULTS.items():  # options without a name are those of the default
        node = OmegaConf.select(config, key, throw_on_resolution_failure=False)
        if isinstance(node, DictConfig) and "name" not in node:
            config[key] = OmegaConf.merge({"name": name}, node)
    while idle := variables & set(config) - _variables(config):  # overrides took the place of what referred to them
        for key in idle:
            del config[key]
    return config


def _variables(config: DictConfig) -> set[str]:
    """The top-level keys that are no options and that other values refer to."""
    text = str(OmegaConf.to_container(config, resolve=False))
    own = set(config) - set(options_of(catalogue.top_level()))
    return {str(key) for key in own if re.search(rf"\$\{{{re.escape(str(key))}[.\[}}]", text)}


def _override(config: DictConfig, text: str) -> None:
    key, separator, value_text = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"the override {text!r} is not key=value; for example rounds=50")
    parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value_text}"]))  # interpolations stay
    value = cast(dict[str, Any], parsed)["value"]
    parents = [key[:end] for end, letter in enumerate(key) if letter == "."]
    for parent in parents:
        node = OmegaConf.select(config, parent, throw_on_resolution_failure=False)
        if isinstance(node, str):  # a component by its name alone, which is about to have options
            OmegaConf.update(config, parent, {"name": node}, merge=False)
    if parents and key == f"{parents[-1]}.name":
        _drop_what_does_not_fit(config, parents[-1], value)
    OmegaConf.update(config, key, value, merge=False, force_add=True)


def _drop_what_does_not_fit(config: DictConfig, path: str, name: Any) -> None:
    """Remove the options of the component at ``path`` that the component called ``name`` does not have."""
    node = OmegaConf.select(config, path, throw_on_resolution_failure=False)
    if not isinstance(node, DictConfig) or node.get("name") in (None, name):
        return
    try:
        registry = _registry_at(config, path)
        old, new = (options_of(named(registry, each, path)) for each in (node.get("name"), name))
    except ConfigError:
        return  # what is wrong with the names shows when they are built
    for option in [option for option in node if option in old]:
        if option not in new or new[option].annotation != old[option].annotation:
            del node[option]


def _registry_at(config: DictConfig, path: str) -> Registry:
    """The components that can stand at ``path``; none if that is no component's place."""
    outer, _, key = path.rpartition(".")
    owner = catalogue.top_level()
    if outer:
        within = options_of(owner).get(outer)
        section = section_of(within.annotation) if within else None
        owner = section or named(_registry_at(config, outer), OmegaConf.select(config, f"{outer}.name"), outer)
    option = options_of(owner).get(key)
    kind = catalogue.kind_of(option.annotation) if option else None
    return catalogue.components(kind) if kind else {}


@dataclass(frozen=True)
class Configured:
    """A component with its options set, still to be called with what the program supplies."""

    function: Callable[..., Any]
    options: Mapping[str, Any]
    where: str
    result: Any  # its type
    asked: str = ""  # what it was built from

    def __call__(self, *objects: Any) -> Any:
        """Call it; what the component refuses becomes a `ConfigError` that says where the option stands.

        A component of the same kind among its options, such as an algorithm's base, is called with the same objects.
        """
        options = dict(self.options)
        if catalogue.kind_of(self.result) is not None:
            for name, value in options.items():
                if isinstance(value, Configured) and value.result == self.result:
                    options[name] = value(*objects)
        return _call(self.function, objects, options, self.where, self.result)


# kinds that are made without reading anything
_LIGHT = ("algorithms", "aggregators", "privacy", "server_optimizers", "methods", "averagings", "backends")


def build(annotation: Any, value: Any, where: str, dry: bool = False) -> Any:
    """Build the component that ``value`` names, with its options checked.

    Args:
        annotation: The type of parameter that it is for, one of those in `fedray.catalogue.KINDS`.
        value: A mapping with a ``name`` and options, or a name alone.
        where: Where it stands in the configuration, for messages.
        dry: Do not make what reads data or models, which may be elsewhere: a `Configured` stands for it.

    Returns:
        The component, or a `Configured` function if the program still has something to supply.

    Raises:
        ConfigError: an unknown name or option, a wrong type, a missing option, a value that the component refuses.
    """
    kind = catalogue.kind_of(annotation) or ""
    if kind == "datasets" and not dry:
        return once(kind, repr(value), lambda: _build(annotation, kind, value, where))
    return _build(annotation, kind, value, where, dry)


def _build(annotation: Any, kind: str, value: Any, where: str, dry: bool = False) -> Any:
    registry = catalogue.components(kind)
    options = {"name": value} if isinstance(value, str) else value
    if not isinstance(options, Mapping):
        example = f"{{name: {next(iter(registry))}}}"
        raise ConfigError(f"{where} is {_shown(value)}; it must be a mapping with a name, such as {example}")
    if "name" not in options:
        raise ConfigError(f"{where} has no name; {_known(registry)}")
    function = named(registry, options["name"], where)
    arguments = check(function, {key: v for key, v in options.items() if key != "name"}, where, options["name"], dry)
    if dry and (kind not in _LIGHT or "path" in options or _stands_for_something(arguments.values())):
        return Configured(function, arguments, where, annotation)
    if get_origin(annotation) is Callable:
        return Configured(function, arguments, where, get_args(annotation)[-1])
    asks = any(parameter.kind is parameter.POSITIONAL_ONLY for parameter in parameters(function))
    if asks and kind in ("tasks", "algorithms"):  # for the seed, or the number of clients
        return Configured(function, arguments, where, annotation, repr(value))
    return _call(function, (), arguments, where, annotation)


def fill(component: Any, *objects: Any) -> Any:
    """A component that still waits for ``objects``, called with them; any other as it is."""
    return component(*objects) if isinstance(component, Configured) else component


def _stands_for_something(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Configured) for value in values)


def check(
    function: Callable[..., Any], options: Mapping[str, Any], where: str, name: str, dry: bool = False
) -> dict[str, Any]:
    """The keyword arguments for ``function`` that ``options`` stand for; see `build` for ``dry``."""
    known = options_of(function)
    label = f"{where} ({name})" if where and name else where or name
    prefix = f"{where}." if where else ""
    for key in options:
        if key not in known:
            raise ConfigError(f"{label} has no option {key!r}; {nearest(str(key), known)}")
    missing = [option.name for option in known.values() if option.required and option.name not in options]
    if missing:
        ours = f" (or move what fedray supplies before a / in the signature of {name})" if "." in name else ""
        raise ConfigError(f"{label} lacks {', '.join(missing)}; give {prefix}{missing[0]}=...{ours}")
    arguments: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {option.group: {} for option in known.values() if option.group}
    for key, value in options.items():
        group = known[key].group
        converted = convert(value, known[key].annotation, f"{prefix}{key}", dry)
        (groups[group] if group else arguments)[key] = converted
    for parameter in parameters(function):
        if parameter.name in groups and not (dry and _stands_for_something(groups[parameter.name].values())):
            arguments[parameter.name] = _call(parameter.annotation, (), groups[parameter.name], where)
    return arguments


def call(function: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    """``function`` with what the options of a whole configuration stand for; what it refuses is a `ConfigError`."""
    return _call(function, (), check(function, options, "", "the configuration"), "")


def convert(value: Any, annotation: Any, where: str, dry: bool = False) -> Any:
    """``value`` as the annotated type, which is checked; components are built."""
    if catalogue.kind_of(annotation) is not None:
        return build(annotation, value, where, dry)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if (section := section_of(annotation)) is not None and value is not None:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} is {_shown(value)}; it must be a mapping of its options")
        return _call(section, (), check(section, value, where, ""), where)
    if origin in (typing.Union, types.UnionType):
        return _convert_to_one_of(value, arguments, where, dry)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where} is {_shown(value)}; {nearest(str(value), map(str, arguments))}")
        return value
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {_shown(value)}; it must be a list, such as [{value}]")
        return [convert(item, arguments[0], f"{where}[{i}]", dry) for i, item in enumerate(value)]
    if annotation is float and type(value) is int:
        value = float(value) if abs(value) < sys.float_info.max else math.inf
    wrong = annotation in _TYPES and type(value) is not annotation
    if wrong or (annotation is float and not math.isfinite(value)):
        raise ConfigError(f"{where} is {_shown(value)}; it must be {_TYPES[annotation]}")
    return value


def _convert_to_one_of(value: Any, annotations: Sequence[Any], where: str, dry: bool) -> Any:
    if value is None and type(None) in annotations:
        return None
    kinds = [annotation for annotation in annotations if annotation is not type(None)]
    if len(kinds) == 1:
        return convert(value, kinds[0], where, dry)
    for kind in kinds:
        try:
            return convert(value, kind, where, dry)
        except ConfigError:
            continue
    allowed = " or ".join(_TYPES.get(annotation) or type_name(annotation) for annotation in annotations)
    raise ConfigError(f"{where} is {_shown(value)}; it must be {allowed}")


def named(registry: Registry, name: Any, where: str) -> Callable[..., Any]:
    """A component by its name, or a user's own by its dotted path, from the current folder or Python's path."""
    if not isinstance(name, str):
        raise ConfigError(f"{where}.name is {_shown(name)}; {_known(registry)}")
    if name in registry:
        return registry[name]
    module_name, _, attribute = name.rpartition(".")
    if not module_name or not attribute:
        raise ConfigError(f"{where}.name is {name!r}; {nearest(name, registry)}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    problem = f"{where}.name is {name!r}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        own = f"{module_name}.".startswith(f"{error.name}.")
        hint = f"run fedray in the folder of {module_name.partition('.')[0]}.py, or install it" if own else "install it"
        raise ConfigError(f"{problem}, which needs the module {error.name!r}; {hint}") from None
    except Exception as error:  # the user's own code runs here
        line = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if isinstance(error, SyntaxError) else f" ({line.filename}, line {line.lineno})"
        raise ConfigError(f"{problem}, whose import raises {type(error).__name__}: {_one_line(error)}{place}") from None
    function = getattr(module, attribute, None)
    if function is None:
        raise ConfigError(f"{problem}, but {module_name} has no {attribute}; {nearest(attribute, vars(module))}")
    if not callable(function):
        raise ConfigError(f"{problem}, which is a {type(function).__name__}; it must be a function")
    return cast(Callable[..., Any], function)


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint: the nearest known name, or all of them.

    >>> nearest("alhpa", ["alpha", "min_size"])
    "did you mean 'alpha'?"
    """
    known = [name for name in known if not name.startswith("_")]
    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]!r}?" if close else _known(known)


def _known(known: Iterable[str]) -> str:
    return f"known: {', '.join(sorted(known)) or 'none'}"


def _call(
    function: Callable[..., Any], objects: Sequence[Any], options: Mapping[str, Any], where: str, result: Any = None
) -> Any:
    """``function(*objects, **options)``; what it refuses, or another result than wanted, is a `ConfigError`."""
    try:
        inspect.signature(function).bind(*objects, **options)
    except TypeError as error:
        raise ConfigError(
            f"{where}: {path_of(function)} cannot be called with what fedray supplies ({error}); "
            f"{len(objects)} parameters must stand before the / of its signature"
        ) from None
    try:
        made = function(*objects, **options)
    except ConfigError:
        raise
    except ValueError as error:
        message = _one_line(error)
        about_option = where and message.partition(" ")[0] in options_of(function)
        kind = DataError if isinstance(error, DataError) else ConfigError
        raise kind(f"{where}{'.' if about_option else ': ' if where else ''}{message}") from error
    wanted = get_origin(result) or result
    if isinstance(wanted, type) and not _is_a(made, wanted):
        got = f"{path_of(function)} returned a {type(made).__name__}"
        raise ConfigError(f"{where}: {got}; it must return a {wanted.__name__}")
    return made


def _is_a(value: Any, kind: type) -> bool:
    if not getattr(kind, "_is_protocol", False):
        return isinstance(value, kind)
    members = {*vars(kind), *inspect.get_annotations(kind)}
    return all(hasattr(value, name) for name in members if not name.startswith("_"))


@contextmanager
def _explained(problem: str) -> Iterator[None]:
    """What YAML, OmegaConf or the file system raise, on one line; they share no base class."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{problem}: {_one_line(error)}") from None


def _plain(value: Any) -> Any:
    """A mapping from Python as YAML could have given it: paths become text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _one_line(error: BaseException) -> str:
    text = str(error)
    if isinstance(error, OmegaConfBaseException):
        text = text.partition("\n")[0]  # its further lines are about OmegaConf
    return " ".join(text.split()) or type(error).__name__


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else written(value)


_TYPES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
