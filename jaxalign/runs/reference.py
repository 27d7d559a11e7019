"""The reference's log-probabilities of all data, computed once and kept in the run folder: training holds one model."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxalign import hosts
from jaxalign.algorithms.responses import LOGPS, REF, response_logps
from jaxalign.config.offline import FeedbackConfig
from jaxalign.data.batches.groups import GroupPlan, Layout, Responses
from jaxalign.models import places
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.places import Layout as MeshLayout
from jaxalign.runs import devices
from jaxalign.runs.program import implementation
from jaxalign.runs.train import Base
from jaxalign.training import sharding

log = logging.getLogger(__name__)

FOLDER, INDEX = "reference", "index"


def precompute(config: FeedbackConfig, base: Base, plan: GroupPlan, sets: list[Responses]) -> list[Responses]:
    """The sets with a column of log π_ref [N K]; from disk where the model and the data are those it was made of.

    The key is of the weights' files, of every token and mask (and so of tokenizer and template), and of the precision.
    """
    return [_of_set(config, base, plan, part) if len(part) else part for part in sets]


def _of_set(config: FeedbackConfig, base: Base, plan: GroupPlan, responses: Responses) -> Responses:
    source = config.ref_model or config.model
    key = {
        "model": fingerprint(source),
        "data": responses.fingerprint(),
        "precision": devices.compute_dtype(config.precision).name,
        "param_dtype": config.param_dtype,
        "quantise": config.lora.quantise,
    }
    path = Path(config.output) / FOLDER / f"{zlib.crc32(json.dumps(key).encode()):08x}.npz"
    if hosts.first_decides(lambda: _read(path, key) is not None):
        log.info("reference log-probabilities of %d groups: %s", len(responses), path)
        values = _read(path, key)
    else:
        values = _compute(config, base, plan, responses, source)
        if jax.process_index() == 0:
            _write(path, key, values)
    return dataclasses.replace(responses, columns={**responses.columns, REF + LOGPS: values})


def fingerprint(source: str) -> int:
    """Changes when a weight of the model does: of each file its name, size, and first and last megabyte."""
    total = 0
    for file in sorted(huggingface.folder(source).glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as handle:
            total = zlib.crc32(f"{file.name} {size}".encode() + handle.read(2**20), total)
            handle.seek(max(0, size - 2**20))
            total = zlib.crc32(handle.read(2**20), total)
    return total


def _read(path: Path, key: dict[str, Any]) -> np.ndarray | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as held:
            return held["logps"] if json.loads(str(held["key"])) == key else None
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def _write(path: Path, key: dict[str, Any], values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, logps=values, key=json.dumps(key))
    os.replace(partial, path)


def _compute(config: FeedbackConfig, base: Base, plan: GroupPlan, responses: Responses, source: str) -> np.ndarray:
    """Batch by batch over the mesh; a column carries each group's number to its row and back."""
    graphdef, abstract = make_decoder(
        base.model,
        compute_dtype=devices.compute_dtype(config.precision),
        param_dtype=config.param_dtype,
        attention=None if config.attention == "auto" else config.attention,
        layout=MeshLayout(base.mesh) if base.mesh.size > 1 else None,
        quantise=config.lora.quantise,
    )
    placed = places.shardings(abstract, base.mesh)
    params = load_params(
        source, base.model, param_dtype=config.param_dtype, shardings=placed, quantise=config.lora.quantise
    )

    def read(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        found = response_logps(nnx.merge(graphdef, params), batch, implementation=implementation(config))[LOGPS]
        return found, batch.columns[INDEX], batch.valid

    everywhere = jax.sharding.NamedSharding(base.mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(read, out_shardings=everywhere)
    numbered = dataclasses.replace(responses, columns={INDEX: np.arange(len(responses), dtype=np.int32)})
    layout, size = Layout.of(numbered, plan), plan.batch_size
    values = np.zeros(responses.groups.shape, np.float32)
    order = np.argsort(-responses.lengths.sum(axis=1), kind="stable")  # alike lengths together: fewer rows
    for at in range(0, len(order), size):
        batch = layout.batch(numbered.take(order[at : at + size]), host=jax.process_index(), hosts=jax.process_count())
        logps, index, valid = jax.device_get(compiled(params, sharding.put_batch(batch, base.mesh)))
        values[index[valid]] = logps[valid]
    log.info("the reference has read %d groups, %s tokens", len(responses), f"{int(responses.lengths.sum()):,}")
    return values
