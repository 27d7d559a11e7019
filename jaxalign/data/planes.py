"""The planes of a batch as they are filled with sequences, one behind another."""

from __future__ import annotations

import numpy as np

from jaxalign.types import TokenBatch


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
