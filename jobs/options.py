"""From a config dataclass to a command line: attribute docstrings become help, a YAML recipe gives the defaults."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import dacite
import tyro
import yaml

from boxinst.errors import InputError

Config = TypeVar("Config")

SECTIONS = ("shard", "train", "evaluate", "segment", "review", "feedback", "promote")
"""The sections that a recipe may have: one per command that reads it."""

RECIPES = files("jobs") / "recipes"
"""The recipes that come with the package."""


class _Loader(yaml.SafeLoader):
    """YAML whose ``1e-3`` is a number, as in YAML 1.2 and every other language, and not a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(config_class: type[Config], argv: Sequence[str], *, command: str, about: str | None) -> Config:
    """The config that a command line asks for; ``parse_following`` without anything that follows."""
    return parse_following(config_class, argv, command=command, about=about, follow=lambda asked, meant: {})[1]


def parse_following(
    config_class: type[Config],
    argv: Sequence[str],
    *,
    command: str,
    about: str | None,
    follow: Callable[[Config, Config], Mapping[str, Any]],
) -> tuple[Config, Config]:
    """The config that a command line asks for, before and after some values have followed others.

    The value of a field is, in this order: the option given, what follows, the recipe's, the dataclass's default.

    Args:
        config_class: a dataclass; fields that are dataclasses become ``--field.option``.
        argv: the words after the command's name, among them perhaps ``--recipe NAME|FILE``.
        command: the command's name; where it is one of SECTIONS, ``--recipe`` is understood too.
        about: the command's docstring, shown on top of ``--help``.
        follow: from the config asked for and the one without any option given, values to put above the recipe's.

    Raises:
        InputError: the recipe is unknown, or names something that does not exist, or a value is of another type.
        SystemExit: ``--help`` (status 0), or an option that does not parse (status 2).
    """
    argv = list(argv)
    recipe = _take_recipe(argv) if command in SECTIONS else None
    section = {} if recipe is None else recipe_section(recipe, command)
    where = f"recipe {recipe}, {command}"
    default = with_values(config_class, section, where=where)
    recipes = f"\n\n--recipe NAME|FILE sets defaults (shipped: {', '.join(recipe_names())})." * (command in SECTIONS)
    # The parser runs lines together, but for those that start with a blank: each example stays a line.
    description = re.sub("^boxinst ", "  boxinst ", (about or "").strip(), flags=re.MULTILINE) + recipes

    def read(base: Config) -> Config:
        return tyro.cli(config_class, args=argv, default=base, prog=f"boxinst {command}", description=description)

    asked = read(default)
    values = follow(asked, default)
    return asked, read(with_values(config_class, _over(section, values), where=where)) if values else asked


