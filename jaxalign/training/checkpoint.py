"""Checkpoints by Orbax, written while training goes on, verified before they are trusted.

Each holds the train state and a JSON of what else must continue (progress, data cursor). Checksums are added after
Orbax has written a checkpoint's files and before it commits them under their final name. A restore compares them, and
falls back to the checkpoint before if a file was cut short or changed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxalign import hosts
from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, brief, read_object, writing
from jaxalign.types import PyTree, leaf_names

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
BLOCK = 1 << 24  # bytes of a file that have a checksum of their own; a part of the format
UNREADABLE = 1 << 30  # above every number of a block
BEST = "best_metric"
LEAVES = "leaves"
EXTRAS = "extras/metadata"  # of a checkpoint's files, the one that is JSON
SPARE = 1.1  # bytes on disk per byte of a checkpoint's arrays


class Checkpoints:
    """Checkpoints of one run folder: the newest `keep`, and besides them the `keep_best` of lowest metric."""

    def __init__(self, directory: str | Path, *, keep: int = 2, keep_best: int = 0):
        self.directory = Path(directory).absolute()
        self._keep, self._keep_best = max(keep, 1), keep_best
        self._metrics: dict[int, float] = {}
        self._saves = False  # a reader, such as export, deletes nothing
        self._step = -1  # that is being written
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            create=True,
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._add_checksums, barrier_sync_fn=self._meet
            ),
        )
        with writing(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "extras"))
        self._metrics = {step: m for step in self.steps() if (m := self._metric_of(step)) is not None}

    def steps(self) -> list[int]:
        """Committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """Committed step of lowest metric."""
        metrics = {step: metric for step, metric in self._metrics.items() if step in self.steps()}
        return min(metrics, key=metrics.get) if metrics else None

    def save(self, step: int, state: PyTree, extras: dict[str, Any], *, metric: float | None = None) -> None:
        """Copies the arrays from the devices and returns; files are written in the background.

        Raises:
          Mistake: the disk has too little room, or the checkpoint before could not be written; the message names the
            last good step.
        """
        self.wait()
        self._check_space(state)
        self._saves, self._step = True, step
        extras = {**extras, BEST: metric, LEAVES: _shapes(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(_without_keys(state)), extras=ocp.args.JsonSave(extras))
        with writing(self.directory):
            self._manager.save(step, args=args, force=True)
        if metric is not None:
            self._metrics[step] = metric

    def wait(self) -> None:
        """Waits until the last save is on disk, then deletes the checkpoints that need not stay.

        Raises:
          Mistake: it could not be written; the message names the last good step.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # any that ended Orbax's writing thread
            raise Mistake(
                f"a checkpoint could not be written to {self.directory} ({error}); {self.last_good()}. Make room and "
                "run the same command again"
            ) from error
        if self._saves:
            self._delete_old()

    def _delete_old(self) -> None:
        steps = self.steps()
        ranked = sorted((metric, step) for step, metric in self._metrics.items() if step in steps)
        needed = {*steps[-self._keep :], *(step for _, step in ranked[: self._keep_best])}
        for step in steps:
            if step not in needed:
                self._manager.delete(step)
                self._metrics.pop(step, None)

    def close(self, *, tidy: bool = True) -> None:
        """Waits for the last save; with `tidy` it also deletes the checkpoints that need not stay."""
        self._saves = self._saves and tidy
        self.wait()
        self._manager.close()

    def restore(self, like: PyTree, *, step: int | None = None) -> tuple[PyTree, Fields] | None:
        """(state, extras) of the newest undamaged checkpoint, or of `step`; None when there is no checkpoint.

        Args:
          like: arrays or ShapeDtypeStructs with the shardings to restore to, which may differ from those it was
            saved with.
          step: the only step to accept; None: the newest that is not damaged.

        Raises:
          Mistake: the checkpoint is of another model or optimizer, `step` does not exist or is damaged, or all are.
        """
        steps = self._agreed_steps()
        self._check_exists(step)
        damaged: list[int] = []
        for candidate in [step] if step is not None else reversed(steps):
            problem = self._damage(candidate)
            if problem is None:
                restored = self._read(candidate, like)
                self._put_aside(damaged)
                return restored
            log.warning("checkpoint of step %d is damaged (%s); taking the one before", candidate, problem)
            damaged.append(candidate)
        if steps:
            raise Mistake(
                f"every checkpoint in {self.directory} is damaged; delete the folder to start again from the beginning"
            )
        return None

    def restore_part(self, prefix: str, like: PyTree, *, step: int | None = None) -> tuple[PyTree, int] | None:
        """(leaves of the state under `prefix`, step) of the newest undamaged checkpoint; other leaves are not read.

        Args:
          prefix: such as "params".
          like: tree of ShapeDtypeStructs with shardings, as it lies under the prefix.
          step: the only step to accept; None: the newest that is not damaged.

        Raises:
          Mistake: `step` does not exist or is damaged, or all are.
        """
        steps = self._agreed_steps()
        if not steps:
            return None
        self._check_exists(step)
        newest = next((s for s in reversed(steps) if step in (None, s) and self._damage(s) is None), None)
        if newest is None:
            which = "every checkpoint" if step is None else f"the checkpoint of step {step}"
            raise Mistake(f"{which} in {self.directory} is damaged")
        names = jax.tree.map(lambda name: f"{prefix}.{name.replace('/', '.')}", leaf_names(like))
        item = dict(zip(jax.tree.leaves(names), jax.tree.leaves(like), strict=True))
        args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), item)
        with ocp.PyTreeCheckpointer() as checkpointer:
            folder = self.directory / str(newest) / "state"
            leaves = checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
            )
        return jax.tree.map(lambda name: leaves[name], names), newest

    def extras(self, step: int) -> Fields:
        """The JSON that was saved with a step."""
        return read_object(self.directory / str(step) / EXTRAS)

    def _agreed_steps(self) -> list[int]:
        """The committed steps. Raises Mistake where another host has others."""
        steps = self.steps()
        hosts.agree(checkpoints=f"{steps}")
        return steps

    def _check_exists(self, step: int | None) -> None:
        steps = self.steps()
        if step is not None and step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise Mistake(f"{self.directory} has no checkpoint of step {step}; those kept are {known}")

    def _put_aside(self, damaged: list[int]) -> None:
        """Moves damaged steps to `damaged/` beside the checkpoints, since training will save them again."""
        if not damaged:
            return
        if jax.process_index() == 0:
            aside = self.directory.with_name("damaged")
            with writing(aside):
                aside.mkdir(exist_ok=True)
                for step in damaged:
                    shutil.rmtree(aside / str(step), ignore_errors=True)
                    (self.directory / str(step)).rename(aside / str(step))
        hosts.barrier("damaged checkpoints put aside")
        for step in damaged:
            self._metrics.pop(step, None)
        self._manager.reload()

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, Fields]:
        self._check_structure(step, like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(_abstract(_without_keys(like))))
        try:
            restored = self._manager.restore(step, args=args)
        except OSError as error:
            raise Mistake(
                f"the checkpoint of step {step} in {self.directory} cannot be read ({brief(str(error), 200)}); its "
                "files are as they were written: look at the disk and at their permissions"
            ) from error
        return _with_keys(restored["state"], like), self.extras(step)

    def _check_structure(self, step: int, like: PyTree) -> None:
        """Raises Mistake naming the first leaf whose shape on disk differs."""
        saved, expected = self.extras(step).get(LEAVES, dict), _shapes(like)
        for name in [*expected, *saved]:
            if saved.get(name) != expected.get(name):
                raise Mistake(
                    f"the checkpoint of step {step} in {self.directory} is of another model or optimizer: {name} is "
                    f"{saved.get(name, 'absent')} there and {expected.get(name, 'absent')} here; "
                    "take the settings that it was saved with"
                )

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's barriers of a save, in its writing thread; before the first a host sums the files that it wrote."""
        if "write_complete" in key:
            own = f"ocdbt.process_{jax.process_index()}"
            with contextlib.suppress(OSError):  # then the first host sums them
                for folder in self._unfinished():
                    items = [f for f in folder.iterdir() if f.name.partition(".")[0] == "state"]  # a passing name
                    files = [(item, f) for item in items for f in (item / own).rglob("*") if f.is_file()]
                    sums = {f"state/{file.relative_to(item)}": checksums(file) for item, file in files}
                    (folder / f"{CHECKSUMS}.{jax.process_index()}").write_text(json.dumps(sums))
        self._barrier(key=key, timeout_ms=timeout_ms)

    def _add_checksums(self) -> None:
        """Writes the checksums of a step on the first host: those of the hosts, and its own of what they left out."""
        if jax.process_index() != 0:
            return
        for folder in self._unfinished():
            sums: dict[str, Any] = {}
            parts = list(folder.glob(f"{CHECKSUMS}.*"))
            for part in parts:
                with contextlib.suppress(Mistake):
                    sums |= read_object(part).content
            sums = {name: sums.get(name) or checksums(file) for name, file in _content(folder).items()}
            (folder / CHECKSUMS).write_text(json.dumps(sums))
            for part in parts:
                part.unlink()

    def _unfinished(self) -> list[Path]:
        """The folder of the step that is being written, under its passing name or its last."""
        folders = (folder for folder in self.directory.iterdir() if folder.name.partition(".")[0] == str(self._step))
        return [folder for folder in folders if folder.is_dir() and not (folder / CHECKSUMS).exists()]

    def _damage(self, step: int) -> str | None:
        """The damage to a step; None if it is whole. Each host reads a share of the blocks, and all return the same.

        Raises:
          Mistake: a host cannot read a file.
        """
        folder = self.directory / str(step)
        files, problem = _content(folder), None
        blocks: list[_Block] = []
        try:
            blocks = _blocks(folder, files)
        except Mistake as mistake:
            problem = str(mistake)
        worst = len(blocks) + 1 if problem else 0  # counted from the last block, so that the first is the largest
        try:
            for number in _share([block.size for block in blocks]):
                if not _is_whole(files[blocks[number].name], blocks[number]):
                    worst = max(worst, len(blocks) - number)
        except OSError as error:
            worst, problem = UNREADABLE, f"{error.filename}: {error.strerror}"
        worst = max(hosts.exchange(worst))
        if worst == UNREADABLE:
            raise Mistake(
                f"the checkpoint of step {step} in {self.directory} cannot be read "
                f"({brief(problem or 'by another host', 200)}); look at the disk and at the files' permissions"
            )
        if worst > len(blocks):
            return problem or f"another host finds no readable {CHECKSUMS}"
        return f"{brief(blocks[-worst].name)} has changed" if worst else None

    def _metric_of(self, step: int) -> float | None:
        try:
            return self.extras(step).get(BEST, float, None)
        except Mistake:
            return None

    def _check_space(self, state: PyTree) -> None:
        needed = int(SPARE * sum(_local_bytes(x) for x in jax.tree.leaves(state)))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise Mistake(
                f"a checkpoint needs {needed / 2**20:,.1f} MiB and {self.directory} has {free / 2**20:,.1f} MiB left; "
                f"free some space and run the same command again. {self.last_good()}"
            )

    def last_good(self) -> str:
        """The newest step that is on disk, as a clause for an error."""
        steps = self.steps()
        return f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no earlier checkpoint"


class _Block(NamedTuple):
    """A part of a file of a checkpoint, and its checksum."""

    name: str
    begin: int  # byte of the file
    size: int
    sum: int


def _blocks(folder: Path, files: dict[str, Path]) -> list[_Block]:
    """The parts of a step's files whose sums are known. Raises Mistake where they do not fit the files."""
    try:
        listed = read_object(folder / CHECKSUMS).content
    except Mistake:
        raise Mistake(f"no readable {CHECKSUMS}") from None
    if EXTRAS not in listed:
        raise Mistake(f"{CHECKSUMS} does not list {EXTRAS}")
    blocks = []
    for name, sums in sorted(listed.items()):
        if name not in files:
            raise Mistake(f"{brief(name)} is missing")
        size, length = files[name].stat().st_size, BLOCK
        if isinstance(sums, int):  # of an older version: one of the whole file
            sums, length = [sums], max(size, 1)
        if not isinstance(sums, list) or not all(isinstance(x, int) for x in sums):
            raise Mistake(f"no readable {CHECKSUMS}")
        if len(sums) != max(1, -(-size // length)):
            raise Mistake(f"{brief(name)} has another length")
        begins = range(0, len(sums) * length, length)
        blocks += [_Block(name, at, min(length, size - at), x) for at, x in zip(begins, sums, strict=True)]
    return blocks


def _is_whole(file: Path, block: _Block) -> bool:
    with file.open("rb") as handle:
        handle.seek(block.begin)
        total = 0
        for at in range(0, block.size, BLOCK):
            total = zlib.crc32(handle.read(min(BLOCK, block.size - at)), total)
    return total == block.sum


def _share(sizes: list[int]) -> list[int]:
    """The numbers of the blocks that this host reads: the same sum of sizes on each, as far as they can be dealt."""
    load, own = [0] * jax.process_count(), []
    for number in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        host = load.index(min(load))
        load[host] += sizes[number]
        own += [number] if host == jax.process_index() else []
    return sorted(own)


def checksums(file: Path) -> list[int]:
    """CRC-32 of each block of a file."""
    with file.open("rb") as handle:
        return [zlib.crc32(handle.read(BLOCK)) for _ in range(max(1, -(-file.stat().st_size // BLOCK)))]


def _content(folder: Path) -> dict[str, Path]:
    """Files of both items by name; Orbax adds its own markers beside them later."""
    inside = (f for item in ("state", "extras") for f in (folder / item).rglob("*"))
    return {str(f.relative_to(folder)): f for f in inside if f.is_file() and f.name != "commit_success.txt"}


def _shapes(tree: PyTree) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in _without_keys(tree).items()}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    """Leaves by name, typed keys as their words: the dict that Orbax stores."""

    def plain(x: Any) -> Any:
        if not _is_key(x):
            return x
        if isinstance(x, jax.Array):
            return jax.random.key_data(x)
        return jax.ShapeDtypeStruct((*x.shape, 2), jnp.uint32, sharding=x.sharding)

    names, leaves = jax.tree.leaves(leaf_names(tree)), jax.tree.leaves(tree)
    return {name.replace("/", "."): plain(x) for name, x in zip(names, leaves, strict=True)}


def _with_keys(restored: dict[str, Any], like: PyTree) -> PyTree:
    def typed(name: str, x: Any) -> Any:
        value = restored[name.replace("/", ".")]
        return jax.random.wrap_key_data(value) if _is_key(x) else value

    return jax.tree.map(typed, leaf_names(like), like)


def _abstract(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _local_bytes(x: jax.Array) -> int:
    if _is_key(x):
        return 0
    return sum(shard.data.nbytes for shard in x.addressable_shards if shard.replica_id == 0)
