"""Limits of settings, which stand in the fields, and a config as JSON and back."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from jaxalign.config import effects
from jaxalign.mistake import Mistake
from jaxalign.outside import brief, check_local


class Limit(NamedTuple):
    """The range of a number."""

    least: float
    most: float
    above_least: bool  # the least itself is too little
    below_most: bool  # the most itself is too much

    def __contains__(self, value: float) -> bool:
        too_little = value <= self.least if self.above_least else value < self.least
        too_much = value >= self.most if self.below_most else value > self.most
        return not (too_little or too_much or value != value)  # NaN; math.isnan takes no integer of 400 digits

    def __str__(self) -> str:
        text = f"{'above' if self.above_least else 'at least'} {self.least:.10g}"
        if self.most == math.inf:
            return text
        return f"{text} and {'below' if self.below_most else 'at most'} {self.most:.10g}"


def at_least(least: float, *, below: float = math.inf) -> Limit:
    """least <= value < below."""
    return Limit(least, below, False, True)


def above(least: float) -> Limit:
    """least < value < infinity."""
    return Limit(least, math.inf, True, True)


def between(least: float, most: float) -> Limit:
    """least <= value <= most."""
    return Limit(least, most, False, False)


def within(least: float, most: float) -> Limit:
    """least < value < most."""
    return Limit(least, most, True, True)


def share() -> Limit:
    """0 <= value <= 1."""
    return between(0, 1)


def positive_share() -> Limit:
    """0 < value <= 1."""
    return Limit(0, 1, True, False)


LARGEST = 3.4028234e38  # of float32; any larger number would be infinite on a device
WHOLE = Limit(-(2**31), 2**31, False, True)  # of whole numbers without a largest one of their own
EMPTY_IS_MEANT = object()  # marks a text of the user's own, which may be empty
WORDS = object()  # marks a text that names no file: words of the user's own, or the address of a server
FUNCTION = object()  # marks a text that `select` reads, and so may name code to import


def check(config: Any, *, prefix: str = "") -> None:
    """Raises Mistake on a value outside its limits; of a whole config also on one without effect, or an address."""
    check_values(config, prefix=prefix)
    if not prefix:
        effects.check(config)
        check_addresses(config)


def check_values(config: Any, *, prefix: str = "") -> None:
    """Raises Mistake on a number outside its limits, a word that is none of its choices, or an empty or broken text."""
    hints = get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name
        plain, marks = unpacked(hints[field.name])
        if dataclasses.is_dataclass(value):
            check_values(value, prefix=f"{name}.")
            continue
        if value is None:
            continue
        bounded = any(isinstance(mark, Limit) and mark.most < math.inf for mark in marks)
        rule = broken_rule(value, [*marks, WHOLE] if int in (plain, *get_args(plain)) and not bounded else marks)
        if rule:
            raise Mistake(f"`{name}` {brief(value)}: it must be {rule}", setting=name)
        choices = _choices(plain)
        if choices and value not in choices:
            raise Mistake(f"`{name}` {brief(repr(value))} is not one of {', '.join(map(repr, choices))}", setting=name)
        if isinstance(value, str | Path | tuple) and EMPTY_IS_MEANT not in marks:
            _check_texts(value if isinstance(value, tuple) else (str(value),), name)


def check_addresses(config: Any) -> None:
    """Raises Mistake on a text, unless it is marked, or a path that is an address, as gs://bucket/run is."""
    for name, hint in settings(type(config)).items():
        value = functools.reduce(getattr, name.split("."), config)
        if isinstance(value, str | Path) and not {WORDS, EMPTY_IS_MEANT} & {*unpacked(hint)[1]}:
            check_local(value, name)


def _check_texts(texts: tuple[str, ...], name: str) -> None:
    for text in texts:
        if not text:
            raise Mistake(f"`{name}` is empty; give it a value, or leave it out", setting=name)
        try:
            broken = "\0" in text or not text.encode()
        except UnicodeEncodeError:  # bytes of the command line that are no UTF-8
            broken = True
        if broken:
            raise Mistake(f"`{name}` {brief(text)} is not UTF-8 text; give another", setting=name)


