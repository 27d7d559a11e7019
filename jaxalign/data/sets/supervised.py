"""Data for supervised fine-tuning: from `data` to examples, with a log of the rows read, cut and dropped."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from jaxalign.config.shared import TrainConfig
from jaxalign.data.read import chat, feedback_formats, formats, sources
from jaxalign.data.read.spellings import is_empty
from jaxalign.data.read.tokens import Encoder, Examples, joined, show
from jaxalign.data.sets import split
from jaxalign.data.sets.split import Set
from jaxalign.mistake import Mistake
from jaxalign.outside import brief, visible

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """How rows become examples, and how many of them are held out."""

    max_length: int  # tokens of an example
    terminators: tuple[int, ...]  # ids that end a response, the one to append first
    turns: str = "all"  # turns of the assistant that are learned, or the "last"
    long_text: str = "truncate"  # longer texts keep their first max_length tokens, or are "split" into examples
    max_dropped: float = 0.1  # largest share of a source's rows that may be unusable
    eval_share: float = 0.0  # share of the examples to hold out, where the data have no held-out part
    seed: int = 0  # of that share

    @classmethod
    def of(cls, config: TrainConfig, terminators: tuple[int, ...], **options: str) -> Options:
        """The options of a command's config; on-policy configs have no `eval_share` and hold nothing out."""
        return cls(
            config.max_length,
            terminators,
            max_dropped=config.max_dropped,
            eval_share=getattr(config, "eval_share", 0.0),
            seed=config.seed,
            **options,
        )


def load(
    spec: str, tokenizer: Any, options: Options, *, eval_spec: str | None = None, as_chat: bool = False
) -> Set[Examples]:
    """Training and held-out examples, as `split.load` divides them. Of feedback, the best responses are learned.

    Args:
      spec: as in `sources.parse`.
      tokenizer: with a chat template if the data are conversations.
      options: window, terminators and shares.
      eval_spec: held-out data of their own.
      as_chat: text prompts and responses are turns of a conversation.

    Raises:
      Mistake: a source is malformed or empty, has unknown columns, or loses more than `max_dropped` of its rows.
    """

    def read(source: sources.Source, loaded: sources.Loaded, where: str) -> Examples:
        return _examples(source, loaded, where, tokenizer, options, as_chat)

    data = split.load(spec, eval_spec, read, joined, eval_share=options.eval_share, seed=options.seed)
    log.info("held out for evaluation: %d examples", len(data.held_out))
    ids, mask = data.train.examples[0]
    log.info("the first example, its learned tokens between ⟦ ⟧:\n%s", visible(show(tokenizer, ids, mask)))
    return dataclasses.replace(data, prompts=openings(data.held_out))


def _examples(
    source: sources.Source, loaded: sources.Loaded, where: str, tokenizer: Any, options: Options, as_chat: bool
) -> Examples:
    form = feedback_formats.recognise_demonstrations(
        loaded.rows[0], where=where, dialogues_as_texts=not as_chat and not tokenizer.chat_template
    )
    if _is_plain_text_file(source):
        options = dataclasses.replace(options, long_text="split")
    encoder = Encoder(
        tokenizer, options.terminators, options.max_length, options.turns, windows=options.long_text == "split"
    )
    parts, unread, undesirable = [], set(), 0
    for number, row in enumerate(loaded.rows, start=1):
        place = f"{where}, row {number}"
        unread |= formats.unread(form, row)
        sequences = feedback_formats.demonstrations(formats.normalise(form, row, as_chat, where=place))
        undesirable += not sequences
        for sequence in sequences:
            if isinstance(sequence, formats.Conversation):
                check_template(tokenizer, where, number, row)
            parts += encoder.encode(sequence, where=place)
    if undesirable == len(loaded.rows):
        raise Mistake(f"{where}: all rows are rated undesirable, so there is nothing to imitate; use jaxalign kto")
    _report(where, form, encoder, parts, len(loaded.rows), options)
    if undesirable:
        log.warning("%s: %d rows are rated undesirable and are not learned; kto uses them", where, undesirable)
    log_unread(where, unread)
    return Examples.of(parts)


def log_unread(where: str, names: Collection[str]) -> None:
    """Logs the columns, and the keys of turns, that nothing reads."""
    if names:
        log.info("%s: nothing reads %s", where, brief(", ".join(sorted(names)), 400))


def _is_plain_text_file(source: sources.Source) -> bool:
    return Path(source.name).name.removesuffix(".gz").endswith(".txt")


def check_template(tokenizer: Any, where: str, number: int, row: sources.Row) -> None:
    """Raises Mistake, which names the data and the column that is to blame, if there is no template for messages."""
    try:
        chat.require_template(tokenizer)
    except ValueError as error:
        frame = [name for name in formats.BEFORE if not is_empty(row.get(name))]
        reason = f", row {number}: column {frame[0]!r} makes it a conversation" if frame else ""
        raise Mistake(f"{where}{reason}: {error}") from None


def _report(where: str, form: formats.Format, encoder: Encoder, parts: list, rows: int, options: Options) -> None:
    dropped = sum(encoder.dropped.values())
    reasons = "; ".join(f"{n} x {r} (first: {encoder.first_dropped[r]})" for r, n in encoder.dropped.items())
    if dropped > options.max_dropped * rows or not parts:
        allowed = f"more than {options.max_dropped:.0%}" if parts else "all of them"
        or_allow = ", or allow it with `max_dropped`" if parts else ""
        raise Mistake(
            f"{where}: {dropped} of {rows} rows have nothing to learn: {reasons}. That is {allowed}; "
            f"fix them, or raise `max_length` ({options.max_length}){or_allow}"
        )
    tokens, learned = sum(len(ids) for ids, _ in parts), sum(int(mask[1:].sum()) for _, mask in parts)
    log.info("%s: format %s, %d rows, %d examples", where, form.name, rows, len(parts))
    log.info("%s: %s tokens, %s of them learned", where, f"{tokens:,}", f"{learned:,}")
    for note, count in encoder.notes.items():
        log.info("%s: %d conversations %s", where, count, note)
    if dropped:
        log.warning("%s: dropped %d rows: %s", where, dropped, reasons)
    if encoder.shortened:
        how = "cut into several examples" if encoder.windows else "shortened to their first tokens"
        log.warning("%s: %d rows longer than %d tokens were %s", where, encoder.shortened, options.max_length, how)


def openings(examples: Examples, *, count: int = 16) -> list[list[int]]:
    """Ids before the first learned token; of texts, of which all is learned, the first few tokens."""
    prompts = []
    for i in range(min(count, len(examples))):
        ids, mask = examples[i]
        first = int(np.argmax(mask))
        prompts.append(ids[: first if first > 1 else max(1, min(16, len(ids) // 4))].tolist())
    return prompts
