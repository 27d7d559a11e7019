"""Ids and masks of rows, in one flat array. Prompt and response are tokenised apart and their ids joined."""

from __future__ import annotations

import dataclasses
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.read import chat
from jaxalign.data.read.formats import Conversation, Normal, PromptCompletion, Text
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


@dataclasses.dataclass
class Encoder:
    """Tokenises rows by the settings of a run, and counts the rows that it drops and cuts.

    The bos token opens a sequence if the tokenizer itself would put it there; one terminator ends each response.
    """

    tokenizer: Any
    terminators: Sequence[int]  # ids; the first is appended, unless a templated turn ends with one of them
    max_length: int
    turns: str = "all"
    windows: bool = False  # texts longer than max_length are cut into several examples, not shortened
    keeps_empty: bool = False  # keep an empty response, which is its terminator alone: a policy may give one
    dropped: Counter = dataclasses.field(default_factory=Counter)
    first_dropped: dict[str, str] = dataclasses.field(default_factory=dict)
    shortened: int = 0

    def __post_init__(self) -> None:
        probe = self.tokenizer("a")["input_ids"]
        bos = self.tokenizer.bos_token_id
        self.bos = [bos] if bos is not None and probe[:1] == [bos] else []
        self._terminator_texts = [t for t in self.tokenizer.convert_ids_to_tokens(list(self.terminators)) if t]
        self._anchor = self._plain("\n")
        # SentencePiece puts a space before every text that it tokenises, but not behind a newline
        self._anchored = (
            self._plain("\na")[: len(self._anchor)] == self._anchor
            and self._plain("a") != (self._plain("\na")[len(self._anchor) :])
        )

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def continuation(self, text: str) -> list[int]:
        """Ids of text that continues another: without the space that some tokenizers put before a text."""
        if not self._anchored:
            return self._plain(text)
        ids = self._plain("\n" + text)
        return ids[len(self._anchor) :] if ids[: len(self._anchor)] == self._anchor else self._plain(text)

    def encode(self, row: Normal, *, where: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, mask) of each example of a row: one, several windows of it, or none if it is dropped."""
        if isinstance(row, Text):
            return self._text(row.text, where)
        if isinstance(row, PromptCompletion):
            if not row.completion.strip() and not self.keeps_empty:
                return self._drop("empty response", where)
            prompt = [*self.bos, *self._plain(row.prompt)]
            parts = [(prompt, False), ([*self.continuation(row.completion), self.terminators[0]], True)]
        else:
            answers = [m["content"].strip() for m in row.messages if m["role"] == "assistant"]
            if not answers:
                return self._drop("no turn of the assistant", where)
            if not answers[-1] and not self.keeps_empty:
                return self._drop("empty response", where)
            parts = self._conversation(row, where)
        return self._fit(parts, where)

    def _text(self, text: str, where: str) -> list[tuple[np.ndarray, np.ndarray]]:
        if not text.strip():
            return self._drop("empty text", where)
        ids = np.array([*self.bos, *self._plain(text), self.terminators[0]], np.int32)
        step = self.max_length if self.windows else len(ids)
        if len(ids) > self.max_length:
            self.shortened += 1
        pieces = [ids[at : at + step][: self.max_length] for at in range(0, len(ids), step)]
        windows = [(piece, np.ones(len(piece), bool)) for piece in pieces if len(piece) > 1]
        return windows or self._drop("a text of one token, which nothing predicts", where)

    def _conversation(self, row: Conversation, where: str) -> list[tuple[list[int], bool]]:
        try:
            spans = chat.spans(self.tokenizer, row.messages, terminators=self._terminator_texts, turns=self.turns)
        except ValueError as error:
            raise Mistake(f"{where}: {error}") from None
        parts = []
        for i, span in enumerate(spans):
            ids = self.continuation(span.text) if i else self.opening(span.text)
            if span.learned and ids[-1:] and ids[-1] not in self.terminators:
                ids = [*ids, self.terminators[0]]
            parts.append((ids, span.learned))
        return parts

    def opening(self, text: str) -> list[int]:
        """Ids of text that begins a sequence, behind one bos token if the tokenizer puts it there."""
        ids = self._plain(text)
        return ids if ids[: len(self.bos)] == self.bos else [*self.bos, *ids]

    def _fit(self, parts: list[tuple[list[int], bool]], where: str) -> list[tuple[np.ndarray, np.ndarray]]:
        ids = np.concatenate([np.array(part, np.int32) for part, _ in parts])
        mask = np.concatenate([np.full(len(part), learned) for part, learned in parts])
        if len(ids) > self.max_length:
            self.shortened += 1
            ids, mask = ids[: self.max_length], mask[: self.max_length]
        if not mask[1:].any():
            return self._drop("the prompt fills the window", where)
        return [(ids, mask)]

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