def broken_rule(value: Any, marks: Iterable[Any]) -> str | None:
    """The rule that a number breaks, a `Limit` among the marks of its type or that float32 holds it; else None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    finite = f"a finite number, at most {LARGEST:.8g}"
    if abs(value) > LARGEST:
        return finite
    limit = next((str(mark) for mark in marks if isinstance(mark, Limit) and value not in mark), None)
    return finite if limit is None and math.isnan(value) else limit


def settings(kind: type, *, prefix: str = "") -> dict[str, Any]:
    """The dotted name of each setting of a config class, with the type that its field is annotated with."""
    result: dict[str, Any] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            result |= settings(hints[field.name], prefix=f"{name}.")
        else:
            result[name] = hints[field.name]
    return result


def functions(config: Any) -> dict[str, str]:
    """The texts of a config that name functions, by dotted name of their setting."""
    names = (name for name, hint in settings(type(config)).items() if FUNCTION in unpacked(hint)[1])
    values = {name: functools.reduce(getattr, name.split("."), config) for name in names}
    return {name: text for name, text in values.items() if text}


def to_json(config: Any) -> dict[str, Any]:
    """The config as plain JSON values; `from_json` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def upgraded(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """`to_json`'s values of an older version as this version names them.

    A class lists in `renamed` the settings that moved, {old name: dotted new name}; in `retired` those that its command
    never obeyed, by dotted name; and in `reworded` values that meant something else, {dotted name: {old: new}}.
    """
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in values.items()}
    for old, new in getattr(kind, "renamed", {}).items():
        group, _, name = new.partition(".")
        if old in values and isinstance(values.setdefault(group, {}), dict):
            values[group][name] = values.pop(old)
    for retired in getattr(kind, "retired", ()):
        group, dot, name = retired.partition(".")
        place = values.get(group) if dot else values
        if isinstance(place, dict):
            place.pop(name if dot else group, None)
    groups = {name: value for name, value in values.items() if isinstance(value, dict)} | {"": values}
    if "extend" not in groups.get("optimizer", {"extend": None}):  # written before the words had their present meaning
        for reworded, words in getattr(kind, "reworded", {}).items():
            group, _, name = reworded.rpartition(".")
            if isinstance(word := groups.get(group, {}).get(name), str) and word in words:
                groups[group][name] = words[word]
    return values


def from_json(kind: type, values: dict[str, Any], *, where: str = "config.json") -> Any:
    """A config of `kind` from `to_json`'s values, of this version or an older one.

    Raises:
      Mistake: a name that `kind` does not have, a value of another type or outside its limits, or a required one that
        is absent.
    """
    config = _from_json(kind, values, where)
    try:
        check_values(config)
    except Mistake as mistake:
        raise Mistake(f"{where}: {mistake}", setting=mistake.setting) from None
    return config


def _from_json(kind: type, values: dict[str, Any], where: str) -> Any:
    values = upgraded(kind, values)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise Mistake(f"{where}: there is no setting {brief(', '.join(unknown))}; there are {', '.join(fields)}")
    absent = [n for n, f in fields.items() if n not in values and f.default is f.default_factory is dataclasses.MISSING]
    if absent:
        raise Mistake(f"{where} has no {', '.join(absent)}; add it, for it has no default")
    hints, arguments = get_type_hints(kind), dict[str, Any]()
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]) and isinstance(value, dict):
            arguments[name] = _from_json(hints[name], value, f"{where}: {name}")
            continue
        if value == "" and hints[name] in (Path, Path | None):
            raise Mistake(f"{where}: {name} is empty; give it a value")
        if not fits(value, hints[name]):
            raise Mistake(f"{where}: {name} is {brief(repr(value))}, and must be {described(hints[name])}")
        is_path = isinstance(value, str) and hints[name] in (Path, Path | None)
        arguments[name] = Path(value) if is_path else tuple(value) if isinstance(value, list) else value
    return kind(**arguments)


def unpacked(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the type, the marks that Annotated puts on it)."""
    return (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def described(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return "an object"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def fits(value: Any, hint: Any) -> bool:
    """True if a value of JSON or a literal has the type; True for types that it has no rule for."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, arguments[0])
    if origin is Literal:
        return value in arguments
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in arguments)
    if origin in (list, tuple):
        parts = {part for part in arguments if part is not Ellipsis}
        return isinstance(value, list | tuple) and all(any(fits(x, part) for part in parts) for x in value)
    if isinstance(value, bool) and hint in (bool, int, float, str):
        return hint is bool
    plain = {Path: str, float: (int, float), None: type(None)}.get(hint, hint)
    return not isinstance(plain, type | tuple) or plain is Any or isinstance(value, plain)
