"""Batches of responses to prompts, in groups (pairs, rated responses, rankings), as a function of the step.

A batch has `batch_size` groups, as papers count, whatever their lengths. With packing they stand in as few rows as hold
them, so the time of a step grows with its tokens. The number of rows is one of a few, so few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxalign.data.batches.packing import Placements, Planes, pack_groups, share_prompts, with_all_responses
from jaxalign.data.batches.plan import Batches, Mixture, Plan
from jaxalign.data.read.tokens import Examples
from jaxalign.types import ResponseBatch, UnpairedBatch

ROW_BUCKETS = 8  # numbers of rows that a packed batch can have


@dataclasses.dataclass(frozen=True)
class Responses:
    """Sequences in groups. `examples` has each response behind its prompt; the mask is True on the response."""

    examples: Examples
    groups: np.ndarray  # Int64[N K], index of an example; -1 where there is none
    columns: dict[str, np.ndarray]  # [N ...] each, what else is known of a group: margin, label, ref_logps
    prompt_lengths: np.ndarray | None = None  # Int64[examples]; None: as the masks have it, so never 0

    def __len__(self) -> int:
        return len(self.groups)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Int64[N K], tokens of each sequence; 0 where there is none."""
        return np.where(self.groups >= 0, self.examples.lengths[self.groups], 0)

    def take(self, indices: Sequence[int] | np.ndarray) -> Responses:
        """Some of the groups, in the order given; the examples stay as they are."""
        chosen = np.asarray(indices, np.int64)
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return dataclasses.replace(self, groups=self.groups[chosen], columns=columns)

    def fingerprint(self) -> int:
        """Number that changes with any token, mask, group or column."""
        parts = [self.groups, *(self.columns[name] for name in sorted(self.columns))]
        whole = Examples(
            self.examples.ids, self.examples.mask, np.concatenate([self.examples.offsets, *map(_bits, parts)])
        )
        return whole.fingerprint()


