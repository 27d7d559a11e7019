"""`jaxalign export`: a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxalign.commands import COMMANDS, reward
from jaxalign.config.inference import ExportConfig
from jaxalign.config.limits import check, from_json
from jaxalign.config.offline import RewardConfig
from jaxalign.config.shared import MeshConfig, TrainConfig
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import join
from jaxalign.models.adapters.merge import merge_by_layer
from jaxalign.models.files import huggingface
from jaxalign.models.files.weights import fingerprint
from jaxalign.outside import Fields
from jaxalign.run import devices, final
from jaxalign.run.folder import check_weights, check_writable, read_run
from jaxalign.run.run import Run
from jaxalign.training import part
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.types import PyTree

ConfigT = TypeVar("ConfigT", bound=TrainConfig)

log = logging.getLogger(__name__)

PATHS = "model", "tokenizer", "chat_template"  # settings of a run, which export reads, that may be paths
NOTHING_YET = "has no checkpoint yet; run its command again, which continues it"


def main(config: ExportConfig) -> int:
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
    command = described["command"]
    if command not in COMMANDS or not COMMANDS[command].trains:
        raise Mistake(f"{config.run} is a run of {command!r}, which leaves no model")
    trained = from_json(COMMANDS[command].config, described["config"], where=str(config.run / "config.json"))
    trained = _found(trained, config, described)
    if config.export_dtype != "auto":
        if config.adapter:
            raise Mistake(
                f"`export_dtype` {config.export_dtype}: adapters are float32 always; leave out one of the two"
            )
        trained = dataclasses.replace(trained, export_dtype=config.export_dtype)
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
    step = (_reward_model if command == "reward" else _language_model)(config, trained, command, checkpoints, step)
    checkpoints.close()
    if step is None:
        raise Mistake(f"{config.run} {NOTHING_YET}")
    log.info("step %d of %s is in %s", step, config.run, config.output)
    return 0


def _found(trained: ConfigT, config: ExportConfig, described: dict[str, Any]) -> ConfigT:
    """The run's config with its folder where it is now, and with paths that hold from the present working folder.

    Relative paths are those of the folder in which the run was started: the one from which `output` is the run folder,
    as it is after a move too; or the one that it recorded; or, of an older version, the present one.

    Raises:
      Mistake: a model or tokenizer is in none of them, nor on the hub; or the base of adapters has changed.
    """
    run = Path(config.run).resolve()
    depth = len(trained.output.parts)
    origins = [Path(Fields(described, str(config.run)).get("folder", str, str(Path.cwd())))]
    if not trained.output.is_absolute() and run.parts[-depth:] == trained.output.parts:
        origins = [*run.parents][depth - 1 : depth] + origins
    paths = {}
    for name in PATHS:
        value = getattr(trained, name)
        prefix = huggingface.RANDOM if value and huggingface.is_random(value) else ""
        path = Path((value or "").removeprefix(prefix)).expanduser()
        if not value or path.is_absolute():
            continue
        places = [origin / path for origin in origins if (origin / path).exists()]
        if places:
            paths[name] = prefix + str(places[0].resolve())
        elif name != "chat_template":
            _check_on_hub(name, value, config.run, origins[0])
    resolved = dataclasses.replace(trained, output=run, **paths)
    if trained.lora.rank or getattr(trained, "freeze_trunk", False):  # else its weights are not read
        check_weights(run / "config.json", {f"`model` {trained.model}": fingerprint(resolved.model)})
    return resolved


def _check_on_hub(name: str, source: str, run: Path, origin: Path) -> None:
    try:
        huggingface.folder(source)
    except Mistake as mistake:
        raise Mistake(
            f"`{name}` {source} of {run} is not in {origin}, from where the run named it, nor on the hub ({mistake}); "
            "put it back there"
        ) from None


def _reward_model(
    config: ExportConfig, trained: RewardConfig, command: str, checkpoints: Checkpoints, step: int | None
) -> int | None:
    """Writes the folder, and returns its step; None where there is no checkpoint."""
    if config.adapter:
        raise Mistake(f"{config.run} is of `jaxalign reward`, whose adapters go with its heads; leave out `adapter`")
    return reward.export(trained, Path(config.output), checkpoints, step)


def _language_model(
    config: ExportConfig, trained: TrainConfig, command: str, checkpoints: Checkpoints, step: int | None
) -> int | None:
    """The same for a run that leaves a language model."""
    run = Run.read(dataclasses.replace(trained, mesh=MeshConfig()), command)
    if config.adapter and run.lora is None:
        raise Mistake(f"{config.run} trained all parameters, so it has no adapter; export it without `adapter`")
    policy = part.language_model(run.config, run.model, run.mesh)
    prefix = ".".join(filter(None, ("params", COMMANDS[command].policy)))  # beside it may be a critic
    restored = checkpoints.restore_part(prefix, _on_host(policy.trained), step=step)
    if restored is None:
        return None
    params, step = restored
    output = Path(config.output)
    if config.adapter:
        final.save_lora(output, run, params, step)
        return step
    if run.lora is not None:
        params = merge_by_layer(join(params, policy.load(_on_host(policy.frozen))), run.lora)
    final.save_model(output, run, params, step)
    return step


def _on_host(abstract: PyTree) -> PyTree:
    place = SingleDeviceSharding(jax.devices("cpu")[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype(x.dtype), sharding=place), abstract)
