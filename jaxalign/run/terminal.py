"""Text of a model on a terminal, printed once as it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TextIO

from jaxalign.outside import visible


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
