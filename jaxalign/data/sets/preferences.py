"""Feedback for reward models, DPO and KTO: from `data` to groups of responses, with a log of the groups dropped."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.batches.groups import Responses
from jaxalign.data.read import feedback_formats, formats, sources
from jaxalign.data.read.feedback_formats import PAIRS, RANKED, RATED, Group
from jaxalign.data.read.formats import Conversation, Format
from jaxalign.data.read.tokens import Encoder, Examples, show
from jaxalign.data.sets import split
from jaxalign.data.sets.split import Set
from jaxalign.data.sets.supervised import Options, check_template, log_unread, openings
from jaxalign.mistake import Mistake
from jaxalign.outside import visible

log = logging.getLogger(__name__)

# Defaults for pairs that lack a column: margin 0, preference 1, not a tie.
DEFAULTS = {"margin": np.float32(0), "preference": np.float32(1), "tie": np.bool_(False)}
NOTHING_BETTER = "no response is better than another"


def load(
    spec: str,
    tokenizer: Any,
    options: Options,
    *,
    kind: str,
    eval_spec: str | None = None,
    as_chat: bool = False,
    most_responses: int = 9,
    ties: bool = False,
) -> Set[Responses]:
    """Training and held-out groups of the kind that a method learns from.

    Args:
      spec: as in `sources.parse`.
      tokenizer: with a chat template if the data are messages.
      options: window, terminators and shares, as for supervised data. No held-out response is in a training group.
      kind: PAIRS (K = 2, chosen first), RANKED (up to `most_responses`, best first) or RATED (K = 1, with a label).
      eval_spec: held-out data of their own.
      as_chat: text prompts and responses are turns of a conversation.
      most_responses: K of RANKED: a longer ranking keeps its best.
      ties: keep PAIRS of which neither response is better, for a loss that reads the column `tie`.

    Raises:
      Mistake: as for supervised data; or the data hold no feedback of the kind.
    """
    reader = _Reader(tokenizer, options, kind, as_chat, {PAIRS: 2, RATED: 1}.get(kind, most_responses), ties)
    data = split.load(
        spec, eval_spec, reader.read, joined, eval_share=options.eval_share, seed=options.seed, numbers=response_numbers
    )
    log.info("held out for evaluation: %d groups", len(data.held_out))
    responses = data.responses
    for k, name in enumerate(("the first response", "and the one it is compared with")[: responses.groups.shape[1]]):
        ids, mask = responses.examples[int(responses.groups[0, k])]
        log.info("%s, its compared tokens between ⟦ ⟧:\n%s", name, visible(show(tokenizer, ids, mask)))
    return dataclasses.replace(data, prompts=openings(first_responses(data.held_out)))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the rows of a source as `Responses`, by the settings of a run."""

    tokenizer: Any
    options: Options
    kind: str
    as_chat: bool
    width: int  # K
    ties: bool

    def read(self, source: sources.Source, loaded: sources.Loaded, where: str) -> Responses:
        form = feedback_formats.recognise(
            loaded.rows[0], where=where, dialogues_as_texts=not self.as_chat and not self.tokenizer.chat_template
        )
        encoder = Encoder(self.tokenizer, self.options.terminators, self.options.max_length, "last")
        builder, dropped, unread = _Builder(self.width), Counter(), set()
        for number, row in enumerate(loaded.rows, start=1):
            place = f"{where}, row {number}"
            unread |= formats.unread(form, row)
            for group in formats.normalise(form, row, self.as_chat, where=place):
                groups = feedback_formats.as_kind([group], self.kind, ties=self.ties)
                if not groups:
                    dropped[NOTHING_BETTER] += 1
                for part in groups:
                    for sequence in part.sequences:
                        if isinstance(sequence, Conversation):
                            check_template(self.tokenizer, where, number, row)
                            _check_is_learned(sequence, place)
                    if reason := builder.add(part, encoder, place):
                        dropped[reason] += 1
        responses = builder.build(self.kind)
        self._report(where, form, responses, dropped, encoder)
        log_unread(where, unread)
        return responses

    def _report(self, where: str, form: Format, responses: Responses, dropped: Counter, encoder: Encoder) -> None:
        """Logs what was read and dropped. Raises Mistake if nothing is left, or more than `max_dropped` is lost."""
        count, lost = len(responses), sum(dropped.values())
        reasons = "; ".join(f"{n} x {reason}" for reason, n in dropped.items())
        if not count or lost > self.options.max_dropped * (count + lost):
            raise Mistake(
                f"{where}: {lost} of {count + lost} groups of responses cannot be compared: {reasons or 'none'}. "
                f"That is more than {self.options.max_dropped:.0%}; fix them, raise `max_length` "
                f"({self.options.max_length}), or allow it with `max_dropped`"
            )
        tokens = f"{int(responses.lengths.sum()):,}"
        log.info("%s: format %s as %s, %d groups, %s tokens", where, form.name, self.kind, count, tokens)
        if lost:
            log.warning("%s: dropped %d groups: %s", where, lost, reasons)
        if encoder.shortened:
            text = "%s: %d responses were cut at %d tokens; a cut response has no terminator"
            log.warning(text, where, encoder.shortened, self.options.max_length)


