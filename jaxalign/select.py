"""From the text "ipo(beta=0.05)" or "my_lab.losses:slic(delta=1.0)" to a function, without eval.

A bare name is looked up in the table that the caller passes; "module:function" is imported. Keyword values are
Python literals, read by `ast.literal_eval`. Everything that can be wrong is found here, before device work.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def select(text: str, table: Mapping[str, Callable]) -> Callable:
    """The function that `text` names, its keywords bound.

    Args:
      text: `name`, `name(key=literal, ...)` or `package.module:name(key=literal, ...)`.
      table: the functions known by a bare name.

    Raises:
      ValueError: the text is malformed, or the name, module or keyword does not exist; the message lists what does.
    """
    target, keywords = _parse(text)
    function = _import(target, text) if ":" in target else _look_up(target, table)
    known = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    names = [n for n, p in known.items() if p.kind is p.KEYWORD_ONLY]
    for name in keywords:
        if name not in names and not takes_any:
            raise ValueError(
                f"{text!r}: {target} has no keyword {name!r}{_nearest(name, names)}; it takes {_list(names)}"
            )
    return functools.partial(function, **keywords) if keywords else function


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    target, bracket, rest = text.strip().partition("(")
    if not bracket:
        return target, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise SyntaxError
        return target.strip(), {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError):
        raise ValueError(f"{text!r} is not of the form name(key=value, ...) with literal values") from None


def _look_up(name: str, table: Mapping[str, Callable]) -> Callable:
    if name not in table:
        raise ValueError(
            f"unknown name {name!r}{_nearest(name, list(table))}; known are {_list(sorted(table))}, "
            "or name your own as package.module:function"
        )
    return table[name]


def _import(target: str, text: str) -> Callable:
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ValueError(f"{text!r} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's runs as it is imported
        absent = isinstance(error, ModuleNotFoundError) and error.name in (module_name, module_name.split(".")[0])
        hint = "is its folder on PYTHONPATH?" if absent else "JAXALIGN_TRACEBACK=1 shows where"
        raise ValueError(
            f"{text!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); {hint}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ValueError(
            f"{text!r}: {module_name} has no function {name!r}{_nearest(name, public)}; it has {_list(public)}"
        )
    return function


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _list(names: list[str]) -> str:
    return ", ".join(names) if names else "nothing"
