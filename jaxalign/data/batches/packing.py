"""Several sequences in a row: best-fit decreasing, in time n log n.

The planes of a batch as they are filled with sequences, one behind another.

A prompt that stands once before all responses to it, which see it and themselves but not each other.

A shared prompt is a segment of its own, without its last token. That token begins each response instead: it predicts
the response's first token, so it must be the one just before it, as it is in a sequence that stands alone.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np

from jaxalign.data.read.tokens import Examples
from jaxalign.mistake import Mistake
from jaxalign.types import TokenBatch


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of the sequences of each row; no row holds more than `width` tokens, and every sequence is in one row.

    The longest sequence first, each into the fullest row that still takes it. Rows are in the order of their first
    sequence, sequences in a row in their own order.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > width:
        raise Mistake(f"a sequence of {lengths.max()} tokens does not fit in a row of {width}")
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}  # free tokens -> rows
    spaces: list[int] = []  # the keys of with_space, sorted
    for i in np.argsort(-lengths, kind="stable").tolist():
        need = int(lengths[i])
        at = bisect.bisect_left(spaces, need)
        if at == len(spaces):
            row, space = len(rows), width
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        rows[row].append(i)
        left = space - need
        if left:
            if left not in with_space:
                bisect.insort(spaces, left)
            with_space.setdefault(left, []).append(row)
    return sorted(sorted(row) for row in rows)


class Planes:
    """Arrays [rows, planes, width] and, for each plane, where its next sequence goes."""

    def __init__(self, rows: int, planes: int, width: int):
        shape = rows, planes, width
        self._tokens, self._positions, self._segment_ids, self._prefix_ids = (
            np.zeros(shape, np.int32) for _ in range(4)
        )
        self._mask = np.zeros(shape, bool)
        self._ends, self._segments = (np.zeros((rows, planes), np.int64) for _ in range(2))

    def write(
        self, row: int, plane: int, ids: np.ndarray, mask: np.ndarray, *, position: int = 0, prefix: int = 0
    ) -> int:
        """Adds a sequence and returns its segment.

        Args:
          row: and plane: where.
          ids: of its tokens.
          mask: True on those that are learned.
          position: of its first token.
          prefix: the segment that it sees besides itself; 0: none.
        """
        at = row, plane
        here = (*at, slice(self._ends[at], self._ends[at] + len(ids)))
        self._ends[at] += len(ids)
        self._segments[at] += 1
        segment = int(self._segments[at])
        self._tokens[here], self._mask[here] = ids, mask
        self._positions[here] = np.arange(position, position + len(ids))
        self._segment_ids[here], self._prefix_ids[here] = segment, prefix or segment
        return segment

    def tokens(self, *, prefixes: bool) -> TokenBatch:
        """What was written; with `prefix_ids` or without."""
        return TokenBatch(
            self._tokens, self._mask, self._positions, self._segment_ids, self._prefix_ids if prefixes else None
        )


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
