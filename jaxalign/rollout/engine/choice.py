"""The engine of an on-policy run: the devices that train, or a server that loads every new policy."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxalign.config.on_policy import RolloutConfig
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import Lora
from jaxalign.models.adapters.merge import merge_by_layer
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import decoder_for
from jaxalign.models.files import huggingface
from jaxalign.models.files.save import save_pretrained
from jaxalign.models.places import decoding_mesh
from jaxalign.outside import brief
from jaxalign.rollout.engine.agreement import Agreement
from jaxalign.rollout.engine.engine import Engine, LocalEngine
from jaxalign.rollout.engine.http import HttpEngine, PublishFn
from jaxalign.rollout.engine.servers import parse_reload
from jaxalign.types import PyTree

log = logging.getLogger(__name__)

POLICY = "policy"  # folder in the run folder: the policy that the server loaded last
MOST_SLOTS = 64  # for each device; where `slots` names no number
CHECKED = 8  # responses of a step whose log-probs are compared with the policy's


def check_server(config: RolloutConfig) -> None:
    """Requires that the server of `engine`, if one is set, answers and has room for rows of `max_length`.

    Raises:
      EngineError: the server does not answer.
      Mistake: it has less room, or `engine` or `engine_reload` cannot be read.
    """
    if config.engine is None:
        return
    if config.engine_reload is not None:
        parse_reload(config.engine_reload)
    model = HttpEngine(config.engine, kind=config.engine_kind, attempts=1).served()
    room = model.get("max_model_len")
    if room is not None and room < config.max_length:
        raise Mistake(
            f"`max_length` {config.max_length}: the server at {config.engine} has room for {room} tokens of prompt and "
            "response; start it with more (vLLM: --max-model-len, SGLang: --context-length)"
        )
    log.info("responses are drawn by %s, which serves %s", config.engine, brief(model["id"]))


def make_engine(
    config: RolloutConfig,
    model: ModelConfig,
    lora: Lora | None,
    mesh: Mesh,
    *,
    publish: PublishFn | None,
) -> Engine:
    """The engine that a config chooses.

    Args:
      config: its `engine`, `slots` and what belongs to them.
      model: config of the policy.
      lora: of adapters among the params; None: there are none.
      mesh: of training, whose devices generate, on a mesh of their own unless `decode_layout` says otherwise.
      publish: writes params where a server reads them; None suffices for the local engine.
    """
    most = MOST_SLOTS * mesh.size if config.slots is None else config.slots
    slots = min(most, config.batch_size * config.n)
    if config.engine is None:
        layout = "training" if config.decode_layout == "training" else "tensor"
        own = decoding_mesh(mesh, model.num_kv_heads) if config.decode_layout == "auto" else mesh
        return LocalEngine(decoder_for(config, model, own, lora)[0], slots=slots, layout=layout)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    graphdef, _ = decoder_for(config, model, mesh, lora)
    return HttpEngine(
        config.engine,
        kind=config.engine_kind,
        publish=publish,
        reload=None if config.engine_reload is None else parse_reload(config.engine_reload),
        vocabulary=model.vocab_size,
        check=Agreement(graphdef, rows=-(-CHECKED // ways) * ways, max_length=config.max_length),
        concurrency=slots,
    )


def publisher(
    output: Path,
    source: str,
    model: ModelConfig,
    lora: Lora | None,
    *,
    tokenizer: Any,
    generation_config: dict[str, Any],
    dtype: Any,
) -> PublishFn:
    """A function that writes params as the folder `policy/`, adapters merged, and returns its path.

    Args:
      output: run folder, in which `policy/` lies.
      source: Hugging Face folder or name of the starting model, whose config.json is copied.
      model: its config.
      lora: of adapters among the params; None: there are none.
      tokenizer: written beside the params.
      generation_config: written as generation_config.json.
      dtype: of the written params.
    """
    folder, hf_config = Path(output).absolute() / POLICY, huggingface.read_hf_config(source)

    def publish(params: PyTree) -> Path:
        fresh = folder.with_name(f"{POLICY}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        save_pretrained(
            fresh,
            merge_by_layer(params, lora),
            model,
            hf_config,
            tokenizer=tokenizer,
            generation_config=generation_config,
            dtype=dtype,
        )
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
        return folder

    return publish
