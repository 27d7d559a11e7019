"""Prompts for policies to answer, with the other columns of their rows, which rewards may read."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxalign.data.batches.plan import Batches, Mixture, Plan, order
from jaxalign.data.read import formats, sources
from jaxalign.data.read.formats import Conversation
from jaxalign.data.read.spellings import is_empty, tools_of
from jaxalign.data.read.tokens import context_ids, text_ids
from jaxalign.mistake import Mistake
from jaxalign.outside import brief

log = logging.getLogger(__name__)

# A text to continue, or messages to answer, of which the first has the "tools" of the conversation, if there are any.
Prompt = str | Sequence[dict[str, Any]]
LastTurn = Literal["refuse", "continue", "drop"]  # for a prompt whose last turn is the assistant's


def _prompt(column: str, *, question: bool = False) -> formats.Format:
    """Rows with a prompt in this column, behind the system text and history of the row; answers stand elsewhere."""

    def convert(row: sources.Row) -> Prompt:
        value = row.get(column)
        if not isinstance(value, str) and not (isinstance(value, list) and value):
            raise Mistake(f"{column!r} holds {brief(repr(value))}; it must be a text, or a list of messages")
        prompt, tools = (
            formats.framed(formats.question(row, column) if question else value, row),
            formats.tools_beside(row),
        )
        if isinstance(prompt, str) and not tools:
            return prompt
        conversation = formats.messages(formats.turns_of(prompt), tools)
        first, *others = conversation.messages
        return [first | ({"tools": conversation.tools} if conversation.tools else {}), *others]

    history = () if column in ("messages", "conversations") else ("history",)
    reads = (*formats.SYSTEM, *history, *formats.TOOLS, *(formats.BESIDE if question else ()))
    return formats.Format(f"prompts in {column!r}", (column,), convert, reads)


PROMPT_FORMATS = (
    _prompt("prompt"),
    _prompt("messages"),
    _prompt("conversations"),
    _prompt("question", question=True),
    _prompt("instruction", question=True),
    _prompt("query", question=True),
)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts to answer: ids for the model, and texts or messages for rewards."""

    ids: list[tuple[int, ...]]
    raw: list[Any]  # texts or messages, as they stand in the data
    columns: dict[str, list[Any]]  # the other columns of the rows, by name
    sizes: tuple[int, ...] = ()  # prompts of each source
    weights: tuple[float | None, ...] = ()  # of each source

    def __len__(self) -> int:
        return len(self.ids)

    def fingerprint(self) -> int:
        """Number that changes with any prompt or column."""
        whole = repr((self.ids, sorted(self.columns.items())))
        return zlib.crc32(whole.encode())


def read(
    rows: Sequence[sources.Row], name: str, *, elsewhere: Callable[[str], bool] = lambda column: False
) -> tuple[list[Prompt], list[Any], list[sources.Row]]:
    """(the prompt of each row, the same as it stands in the data, the row's other columns)

    Args:
      rows: of one source.
      name: of the source, for errors and the log.
      elsewhere: True for a column that something else reads, as a reward.

    Raises:
      Mistake: no column holds a prompt, a row has no prompt, or a column that carries content is not read.
    """
    form = formats.recognise(rows[0], PROMPT_FORMATS, where=f"data {name}", otherwise="hold no prompt")
    (column,) = form.columns
    exempt = {name for name in formats.CONTENT if elsewhere(name)} | set(formats.OF_RESPONSES)
    prompts, raw, others, unread = [], [], [], set()
    for number, row in enumerate(rows, 1):
        prompt = formats.normalise(form, row, where=f"{name}, row {number}", elsewhere=exempt)
        unread |= formats.unread(form, row)
        prompts.append(prompt)
        # messages stay in the spelling of the data, unless something is put in front of them
        same = isinstance(row[column], list) and len(row[column]) == len(prompt) and is_empty(formats.tools_beside(row))
        raw.append(row[column] if same else prompt if isinstance(prompt, str) else list(prompt))
        others.append({name: value for name, value in row.items() if name != column})
    if unread := {column for column in unread if not elsewhere(column)}:
        log.info("%s: nothing reads %s", name, brief(", ".join(sorted(unread)), 400))
    return prompts, raw, others


