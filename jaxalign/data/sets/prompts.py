"""Prompts for policies to answer, with the other columns of their rows, which rewards may read."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.batches.plan import Batches, Plan, order
from jaxalign.data.read import chat, formats, sources
from jaxalign.mistake import Mistake

log = logging.getLogger(__name__)

Prompt = str | Sequence[dict[str, str]]  # a text to continue, or messages to answer
COLUMNS = ("prompt", "messages", "question", "instruction", "query")


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts to answer: ids for the model, and texts or messages for rewards."""

    ids: list[tuple[int, ...]]
    raw: list[Any]  # texts or messages, as they stand in the data
    columns: dict[str, list[Any]]  # the other columns of the rows, by name

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> int:
        """Number that changes with any prompt or column."""
        whole = repr((self.ids, sorted(self.columns.items())))
        return zlib.crc32(whole.encode())


def load(spec: str, tokenizer: Any, *, max_length: int, max_dropped: float, as_chat: bool = False) -> Prompts:
    """The prompts of `data`.

    Args:
      spec: as in `sources.parse`; rows have one of COLUMNS, which holds a text or a conversation to go on with.
      tokenizer: with a chat template, if prompts are conversations.
      max_length: most tokens of a prompt; longer ones are dropped, for a cut prompt asks another question.
      max_dropped: largest share of prompts that may be dropped.
      as_chat: texts are turns of the user.

    Raises:
      Mistake: there are no rows or no such column, a row has no prompt, or an empty one, or too many are too long.
    """
    ids, raw, others, dropped = [], [], [], 0
    for source in sources.parse(spec):
        rows = sources.load(source).rows
        if not len(rows):
            raise Mistake(f"data {source.name} has no rows")
        column = next((name for name in COLUMNS if name in rows[0]), None)
        if column is None:
            raise Mistake(
                f"data {source.name}: rows have {', '.join(rows[0])}; a prompt must be in one of {', '.join(COLUMNS)}"
            )
        for number, row in enumerate(rows, 1):
            where = f"{source.name}, row {number}"
            prompt = as_prompt(row.get(column), where, column)
            if as_chat and isinstance(prompt, str):
                prompt = formats.turns_of(prompt)
            tokens = tuple(encode(prompt, tokenizer, where))
            if not tokens:
                raise Mistake(f"{where}: `{column}` is empty, so there is nothing to answer")
            if len(tokens) > max_length:
                dropped += 1
                continue
            ids.append(tokens)
            raw.append(row[column])
            others.append({name: value for name, value in row.items() if name != column})
    total = dropped + len(ids)
    if dropped:
        log.warning("%d of %d prompts have more than %d tokens and were dropped", dropped, total, max_length)
    if dropped == total or dropped > max_dropped * total:
        allow = "" if dropped == total else ", or allow it with `max_dropped`"
        raise Mistake(
            f"{dropped} of {total} prompts have more than {max_length} tokens, which is `max_length` - "
            f"`max_new_tokens`; raise `max_length` or lower `max_new_tokens`{allow}"
        )
    return Prompts(ids, raw, by_column(others))


def by_column(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The values of every name that any row has; None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def as_prompt(value: Any, where: str, column: str) -> Prompt:
    """The prompt in a row's `column`, a text or messages. Raises Mistake, with the place, when it holds neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        return formats.normalise(formats.MESSAGES, {"messages": value}, where=where).messages
    raise Mistake(f"{where}: `{column}` holds {value!r}; it must be a text, or a list of messages")


def encode(prompt: Prompt, tokenizer: Any, where: str) -> list[int]:
    """Ids of a text, or of messages up to the beginning of the response. Raises Mistake, with the place."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    if not tokenizer.chat_template:
        raise Mistake(f"{where}: the prompt is a conversation, but the tokenizer has no chat template; give texts")
    try:
        text = chat.render(tokenizer, prompt, True)
    except ValueError as error:
        raise Mistake(f"{where}: {error}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


class PromptBatches(Batches):
    """Step n -> the numbers of its prompts, Int64[N], all of them on every host."""

    def __init__(self, count: int, plan: Plan, *, steps: int = 0):
        super().__init__(plan, lambda epoch: order(count, (plan.seed, epoch), plan.shuffle), steps=steps)

    def __getitem__(self, step: int) -> np.ndarray:
        return np.array(self._items(step), np.int64)
