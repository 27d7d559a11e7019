"""LoRA in a run: what --lora.* asks for, the base that is frozen, the adapters, and both at the run's end."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from jaxalign.config.shared import LoraConfig
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import Lora, init_adapter, join, resolve_targets, split
from jaxalign.models.adapters.merge import merge_by_layer
from jaxalign.models.adapters.quantise import quantise_kernels
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import init_params
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.files.peft import check_exportable, save_adapter
from jaxalign.runs import finish
from jaxalign.runs.vocabulary import Vocabulary
from jaxalign.training.state import TrainState
from jaxalign.types import PyTree


def lora_of(config: LoraConfig, model: ModelConfig) -> Lora | None:
    """The adapters that a config asks for; None when --lora.rank is 0.

    Raises:
      Mistake: a target that the model does not have, or a setting that cannot be.
    """
    if config.rank == 0 and config.quantise != "none":
        raise Mistake(
            f"`lora.quantise` {config.quantise} needs `lora.rank` of at least 1: codes have no gradient, so only "
            "adapters can be trained on a quantised base"
        )
    if config.rank == 0:
        return None
    lora = Lora(config.rank, config.alpha, resolve_targets(config.targets, model), config.rslora, config.dora)
    check_exportable(lora, model)
    return lora


def divide(params: PyTree, lora: Lora | None) -> tuple[PyTree, PyTree]:
    """(what is trained, what is frozen): everything and nothing, or the adapters and their base."""
    if lora is None:
        return params, None
    base, adapter = split(params)
    return adapter, base


def load_base(config: Any, model: ModelConfig, like: PyTree) -> PyTree:
    """The frozen base, in the places of `like`: a checkpoint's or, for config:, the random weights that --seed gives.

    It is in no checkpoint of the run, so it is read at every start.
    """
    places, dtype, kind = jax.tree.map(lambda x: x.sharding, like), config.param_dtype, config.lora.quantise
    if not huggingface.is_random(config.model):
        return load_params(config.model, model, param_dtype=dtype, shardings=places, quantise=kind)
    params_key = jax.random.split(jax.random.key(config.seed))[0]  # as a run without adapters draws them
    if kind == "none":
        return init_params(model, params_key, param_dtype=dtype, shardings=places)
    quantised = lambda key: quantise_kernels(init_params(model, key, param_dtype=dtype), kind)  # noqa: E731
    return jax.jit(quantised, out_shardings=places)(params_key)


def new_adapter(like: PyTree, key: jax.Array, base: PyTree) -> PyTree:
    """Adapters that change nothing yet, in the places of `like`."""
    return init_adapter(like, key, base=base, shardings=jax.tree.map(lambda x: x.sharding, like))


def export_final(
    config: Any, model: ModelConfig, vocabulary: Vocabulary, lora: Lora | None, state: TrainState, frozen: PyTree
) -> None:
    """`final/`, an ordinary model folder; of a LoRA run the merged one, and the adapter in PEFT's format beside it."""
    if lora is None:
        return finish.export_final(config, model, vocabulary, state)
    folder = Path(config.output) / "adapter"
    step = int(state.step)
    if finish.trained_steps(folder) != step:  # else a run that was stopped between the two folders has written it
        finish.put_aside(folder)
        save(folder, config, model, lora, state.params, step)
    merged = merge_by_layer(join(state.params, frozen), lora)
    return finish.export_final(config, model, vocabulary, dataclasses.replace(state, params=merged))


def whole(config: Any, model: ModelConfig, lora: Lora | None, trained: PyTree, like: PyTree) -> PyTree:
    """What `save_pretrained` writes of a run's trained leaves; adapters are merged into the base, read again."""
    return trained if lora is None else merge_by_layer(join(trained, load_base(config, model, like)), lora)


def save(folder: Path, config: Any, model: ModelConfig, lora: Lora, adapter: PyTree, step: int) -> None:
    """The adapter after `step` in PEFT's format, with the mark that `final/` carries."""
    base, mark = huggingface.lasting(config.model), {finish.MARK_FILE: finish.mark(step)}
    save_adapter(folder, adapter, lora, model, base_model=base, extra=mark)


def gradient_share(lora: Lora | None) -> float:
    """Operations of a step, as a share of a full one's: a third is the gradient of kernels, which a base has not."""
    return 1.0 if lora is None else 2 / 3