def load(
    spec: str,
    tokenizer: Any,
    *,
    max_length: int,
    max_dropped: float,
    as_chat: bool = False,
    last_turn: LastTurn = "refuse",
    elsewhere: Callable[[str], bool] = lambda column: False,
) -> Prompts:
    """The prompts of `data`.

    Args:
      spec: as in `sources.parse`; rows are of one of PROMPT_FORMATS: a text, or a conversation to go on with.
      tokenizer: with a chat template, if prompts are conversations.
      max_length: most tokens of a prompt; longer ones are dropped, for a cut prompt asks another question.
      max_dropped: largest share of prompts that may be dropped.
      as_chat: texts are turns of the user.
      last_turn: for prompts whose last turn is the assistant's: refuse, continue or drop it.
      elsewhere: True for a column that a reward reads.

    Raises:
      Mistake: there are no rows, what `read` raises, a prompt is empty, or too many are too long.
    """
    ids, raw, others, dropped, answered, sizes, parts = [], [], [], 0, 0, [], sources.parse(spec)
    for source in parts:
        before = len(ids)
        rows = sources.load(source).rows
        if not len(rows):
            raise Mistake(f"data {source.name} has no rows")
        prompts, texts, columns = read(rows, source.name, elsewhere=elsewhere)
        for number, prompt in enumerate(prompts):
            where = f"{source.name}, row {number + 1}"
            if as_chat and isinstance(prompt, str):
                prompt = formats.turns_of(prompt)
            answered += ends_with_assistant(prompt)
            prompt = settled(prompt, where, last_turn)
            tokens = tuple(encode(prompt, tokenizer, where, last_turn))
            if not tokens:
                raise Mistake(f"{where}: the prompt is empty, so there is nothing to answer")
            if len(tokens) > max_length:
                dropped += 1
                continue
            ids.append(tokens)
            raw.append(texts[number] if isinstance(texts[number], str) else texts[number][: len(prompt)])
            others.append(columns[number])
        sizes.append(len(ids) - before)
        if source.weight is not None and not sizes[-1]:
            raise Mistake(
                f"data {source.name}: all prompts have more than {max_length} tokens, so its weight has no use"
            )
    if answered:
        what = {"continue": "goes on with", "drop": "does without"}[last_turn]
        log.info("%d prompts end with a turn of the assistant, which the response %s", answered, what)
    total = dropped + len(ids)
    if dropped:
        log.warning("%d of %d prompts have more than %d tokens and were dropped", dropped, total, max_length)
    if dropped == total or dropped > max_dropped * total:
        allow = "" if dropped == total else ", or allow it with `max_dropped`"
        raise Mistake(
            f"{dropped} of {total} prompts have more than {max_length} tokens, which is `max_length` - "
            f"`max_new_tokens`; raise `max_length` or lower `max_new_tokens`{allow}"
        )
    return Prompts(ids, raw, by_column(others), tuple(sizes), tuple(source.weight for source in parts))


def by_column(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """The values of every name that any row has; None where a row lacks it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def encode(prompt: Prompt | Conversation, tokenizer: Any, where: str, last_turn: LastTurn = "refuse") -> list[int]:
    """Ids of a text, or of messages up to the beginning of the response. Raises Mistake, with the place."""
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    if not tokenizer.chat_template:
        raise Mistake(f"{where}: the prompt is a conversation, but the tokenizer has no chat template; give texts")
    messages, tools = (prompt.messages, prompt.tools) if isinstance(prompt, Conversation) else (prompt, None)
    tools = tools_of(messages, tools)
    messages = [{k: v for k, v in m.items() if k != "tools"} for m in settled(messages, where, last_turn)]
    try:
        return context_ids(tokenizer, messages, tools, open_turn=ends_with_assistant(messages))
    except Mistake as error:
        raise Mistake(f"{where}: {error}") from None


def ends_with_assistant(prompt: Prompt) -> bool:
    """True of messages of which the last is the assistant's."""
    return not isinstance(prompt, str) and len(prompt) > 0 and prompt[-1]["role"] == "assistant"


def settled(prompt: Any, where: str, last_turn: LastTurn) -> Any:
    """The prompt, of which `last_turn` drop takes off the turns of the assistant at its end.

    Raises:
      Mistake: the last turn is the assistant's and is refused, or there are no others to keep.
    """
    if not ends_with_assistant(prompt) or last_turn == "continue":
        return prompt
    if last_turn == "refuse":
        raise Mistake(
            f"{where}: the last turn of the prompt is the assistant's, and a second one would begin behind it; with "
            "`last_turn` continue the response goes on with it, with drop it is taken off"
        )
    shorter = settled(prompt[:-1], where, last_turn)
    if not shorter:
        raise Mistake(f"{where}: all turns of the prompt are the assistant's, so with `last_turn` drop none is left")
    return shorter


class PromptBatches(Batches):
    """Step n -> the numbers of its prompts, Int64[N], all of them on every host."""

    def __init__(self, prompts: Prompts, plan: Plan, *, steps: int = 0):
        def epoch(number: int) -> np.ndarray:
            if None in prompts.weights:
                return order(len(prompts), (plan.seed, number), plan.shuffle)
            mixture = Mixture.of(prompts, prompts.sizes, prompts.weights)
            return mixture.epoch(number, seed=plan.seed, shuffle=plan.shuffle)

        super().__init__(plan, epoch, steps=steps)

    def __getitem__(self, step: int) -> np.ndarray:
        return np.array(self._items(step), np.int64)