def _bits(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The shapes that the batches of a run can have, and how groups are laid out in them."""

    plan: Plan
    responses: int  # K, of a group, and so the planes of a row
    max_groups: int  # G, for which a row has slots
    row_counts: tuple[int, ...]  # ascending

    @classmethod
    def of(cls, responses: Responses, plan: Plan) -> BatchShapes:
        """The shapes for these groups. With packing, a row has slots for twice the groups that fill it on average."""

        def in_units(rows: int) -> int:
            return -(-rows // plan.unit) * plan.unit

        responses_per_group = responses.groups.shape[1]
        if not plan.packing:
            return cls(plan, responses_per_group, 1, (in_units(plan.batch_size),))
        mean_tokens = max(float(_lengths_to_pack(responses, plan)[0].sum()) / max(len(responses), 1), 1.0)
        max_groups = int(np.clip(2 * responses_per_group * plan.max_length / mean_tokens, 1, plan.batch_size))
        counts = sorted({in_units(-(-plan.batch_size * i // ROW_BUCKETS)) for i in range(1, ROW_BUCKETS + 1)})
        return cls(plan, responses_per_group, max_groups, tuple(counts))

    @property
    def count(self) -> int:
        """Number of shapes of batches that can occur."""
        return len(self.row_counts) if self.plan.packing else len(self.plan.widths)

    @property
    def stride(self) -> int:
        """1 + the largest number of segments in a plane: responses and, where they are shared, prompts."""
        return self.max_groups * (self.responses + self.plan.share_prompt) + 1

    def rows(self, responses: Responses) -> list[Placements]:
        """The sequences of each row."""
        lengths, shared = _lengths_to_pack(responses, self.plan)
        if self.plan.packing:
            rows = pack_groups(lengths, planes=self.responses, width=self.plan.max_length, max_groups=self.max_groups)
            return [with_all_responses(row, shared, responses.groups) for row in rows]
        return [[(g, k, k) for k in range(self.responses) if lengths[g, k]] for g in range(len(lengths))]

    def batch(self, responses: Responses, *, min_rows: int = 0) -> ResponseBatch:
        """These groups as one batch of at least `min_rows` rows."""
        rows = self.rows(responses)
        count = next(n for n in self.row_counts if n >= max(len(rows), min_rows))
        width = self.plan.width(int(responses.lengths.max(initial=1)))
        return self._assemble(responses, [*rows, *[[] for _ in range(count - len(rows))]], width)

    def _assemble(self, responses: Responses, rows: list[Placements], width: int) -> ResponseBatch:
        planes = Planes(len(rows), self.responses, width)
        shared = _lengths_to_pack(responses, self.plan)[1]
        slots = np.zeros((len(rows), self.max_groups, self.responses), np.int32)
        columns = {
            name: np.zeros((len(rows), self.max_groups, *values.shape[1:]), values.dtype)
            for name, values in responses.columns.items()
        }
        for r, row in enumerate(rows):
            places: dict[int, int] = {}  # of each group, its number in the row
            prompts: dict[int, int] = {}  # of each group, the segment of its shared prompt
            for group, k, plane in row:
                ids, learned = responses.examples[int(responses.groups[group, k])]
                start = int(shared[group])
                if start and group not in prompts:
                    prompts[group] = planes.write(r, plane, ids[:start], learned[:start])
                segment = planes.write(
                    r, plane, ids[start:], learned[start:], position=start, prefix=prompts.get(group, 0)
                )
                place = places.setdefault(group, len(places))
                slots[r, place, k] = plane * self.stride + segment
            for group, place in places.items():
                for name, values in responses.columns.items():
                    columns[name][r, place] = values[group]
        sequences = planes.tokens(prefixes=self.plan.share_prompt)
        return ResponseBatch(sequences=sequences, slots=slots, columns=columns, stride=self.stride)


def _lengths_to_pack(responses: Responses, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(Int64[N K], tokens to find room for; Int64[N], tokens of the shared prompt, 0 where nothing is shared)"""
    if plan.share_prompt:
        return share_prompts(responses.examples, responses.groups, plan.max_length)
    return responses.lengths, np.zeros(len(responses), np.int64)


class GroupBatches(Batches):
    """Step n -> batch n."""

    def __init__(self, mixture: Mixture, plan: Plan, *, steps: int = 0) -> None:
        super().__init__(plan, functools.partial(mixture.epoch, seed=plan.seed, shuffle=plan.shuffle), steps=steps)
        self.mixture, self.shapes = mixture, BatchShapes.of(mixture.examples, plan)

    def __getitem__(self, step: int) -> ResponseBatch:
        return self.shapes.batch(self.mixture.examples.take(self.groups_of(step)))

    def groups_of(self, step: int) -> np.ndarray:
        """Indices of the groups of batch `step`, in order."""
        return np.array(self._items(step), np.int64)

    @property
    def shape_count(self) -> int:
        """Number of shapes of batches that can occur."""
        return self.shapes.count


class UnpairedBatches(GroupBatches):
    """Step n -> rated responses and, in equally many rows, the same prompts with responses to other prompts."""

    def __init__(self, mixture: Mixture, mismatched: Responses, plan: Plan, *, steps: int = 0) -> None:
        super().__init__(mixture, plan, steps=steps)
        self.mismatched = mismatched
        self._other_shapes = dataclasses.replace(BatchShapes.of(mismatched, plan), row_counts=self.shapes.row_counts)

    def __getitem__(self, step: int) -> UnpairedBatch:
        chosen = self.groups_of(step)
        pair = self.mixture.examples.take(chosen), self.mismatched.take(chosen)
        return _unpaired(pair, (self.shapes, self._other_shapes))


def _unpaired(pair: tuple[Responses, Responses], shapes: tuple[BatchShapes, BatchShapes]) -> UnpairedBatch:
    both = list(zip(shapes, pair, strict=True))
    min_rows = max(len(layout.rows(part)) for layout, part in both)
    return UnpairedBatch(*(layout.batch(part, min_rows=min_rows) for layout, part in both))


def eval_batches(responses: Responses, plan: Plan) -> list[ResponseBatch]:
    """Every group once; the last batch is filled up with empty rows."""
    shapes = BatchShapes.of(responses, plan)
    return [shapes.batch(responses.take(part)) for part in _parts(responses, plan)]


def unpaired_eval_batches(rated: Responses, mismatched: Responses, plan: Plan) -> list[UnpairedBatch]:
    """Every rated response once, with its mismatched one; the last batch is filled up with empty rows."""
    shapes = BatchShapes.of(rated, plan), BatchShapes.of(mismatched, plan)
    return [_unpaired((rated.take(part), mismatched.take(part)), shapes) for part in _parts(rated, plan)]


def _parts(responses: Responses, plan: Plan) -> list[range]:
    """The indices of the groups of each batch, in order."""
    count, size = len(responses), plan.batch_size
    return [range(at, min(at + size, count)) for at in range(0, count, size)]