def _check_is_learned(conversation: Conversation, place: str) -> None:
    if conversation.messages and conversation.messages[-1].get("learn") is False:
        raise Mistake(
            f"{place}: the last turn of a response is marked as not learned, and feedback is about this turn; remove "
            "its 'weight' or 'train', or leave the row out"
        )


class _Builder:
    """Collects encoded groups."""

    def __init__(self, width: int):
        self._width = width
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []
        self._groups: list[list[int]] = []
        self._labels: list[bool] = []
        self._opinions: list[dict[str, float]] = []
        self._ranks: list[tuple[int, ...] | None] = []

    def add(self, group: Group, encoder: Encoder, place: str) -> str | None:
        """Adds a group, or returns the reason why nothing can be learned from it."""
        encoded = []
        for sequence in group.sequences[: self._width]:
            before = dict(encoder.dropped)
            examples = encoder.encode(sequence, where=place)
            if not examples:
                return next(r for r, n in encoder.dropped.items() if n > before.get(r, 0))
            encoded.append(examples[0])
        if len(encoded) > 1 and not _same_prompts(encoded):
            return "the responses answer different prompts"
        if len(encoded) > 1 and all(np.array_equal(ids, encoded[0][0]) for ids, _ in encoded[1:]):
            return "the responses are the same, once cut to `max_length`"
        if group.ranks and not feedback_formats.compares(group.ranks[: len(encoded)]):
            return f"{NOTHING_BETTER} among the first {len(encoded)}"
        self._groups.append([*range(len(self._parts), len(self._parts) + len(encoded))])
        self._groups[-1] += [-1] * (self._width - len(encoded))
        self._parts += encoded
        self._labels.append(bool(group.label))
        self._opinions.append(group.opinions)
        self._ranks.append(group.ranks)
        return None

    def build(self, kind: str) -> Responses:
        columns: dict[str, np.ndarray] = {}
        if kind == RATED:
            columns["label"] = np.array(self._labels, bool)
        if kind == PAIRS:
            columns |= self._opinion_columns()
        if kind == RANKED and any(self._ranks):
            order = tuple(range(self._width))
            rows = [(*(ranks or order), *order)[: self._width] for ranks in self._ranks]
            columns["ranks"] = np.array(rows, np.int32).reshape(-1, self._width)
        groups = np.array(self._groups, np.int64).reshape(-1, self._width)
        prompt_lengths = np.array([_prompt_length(mask) for _, mask in self._parts], np.int64)
        return Responses(Examples.of(self._parts), groups, columns, prompt_lengths)

    def _opinion_columns(self) -> dict[str, np.ndarray]:
        """The columns of DEFAULTS that any pair has."""
        names = {name for opinions in self._opinions for name in opinions}
        return {n: np.array([o.get(n, x) for o in self._opinions], x.dtype) for n, x in DEFAULTS.items() if n in names}


def _prompt_length(mask: np.ndarray) -> int:
    return int(np.argmax(mask))


def _prompt_lengths(responses: Responses) -> np.ndarray:
    """Int64[examples]. Of an empty prompt the mask says 1, as the first token of a sequence is never learned."""
    if responses.prompt_lengths is not None:
        return responses.prompt_lengths
    return np.array([_prompt_length(mask) for _, mask in responses.examples], np.int64)


