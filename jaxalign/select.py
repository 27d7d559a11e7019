"""Functions from text such as "ipo(beta=0.05)" or "my_lab.losses:slic(delta=1.0)", without eval.

A bare name is looked up in the table that the caller passes; "module:function" is imported, which runs that module:
only texts that the user wrote on the command line may do so, and none that comes from a file. Keyword values are Python
literals, read by `ast.literal_eval`, of the type and within the `Limit`s that the function's annotations have, as
settings are. Several with weights are a sum: "dpo(beta=0.1) + 0.2*sft". Everything that can be wrong with the text is
raised here, before device work.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import inspect
import io
import math
import tokenize
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from jaxalign.config.limits import broken_rule, described, fits, unpacked
from jaxalign.mistake import Mistake
from jaxalign.outside import NAMES, brief


def select(text: str, table: Mapping[str, Callable]) -> Callable:
    """The function that `text` names, its keywords bound.

    Args:
      text: `name`, `name(key=literal, ...)` or `package.module:name(key=literal, ...)`.
      table: the functions known by a bare name.

    Raises:
      Mistake: the text is malformed; the name, module or keyword does not exist, and the message lists what does; or
        a keyword's value is of another type than its annotation, or outside its limits.
    """
    target, keywords = _parse(text)
    function = _import(target, text) if ":" in target else _look_up(target, table)
    known = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    names = [n for n, p in known.items() if p.kind is p.KEYWORD_ONLY]
    for name in keywords:
        if name not in names and not takes_any:
            raise Mistake(
                f"{brief(text)!r}: {target} has no keyword {name!r}{nearest(name, names)}; it takes {listed(names)}"
            )
    _check_values(target, function, keywords)
    return functools.partial(function, **keywords) if keywords else function


def _check_values(target: str, function: Callable, keywords: Mapping[str, Any]) -> None:
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception:  # the annotations of a user's function may name anything
        hints = {}
    for name, value in keywords.items():
        hint, marks = unpacked(hints.get(name, Any))
        rule = broken_rule(value, marks) if fits(value, hint) else _in_words(hint)
        if rule:
            raise Mistake(f"{target}: {name}={brief(repr(value))} must be {rule}")


def _in_words(hint: Any) -> str:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = {type(None): "None", **NAMES, bool: "True or False"}
    return " or ".join(words.get(option) or described(option) for option in options)


def select_sum(text: str, table: Mapping[str, Callable]) -> tuple[tuple[float, Callable], ...]:
    """The (weight, function) terms of `text`, a sum such as "dpo(beta=0.1) + 0.2*sft"; a term without weight counts 1.

    Args:
      text: terms joined by +, each a text for `select`, optionally after a number and *.
      table: the functions known by a bare name.

    Raises:
      Mistake: a term without function or with a weight that is not a finite number, or an error of `select`.
    """
    return tuple((weight, select(term, table)) for weight, term in terms(text))


def terms(text: str) -> tuple[tuple[float, str], ...]:
    """The (weight, text of the function) terms of a sum. Raises Mistake as `select_sum` does for terms and weights."""
    return tuple(_weighted(term, text) for term in _terms(text))


def names_own_code(text: str) -> bool:
    """True if a text for `select` or `select_sum` names code of a user's own, which using it would import.

    The keyword `rule`, of a reward model, is such a text as well.
    """
    return any(_imports(term) for term in _terms(text))


def _imports(term: str) -> bool:
    if ":" in term.partition("(")[0]:
        return True
    try:
        rule = _parse(term)[1].get("rule")
    except Mistake:  # of a text that cannot be selected either
        return False
    return isinstance(rule, str) and names_own_code(rule)


def _terms(text: str) -> list[str]:
    """The text cut at each + outside brackets. Python's tokenizer reads strings whole, and 1e+3 as one number."""
    cuts, depth = [0], 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type != tokenize.OP:
                continue
            depth += (token.string in "([{") - (token.string in ")]}")
            if token.string == "+" and depth == 0:
                cuts += [token.start[1], token.end[1]]
    except (tokenize.TokenError, SyntaxError):
        pass  # an open bracket or string: `select` raises on the rest
    cuts.append(len(text))
    return [text[start:end].strip() for start, end in zip(cuts[::2], cuts[1::2], strict=True)]


def _weighted(term: str, text: str) -> tuple[float, str]:
    weight, star, rest = term.partition("*")
    if not star or "(" in weight:
        weight, rest = "1", term
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if broken_rule(number, ()):
        raise Mistake(
            f"{brief(text)!r}: {brief(weight)!r} is not a finite number; a weight stands before its "
            "function, as in 0.2*sft"
        )
    if not rest.strip():
        raise Mistake(f"{brief(text)!r} has a term without a function; a sum is written as in dpo(beta=0.1) + 0.2*sft")
    return number, rest.strip()


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    target, bracket, rest = text.strip().partition("(")
    if not bracket:
        return target, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise SyntaxError
        return target.strip(), {k.arg: _literal(k.value) for k in call.keywords if k.arg}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        # the last three: literals such as {[]: 1}, and thousands of brackets
        raise Mistake(
            f"{brief(text)!r} is not of the form name(key=value, ...) with literal values, such as 0.1, None or 'text'"
        ) from None


def _literal(node: ast.expr) -> Any:
    """The value of a literal; also of inf and nan, which a number's rule then refuses by name."""
    source = ast.unparse(node)
    return float(source) if source in ("inf", "-inf", "nan") else ast.literal_eval(node)


def _look_up(name: str, table: Mapping[str, Callable]) -> Callable:
    if name not in table:
        raise Mistake(
            f"unknown name {brief(name)!r}{nearest(name, list(table))}; known are {listed(sorted(table))}, "
            "or name your own as package.module:function"
        )
    return table[name]


def _import(target: str, text: str) -> Callable:
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise Mistake(f"{brief(text)!r} is not of the form package.module:function")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # importing runs the user's module, which may raise anything
        absent = isinstance(error, ModuleNotFoundError) and error.name in (module_name, module_name.split(".")[0])
        hint = "is its folder on PYTHONPATH?" if absent else "JAXALIGN_TRACEBACK=1 shows where"
        reason = f"{brief(type(error).__name__)}: {brief(str(error), 300)}"
        raise Mistake(f"{brief(text)!r}: cannot import {module_name!r} ({reason}); {hint}") from error
    function = getattr(module, name, None)
    if not callable(function):
        public = sorted(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise Mistake(
            f"{brief(text)!r}: {module_name} has no function {name!r}{nearest(name, public)}; it has {listed(public)}"
        )
    return function


def nearest(name: str, known: list[str]) -> str:
    """The question " (did you mean 'name'?)" with the closest known name; "" if none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def listed(names: list[str]) -> str:
    """The names joined by commas, for an error's text."""
    return ", ".join(names) if names else "nothing"
