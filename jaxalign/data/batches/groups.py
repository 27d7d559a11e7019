"""Batches of responses to prompts, in groups (pairs, rated responses, rankings), as a function of the step.

A batch has `batch_size` groups, as papers count, whatever their lengths; with packing they stand in as few rows as hold
them, so a step costs what its tokens cost. Rows come in few numbers, so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from jaxalign.data.batches import packing
from jaxalign.data.batches.packing import Planes
from jaxalign.data.batches.plan import Batches, Mixture, Plan
from jaxalign.data.read.tokens import Examples
from jaxalign.mistake import Mistake
from jaxalign.types import ResponseBatch, UnpairedBatch

ROW_BUCKETS = 8


@dataclasses.dataclass(frozen=True)
class Responses:
    """Sequences in groups. `examples` holds each response behind its prompt, the response masked."""

    examples: Examples
    groups: np.ndarray  # Int64[N K], index of an example; -1 where there is none
    columns: dict[str, np.ndarray]  # [N ...] each

    def __len__(self) -> int:
        return len(self.groups)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Int64[N K], tokens of each sequence; 0 where there is none."""
        return np.where(self.groups >= 0, self.examples.lengths[self.groups], 0)

    def take(self, indices: Sequence[int]) -> Responses:
        """Some of the groups, in the order given; the examples stay as they are."""
        chosen = np.asarray(indices, np.int64)
        columns = {name: values[chosen] for name, values in self.columns.items()}
        return Responses(self.examples, self.groups[chosen], columns)

    def fingerprint(self) -> int:
        """Changes when any token, mask, group or column does."""
        parts = [self.groups, *(self.columns[name] for name in sorted(self.columns))]
        whole = Examples(
            self.examples.ids, self.examples.mask, np.concatenate([self.examples.offsets, *map(_bits, parts)])
        )
        return whole.fingerprint()


def _bits(values: np.ndarray) -> np.ndarray:
    return np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8).astype(np.int64)


@dataclasses.dataclass
class _Row:
    """A row being filled: the free tokens of its planes, and (group, response, plane) of what stands in it."""

    free: list[int]
    placed: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    groups: int = 0

    def fits(self, lengths: np.ndarray) -> list[int] | None:
        """A plane for each response of a group, the longest first into the fullest plane that takes it."""
        free, planes = list(self.free), [-1] * len(lengths)
        for k in np.argsort(-lengths, kind="stable"):
            if not lengths[k]:
                continue
            able = [q for q, room in enumerate(free) if room >= lengths[k]]
            if not able:
                return None
            planes[k] = min(able, key=lambda q: free[q])
            free[planes[k]] -= lengths[k]
        return planes

    def place(self, group: int, lengths: np.ndarray, planes: list[int]) -> None:
        for k, plane in enumerate(planes):
            if plane >= 0:
                self.free[plane] -= int(lengths[k])
                self.placed.append((group, k, plane))
        self.groups += 1


