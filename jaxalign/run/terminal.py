"""Text of a model on a terminal: without control characters, and printed once as it grows."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import TextIO

# Marks of writing direction show text in another order than it is in; line separators end lines where nobody looks.
HIDDEN = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")


def visible(text: str, encoding: str | None = None) -> str:
    r"""The text with every character that a terminal would obey written as \x1b, line ends and tabs aside.

    Args:
      encoding: of the terminal; what it cannot say is written as its number too.
    """
    shown = "".join(c if c in "\n\t" or not _obeyed(c) else c.encode("unicode_escape").decode() for c in text)
    return sayable(shown, encoding)


def sayable(text: str, encoding: str | None) -> str:
    r"""The text with every character that the encoding lacks written as \u2028."""
    return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")


def _obeyed(c: str) -> bool:
    return c in HIDDEN or unicodedata.category(c) in ("Cc", "Cs")


class Stream:
    """Writes a text that grows token by token."""

    def __init__(self, decode: Callable[[Sequence[int]], str], out: TextIO):
        self._decode, self._out = decode, out
        self.tokens: list[int] = []  # that were shown last
        self.text = ""  # what was written

    def show(self, tokens: Sequence[int]) -> None:
        """Writes what is new. The bytes of a character that is not whole yet wait for the rest of it."""
        self.tokens = list(tokens)
        self._write(self._decode(self.tokens).rstrip("\ufffd"))

    def finish(self, tokens: Sequence[int]) -> None:
        """Writes the rest and ends the line."""
        self.tokens, whole = list(tokens), self._decode(list(tokens))
        if not whole.startswith(self.text):  # a tokenizer that writes the beginning anew
            self._out.write("\n")
            self.text = ""
        self._write(whole)
        self._out.write("\n")
        self._out.flush()

    def _write(self, text: str) -> None:
        if len(text) > len(self.text) and text.startswith(self.text):
            new, self.text = text[len(self.text) :], text
            self._out.write(visible(new, self._out.encoding))
            self._out.flush()
