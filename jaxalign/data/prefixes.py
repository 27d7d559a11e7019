"""A prompt that stands once before all responses to it, which see it and themselves but not each other.

A shared prompt is a segment of its own, without its last token. That token begins each response instead: it predicts
the response's first token, so it must be the one just before it, as it is in a sequence that stands alone.
"""

from __future__ import annotations

import numpy as np

from jaxalign.data.tokens import Examples

Placed = list[tuple[int, int, int]]  # (group, response, plane) of what stands in a row


def together(examples: Examples, groups: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """How groups are to be packed, and how many tokens the responses of each share.

    Args:
      examples: each response behind its prompt.
      groups: Int64[N K], index of an example; -1 where there is none.
      width: tokens of a plane. A group that is longer, even so, shares nothing.

    Returns:
      Int64[N K], tokens to find room for: of a group that shares, all of them in its first response and 0 in the
      others. Int64[N], tokens of the shared prompt, its last one aside; 0: nothing is shared.
    """
    lengths = np.where(groups >= 0, examples.lengths[groups], 0)
    shared = np.array([_shared([examples[int(e)] for e in group if e >= 0]) for group in groups], np.int64)
    total = lengths.sum(axis=1) - shared * ((groups >= 0).sum(axis=1) - 1)
    shared = np.where((total <= width) & (groups[:, 0] >= 0), shared, 0)
    packed = np.where(np.arange(groups.shape[1]) == 0, total[:, None], 0)
    return np.where(shared[:, None] > 0, packed, lengths), shared


def spread(row: Placed, shared: np.ndarray, groups: np.ndarray) -> Placed:
    """A row of groups packed by `together` with all responses named: those of a group that shares are in one plane."""
    placed: Placed = []
    for group, k, plane in row:
        present = np.flatnonzero(groups[group] >= 0).tolist() if shared[group] else [k]
        placed += [(group, response, plane) for response in present]
    return placed


def _shared(responses: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """Tokens that all begin with and none learns, less the last."""
    if len(responses) < 2:
        return 0
    prompt = min(int(np.argmax(mask)) if mask.any() else len(ids) for ids, mask in responses)
    first = responses[0][0][:prompt]
    for ids, _ in responses[1:]:
        differs = np.flatnonzero(first != ids[: len(first)])
        first = first[: differs[0]] if len(differs) else first
    return max(len(first) - 1, 0)
