"""`jaxalign export`: a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxalign.models import huggingface
from jaxalign.models.decoder import make_decoder
from jaxalign.runs import devices, finish
from jaxalign.runs.config import ExportConfig, SFTConfig, from_json
from jaxalign.runs.folder import read_run
from jaxalign.runs.vocabulary import load_vocabulary
from jaxalign.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)


def run(config: ExportConfig) -> int:
    """Writes --output from the newest whole checkpoint, the best, or the one of --step."""
    devices.start()
    devices.start_log()
    held = from_json(SFTConfig, read_run(config.run)["config"], where=str(config.run / "config.json"))
    folder = Path(config.run) / "checkpoints"
    if not folder.is_dir():
        raise ValueError(f"{config.run} has no checkpoints yet")
    checkpoints = Checkpoints(folder)
    step = checkpoints.best_step() if config.best else config.step
    if config.best and step is None:
        raise ValueError(f"{config.run} kept no checkpoint with a held-out loss")
    model = huggingface.read_config(held.model)
    _, abstract = make_decoder(model, param_dtype=held.param_dtype)
    found = checkpoints.restore_part("params", _on_host(abstract), step=step)
    if found is None:
        raise ValueError(f"{config.run} has no checkpoint yet")
    params, step = found
    checkpoints.close()
    finish.export(Path(config.output), held, model, load_vocabulary(held, model), params, step)
    log.info("step %d of %s is in %s", step, config.run, config.output)
    return 0


def _on_host(abstract: dict) -> dict:
    place = SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype), sharding=place), abstract)
