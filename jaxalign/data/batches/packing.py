"""Rows that hold several sequences: which sequences share a row, and the arrays they are written to.

`pack` lays single sequences into rows, `pack_groups` whole groups of responses into rows of several planes. Both are
best-fit decreasing: the longest first, each into the fullest row that still has room for it.

With `share_prompts` the prompt of a group stands once, before all responses to it, which see it and themselves but not
each other. It is a segment of its own, without its last token. That token begins each response instead: it predicts
the response's first token, so it must stand just before it, as it does in a sequence that stands alone.

`Planes` are the arrays of a batch, filled with one sequence behind another.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxalign.data.read.tokens import Examples
from jaxalign.mistake import Mistake
from jaxalign.types import TokenBatch

Placements = list[tuple[int, int, int]]  # (group, response, plane) of each sequence in a row


def pack(lengths: Sequence[int] | np.ndarray, width: int) -> list[list[int]]:
    """Indices of the sequences of each row; no row holds more than `width` tokens, and every sequence is in one row.

    Takes time n log n. Rows are in the order of their first sequence, sequences in a row in their own order.
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


def pack_groups(lengths: np.ndarray, *, planes: int, width: int, max_groups: int) -> list[Placements]:
    """The sequences of each row, whole groups of them; no row holds more than `max_groups` groups.

    Args:
      lengths: Int[N K], tokens of each response; 0 where there is none.
      planes: number of planes of a row.
      width: tokens of a plane.
      max_groups: largest number of groups in a row.
    """
    if lengths.size and lengths.max() > width:
        raise Mistake(f"a sequence of {lengths.max()} tokens does not fit in a plane of {width}")
    rows: list[_OpenRow] = []
    by_room: list[tuple[int, int]] = []  # (free tokens, row) of the rows that may take another group, the fullest first
    for group in np.argsort(-lengths.sum(axis=1), kind="stable").tolist():
        able = range(bisect.bisect_left(by_room, (int(lengths[group].sum()), -1)), len(by_room))
        at = next((i for i in able if rows[by_room[i][1]].add(group, lengths[group])), None)
        if at is None:
            number = len(rows)
            rows.append(_OpenRow([width] * planes))
            fits = rows[-1].add(group, lengths[group])
            assert fits  # a plane for each response
        else:
            number = by_room.pop(at)[1]
        if rows[number].groups < max_groups:
            bisect.insort(by_room, (sum(rows[number].free), number))
    return [row.placements for row in rows]


@dataclasses.dataclass
class _OpenRow:
    """A row that is being filled."""

    free: list[int]  # tokens, of each plane
    placements: Placements = dataclasses.field(default_factory=list)
    groups: int = 0

    def add(self, group: int, lengths: np.ndarray) -> bool:
        """Adds a group if it fits: the longest response first, each in the fullest plane that has room for it."""
        free, planes = list(self.free), {}
        for k in np.argsort(-lengths, kind="stable"):
            if lengths[k]:
                able = [plane for plane, room in enumerate(free) if room >= lengths[k]]
                if not able:
                    return False
                planes[int(k)] = min(able, key=lambda plane: free[plane])
                free[planes[int(k)]] -= int(lengths[k])
        self.free = free
        self.placements += [(group, k, planes[k]) for k in sorted(planes)]
        self.groups += 1
        return True


def share_prompts(examples: Examples, groups: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The lengths to pack groups by, and how many tokens of prompt the responses of each group share.

    Args:
      examples: each response behind its prompt.
      groups: Int64[N K], index of an example; -1 where there is none.
      width: tokens of a plane. A group that is longer, even with its prompt shared, shares nothing.

    Returns:
      Int64[N K], tokens to find room for. Those of a group that shares stand in one plane: all of them are counted for
      its first response, and 0 for the others.
      Int64[N], tokens of the shared prompt without its last; 0 where nothing is shared.
    """
    lengths = np.where(groups >= 0, examples.lengths[groups], 0)
    shared = np.array([_shared_tokens([examples[int(e)] for e in group if e >= 0]) for group in groups], np.int64)
    total = lengths.sum(axis=1) - shared * ((groups >= 0).sum(axis=1) - 1)
    shared = np.where((total <= width) & (groups[:, 0] >= 0), shared, 0)
    in_one_plane = np.where(np.arange(groups.shape[1]) == 0, total[:, None], 0)
    return np.where(shared[:, None] > 0, in_one_plane, lengths), shared


def with_all_responses(row: Placements, shared: np.ndarray, groups: np.ndarray) -> Placements:
    """A row packed by the lengths of `share_prompts`, with the other responses of each group that shares its prompt."""
    placements: Placements = []
    for group, k, plane in row:
        present = np.flatnonzero(groups[group] >= 0).tolist() if shared[group] else [k]
        placements += [(group, response, plane) for response in present]
    return placements


def _shared_tokens(responses: list[tuple[np.ndarray, np.ndarray]]) -> int:
    """Number of tokens that all responses begin with and none learns, without the last."""
    if len(responses) < 2:
        return 0
    prompt = min(int(np.argmax(mask)) if mask.any() else len(ids) for ids, mask in responses)
    first = responses[0][0][:prompt]
    for ids, _ in responses[1:]:
        differs = np.flatnonzero(first != ids[: len(first)])
        first = first[: differs[0]] if len(differs) else first
    return max(len(first) - 1, 0)


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
        """Writes a sequence behind those in a plane and returns its segment.

        Args:
          row: index of the row.
          plane: index of the plane in the row.
          ids: of the sequence's tokens.
          mask: True on those that are learned.
          position: of the first token.
          prefix: the segment that the sequence sees besides itself; 0: none.
        """
        at = row, plane
        place = (*at, slice(self._ends[at], self._ends[at] + len(ids)))
        self._ends[at] += len(ids)
        self._segments[at] += 1
        segment = int(self._segments[at])
        self._tokens[place], self._mask[place] = ids, mask
        self._positions[place] = np.arange(position, position + len(ids))
        self._segment_ids[place], self._prefix_ids[place] = segment, prefix or segment
        return segment

    def tokens(self, *, prefixes: bool) -> TokenBatch:
        """All that was written, with `prefix_ids` or without."""
        return TokenBatch(
            self._tokens, self._mask, self._positions, self._segment_ids, self._prefix_ids if prefixes else None
        )
