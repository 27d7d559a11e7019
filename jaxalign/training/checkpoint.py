"""Checkpoints by Orbax, written while training goes on, verified before they are trusted.

Each holds the train state and a JSON of what else must continue (progress, data cursor). When Orbax has written a
checkpoint's files, and before it commits them under their final name, their checksums are added; a restore compares
them, so a file that was cut short or changed is noticed, and the checkpoint before is taken instead.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from jaxalign import hosts
from jaxalign.mistake import Mistake
from jaxalign.types import PyTree, leaf_names

log = logging.getLogger(__name__)

CHECKSUMS = "checksums.json"
BEST = "best_metric"
LEAVES = "leaves"
SPARE = 1.1  # a checkpoint needs this much of its arrays' bytes on disk


class Checkpoints:
    """The checkpoints of one run folder: the newest `keep`, and the `keep_best` of lowest metric besides."""

    def __init__(self, directory: str | Path, *, keep: int = 2, keep_best: int = 0):
        self.directory = Path(directory).absolute()
        self._keep, self._keep_best = max(keep, 1), keep_best
        self._metrics: dict[int, float] = {}
        self._saves = False  # one who only reads, as export does, deletes nothing
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            create=True,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._add_checksums),
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_names=("state", "extras"))
        self._metrics = {step: m for step in self.steps() if (m := self._metric_of(step)) is not None}

    def steps(self) -> list[int]:
        """The committed steps, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The kept step of lowest metric."""
        held = {step: metric for step, metric in self._metrics.items() if step in self.steps()}
        return min(held, key=held.get) if held else None

    def save(self, step: int, state: PyTree, extras: dict[str, Any], *, metric: float | None = None) -> None:
        """Returns when the arrays are copied from the devices; the files are written meanwhile.

        Raises:
          OSError: the disk has not room enough, or the checkpoint before could not be written; the message says which
            step is still good.
        """
        self.wait()
        self._check_space(state)
        self._saves = True
        extras = {**extras, BEST: metric, LEAVES: _shapes(state)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_without_keys(state)), extras=ocp.args.JsonSave(extras)
            ),
            force=True,
        )
        if metric is not None:
            self._metrics[step] = metric

    def wait(self) -> None:
        """Until what was saved is on disk; then what need not be kept is deleted."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # of the writing thread, whatever it met
            raise Mistake(
                f"a checkpoint could not be written to {self.directory} ({error}); {self._last_good()}. Make room and "
                "run the same command again"
            ) from error
        if self._saves:
            self._delete_old()

    def _delete_old(self) -> None:
        kept = set(self.steps()[-self._keep :])
        ranked = sorted((m, s) for s, m in self._metrics.items() if s in self.steps())
        kept |= {step for _, step in ranked[: self._keep_best]}
        for step in self.steps():
            if step not in kept:
                self._manager.delete(step)
                self._metrics.pop(step, None)

    def close(self) -> None:
        self.wait()
        self._manager.close()

    def restore(self, like: PyTree, *, step: int | None = None) -> tuple[PyTree, dict[str, Any]] | None:
        """(state, extras) of the newest checkpoint that is whole, or of `step`; None when there is none.

        Args:
          like: arrays or ShapeDtypeStructs with the shardings to restore to, which may differ from those it was
            saved with.
          step: that one, or an error.

        Raises:
          Mistake: the checkpoint is of another model or optimizer, `step` does not exist or is damaged, or all are.
        """
        steps = self.steps()
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
        """(the leaves under `prefix` of the state, the step) of the newest whole checkpoint; the rest is not read.

        Args:
          prefix: "params".
          like: a tree of ShapeDtypeStructs with shardings, as it lies under the prefix.
          step: that one, or an error.
        """
        if not self.steps():
            return None
        self._check_exists(step)
        whole = [s for s in self.steps() if step in (None, s) and self._damage(s) is None]
        if not whole:
            which = "every checkpoint" if step is None else f"the checkpoint of step {step}"
            raise Mistake(f"{which} in {self.directory} is damaged")
        names = jax.tree.map(lambda name: f"{prefix}.{name.replace('/', '.')}", leaf_names(like))
        item = dict(zip(jax.tree.leaves(names), jax.tree.leaves(like), strict=True))
        args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), item)
        with ocp.PyTreeCheckpointer() as checkpointer:
            folder = self.directory / str(whole[-1]) / "state"
            found = checkpointer.restore(
                folder, args=ocp.args.PyTreeRestore(item=item, restore_args=args, partial_restore=True)
            )
        return jax.tree.map(lambda name: found[name], names), whole[-1]

    def _check_exists(self, step: int | None) -> None:
        steps = self.steps()
        if step is not None and step not in steps:
            kept = ", ".join(map(str, steps)) or "none"
            raise Mistake(f"{self.directory} has no checkpoint of step {step}; those kept are {kept}")

    def _put_aside(self, damaged: list[int]) -> None:
        """Damaged steps move to `damaged/` beside the checkpoints, since training will save them again."""
        if not damaged:
            return
        if jax.process_index() == 0:
            aside = self.directory.with_name("damaged")
            aside.mkdir(exist_ok=True)
            for step in damaged:
                shutil.rmtree(aside / str(step), ignore_errors=True)
                (self.directory / str(step)).rename(aside / str(step))
        hosts.barrier("damaged checkpoints put aside")
        for step in damaged:
            self._metrics.pop(step, None)
        self._manager.reload()

    def _read(self, step: int, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        self._check_structure(step, like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(_abstract(_without_keys(like))), extras=ocp.args.JsonRestore()
            ),
        )
        return _with_keys(restored["state"], like), restored["extras"]

    def _check_structure(self, step: int, like: PyTree) -> None:
        """Raises Mistake naming the first leaf that differs from what is on disk."""
        saved, asked = self._extras(step)[LEAVES], _shapes(like)
        for name in [*asked, *saved]:
            if saved.get(name) != asked.get(name):
                raise Mistake(
                    f"the checkpoint of step {step} in {self.directory} is of another model or optimizer: {name} is "
                    f"{saved.get(name, 'absent')} there and {asked.get(name, 'absent')} here"
                )

    def _add_checksums(self) -> None:
        if jax.process_index() != 0:
            return
        for folder in self.directory.iterdir():
            if folder.is_dir() and not (folder / CHECKSUMS).exists():
                sums = {str(f.relative_to(folder)): checksum(f) for f in _content(folder)}
                (folder / CHECKSUMS).write_text(json.dumps(sums))

    def _damage(self, step: int) -> str | None:
        folder = self.directory / str(step)
        try:
            sums = json.loads((folder / CHECKSUMS).read_text())
        except (OSError, ValueError):
            return f"no readable {CHECKSUMS}"
        for name, expected in sums.items():
            file = folder / name
            if not file.exists():
                return f"{name} is missing"
            if checksum(file) != expected:
                return f"{name} has changed"
        return None

    def _metric_of(self, step: int) -> float | None:
        try:
            return self._extras(step).get(BEST)
        except (OSError, ValueError):
            return None

    def _extras(self, step: int) -> dict[str, Any]:
        return json.loads((self.directory / str(step) / "extras" / "metadata").read_text())

    def _check_space(self, state: PyTree) -> None:
        needed = int(SPARE * sum(_local_bytes(x) for x in jax.tree.leaves(state)))
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise Mistake(
                f"a checkpoint needs {needed / 2**20:,.1f} MiB and {self.directory} has {free / 2**20:,.1f} MiB left; "
                f"free some space and run the same command again. {self._last_good()}"
            )

    def _last_good(self) -> str:
        steps = self.steps()
        return f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no earlier checkpoint"


def checksum(file: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    total = 0
    with file.open("rb") as handle:
        while piece := handle.read(2**22):
            total = zlib.crc32(piece, total)
    return total


def _content(folder: Path) -> list[Path]:
    """The files of both items; Orbax adds its own markers beside them later."""
    inside = (f for item in ("state", "extras") for f in (folder / item).rglob("*"))
    return sorted(f for f in inside if f.is_file() and f.name != "commit_success.txt")


def _shapes(tree: PyTree) -> dict[str, list[int]]:
    return {name: list(x.shape) for name, x in _without_keys(tree).items()}


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _without_keys(tree: PyTree) -> PyTree:
    """Typed keys as their words, named leaves in a dict: what Orbax stores."""

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