def _over(section: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` over ``section``, both nested as in a recipe."""
    nested = {k: _over(section.get(k) or {}, v) for k, v in values.items() if isinstance(v, Mapping)}
    return {**section, **values, **nested}


def recipe_section(recipe: str, command: str) -> dict[str, Any]:
    """What ``recipe`` says about ``command``; empty where it says nothing.

    Args:
        recipe: the name of a shipped recipe, or the path of a YAML file.
        command: one of SECTIONS.

    Raises:
        InputError: there is no such recipe, it is not YAML, or it has a section that no command reads.
    """
    text = _recipe_text(recipe)
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {recipe}", f"not YAML ({error})".replace("\n", " "), "Correct the file.") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InputError(f"recipe {recipe}", f"a {type(content).__name__}", f"Give sections: {', '.join(SECTIONS)}.")
    for name in content:
        if name not in SECTIONS:
            raise InputError(f"recipe {recipe}", f"section {name!r}", _closest(str(name), SECTIONS))
    section = content.get(command)
    if section is not None and not isinstance(section, dict):
        raise InputError(f"recipe {recipe}, {command}", repr(section), "Give options as `name: value` lines.")
    return section or {}


def recipe_names() -> list[str]:
    """The names of the shipped recipes."""
    return sorted(entry.name.removesuffix(".yaml") for entry in RECIPES.iterdir() if entry.name.endswith(".yaml"))


def with_values(config_class: type[Config], values: Mapping[str, Any], *, where: str) -> Config:
    """A ``config_class`` for tyro to start from: ``values`` over the defaults, the rest marked as missing.

    It is made without ``__init__``, because a required field may still come from the command line; tyro builds
    the real one, whose ``__post_init__`` then checks the values together.

    Raises:
        InputError: a name that is no field, or a value that is not of the field's type.
    """
    hints = get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class) if f.init}  # type: ignore[arg-type]
    config = object.__new__(config_class)
    for name in values:
        if name not in fields:
            raise InputError(where, f"option {name!r}", _closest(str(name), fields))
    for name, field in fields.items():
        path = f"{where}.{name}"
        if dataclasses.is_dataclass(hints[name]):
            section = values.get(name, {})
            if not isinstance(section, dict):
                raise InputError(path, repr(section), "Give options as `name: value` lines.")
            value = with_values(hints[name], _defaults(field) | section, where=path)
        elif name in values:
            value = _checked(hints[name], values[name], path)
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING
        object.__setattr__(config, name, value)
    return config


def _defaults(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """The values of a nested config that its parent's default sets; the nested class may have others of its own."""
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        default = field.default
    else:
        return {}
    shallow = {f.name: getattr(default, f.name) for f in dataclasses.fields(default) if f.init}
    return {k: v for k, v in shallow.items() if not dataclasses.is_dataclass(v)}


def _checked(hint: Any, value: Any, path: str) -> Any:
    """``value`` as the type ``hint`` by dacite's strict rules: no silent conversion but int to float, list to tuple."""
    holder = dataclasses.make_dataclass("holder", [("value", hint)])
    hooks: dict[type[Any], Callable[[Any], Any]] = {int: _integer, float: _number}
    try:
        held: Any = dacite.from_dict(holder, {"value": _tuples(value)}, dacite.Config(type_hooks=hooks))
    except (dacite.DaciteError, TypeError) as error:
        wanted = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
        wanted = wanted.replace("typing.", "").replace("Literal", "one of ")
        raise InputError(path, repr(value), f"Give a value of type {wanted}.") from error
    return held.value


def _tuples(value: Any) -> Any:
    """Configs hold tuples, YAML has lists."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _integer(value: Any) -> Any:
    if isinstance(value, bool):
        raise TypeError("true is not a number")
    return value


def _number(value: Any) -> Any:
    return float(value) if isinstance(_integer(value), int) else value


def _take_recipe(argv: list[str]) -> str | None:
    """Remove ``--recipe NAME`` or ``--recipe=NAME`` from ``argv`` and return NAME; the last one counts."""
    recipe = None
    position = 0
    while position < len(argv):
        word = argv[position]
        if word == "--recipe":
            if position + 1 == len(argv) or argv[position + 1].startswith("--"):
                raise InputError("--recipe", "without a name", f"Give a file or one of {', '.join(recipe_names())}.")
            recipe = argv[position + 1]
            del argv[position : position + 2]
        elif word.startswith("--recipe="):
            recipe = word.partition("=")[2]
            del argv[position]
        else:
            position += 1
    return recipe


def _recipe_text(recipe: str) -> str:
    shipped = RECIPES / f"{recipe}.yaml"
    if recipe in recipe_names():
        return shipped.read_text()
    path = Path(recipe)
    if path.is_file():
        try:
            return path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError("--recipe", f"{recipe} ({error})", "Give a YAML text file that can be read.") from error
    raise InputError("--recipe", recipe, f"No such file and no shipped recipe. {_closest(recipe, recipe_names())}")


def _closest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"Did you mean {close[0]!r}? " if close else ""
    return f"{guess}There are: {', '.join(known)}."
