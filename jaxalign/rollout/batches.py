"""Batches of scored responses: rows for a policy gradient, or each prompt's best and worst response as a pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxalign.data.batches.groups import Responses
from jaxalign.data.read.tokens import Examples
from jaxalign.rollout.engine.engine import Response
from jaxalign.rollout.scored import ScoredResponses, has_spread
from jaxalign.types import RolloutBatch, TokenBatch

PromptIds = Sequence[Sequence[int]]  # the ids of each response's prompt


def to_rollout_batch(
    scored: ScoredResponses, prompt_ids: PromptIds, *, advantages: np.ndarray | None = None, width: int, rows: int
) -> RolloutBatch:
    """One response a row, behind its prompt, with its score and log-probs.

    Args:
      scored: N responses.
      prompt_ids: ids of the prompt of each.
      advantages: Float[N], the same for all tokens of a response; None: a critic computes them.
      width: tokens of a row.
      rows: of the batch; those beyond N are empty.
    """
    sequences, logps = token_rows(prompt_ids, scored.responses, width=width, rows=rows)
    ended = [response.finished for response in scored.responses]
    columns = {
        "old_logps": logps,
        "scores": _filled_up(scored.scores, rows, np.float32),
        "ended": _filled_up(ended, rows, bool),
    }
    if advantages is not None:
        of_rows = _filled_up(advantages, rows, np.float32)
        columns["advantages"] = np.where(sequences.mask, of_rows[:, None], np.float32(0))
    return RolloutBatch(sequences, columns)


def token_rows(
    prompt_ids: PromptIds, responses: Sequence[Response], *, width: int, rows: int
) -> tuple[TokenBatch, np.ndarray]:
    """(prompts and responses side by side, padded on the right; the engine's log-probs Float32[rows width])."""
    tokens, positions, segments = (np.zeros((rows, width), np.int32) for _ in range(3))
    mask, logps = np.zeros((rows, width), bool), np.zeros((rows, width), np.float32)
    for row, (prompt, response) in enumerate(zip(prompt_ids, responses, strict=True)):
        length = len(prompt) + len(response.tokens)
        tokens[row, :length] = [*prompt, *response.tokens]
        positions[row, :length], segments[row, :length] = np.arange(length), 1
        mask[row, len(prompt) : length], logps[row, len(prompt) : length] = True, response.logps
    return TokenBatch(tokens=tokens, mask=mask, positions=positions, segment_ids=segments), logps


def _filled_up(values: Sequence | np.ndarray, rows: int, dtype: type) -> np.ndarray:
    """[rows]: the values, then zeros."""
    column = np.zeros(rows, dtype)
    column[: len(values)] = values
    return column


def best_and_worst(scores: np.ndarray) -> np.ndarray:
    """Int64[pairs 2], of scores [G n]: the numbers of each prompt's best and worst response, the first of equals.

    Prompts whose responses all score the same have no pair.
    """
    first = np.arange(len(scores)) * scores.shape[1]
    pairs = np.stack([first + scores.argmax(axis=1), first + scores.argmin(axis=1)], axis=1)
    return pairs[has_spread(scores)]


def to_pairs(scored: ScoredResponses, prompt_ids: PromptIds, pairs: np.ndarray) -> Responses:
    """Groups of two, the better response first, each behind its prompt.

    Args:
      scored: N responses.
      prompt_ids: ids of the prompt of each.
      pairs: Int64[pairs 2], numbers of responses, from `best_and_worst`.
    """
    parts = []
    for i in pairs.reshape(-1):
        ids = np.array([*prompt_ids[i], *scored.responses[i].tokens], np.int32)
        parts.append((ids, np.arange(len(ids)) >= len(prompt_ids[i])))
    return Responses(Examples.of(parts), np.arange(pairs.size).reshape(-1, 2), {})