def pack_groups(lengths: np.ndarray, *, planes: int, width: int, max_groups: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (group, response, plane): best-fit decreasing on whole groups; no row takes more than `max_groups`.

    Args:
      lengths: Int[N K], tokens of each response, 0 where there is none.
      planes: of a row.
      width: tokens of a plane.
      max_groups: of a row.
    """
    if lengths.size and lengths.max() > width:
        raise Mistake(f"a sequence of {lengths.max()} tokens does not fit in a plane of {width}")
    rows: list[_Row] = []
    for group in np.argsort(-lengths.sum(axis=1), kind="stable").tolist():
        need = lengths[group]
        for row in sorted((r for r in rows if r.groups < max_groups), key=lambda r: sum(r.free)):
            if (found := row.fits(need)) is not None:
                row.place(group, need, found)
                break
        else:
            row = _Row([width] * planes)
            found = row.fits(need)
            assert found is not None
            row.place(group, need, found)
            rows.append(row)
    return [row.placed for row in rows]


class GroupBatches(Batches):
    """Step n -> this host's rows of batch n."""

    def __init__(self, mixture: Mixture, plan: Plan, *, process_count: int = 1, **options: int) -> None:
        if plan.unit % process_count:
            raise Mistake(
                f"`mesh.data` x `mesh.fsdp` x `microbatches` = {plan.unit} must be a multiple of the "
                f"{process_count} hosts"
            )
        epoch = functools.partial(mixture.epoch, seed=plan.seed, shuffle=plan.shuffle)
        super().__init__(plan, epoch, process_count=process_count, **options)
        self.mixture, self.shapes = mixture, BatchShapes.of(mixture.examples, plan)

    def __getitem__(self, step: int) -> ResponseBatch:
        groups = self.mixture.examples.take(self.groups_of(step))
        return self.shapes.batch(groups, host=self._host, hosts=self._hosts)

    def groups_of(self, step: int) -> np.ndarray:
        """Indices of the groups of batch `step`, in order."""
        return np.array(self._items(step), np.int64)

    @property
    def shape_count(self) -> int:
        """Number of shapes of batches that can occur."""
        return self.shapes.count


@dataclasses.dataclass(frozen=True)
class BatchShapes:
    """The shapes of a run's batches: rows in few numbers, planes, groups in a row."""

    plan: Plan
    responses: int  # K
    max_groups: int  # G
    row_counts: tuple[int, ...]

    @classmethod
    def of(cls, responses: Responses, plan: Plan) -> BatchShapes:
        """With packing, a row has room for twice the groups that fill it on average."""

        def in_units(rows: int) -> int:
            return -(-rows // plan.unit) * plan.unit

        responses_per_group = responses.groups.shape[1]
        if not plan.packing:
            return cls(plan, responses_per_group, 1, (in_units(plan.batch_size),))
        mean = max(float(_together(responses, plan)[0].sum()) / max(len(responses), 1), 1.0)
        max_groups = int(np.clip(2 * responses_per_group * plan.max_length / mean, 1, plan.batch_size))
        counts = sorted({in_units(-(-plan.batch_size * i // ROW_BUCKETS)) for i in range(1, ROW_BUCKETS + 1)})
        return cls(plan, responses_per_group, max_groups, tuple(counts))

    @property
    def count(self) -> int:
        """Number of shapes of batches that can occur."""
        return len(self.row_counts) if self.plan.packing else len(self.plan.widths)

    @property
    def stride(self) -> int:
        """1 + the most segments of a plane: responses and, where prompts are shared, prompts."""
        return self.max_groups * (self.responses + self.plan.share_prompt) + 1

    def rows(self, responses: Responses) -> list[packing.Placed]:
        """What stands in each row: (group, response, plane)."""
        lengths, shared = _together(responses, self.plan)
        if self.plan.packing:
            placed = pack_groups(lengths, planes=self.responses, width=self.plan.max_length, max_groups=self.max_groups)
            return [packing.spread(row, shared, responses.groups) for row in placed]
        return [[(g, k, k) for k in range(self.responses) if lengths[g, k]] for g in range(len(lengths))]

    def batch(self, responses: Responses, *, rows: int = 0, host: int = 0, hosts: int = 1) -> ResponseBatch:
        """These groups as one batch, this host's share of its rows; at least `rows` rows."""
        placed = self.rows(responses)
        count = next(n for n in self.row_counts if n >= max(len(placed), rows))
        width = self.plan.width(int(responses.lengths.max(initial=1)))
        placed = [*placed, *[[] for _ in range(count - len(placed))]]
        share = count // hosts
        return self._assemble(responses, placed[host * share : (host + 1) * share], width)

    def _assemble(self, responses: Responses, placed: list[packing.Placed], width: int) -> ResponseBatch:
        planes = Planes(len(placed), self.responses, width)
        shared = _together(responses, self.plan)[1]
        slots = np.zeros((len(placed), self.max_groups, self.responses), np.int32)
        columns = {
            name: np.zeros((len(placed), self.max_groups, *values.shape[1:]), values.dtype)
            for name, values in responses.columns.items()
        }
        for r, row in enumerate(placed):
            places: dict[int, int] = {}
            prompts: dict[int, int] = {}
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


def _together(responses: Responses, plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(tokens to find room for [N K], tokens of the shared prompt [N])"""
    if plan.share_prompt:
        return packing.together(responses.examples, responses.groups, plan.max_length)
    return responses.lengths, np.zeros(len(responses), np.int64)


class UnpairedBatches(GroupBatches):
    """Step n -> rated responses and, for the same prompts, responses to other prompts, in equally many rows."""

    def __init__(self, mixture: Mixture, mismatched: Responses, plan: Plan, **options: int) -> None:
        super().__init__(mixture, plan, **options)
        self.mismatched = mismatched
        self._other_shapes = dataclasses.replace(BatchShapes.of(mismatched, plan), row_counts=self.shapes.row_counts)

    def __getitem__(self, step: int) -> UnpairedBatch:
        chosen = self.groups_of(step)
        pair = self.mixture.examples.take(chosen), self.mismatched.take(chosen)
        return _unpaired(pair, (self.shapes, self._other_shapes), host=self._host, hosts=self._hosts)


def _unpaired(
    pair: tuple[Responses, Responses], shapes: tuple[BatchShapes, BatchShapes], *, host: int, hosts: int
) -> UnpairedBatch:
    rows = max(len(shape.rows(part)) for part, shape in zip(pair, shapes, strict=True))
    return UnpairedBatch(
        *(shape.batch(part, rows=rows, host=host, hosts=hosts) for part, shape in zip(pair, shapes, strict=True))
    )


def eval_batches(
    responses: Responses, plan: Plan, *, process_index: int = 0, process_count: int = 1
) -> list[ResponseBatch]:
    """Every group once; the last batch is filled up with empty rows."""
    shapes = BatchShapes.of(responses, plan)
    return [
        shapes.batch(responses.take(part), host=process_index, hosts=process_count) for part in _parts(responses, plan)
    ]


def unpaired_eval_batches(
    rated: Responses, mismatched: Responses, plan: Plan, *, process_index: int = 0, process_count: int = 1
) -> list[UnpairedBatch]:
    """The same of rated responses with their mismatched ones."""
    shapes = BatchShapes.of(rated, plan), BatchShapes.of(mismatched, plan)
    return [
        _unpaired((rated.take(part), mismatched.take(part)), shapes, host=process_index, hosts=process_count)
        for part in _parts(rated, plan)
    ]


def _parts(responses: Responses, plan: Plan) -> list[range]:
    count, size = len(responses), plan.batch_size
    return [range(at, min(at + size, count)) for at in range(0, count, size)]
