"""The reference's log-probabilities of all data, computed once and kept in the run folder: training holds one model."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxalign import hosts
from jaxalign.algorithms.columns import REF
from jaxalign.data.batches.groups import BatchShapes, Responses
from jaxalign.data.batches.plan import Plan
from jaxalign.models import places
from jaxalign.models.decoder.decoder import compute_dtype, decoder_for
from jaxalign.models.files.load import load_params
from jaxalign.models.files.weights import fingerprint
from jaxalign.models.reading import LOGPS, response_logps
from jaxalign.outside import brief, writing
from jaxalign.run.run import Run
from jaxalign.training import sharding
from jaxalign.training.program import as_computed, implementation

log = logging.getLogger(__name__)

FOLDER, INDEX = "reference", "index"


def precompute(run: Run, plan: Plan, sets: list[Responses]) -> list[Responses]:
    """The sets with a column of log π_ref [N K]; read from disk where model and data are those it was made of.

    The key is of the weights' files, of every token and mask (and so of tokenizer and template), and of the precision.
    """
    return [_with_logps(run, plan, part) if len(part) else part for part in sets]


def _with_logps(run: Run, plan: Plan, responses: Responses) -> Responses:
    config = run.config
    source = config.ref_model or config.model
    key = {
        "model": fingerprint(source),
        "data": responses.fingerprint(),
        "precision": compute_dtype(config.precision).name,
        "param_dtype": config.param_dtype,
        "quantise": config.lora.quantise,
    }
    path = Path(config.output) / FOLDER / f"{zlib.crc32(json.dumps(key).encode()):08x}.npz"
    shape = responses.groups.shape
    values = read(path, key, shape) if jax.process_index() == 0 else None
    if hosts.first_decides(lambda: values is not None):
        log.info("reference log-probabilities of %d groups: %s", len(responses), path)
        values = hosts.run_on_first(lambda: np.asarray(values), *shape)
    else:
        values = computed = _compute(run, plan, responses, source)
        hosts.first_decides(lambda: write(path, key, computed) is None)
    return dataclasses.replace(responses, columns={**responses.columns, REF + LOGPS: values})


def read(path: Path, key: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray | None:
    """The stored log-probabilities; None where there are none of this key and shape, or the file is damaged."""
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            values, stored_key = stored["logps"], json.loads(str(stored["key"]))
    except Exception as error:  # numpy's and those of zip, zlib and JSON, under many names
        log.warning("%s is damaged (%s); it is computed anew", path, brief(str(error)))
        return None
    fits = values.shape == shape and values.dtype == np.float32 and bool(np.isfinite(values).all())
    return values if fits and stored_key == key else None


def write(path: Path, key: dict[str, Any], values: np.ndarray) -> None:
    """Raises Mistake where the disk is full, or the folder cannot be written."""
    partial = path.with_suffix(".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, logps=values, key=json.dumps(key))
        os.replace(partial, path)


def _compute(run: Run, plan: Plan, responses: Responses, source: str) -> np.ndarray:
    """Batch by batch over the mesh; a column carries each group's number to its row and back."""
    config, mesh = run.config, run.mesh
    graphdef, abstract = decoder_for(config, run.model, mesh)
    params = load_params(
        source,
        run.model,
        param_dtype=jax.tree.map(lambda x: x.dtype, as_computed(config, abstract)),
        shardings=places.shardings(abstract, mesh),
        quantise=config.lora.quantise,
    )

    def read(params: Any, batch: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        stats = response_logps(nnx.merge(graphdef, params), batch, implementation=implementation(config))
        return stats[LOGPS], batch.columns[INDEX], batch.valid

    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    compiled = jax.jit(read, out_shardings=everywhere)
    numbered = dataclasses.replace(responses, columns={INDEX: np.arange(len(responses), dtype=np.int32)})
    shapes, size = BatchShapes.of(numbered, plan), plan.batch_size
    values = np.zeros(responses.groups.shape, np.float32)
    order = np.argsort(-responses.lengths.sum(axis=1), kind="stable")  # alike lengths together: fewer rows
    for at in range(0, len(order), size):
        batch = shapes.batch(numbered.take(order[at : at + size]))
        logps, index, valid = jax.device_get(compiled(params, sharding.put_batch(batch, mesh)))
        values[index[valid]] = logps[valid]
    log.info("the reference has read %d groups, %s tokens", len(responses), f"{int(responses.lengths.sum()):,}")
    return values
