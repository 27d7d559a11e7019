"""Input from outside: files that others wrote, read with types and limits, and texts made safe to print.

A file of another program can be damaged, huge, no file at all, or written to do harm. `read_text` and `read_object`
read regular files up to a limit; `Fields` returns the values of a JSON object with the type that the reader needs, and
raises a `Mistake` that names the file, the key, the value and the rule. Keys of files stand in quotes, not in
backquotes, which are for settings.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, overload

from jaxalign.mistake import Mistake

MIB = 1 << 20
JSON_LIMIT = 64 * MIB  # bytes of a config, an index or the description of a run
SHOWN = 80  # characters of a value in an error
# Marks of writing direction show text in another order than it is in; line separators end lines where nobody looks.
HIDDEN = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")
NAMES = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list",
    dict: "an object",
}

T = TypeVar("T", str, bool, int, float, list, dict)


def visible(text: str, encoding: str | None = None) -> str:
    r"""The text with every character that a terminal would obey written as \x1b, line ends and tabs aside.

    Args:
      encoding: of the terminal; characters that it lacks are written by their numbers too.
    """
    shown = "".join(c if c in "\n\t" or not _obeyed(c) else c.encode("unicode_escape").decode() for c in text)
    return sayable(shown, encoding)


def sayable(text: str, encoding: str | None) -> str:
    r"""The text with every character that the encoding lacks written as \u2028."""
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def _obeyed(c: str) -> bool:
    return c in HIDDEN or unicodedata.category(c) in ("Cc", "Cs")


def brief(value: Any, limit: int = SHOWN) -> str:
    """A value for an error or a log: on one line, safe to print, and cut to `limit` characters."""
    text = value if isinstance(value, str) else repr(value)
    text = visible(" ".join(text[: 4 * limit].split()))
    return text if len(text) <= limit else text[: limit - 1] + "…"


def check_local(name: str | Path, setting: str | None = None) -> None:
    """Raises Mistake on the address of a file, such as gs://bucket/run: files are read and written by their paths.

    Args:
      name: a path, or names with commas between them.
      setting: dotted name of the setting that it is of.
    """
    slashes = "/" if isinstance(name, Path) else "//"  # of several a Path keeps one
    for part in str(name).split(","):
        if scheme := re.match(rf"\s*([a-z][a-z0-9+.-]+):{slashes}", part, re.IGNORECASE):
            address = brief(f"{scheme[1]}://{part[scheme.end() :]}", 200)
            way_out = "copy it to a disk first, or name a model or set of the Hugging Face hub as owner/name"
            if scheme[1].lower() not in ("http", "https", "hf"):
                way_out = (
                    "cloud storage comes with the next version; until then mount it, as gcsfuse does for gs://, and "
                    "give the path, or use a local disk"
                )
            where = f"`{setting}` {address}" if setting else address
            raise Mistake(f"{where} is an address, and files are read and written by their paths: {way_out}")


def read_bytes(path: Path | str, *, limit: int) -> bytes:
    """The bytes of a regular file. Raises Mistake where it is something else, longer than `limit`, or unreadable.

    A named pipe or a device, which could give bytes for ever or never, is refused without being opened for reading.
    """
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Mistake(f"{brief(str(path), 200)} is not a regular file; give a file")
        with open(path, "rb") as file:
            # a buffer of the size that is asked for is made first
            content = file.read(min(limit, status.st_size or limit) + 1)
    except OSError as error:
        raise Mistake(f"{brief(str(path), 200)} cannot be read: {error.strerror or error}") from None
    if len(content) > limit:
        raise Mistake(f"{brief(str(path), 200)} has more than the {limit:,} bytes that such a file may have")
    return content


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raises Mistake, with the path and the way out, where a file of ours cannot be written, as on a full disk.

    Libraries that write by code of their own raise errors of other classes, which say "os error" and its number.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, Mistake) or not (isinstance(error, OSError) or "os error" in str(error)):
            raise
        reason = brief((error.strerror if isinstance(error, OSError) else None) or str(error), 200)
        raise Mistake(
            f"{brief(str(path), 200)} cannot be written ({reason}); make room there and run the same command again"
        ) from error


def read_text(path: Path | str, *, limit: int = JSON_LIMIT) -> str:
    """The UTF-8 text of a regular file. Raises Mistake."""
    try:
        return read_bytes(path, limit=limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Mistake(f"{brief(str(path), 200)} is not UTF-8 text (at byte {error.start}); fetch it again") from None


def read_object(path: Path | str, *, limit: int = JSON_LIMIT) -> Fields:
    """The JSON object in a file. Raises Mistake where the file is damaged or holds something else."""
    return Fields(read_json(path, limit=limit), brief(str(path), 200))


def read_json(path: Path | str, *, limit: int = JSON_LIMIT) -> Any:
    """The JSON value in a file. Raises Mistake."""
    return parse_json(read_text(path, limit=limit), brief(str(path), 200))


def parse_json(text: str, where: str) -> Any:
    """The JSON value of a text. Raises Mistake, with the place, also where it is too deep or a number too long."""
    try:
        return json.loads(text)
    except RecursionError:
        raise Mistake(f"{where} is not read: its brackets are nested too deeply") from None
    except ValueError as error:
        raise Mistake(f"{where} is not JSON: {brief(str(error), 200)}; fetch it again, or write it anew") from None


class Fields:
    """A JSON object from outside, whose values are returned with the type that the reader names."""

    def __init__(self, content: Any, where: str):
        """
        Raises:
          Mistake: `content` is no JSON object.
        """
        if not isinstance(content, dict):
            raise Mistake(f"{where} holds {brief(content)}, not an object with names and values")
        self.content: dict[str, Any] = content
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    @overload
    def get(self, key: str, kind: type[T]) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: T) -> T: ...
    @overload
    def get(self, key: str, kind: type[T], default: None) -> T | None: ...
    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of a key; null counts as absent.

        Args:
          kind: str, bool, int, float, list or dict. A float is finite and may be written as an integer; true is no int.
          default: what an absent key gives; without it the key must be there.

        Raises:
          Mistake: the key is absent, or its value is of another kind.
        """
        value = self.content.get(key)
        if value is None:
            if default is ...:
                raise Mistake(f"{self.where}: {key!r} is absent; it must hold {NAMES[kind]}")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e300:
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise Mistake(f"{self.where}: {key!r} is {brief(value)}; it must be {NAMES[kind]}")
        if kind is float and not math.isfinite(value):
            raise Mistake(f"{self.where}: {key!r} is {value}; it must be a finite number")
        return value

    def object(self, key: str) -> Fields:
        """The object under a key; an empty one if it is absent. Raises Mistake if it is no object."""
        return Fields(self.get(key, dict, {}), f"{self.where}: {key!r}")

    def texts(self, key: str) -> list[str]:
        """The list of texts under a key; empty if it is absent. Raises Mistake if it holds anything else."""
        return self._all(key, str, "texts")

    def whole_numbers(self, key: str) -> list[int]:
        """The list of whole numbers under a key; empty if it is absent. Raises Mistake if it holds anything else."""
        return self._all(key, int, "whole numbers")

    def _all(self, key: str, kind: type, kinds: str) -> list[Any]:
        values = self.get(key, list, [])
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise Mistake(f"{self.where}: {key!r} holds {brief(value)}; it must hold {kinds}")
        return values
