"""Rows of JSON lines, and the place in a file of whatever cannot be read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxalign.mistake import Mistake
from jaxalign.outside import brief

Row = dict[str, Any]


def repaired(text: str) -> str:
    """The text with U+FFFD for each unpaired surrogate, which is no character and which no tokenizer accepts."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def parse_json(text: str, path: Path, line: int = 1) -> Any:
    """json.loads, which also repairs texts that were cut through an emoji, as "\\ud83d" was. Raises Mistake."""
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if not re.search(r"\\u[dD][89a-fA-F]", text):
            return value
        return json.loads(repaired(json.dumps(value, ensure_ascii=False)))
    except RecursionError:
        at, reason = _deepest(text), "lists or objects are nested too deeply"
    except json.JSONDecodeError as error:
        at, reason = error.pos, f"not JSON ({error.msg})"
    except _TwiceError as error:
        at, reason = _row_with_a_key_twice(text), f"the key {brief(repr(str(error)), 40)} stands twice in an object"
    except ValueError:  # of int()
        digits = sys.get_int_max_str_digits()
        number = re.search(rf"\d{{{digits + 1},}}", text)
        at, reason = number.start() if number else 0, f"a number has more than {digits} digits"
    start = text.rfind("\n", 0, at) + 1
    shown = brief(repr(text[start : start + 60]))
    raise Mistake(f"data file {path}, line {line + text.count(chr(10), 0, at)}: {reason}: {shown}")


class _TwiceError(ValueError):
    """An object has a key twice, of which Python would keep the last value in silence."""


def _object(pairs: list[tuple[str, Any]]) -> Row:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(next(name for at, name in enumerate(names) if name in names[:at]))
    return value


def _row_with_a_key_twice(text: str) -> int:
    """Index of the first item of the first list of a text that is refused; 0 if it is none of them."""
    decoder, at = json.JSONDecoder(object_pairs_hook=_object), text.find("[") + 1
    while at:
        at = len(text) - len(text[at:].lstrip(" \t\r\n,"))
        try:
            _, at = decoder.raw_decode(text, at)
        except _TwiceError:
            return at
        except ValueError:
            return 0
    return 0


def _deepest(text: str) -> int:
    """Index of the innermost bracket outside texts."""
    depth, deepest, at = 0, 0, 0
    for match in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[{}\]]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > deepest:
            deepest, at = depth, match.start()
    return at


def read_jsonl(text: str, path: Path) -> Iterator[Row]:
    # lines end with \n alone: str.splitlines would also cut at U+2028 and others that JSON strings may contain
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, path, number)
        if not isinstance(row, dict):
            raise Mistake(f"data file {path}, line {number}: a {type(row).__name__}, not an object of columns")
        yield row
