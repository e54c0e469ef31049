"""A constructor's signature read as a schema: its options with their types, defaults and documentation."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from fedray import catalogue
from fedray.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """One configurable option of a component: where it goes, its type, default and documentation."""

    name: str
    annotation: Any
    default: Any
    doc: str
    group: str | None = None  # the parameter whose dataclass it is a field of

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is inspect.Parameter.empty


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The options of a component, by name, in the order of its signature."""
    docs, options = documented(function), {}
    for parameter in parameters(function):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            continue
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        if dataclasses.is_dataclass(annotation) and catalogue.kind_of(annotation) is None:
            made = {field.name: field.default_factory for field in dataclasses.fields(annotation)}
            for option in options_of(typing.cast(Callable[..., Any], annotation)).values():
                factory = made.get(option.name, dataclasses.MISSING)
                default = option.default if factory is dataclasses.MISSING else factory()
                options[option.name] = dataclasses.replace(option, default=default, group=parameter.name)
        else:
            doc = docs.get(parameter.name, "")
            options[parameter.name] = Option(parameter.name, annotation, parameter.default, doc)
    return options


def parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a component, their annotations evaluated.

    Raises:
        ConfigError: it has no signature, as some of Python's builtins have not.
    """
    try:
        return list(inspect.signature(function, eval_str=True).parameters.values())
    except (ValueError, TypeError, NameError) as error:
        raise ConfigError(f"{path_of(function)} has no signature to take options from ({error})") from None


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """The ``Args:`` section of a docstring, by parameter."""
    docs: dict[str, str] = {}
    current = None
    inside = False
    for line in (inspect.getdoc(function) or "").splitlines():
        indent = len(line) - len(line.lstrip())
        if line.strip() == "Args:":
            inside = True
        elif inside and line.strip() and indent == 0:
            inside = False
        elif inside and indent == 4 and ":" in line:
            current, _, text = line.strip().partition(":")
            docs[current] = text.strip()
        elif inside and current and line.strip():
            docs[current] += " " + line.strip()
    return docs


def section_of(annotation: Any) -> type | None:
    """The dataclass whose fields are the options of a section, for a parameter that takes one (``Tuning | None``)."""
    if get_origin(annotation) not in (typing.Union, types.UnionType):
        return None
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
    one = kinds[0] if len(kinds) == 1 else None
    return one if isinstance(one, type) and dataclasses.is_dataclass(one) and catalogue.kind_of(one) is None else None


def summary(function: Callable[..., Any]) -> str:
    """The first line of a docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


def path_of(function: Callable[..., Any]) -> str:
    """The dotted path of a function.

    >>> path_of(path_of)
    'fedray.options.path_of'
    """
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__name__)}"


def type_name(annotation: Any) -> str:
    """A type as a user writes it.

    >>> type_name(int | None), type_name(Literal["a", "b"]), type_name(list[int])
    ('int or null', 'a or b', 'list of int')
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    kind = catalogue.kind_of(annotation)
    if kind is not None:
        return f"one of {kind}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(str(value) for value in arguments)
    if origin is list:
        return f"list of {type_name(arguments[0]).removeprefix('one of ')}"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def written(value: Any) -> str:
    """A value as it is written in YAML; a component by its name where it has one.

    >>> written(0.1), written(None), written(True), written([64])
    ('0.1', 'null', 'true', '[64]')
    """
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if value == "":
        return '""'
    if callable(value):
        return str(getattr(value, "__name__", "built in"))
    return "built in" if dataclasses.is_dataclass(value) else str(value)
