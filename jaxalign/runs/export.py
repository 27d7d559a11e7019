"""`jaxalign export`: a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxalign.commands import COMMANDS
from jaxalign.config.inference import ExportConfig
from jaxalign.config.limits import check, from_json
from jaxalign.config.offline import RewardConfig
from jaxalign.config.on_policy import PPOConfig
from jaxalign.config.shared import TrainConfig
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.runs import adapters, devices, finish, reward
from jaxalign.runs.folder import check_writable, read_run
from jaxalign.runs.vocabulary import load_vocabulary
from jaxalign.training.checkpoint import Checkpoints

log = logging.getLogger(__name__)

NOTHING_YET = "has no checkpoint yet; run its command again, which continues it"


def run(config: ExportConfig) -> int:
    """Writes --output from the newest whole checkpoint, the best, or the one of --step."""
    check(config)
    if config.best and config.step is not None:
        raise Mistake(f"`best` and `step` {config.step} name two checkpoints; give one of them")
    devices.start()
    devices.start_log()
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise Mistake(f"`output` {output} is a file; name a new folder")
    if output.is_dir() and any(output.iterdir()):
        raise Mistake(f"`output` {output} is not empty; name a new folder")
    check_writable(output)
    described = read_run(config.run)
    held = from_json(COMMANDS[described["command"]].config, described["config"], where=str(config.run / "config.json"))
    folder = Path(config.run) / "checkpoints"
    if not folder.is_dir():
        raise Mistake(f"{config.run} {NOTHING_YET}")
    checkpoints = Checkpoints(folder)
    step = checkpoints.best_step() if config.best else config.step
    if config.best and step is None:
        raise Mistake(
            f"{config.run} kept no checkpoint with a held-out loss, so none is best; leave out `best` for the newest, "
            f"or name one with `step` ({', '.join(map(str, checkpoints.steps()))})"
        )
    step = (_reward_model if described["command"] == "reward" else _language_model)(config, held, checkpoints, step)
    checkpoints.close()
    if step is None:
        raise Mistake(f"{config.run} {NOTHING_YET}")
    log.info("step %d of %s is in %s", step, config.run, config.output)
    return 0


def _reward_model(config: ExportConfig, held: RewardConfig, checkpoints: Checkpoints, step: int | None) -> int | None:
    """Writes the folder, and returns its step; None where there is no checkpoint."""
    if config.adapter:
        raise Mistake(f"{config.run} is of `jaxalign reward`, whose adapters go with its heads; leave out `adapter`")
    return reward.export(held, Path(config.output), checkpoints, step)


def _language_model(config: ExportConfig, held: TrainConfig, checkpoints: Checkpoints, step: int | None) -> int | None:
    """The same of a run that leaves a language model."""
    model = huggingface.read_config(held.model)
    lora = adapters.lora_of(held.lora, model)
    if config.adapter and lora is None:
        raise Mistake(f"{config.run} trained all parameters, so it has no adapter; export it without `adapter`")
    _, abstract = make_decoder(model, param_dtype=held.param_dtype, lora=lora, quantise=held.lora.quantise)
    trained, frozen = (_on_host(part) for part in adapters.divide(abstract, lora))
    prefix = "params.policy" if isinstance(held, PPOConfig) else "params"  # beside it is the critic
    found = checkpoints.restore_part(prefix, trained, step=step)
    if found is None:
        return None
    params, step = found
    output = Path(config.output)
    if config.adapter:
        adapters.save(output, held, model, lora, params, step)
    else:
        params = adapters.whole(held, model, lora, params, frozen)
        finish.export(output, held, model, load_vocabulary(held, model), params, step)
    return step


def _on_host(abstract: dict) -> dict:
    place = SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype), sharding=place), abstract)
