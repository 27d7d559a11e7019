"""Batches of responses to prompts, in groups (pairs, rated responses, rankings), as a function of the step.

A batch has `batch_size` groups, as papers count, whatever their lengths; with packing they stand in as few rows as hold
them, so a step costs what its tokens cost. Rows come in few numbers, so that few programs are compiled.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence

import numpy as np

from jaxalign.data.batches import packing
from jaxalign.data.batches.packing import Planes
from jaxalign.data.batches.rows import Mixture, bucket_widths
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


@dataclasses.dataclass(frozen=True)
class GroupPlan:
    """How groups become batches."""

    batch_size: int  # groups over all hosts
    max_length: int  # tokens of a plane
    unit: int = 1  # the number of rows is a multiple of it: devices that rows are cut over x microbatches
    packing: bool = True
    shuffle: bool = True
    seed: int = 0
    share_prompt: bool = False  # with packing: a group's prompt stands once, if the group fits in a plane so


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


def pack_groups(lengths: np.ndarray, *, planes: int, width: int, most: int) -> list[list[tuple[int, int, int]]]:
    """Rows of (group, response, plane): best-fit decreasing on whole groups; no row takes more than `most` groups.

    Args:
      lengths: Int[N K], tokens of each response, 0 where there is none.
      planes: of a row.
      width: tokens of a plane.
      most: groups in a row.
    """
    if lengths.size and lengths.max() > width:
        raise Mistake(f"a sequence of {lengths.max()} tokens does not fit in a plane of {width}")
    rows: list[_Row] = []
    for group in np.argsort(-lengths.sum(axis=1), kind="stable").tolist():
        need = lengths[group]
        for row in sorted((r for r in rows if r.groups < most), key=lambda r: sum(r.free)):
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


class GroupBatches:
    """Step n -> this host's rows of batch n. Epochs follow each other without a gap; a batch may span two."""

    def __init__(
        self, mixture: Mixture, plan: GroupPlan, *, steps: int, process_index: int = 0, process_count: int = 1
    ) -> None:
        if plan.unit % process_count:
            raise Mistake(f"rows in multiples of {plan.unit} cannot be shared by {process_count} hosts")
        self.mixture, self.plan, self.steps = mixture, plan, steps
        self.layout = Layout.of(mixture.examples, plan)
        self._host, self._hosts = process_index, process_count
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> ResponseBatch:
        chosen = self.groups_of(step)
        return self.layout.batch(self.mixture.examples.take(chosen), host=self._host, hosts=self._hosts)

    def groups_of(self, step: int) -> np.ndarray:
        """Indices of the groups of batch `step`, in order."""
        per_epoch = self.groups_per_epoch()
        numbers = np.arange(step * self.plan.batch_size, (step + 1) * self.plan.batch_size)
        with self._lock:
            return np.array([self._order(int(n // per_epoch))[n % per_epoch] for n in numbers], np.int64)

    @functools.lru_cache(maxsize=2)  # noqa: B019  one instance a run
    def _order(self, epoch: int) -> np.ndarray:
        return self.mixture.epoch(epoch, seed=self.plan.seed, shuffle=self.plan.shuffle)

    def groups_per_epoch(self) -> int:
        return sum(self.mixture.per_epoch)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shapes of a run's batches: rows in few numbers, planes, groups in a row."""

    plan: GroupPlan
    responses: int  # K
    most: int  # G
    row_counts: tuple[int, ...]

    @classmethod
    def of(cls, responses: Responses, plan: GroupPlan) -> Layout:
        """With packing, a row has room for twice the groups that fill it on average."""
        count = responses.groups.shape[1]
        up = lambda rows: -(-rows // plan.unit) * plan.unit  # noqa: E731
        if not plan.packing:
            return cls(plan, count, 1, (up(plan.batch_size),))
        mean = max(float(_together(responses, plan)[0].sum()) / max(len(responses), 1), 1.0)
        most = int(np.clip(2 * count * plan.max_length / mean, 1, plan.batch_size))
        counts = sorted({up(-(-plan.batch_size * i // ROW_BUCKETS)) for i in range(1, ROW_BUCKETS + 1)})
        return cls(plan, count, most, tuple(counts))

    @property
    def shapes(self) -> int:
        """How many shapes of batches can occur."""
        return len(self.row_counts) if self.plan.packing else len(bucket_widths(self.plan.max_length))

    @property
    def stride(self) -> int:
        """1 + the most segments of a plane: responses and, where prompts are shared, prompts."""
        return self.most * (self.responses + self.plan.share_prompt) + 1

    def rows(self, responses: Responses) -> list[packing.Placed]:
        """What stands in each row: (group, response, plane)."""
        lengths, shared = _together(responses, self.plan)
        if self.plan.packing:
            placed = pack_groups(lengths, planes=self.responses, width=self.plan.max_length, most=self.most)
            return [packing.spread(row, shared, responses.groups) for row in placed]
        return [[(g, k, k) for k in range(self.responses) if lengths[g, k]] for g in range(len(lengths))]

    def batch(self, responses: Responses, *, rows: int = 0, host: int = 0, hosts: int = 1) -> ResponseBatch:
        """These groups as one batch, this host's share of its rows; at least `rows` rows."""
        placed = self.rows(responses)
        count = next(n for n in self.row_counts if n >= max(len(placed), rows))
        widths = [self.plan.max_length] if self.plan.packing else bucket_widths(self.plan.max_length)
        longest = int(responses.lengths.max(initial=1))
        width = next(w for w in widths if w >= longest)
        placed = [*placed, *[[] for _ in range(count - len(placed))]]
        share = count // hosts
        return self._assemble(responses, placed[host * share : (host + 1) * share], width)

    def _assemble(self, responses: Responses, placed: list[packing.Placed], width: int) -> ResponseBatch:
        planes = Planes(len(placed), self.responses, width)
        shared = _together(responses, self.plan)[1]
        slots = np.zeros((len(placed), self.most, self.responses), np.int32)
        columns = {
            name: np.zeros((len(placed), self.most, *values.shape[1:]), values.dtype)
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


def _together(responses: Responses, plan: GroupPlan) -> tuple[np.ndarray, np.ndarray]:
    """(tokens to find room for [N K], tokens of the shared prompt [N])"""
    if plan.share_prompt:
        return packing.together(responses.examples, responses.groups, plan.max_length)
    return responses.lengths, np.zeros(len(responses), np.int64)


class UnpairedBatches(GroupBatches):
    """Step n -> rated responses and, for the same prompts, responses to other prompts, in equally many rows."""

    def __init__(self, mixture: Mixture, mismatched: Responses, plan: GroupPlan, **options: int) -> None:
        super().__init__(mixture, plan, **options)
        self.mismatched = mismatched
        self._other_layout = dataclasses.replace(Layout.of(mismatched, plan), row_counts=self.layout.row_counts)

    def __getitem__(self, step: int) -> UnpairedBatch:
        chosen = self.groups_of(step)
        pair = self.mixture.examples.take(chosen), self.mismatched.take(chosen)
        return _unpaired(pair, (self.layout, self._other_layout), host=self._host, hosts=self._hosts)


def _unpaired(
    pair: tuple[Responses, Responses], layouts: tuple[Layout, Layout], *, host: int, hosts: int
) -> UnpairedBatch:
    rows = max(len(layout.rows(part)) for part, layout in zip(pair, layouts, strict=True))
    return UnpairedBatch(
        *(layout.batch(part, rows=rows, host=host, hosts=hosts) for part, layout in zip(pair, layouts, strict=True))
    )


def eval_batches(
    responses: Responses, plan: GroupPlan, *, process_index: int = 0, process_count: int = 1
) -> list[ResponseBatch]:
    """Every group once; the last batch is filled up with empty rows."""
    layout = Layout.of(responses, plan)
    return [
        layout.batch(responses.take(part), host=process_index, hosts=process_count) for part in _parts(responses, plan)
    ]


def unpaired_eval_batches(
    rated: Responses, mismatched: Responses, plan: GroupPlan, *, process_index: int = 0, process_count: int = 1
) -> list[UnpairedBatch]:
    """The same of rated responses with their mismatched ones."""
    layouts = Layout.of(rated, plan), Layout.of(mismatched, plan)
    return [
        _unpaired((rated.take(part), mismatched.take(part)), layouts, host=process_index, hosts=process_count)
        for part in _parts(rated, plan)
    ]


def _parts(responses: Responses, plan: GroupPlan) -> list[range]:
    count, size = len(responses), plan.batch_size
    return [range(at, min(at + size, count)) for at in range(0, count, size)]
