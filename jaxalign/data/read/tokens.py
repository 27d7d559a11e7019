"""Ids and masks of rows, in one flat array; and the ids of contexts, one law for training and inference.

Before a learned token stand exactly the ids that inference reads: `text_ids` of a text, `context_ids` of messages. The
ids of a response continue them.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.read import turns
from jaxalign.data.read.chat import Message
from jaxalign.data.read.formats import Conversation, Normal, PromptCompletion, Text
from jaxalign.data.read.turns import Turns
from jaxalign.mistake import Mistake


@dataclasses.dataclass(frozen=True)
class Examples:
    """Sequences of ids with masks, one after another. Example i is [offsets[i], offsets[i + 1])."""

    ids: np.ndarray  # Int32[total]
    mask: np.ndarray  # Bool[total], True on what is learned; False on each example's first token
    offsets: np.ndarray  # Int64[count + 1]

    @classmethod
    def of(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Examples:
        """From (ids, mask) pairs. The first token of each is never learned: nothing predicts it."""
        lengths = [len(ids) for ids, _ in parts]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        ids = np.concatenate([*(ids for ids, _ in parts), np.zeros(0, np.int32)]).astype(np.int32)
        mask = np.concatenate([*(mask for _, mask in parts), np.zeros(0, bool)]).astype(bool)
        mask[offsets[:-1][np.array(lengths, int) > 0]] = False
        return cls(ids, mask, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        at = slice(self.offsets[i], self.offsets[i + 1])
        return self.ids[at], self.mask[at]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, indices: Sequence[int] | np.ndarray) -> Examples:
        """Some of the examples, in the order given."""
        return Examples.of([self[int(i)] for i in indices])

    def fingerprint(self) -> int:
        """Number that changes with any id, mask or length; a run that resumes checks that its data have the same."""
        parts = self.ids, np.packbits(self.mask), self.offsets
        return zlib.crc32(b"".join(np.ascontiguousarray(p).tobytes() for p in parts))


def joined(sets: Sequence[Examples]) -> Examples:
    """All examples of all sets, in order."""
    return Examples.of([examples[i] for examples in sets for i in range(len(examples))])


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, and nothing before or behind them."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def opening_ids(tokenizer: Any) -> list[int]:
    """Ids that the tokenizer puts before every text, such as that of a bos token."""
    part, whole = plain_ids(tokenizer, "a"), tokenizer("a")["input_ids"]
    return whole[: next((k for k in range(len(whole)) if whole[k : k + len(part)] == part), 0)]


def text_ids(tokenizer: Any, text: str, opening: list[int] | None = None) -> list[int]:
    """Ids of a text that opens a sequence: behind what the tokenizer puts before a text, such as a bos token, once.

    Some tokenizers put an eos token behind a text, too. It is left off, since it would end what a response continues.

    Args:
      tokenizer: of transformers.
      text: to be tokenised.
      opening: `opening_ids` of the tokenizer, where they are known.
    """
    opening = opening_ids(tokenizer) if opening is None else opening
    ids = plain_ids(tokenizer, text)
    return ids if ids[: len(opening)] == opening else [*opening, *ids]


def context_ids(
    tokenizer: Any, messages: Sequence[Message], tools: Any = None, *, open_turn: bool = False
) -> list[int]:
    """Ids that inference reads of messages, up to the beginning of the response.

    They are those of apply_chat_template(add_generation_prompt=True): of the whole text of the template, which writes
    its own bos token, or none.

    Args:
      tokenizer: with a chat template.
      messages: as `formats.Conversation` has them.
      tools: JSON schemas of the functions that the assistant may call, or None.
      open_turn: the response continues the last message.

    Raises:
      Mistake: the template refuses the messages, or leaves out a part of them.
    """
    return plain_ids(tokenizer, turns.context(tokenizer, messages, tools, open_turn=open_turn))


def response_ids(tokenizer: Any, context: str, response: str) -> list[int]:
    """Ids of a response behind a context, whose own ids stay as they are.

    They are the rest of the ids of both texts together; or, where a token of these would reach from the context into
    the response, the ids of a text that continues another.
    """
    before = plain_ids(tokenizer, context)
    if tokenizer.is_fast:
        both = tokenizer(context + response, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, places, count = both["input_ids"], both["offset_mapping"], len(before)
        ends, starts = (end for _, end in places[:count][-1:]), (start for start, _ in places[count:][:1])
        if ids[:count] == before and max(ends, default=0) <= len(context) <= min(starts, default=len(context)):
            return ids[count:]
    return continuation(tokenizer, response)


def continuation(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that continues another: without the blank that SentencePiece puts before every text.

    It puts none behind a newline.
    """
    anchor, behind = plain_ids(tokenizer, "\n"), plain_ids(tokenizer, "\na")
    if behind[: len(anchor)] == anchor and plain_ids(tokenizer, "a") != behind[len(anchor) :]:
        ids = plain_ids(tokenizer, f"\n{text}")
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
    return plain_ids(tokenizer, text)


