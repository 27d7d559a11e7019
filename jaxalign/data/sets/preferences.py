"""Feedback for reward models, DPO and KTO, from `--data` to groups of responses, with a report of what was dropped."""

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
from jaxalign.data.sets.supervised import Options, check_template, openings
from jaxalign.mistake import Mistake

log = logging.getLogger(__name__)

# What a pair means that does not say it: no margin, a certain preference, no tie.
SILENT = {"margin": np.float32(0), "preference": np.float32(1), "tie": np.bool_(False)}
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
    """Training and held-out groups of the kind that a method wants.

    Args:
      spec: as in `sources.parse`.
      tokenizer: with a chat template if the data are messages.
      options: window, terminators and shares, as for supervised data; held-out responses are in no other group.
      kind: PAIRS (K = 2, chosen first), RANKED (up to `most_responses`, best first) or RATED (K = 1, with a label).
      eval_spec: held-out data of their own.
      as_chat: text prompts and responses are turns of a conversation.
      most_responses: K of RANKED; of more responses the best are kept.
      ties: PAIRS keep those of which neither is better, for a loss that asks for the column `tie`.

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
        log.info("%s, what is compared between ⟦ ⟧:\n%s", name, show(tokenizer, ids, mask))
    return dataclasses.replace(data, prompts=openings(first_responses(data.held_out)))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Rows to `Responses`, by the settings of one run."""

    tokenizer: Any
    options: Options
    kind: str
    as_chat: bool
    width: int  # K
    ties: bool

    def read(self, source: sources.Source, loaded: sources.Loaded, where: str) -> Responses:
        form = feedback_formats.recognise(loaded.rows[0], where=where)
        encoder = Encoder(self.tokenizer, self.options.terminators, self.options.max_length, "last")
        builder, dropped = _Builder(self.width), Counter()
        for number, row in enumerate(loaded.rows, start=1):
            place = f"{where}, row {number}"
            for group in formats.normalise(form, row, self.as_chat, where=place):
                if not (parts := feedback_formats.as_kind([group], self.kind, ties=self.ties)):
                    dropped[NOTHING_BETTER] += 1
                for part in parts:
                    if any(isinstance(s, Conversation) for s in part.sequences):
                        check_template(self.tokenizer, where)
                    if reason := builder.add(part, encoder, place):
                        dropped[reason] += 1
        found = builder.build(self.kind)
        self._report(where, form, found, dropped, encoder)
        return found

    def _report(self, where: str, form: Format, found: Responses, dropped: Counter, encoder: Encoder) -> None:
        lost, reasons = sum(dropped.values()), "; ".join(f"{n} x {reason}" for reason, n in dropped.items())
        if not len(found) or lost > self.options.max_dropped * (len(found) + lost):
            raise Mistake(
                f"{where}: {lost} of {len(found) + lost} groups of responses cannot be compared: {reasons or 'none'}. "
                f"That is more than {self.options.max_dropped:.0%}; mend them, raise `max_length` "
                f"({self.options.max_length}), or allow it with `max_dropped`"
            )
        log.info("%s: format %s as %s, %d groups, %s tokens", where, form.name, self.kind, len(found),
                 f"{int(found.lengths.sum()):,}")  # fmt: skip
        if lost:
            log.warning("%s: dropped %d groups: %s", where, lost, reasons)
        if encoder.shortened:
            log.warning(
                "%s: %d responses were cut at %d tokens; a cut response has no terminator",
                where,
                encoder.shortened,
                self.options.max_length,
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
        """Adds the group, or says why it is of no use."""
        encoded = []
        for sequence in group.sequences[: self._width]:
            before = dict(encoder.dropped)
            found = encoder.encode(sequence, where=place)
            if not found:
                return next(r for r, n in encoder.dropped.items() if n > before.get(r, 0))
            encoded.append(found[0])
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
        return Responses(Examples.of(self._parts), groups, columns)

    def _opinion_columns(self) -> dict[str, np.ndarray]:
        """Of those that any pair has, with what the silent ones mean."""
        held = {name for opinions in self._opinions for name in opinions}
        return {n: np.array([o.get(n, x) for o in self._opinions], x.dtype) for n, x in SILENT.items() if n in held}


def _prompt_length(mask: np.ndarray) -> int:
    return int(np.argmax(mask))


def _same_prompts(encoded: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    first, mask = encoded[0]
    prompt = first[: _prompt_length(mask)]
    return all(np.array_equal(ids[: _prompt_length(m)], prompt) for ids, m in encoded[1:])


def joined(sets: Sequence[Responses]) -> Responses:
    """All groups of all sets, in order, with the columns that any has; a set that is not empty must be among them."""
    names = {name for part in sets for name in part.columns}
    sets = [part for part in sets if len(part)]
    starts = np.cumsum([0, *(len(part.examples) for part in sets)])
    groups = [np.where(s.groups >= 0, s.groups + at, -1) for s, at in zip(sets, starts, strict=False)]
    examples = Examples.of([s.examples[i] for s in sets for i in range(len(s.examples))])
    columns = {name: np.concatenate([_column(s, name) for s in sets]) for name in sorted(names)}
    return Responses(examples, np.concatenate(groups), columns)


def _column(responses: Responses, name: str) -> np.ndarray:
    """[N ...], where the set is silent what that means: of ranks, the best first."""
    if name in responses.columns:
        return responses.columns[name]
    count, width = responses.groups.shape
    silent = np.arange(width, dtype=np.int32) if name == "ranks" else SILENT[name]
    return np.broadcast_to(silent, (count, *silent.shape))


def first_responses(responses: Responses) -> Examples:
    """The first response of each group, behind its prompt."""
    return responses.examples.take(responses.groups[:, 0])


def prompt_numbers(responses: Responses) -> np.ndarray:
    """Int64[N], equal where groups answer one prompt; prompts are numbered as they first appear."""
    known: dict[bytes, int] = {}
    firsts = (responses.examples[int(i)] for i in responses.groups[:, 0])
    prompts = (ids[: _prompt_length(mask)].tobytes() for ids, mask in firsts)
    return np.array([known.setdefault(prompt, len(known)) for prompt in prompts], np.int64)


def response_numbers(responses: Responses) -> np.ndarray:
    """Int64[N], equal where groups have a response to the same prompt in common, or each has one with a third.

    So are all pairs of a ranking. Pairs of different responses to one prompt are not.
    """
    known: dict[bytes, int] = {}
    texts = np.array([known.setdefault(ids.tobytes(), len(known)) for ids, _ in responses.examples], np.int64)
    group, place = np.nonzero(responses.groups >= 0)
    text, numbers = texts[responses.groups[group, place]], np.arange(len(responses))
    while True:
        lowest, found = np.full(len(known), len(responses)), numbers.copy()
        np.minimum.at(lowest, text, numbers[group])
        np.minimum.at(found, group, lowest[text])
        if (found == numbers).all():
            return np.unique(numbers, return_inverse=True)[1]
        numbers = found


def _next_other(prompts: np.ndarray) -> np.ndarray:
    """Int64[N], the place of the next in the round with another prompt; the next of all where there is none."""
    count = len(prompts)
    found = np.roll(np.arange(count), -1)
    if (prompts == prompts[0]).all():
        return found
    for i in [*reversed(range(count))] * 2:  # the second time, what stands at the end knows the beginning
        following = (i + 1) % count
        found[i] = following if prompts[i] != prompts[following] else found[following]
    return found


def mismatched(responses: Responses, *, seed: int) -> Responses:
    """Each prompt of rated responses with the response to another: what KTO estimates its KL from.

    Example i takes the response of the next example with another prompt in one seeded round of all, so no response
    meets its own prompt unless there is only one prompt; the pairing is a column of the data, the same for policy and
    reference, and for every batch size.

    Raises:
      Mistake: fewer than two examples.
    """
    if len(responses) < 2:
        raise Mistake(f"KTO's KL needs the response to another prompt, and there is only {len(responses)} example")
    order = np.random.default_rng((seed, 7)).permutation(len(responses))
    partner = np.empty(len(order), np.int64)
    partner[order] = order[_next_other(prompt_numbers(responses)[order])]
    longest = int(responses.lengths.max())
    parts = []
    for i in range(len(responses)):
        ids, mask = responses.examples[int(responses.groups[i, 0])]
        other, learned = responses.examples[int(responses.groups[partner[i], 0])]
        prompt, response = ids[: _prompt_length(mask)], other[_prompt_length(learned) :]
        whole = np.concatenate([prompt, response])[:longest]
        marks = np.arange(len(whole)) >= len(prompt)
        parts.append((whole, marks))
    return Responses(Examples.of(parts), np.arange(len(parts))[:, None], {})
