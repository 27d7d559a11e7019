"""A conversation as the model reads it: turns of a chat template, or one growing text, whose oldest part is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxalign.data.read.tokens import context_ids, continuation, text_ids
from jaxalign.mistake import Mistake


class ModelInput(NamedTuple):
    """The tokens that the model reads next."""

    ids: list[int]
    dropped: int  # turns, or tokens of the text, that no longer fit


class Conversation:
    """Turns of user and assistant, rendered with the tokenizer's chat template."""

    dropped_of = "turns"

    def __init__(self, tokenizer: Any, *, room: int, system: str | None = None):
        """
        Args:
          tokenizer: with a chat template.
          room: tokens that a prompt may have.
          system: the message that stands before all, whatever is dropped.
        """
        self._tokenizer, self._room = tokenizer, room
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []

    def ask(self, text: str) -> ModelInput:
        """Adds a turn of the user. Raises Mistake, and adds nothing, where it alone is too long."""
        turns = [*self._turns, {"role": "user", "content": text}]
        while len(ids := self._ids(turns)) > self._room:
            if len(turns) == 1:
                raise Mistake(_too_long(len(ids), self._room))
            turns = turns[2:]
        dropped = len(self._turns) + 1 - len(turns)
        self._turns = turns
        return ModelInput(ids, dropped)

    def answer(self, ids: Sequence[int], text: str) -> None:
        """Adds the model's response."""
        self._turns.append({"role": "assistant", "content": text})

    def forget(self) -> None:
        """Takes back the last `ask`; parts that were dropped for it stay dropped."""
        self._turns.pop()

    def reset(self) -> None:
        """Drops all but the system message."""
        self._turns = []

    def _ids(self, turns: list[dict[str, str]]) -> list[int]:
        return context_ids(self._tokenizer, [*self._system, *turns])


class Continuation:
    """One text that user and model write in turn, for tokenizers without a chat template."""

    dropped_of = "tokens"

    def __init__(self, tokenizer: Any, *, room: int):
        self._tokenizer, self._room = tokenizer, room
        self._ids: list[int] = []
        self._before = 0  # ids before the last `ask`

    def ask(self, text: str) -> ModelInput:
        """Adds a line. Raises Mistake, and adds nothing, where it alone is too long."""
        added = continuation(self._tokenizer, f"\n{text}") if self._ids else text_ids(self._tokenizer, text)
        if len(added) > self._room:
            raise Mistake(_too_long(len(added), self._room))
        dropped = max(0, len(self._ids) + len(added) - self._room)
        self._before = len(self._ids) - dropped
        self._ids = [*self._ids, *added][dropped:]
        return ModelInput(list(self._ids), dropped)

    def answer(self, ids: Sequence[int], text: str) -> None:
        """Adds the model's response."""
        self._ids = [*self._ids, *ids]

    def forget(self) -> None:
        """Takes back the last `ask`; parts that were dropped for it stay dropped."""
        self._ids = self._ids[: self._before]

    def reset(self) -> None:
        """Drops everything."""
        self._ids = []


def _too_long(tokens: int, room: int) -> str:
    return (
        f"that has {tokens} tokens and there is room for {room}: the model's window less `max_new_tokens`; say it in "
        "fewer words, or lower `max_new_tokens`"
    )
