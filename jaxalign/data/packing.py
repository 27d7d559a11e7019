"""Several sequences in a row: best-fit decreasing, in time n log n."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of the sequences of each row; no row holds more than `width` tokens, and every sequence is in one row.

    The longest sequence first, each into the fullest row that still takes it. Rows are in the order of their first
    sequence, sequences in a row in their own order.
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > width:
        raise ValueError(f"a sequence of {lengths.max()} tokens does not fit in a row of {width}")
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
