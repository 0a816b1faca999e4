"""Settings as nested dataclasses: build them from mappings, and list them with their descriptions.

A setting is declared once, as the field of a dataclass with a line in its docstring's `Args:`.
The configuration, the command line and docs/settings.md follow from that.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pipelines.errors import ConfigError, yaml_text

Tree: TypeAlias = dict[str, Any]

_DECIMAL = re.compile(r"[-+]?(?!0[0-9])([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Setting:
    """Description of one setting.

    Args:
        key: Dotted key.
        section: Dataclass that declares it.
        kind: Annotated type.
        default: Default value; `dataclasses.MISSING` if it must be given.
        meaning: Description from the docstring of `section`.
    """

    key: str
    section: type
    kind: Any
    default: Any
    meaning: str


def settings(section: Any, prefix: str = "") -> Iterator[Setting]:
    """Iterate over all settings of the dataclass `section`, whose keys start with `prefix`."""
    kinds, text = typing.get_type_hints(section), inspect.getdoc(section) or ""
    for item in dataclasses.fields(section):
        key, kind = f"{prefix}{item.name}", kinds[item.name]
        nested = [choice for choice in _alternatives(kind) if dataclasses.is_dataclass(choice)]
        for choice in nested:
            yield from settings(choice, f"{key}.")
        if not nested:
            found = re.search(rf"^    {item.name}: (.*(?:\n     .*)*)", text, re.MULTILINE)
            yield Setting(key, section, kind, item.default, " ".join(found[1].split()) if found else "")


def flag_options(setting: Setting) -> dict[str, Any]:
    """Return argparse's options for a flag that sets `setting`: help, and type or action."""
    text, arguments = setting.meaning.replace("%", "%%"), typing.get_args(setting.kind)
    if typing.get_origin(setting.kind) is Literal:
        return {"help": text, "choices": arguments}
    kinds = [choice for choice in arguments or (setting.kind,) if choice not in (type(None), ...)]
    if kinds == [bool]:
        return {"help": text, "action": argparse.BooleanOptionalAction}
    options = {"help": text, "type": kinds[0], "metavar": setting.key.rpartition(".")[2].upper()}
    return options | ({"nargs": "+"} if typing.get_origin(setting.kind) is tuple else {})


def add_flags(parser: argparse.ArgumentParser, section: type) -> None:
    """Add to `parser` a flag for each setting of the dataclass `section` that has a default."""
    for setting in settings(section):
        if setting.default is not dataclasses.MISSING:
            flag = f"--{setting.key.replace('_', '-')}"
            parser.add_argument(flag, default=setting.default, **flag_options(setting))


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types that the annotation `kind` allows, without None."""
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return tuple(choice for choice in typing.get_args(kind) if choice is not type(None)) if union else (kind,)


def flatten_tree(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Return the values in nested mappings by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            flatten_tree(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return flat


def set_key(tree: Tree, key: str, value: Any) -> None:
    """Set the dotted `key` in nested mappings to `value`."""
    name, _, rest = key.partition(".")
    if not rest:
        tree[name] = value
    elif isinstance(child := tree.setdefault(name, {}), dict):
        set_key(child, rest, value)
    else:
        raise ConfigError(key, value, f"{name} = {yaml_text(child)} has no settings below it")


def build(cls: Any, tree: Tree, prefix: str = "") -> Any:
    """Return an instance of dataclass `cls` from `tree`, whose keys start with `prefix`.

    Raises:
        ConfigError: For an unknown key or an invalid value; `key` is the full dotted key.
    """
    known, values = typing.get_type_hints(cls), {}
    for key, value in tree.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            advice = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
            raise ConfigError(f"{prefix}{key}", value, f"unknown key; {advice}")
        values[key] = _convert(known[key], value, f"{prefix}{key}")
    for item in dataclasses.fields(cls):
        if item.name not in values and item.default is item.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{item.name}", None, "is required")
    try:
        return cls(**values)
    except ConfigError as error:
        # A nested class names its own field only.
        raise ConfigError(f"{prefix}{error.key}", error.value, error.remedy) from None


def _convert(kind: Any, value: Any, key: str) -> Any:
    """Return `value`, as read from YAML or a flag, as an instance of the annotation `kind`."""
    if value is None and type(None) in typing.get_args(kind):
        return None
    choices = _alternatives(kind)
    kind = choices[0] if len(choices) == 1 else _select(choices, value, key)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(key, value, "expected `key: value` lines below it")
        return build(kind, value, f"{key}.")
    if origin is Literal:
        # Of equal values, 1 is not True.
        if (type(value), value) not in [(type(known), known) for known in arguments]:
            raise ConfigError(key, value, f"must be one of {', '.join(map(yaml_text, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(key, value, "expected a list")
        return tuple(_convert(arguments[0], item, key) for item in value)
    if kind is float:
        # YAML 1.1 reads 1e-3, which has no dot, as text.
        valid = type(value) in (int, float) or (isinstance(value, str) and _DECIMAL.fullmatch(value))
        try:
            number = float(value) if valid else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError(key, value, "expected a finite number")
        return number
    if type(value) is not kind:
        names = {int: "a whole number", bool: "true or false", str: "text; put it in quotes"}
        raise ConfigError(key, value, f"expected {names[kind]}")
    return value


def _select(choices: tuple[Any, ...], value: Any, key: str) -> Any:
    """Return the dataclass among `choices` that `kind` in `value` names; the first one by default."""
    kinds = {choice.__dataclass_fields__["kind"].default: choice for choice in choices}
    kind = value.get("kind", next(iter(kinds))) if isinstance(value, dict) else next(iter(kinds))
    if kind not in kinds:
        raise ConfigError(f"{key}.kind", kind, f"must be one of {', '.join(kinds)}")
    return kinds[kind]