def _same_prompts(encoded: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    first, mask = encoded[0]
    prompt = first[: _prompt_length(mask)]
    return all(np.array_equal(ids[: _prompt_length(m)], prompt) for ids, m in encoded[1:])


def joined(sets: Sequence[Responses]) -> Responses:
    """All groups of all sets, in order, with the columns that any set has. One set at least must have groups."""
    names = {name for part in sets for name in part.columns}
    sets = [part for part in sets if len(part)]
    starts = np.cumsum([0, *(len(part.examples) for part in sets)])
    groups = [np.where(s.groups >= 0, s.groups + at, -1) for s, at in zip(sets, starts, strict=False)]
    examples = Examples.of([s.examples[i] for s in sets for i in range(len(s.examples))])
    columns = {name: np.concatenate([_column(s, name) for s in sets]) for name in sorted(names)}
    prompt_lengths = np.concatenate([_prompt_lengths(s) for s in sets])
    return Responses(examples, np.concatenate(groups), columns, prompt_lengths)


def _column(responses: Responses, name: str) -> np.ndarray:
    """The column [N ...], or its default for every group: that of DEFAULTS; for ranks 0, 1, 2, ..."""
    if name in responses.columns:
        return responses.columns[name]
    count, width = responses.groups.shape
    default = np.arange(width, dtype=np.int32) if name == "ranks" else DEFAULTS[name]
    return np.broadcast_to(default, (count, *default.shape))


def first_responses(responses: Responses) -> Examples:
    """The first response of each group, behind its prompt."""
    return responses.examples.take(responses.groups[:, 0])


def prompt_numbers(responses: Responses) -> np.ndarray:
    """Int64[N], equal where groups have the same prompt; prompts are numbered as they first appear."""
    known: dict[bytes, int] = {}
    lengths = _prompt_lengths(responses)
    prompts = (responses.examples[int(i)][0][: lengths[i]].tobytes() for i in responses.groups[:, 0])
    return np.array([known.setdefault(prompt, len(known)) for prompt in prompts], np.int64)


def response_numbers(responses: Responses) -> np.ndarray:
    """Int64[N], equal where groups are linked: they share a prompt with its response, or are both linked to a third.

    All pairs of a ranking are linked. Pairs of different responses to one prompt are not.
    """
    known: dict[bytes, int] = {}
    texts = np.array([known.setdefault(ids.tobytes(), len(known)) for ids, _ in responses.examples], np.int64)
    group, place = np.nonzero(responses.groups >= 0)
    text, numbers = texts[responses.groups[group, place]], np.arange(len(responses))
    while True:
        lowest, lowered = np.full(len(known), len(responses)), numbers.copy()
        np.minimum.at(lowest, text, numbers[group])
        np.minimum.at(lowered, group, lowest[text])
        if (lowered == numbers).all():
            return np.unique(numbers, return_inverse=True)[1]
        numbers = lowered


def _next_other(prompts: np.ndarray) -> np.ndarray:
    """Int64[N], index of the next example in the round that has another prompt; of the next if all have one prompt."""
    count = len(prompts)
    following = np.roll(np.arange(count), -1)
    others = following.copy()
    if (prompts == prompts[0]).all():
        return others
    for i in [*reversed(range(count))] * 2:  # in the second pass the last examples see past the end of the round
        others[i] = following[i] if prompts[i] != prompts[following[i]] else others[following[i]]
    return others


def mismatched(responses: Responses, *, seed: int) -> Responses:
    """The prompts of rated responses, each with the response to another prompt: KTO estimates its KL from them.

    All examples stand in one seeded round, and each takes the response of the next example that has another prompt. So
    no prompt meets its own response unless there is only one prompt, and the pairing is the same for policy and
    reference, and for every batch size.

    Raises:
      Mistake: fewer than two examples.
    """
    if len(responses) < 2:
        raise Mistake(f"KTO's KL needs the response to another prompt, and there is only {len(responses)} example")
    order = np.random.default_rng((seed, 7)).permutation(len(responses))
    partner = np.empty(len(order), np.int64)
    partner[order] = order[_next_other(prompt_numbers(responses)[order])]
    longest, lengths = int(responses.lengths.max()), _prompt_lengths(responses)
    parts = []
    for i in range(len(responses)):
        own, others = responses.groups[[i, partner[i]], 0]
        prompt, response = responses.examples[own][0][: lengths[own]], responses.examples[others][0][lengths[others] :]
        whole = np.concatenate([prompt, response])[:longest]
        parts.append((whole, np.arange(len(whole)) >= len(prompt)))
    return Responses(Examples.of(parts), np.arange(len(parts))[:, None], {})
