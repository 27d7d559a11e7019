"""Solutions whose steps are labelled right or wrong, which process reward models learn from.

Rows have a prompt, its `completions` (the steps) and their `labels`: true, false, a probability, or null for a step
that is not labelled. A separator follows each step; the step is scored at the separator's last token.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.data.batches.groups import Responses
from jaxalign.data.read import formats, sources
from jaxalign.data.read.tokens import Encoder, Examples, show
from jaxalign.data.sets import split
from jaxalign.data.sets.preferences import joined
from jaxalign.data.sets.split import Set
from jaxalign.data.sets.supervised import Options, log_unread
from jaxalign.mistake import Mistake
from jaxalign.outside import brief, visible

log = logging.getLogger(__name__)

COLUMNS = ("prompt", "completions", "labels")
MOST_STEPS = 64  # of a solution; the labels of later steps are ignored


def load(
    spec: str, tokenizer: Any, options: Options, *, separator: str = "\n", eval_spec: str | None = None
) -> Set[Responses]:
    """Training and held-out solutions, with the columns step_ends and step_labels [N MOST_STEPS].

    Args:
      spec: as in `sources.parse`.
      tokenizer: needs no template, as prompts and steps are texts.
      options: window, terminators and shares, as for supervised data.
      separator: text behind each step.
      eval_spec: held-out data of their own.

    Raises:
      Mistake: rows have another form, or too many have no labelled step in the window.
    """
    encoder = Encoder(tokenizer, options.terminators, options.max_length)

    def read(source: sources.Source, loaded: sources.Loaded, where: str) -> Responses:
        return _read(loaded.rows, where, encoder, separator, options)

    data = split.load(spec, eval_spec, read, joined, eval_share=options.eval_share, seed=options.seed)
    log.info("held out for evaluation: %d solutions", len(data.held_out))
    ids, mask = data.responses.examples[int(data.responses.groups[0, 0])]
    log.info("the first solution, the end of each step between ⟦ ⟧:\n%s", visible(show(tokenizer, ids, mask)))
    return data


def encode(encoder: Encoder, prompt: str, steps: Sequence[str], separator: str) -> tuple[np.ndarray, np.ndarray]:
    """(Int32 ids of prompt and steps, not cut at any length; Int64, index of each step's last token)"""
    ids, ends = [*encoder.opening(prompt)], []
    mark = encoder.continuation(separator)
    for step in steps:
        ids += [*encoder.continuation(step), *mark]
        ends.append(len(ids) - 1)
    return np.array(ids, np.int32), np.array(ends, np.int64)


def _read(rows: Sequence[dict], where: str, encoder: Encoder, separator: str, options: Options) -> Responses:
    form = formats.recognise(rows[0], (FORMAT,), where=where, otherwise="hold no steps")
    parts, ends, labels, dropped, unread, long = [], [], [], Counter(), set(), 0
    for number, row in enumerate(rows, start=1):
        step_labels = formats.normalise(form, row, where=f"{where}, row {number}")
        unread |= formats.unread(form, row)
        long += len(row["completions"]) > MOST_STEPS
        ids, at = encode(encoder, row["prompt"], row["completions"], separator)
        step_labels[at[:MOST_STEPS] >= options.max_length] = -1
        if not (step_labels >= 0).any():
            dropped["no labelled step within `max_length`"] += 1
            continue
        ids, at = ids[: options.max_length], np.minimum(at[:MOST_STEPS], options.max_length - 1)
        fill = MOST_STEPS - len(at)
        parts.append((ids, np.isin(np.arange(len(ids)), at[step_labels >= 0])))
        ends.append(np.pad(at, (0, fill), constant_values=-1))
        labels.append(np.pad(step_labels, (0, fill), constant_values=-1))
    lost = sum(dropped.values())
    if not parts or lost > options.max_dropped * len(rows):
        allow = ", or allow it with `max_dropped`" if parts else ""
        raise Mistake(
            f"{where}: {lost} of {len(rows)} solutions have no labelled step within `max_length` "
            f"{options.max_length}; raise it{allow}"
        )
    log.info("%s: %d solutions, %d labelled steps, %d dropped", where, len(parts), np.sum(np.array(labels) >= 0), lost)
    if long:
        log.warning("%s: the labels beyond %d steps of %d solutions are not learned", where, MOST_STEPS, long)
    log_unread(where, unread)
    columns = {"step_ends": np.array(ends, np.int32), "step_labels": np.array(labels, np.float32)}
    return Responses(Examples.of(parts), np.arange(len(parts))[:, None], columns)


def _labels(row: sources.Row) -> np.ndarray:
    """Float32[min(steps, MOST_STEPS)], -1 where a step has none."""
    prompt, solution, labels = (row[name] for name in COLUMNS)
    if not isinstance(solution, list) or not isinstance(labels, list):
        name, value = ("labels", labels) if isinstance(solution, list) else ("completions", solution)
        raise Mistake(f"{name!r} is {brief(repr(value))}; it must be a list, of one entry for each step")
    if not isinstance(prompt, str) or not all(isinstance(step, str) for step in solution):
        raise Mistake("prompt and completions must be texts")
    if len(labels) != len(solution):
        raise Mistake(f"{len(solution)} completions, but {len(labels)} labels")
    wrong = [x for x in labels if x is not None and not (isinstance(x, int | float) and 0 <= x <= 1)]
    if wrong:
        raise Mistake(f"a label is {brief(repr(wrong[0]))}; it must be true, false, a probability or null")
    return np.array([-1.0 if x is None else float(x) for x in labels[:MOST_STEPS]], np.float32)


FORMAT = formats.Format("solution steps", COLUMNS, _labels)