@dataclasses.dataclass
class Encoder:
    """Tokenises rows by the settings of a run, and counts the rows that it drops and cuts.

    A learned response stands behind the ids that inference reads, and ends with one terminator.
    """

    tokenizer: Any
    terminators: Sequence[int]  # ids; the first is appended to responses that nothing ends
    max_length: int
    turns: str = "all"
    windows: bool = False  # texts longer than max_length are cut into several examples, not shortened
    keeps_empty: bool = False  # keep an empty response, which is its terminator alone: a policy may give one
    dropped: Counter = dataclasses.field(default_factory=Counter)
    first_dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    shortened: int = 0
    notes: Counter = dataclasses.field(default_factory=Counter)  # what was done to conversations, with their number

    def __post_init__(self) -> None:
        self._ends = [self.tokenizer.decode([i], skip_special_tokens=False) for i in self.terminators]
        self._turns = Turns(self.tokenizer, self._ends)
        self._opening_ids = opening_ids(self.tokenizer)

    def opening(self, text: str) -> list[int]:
        """Ids of text that begins a sequence."""
        return text_ids(self.tokenizer, text, self._opening_ids)

    def continuation(self, text: str) -> list[int]:
        """Ids of text that continues another."""
        return continuation(self.tokenizer, text)

    def encode(self, row: Normal, *, where: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, mask) of each example of a row: one, several windows or turns of it, or none if it is dropped."""
        if isinstance(row, Text):
            return self._text(row.text, where)
        if isinstance(row, PromptCompletion):
            if not turns.once_ended(row.completion, self._ends)[0].strip() and not self.keeps_empty:
                return self._drop("empty response", where)
            prompt, response = self.opening(row.prompt), self._response(row.prompt, row.completion)
            return self._fit([([*prompt, *response], [*[False] * len(prompt), *[True] * len(response)])], where)
        answers = [i for i, m in enumerate(row.messages) if m["role"] == "assistant"]
        learned = [i for i in answers if i and row.messages[i].get("learn", True)]
        if not learned:
            reasons = ("no turn of the assistant", "no turn of the assistant that is learned and has one before it")
            return self._drop(reasons[bool(answers)], where)
        if not turns.says(row.messages[learned[-1]]) and not self.keeps_empty:
            return self._drop("empty response", where)
        if answers[0] == 0:
            self.notes["begin with the assistant, whose first turn is context only, as nothing asks for it"] += 1
        if self.turns == "last":
            learned = learned[-1:]
        try:
            return self._fit(self._conversation(row, learned), where)
        except Mistake as error:
            raise Mistake(f"{where}: {error}") from None

    def _response(self, context: str, text: str, end: str = "") -> list[int]:
        """Ids of a response and one terminator, unless the text ends with the token `end` of the template."""
        ids = response_ids(self.tokenizer, context, "".join(turns.once_ended(text, self._ends)))
        ends = {*self.terminators, *([self.tokenizer.convert_tokens_to_ids(end)] if end else [])}
        return ids if ids and ids[-1] in ends else [*ids, self.terminators[0]]

    def _text(self, text: str, where: str) -> list[tuple[np.ndarray, np.ndarray]]:
        text = "".join(turns.once_ended(text, self._ends))
        if not text.strip():
            return self._drop("empty text", where)
        whole = self.opening(text)
        ids = np.array(whole if whole[-1] in self.terminators else [*whole, self.terminators[0]], np.int32)
        step = self.max_length if self.windows else len(ids)
        if len(ids) > self.max_length:
            self.shortened += 1
        pieces = [ids[at : at + step][: self.max_length] for at in range(0, len(ids), step)]
        windows = [(piece, np.ones(len(piece), bool)) for piece in pieces if len(piece) > 1]
        return windows or self._drop("a text of one token, which nothing predicts", where)

    def _conversation(self, row: Conversation, learned: Sequence[int]) -> list[tuple[list[int], list[bool]]]:
        """(ids, mask) of examples in which every learned turn has the ids before it that inference reads.

        A turn stands in one example with those before it if its context begins with that example; else it begins an
        example of its own, behind its whole context.
        """
        says = [i for i in learned if turns.says(row.messages[i]) or i == learned[-1]]  # silence is not taught
        parts: list[tuple[list[int], list[bool]]] = []
        for turn in self._turns.learned(row, says):
            context = plain_ids(self.tokenizer, turn.context)
            response = self._response(turn.context, turn.response, turn.end)
            mask = parts.pop()[1] if parts and context[: len(parts[-1][0])] == parts[-1][0] else []
            mask = [*mask, *[False] * (len(context) - len(mask)), *[True] * len(response)]
            parts.append(([*context, *response], mask))
        if len(parts) > 1:
            self.notes["became an example a turn, as no single one has the ids of inference before every turn"] += 1
        return parts

    def _fit(self, parts: list[tuple[list[int], list[bool]]], where: str) -> list[tuple[np.ndarray, np.ndarray]]:
        self.shortened += any(len(ids) > self.max_length for ids, _ in parts)
        rows = [(np.array(i, np.int32)[: self.max_length], np.array(m, bool)[: self.max_length]) for i, m in parts]
        return [(ids, mask) for ids, mask in rows if mask[1:].any()] or self._drop("the prompt fills the window", where)

    def _drop(self, reason: str, where: str) -> list:
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, where)
        return []


def show(tokenizer: Any, ids: np.ndarray, mask: np.ndarray, *, limit: int = 400) -> str:
    """The decoded example, special tokens included, with its learned tokens between ⟦ and ⟧."""
    edges = np.flatnonzero(np.diff(mask.astype(np.int8))) + 1
    pieces = []
    for piece, learned in zip(np.split(ids, edges), np.split(mask, edges), strict=True):
        text = tokenizer.decode(piece.tolist(), skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if learned.any() else text)
    text = "".join(pieces)
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"
