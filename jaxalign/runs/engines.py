"""Which engine draws a run's responses: the devices that train, or a server that is given every policy."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from jaxalign.config.on_policy import RolloutConfig
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.merge import merge_by_layer
from jaxalign.models.files import huggingface
from jaxalign.models.files.save import save_pretrained
from jaxalign.rollout.engine.engine import LocalEngine
from jaxalign.rollout.engine.http import HttpEngine, PublishFn
from jaxalign.rollout.engine.servers import parse_reload
from jaxalign.runs import devices, finish
from jaxalign.runs.agreement import Agreement
from jaxalign.runs.program import Program
from jaxalign.runs.train import Base
from jaxalign.types import PyTree

log = logging.getLogger(__name__)

POLICY = "policy"  # in the run folder: what the server was last given
CHECKED = 8  # responses of a step whose log-probs are compared


def check_server(config: RolloutConfig) -> None:
    """Raises Mistake or EngineError unless --engine can be used: an address that answers, for rows so long."""
    if config.engine is None:
        return
    if config.engine_reload is not None:
        parse_reload(config.engine_reload)
    found = HttpEngine(config.engine, kind=config.engine_kind, attempts=1).served()
    room = found.get("max_model_len")
    if room is not None and room < config.max_length:
        raise Mistake(
            f"`max_length` {config.max_length}: the server at {config.engine} has room for {room} tokens of prompt and "
            "response; start it with more (vLLM: --max-model-len, SGLang: --context-length)"
        )
    log.info("responses are drawn by %s, which serves %s", config.engine, found["id"])


def make_engine(
    config: RolloutConfig, base: Base, program: Program, *, ways: int, prompt_room: int
) -> LocalEngine | HttpEngine:
    """The engine of a config.

    Args:
      ways: that rows are cut.
      prompt_room: tokens of the longest prompt.
    """
    slots = -(-min(config.slots, config.batch_size * config.n) // ways) * ways
    if config.engine is None:
        return LocalEngine(program.graphdef, slots=slots, prompt_room=prompt_room, layout=config.decode_layout)
    return HttpEngine(
        config.engine,
        kind=config.engine_kind,
        publish=publisher(config, base),
        reload=None if config.engine_reload is None else parse_reload(config.engine_reload),
        check=Agreement(program.graphdef, rows=-(-CHECKED // ways) * ways, max_length=config.max_length),
        concurrency=slots,
    )


def publisher(config: RolloutConfig, base: Base) -> PublishFn:
    """A function that writes params as `policy/` of the run folder, adapters merged, in the dtype of compute."""
    folder = Path(config.output).absolute() / POLICY
    hf_config, dtype = huggingface.read_hf_config(config.model), devices.compute_dtype(config.precision)
    described = finish.generation_config(config.tokenizer or config.model, base.vocabulary.terminators)

    def publish(params: PyTree) -> Path:
        fresh = folder.with_name(f"{POLICY}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        save_pretrained(
            fresh,
            merge_by_layer(params, base.lora),
            base.model,
            hf_config,
            tokenizer=base.vocabulary.tokenizer,
            generation_config=described,
            dtype=dtype,
        )
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        return folder

    return publish
