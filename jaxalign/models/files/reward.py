"""A reward model from its folder: scores of token rows, by one member or by an ensemble.

    model = read_reward_model(folder)                        # structure and shapes; no array is made
    params = load_reward_params(model)                       # or shardings=..., a tree like model.like
    scores = member_scores(model.graphdef, params, tokens, lengths)      # [B M], a pure function
    score = combine(scores, model.rule)                      # [B]

The folder is any Hugging Face sequence classifier with one label, whose score is not changed. `jaxalign reward` writes
one, and beside it `reward.json`, which normalises scores to mean 0 and variance 1 on reference responses, and the
members of an ensemble. Text is scored by `rollout/rewards`. Axis letters: M members, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxalign.mistake import Mistake
from jaxalign.models import heads
from jaxalign.models.adapters.lora import split
from jaxalign.models.adapters.quantise import KINDS
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.families import FAMILIES, model_config
from jaxalign.models.files.load import load_params, read_tensor
from jaxalign.models.files.peft import load_adapter
from jaxalign.types import PyTree

DESCRIPTION, HEAD = "reward.json", "score.weight"
MEMBERS, HEADS = "members", "heads.safetensors"  # in a folder of their own: loaders read every safetensors file of one


def classifier_name(architecture: str) -> str:
    """The class name of transformers for the sequence classifier of an architecture."""
    if architecture == "Gemma3ForCausalLM":
        return "Gemma3TextForSequenceClassification"  # the plain name is of the model that sees images
    return architecture.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"


CLASSIFIERS = {classifier_name(name): name for name in FAMILIES}


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A reward model as its folder describes it, with the shapes of its parameters."""

    folder: Path
    config: ModelConfig  # of the trunk
    graphdef: nnx.GraphDef
    like: PyTree  # "model", "head" [M D], "mean" and "std" [M], and "members" [M ...] where each has adapters
    rule: str = "mean"  # how members' scores are combined
    as_chat: bool = False  # trained on texts as turns of a conversation
    max_length: int = 0  # tokens of a row in training, or else positions of the model
    separator: str | None = None  # the text behind each step, of a process reward model
    base: str | None = None  # the trunk's own folder, where the members are adapters on it
    quantise: str = "none"


def read_reward_model(
    source: str,
    *,
    compute_dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    attention: str | None = None,
    layout: Any = None,
    quantise: str | None = None,
) -> RewardModel:
    """The reward model of a folder or hub name; no array is made.

    Args:
      source: a sequence classifier with one label: the `final/` of `jaxalign reward`, or one made elsewhere.
      compute_dtype: dtype of the trunk's activations; scores are float32.
      param_dtype: dtype of the trunk's parameters.
      attention: an implementation of `models/decoder/attention.py`.
      layout: the mesh that cuts activations.
      quantise: format of the trunk's kernels: "none", "int8" or "nf4"; None: as the base of its adapters in training.

    Raises:
      Mistake: not a sequence classifier, or one with several labels; or an unknown `quantise`.
    """
    if quantise not in (None, "none", *KINDS):
        raise Mistake(f"quantise={quantise!r} is not one of none, {', '.join(KINDS)}")
    path, hf_config = huggingface.folder(source), huggingface.read_hf_config(source)
    config = heads.trunk_config(_causal_config(source, hf_config))
    description = _description(path)
    count, base = description.get("members", 1), description.get("base")
    quantise = description.get("quantise", "none") if quantise is None else quantise
    lora = load_adapter(path / MEMBERS / "0", config)[0] if base else None
    graphdef, abstract = make_decoder(
        config,
        compute_dtype=compute_dtype,
        param_dtype=param_dtype,
        attention=attention,
        layout=layout,
        lora=lora,
        quantise=quantise,
    )
    trunk, adapter = split(abstract)
    wide = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    like = {"model": trunk, "head": wide((count, config.hidden_size)), "mean": wide((count,)), "std": wide((count,))}
    if base:
        like["members"] = jax.tree.map(lambda x: wide((count, *x.shape)), adapter)
    return RewardModel(
        path,
        config,
        graphdef,
        like,
        rule=description.get("rule", "mean"),
        as_chat=description.get("as_chat", False),
        max_length=description.get("max_length", config.max_length),
        separator=description.get("separator"),
        base=base,
        quantise=quantise,
    )


def _causal_config(source: str, hf_config: dict[str, Any]) -> ModelConfig:
    names = hf_config.get("architectures") or ["unknown"]
    if names[0] not in CLASSIFIERS:
        raise Mistake(
            f"{source} is a {names[0]}, not a reward model; those are {', '.join(CLASSIFIERS)}, and `jaxalign reward` "
            "trains one"
        )
    labels = len(hf_config["id2label"]) if hf_config.get("id2label") else hf_config.get("num_labels", 2)
    if labels != 1:
        raise Mistake(f"{source} has {labels} labels; a reward model has one, its score")
    try:
        return model_config({**hf_config, "architectures": [CLASSIFIERS[names[0]]]})
    except ValueError as error:
        raise Mistake(f"{source}: {error}") from None


def _description(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise Mistake(f"{file} is not JSON: {error}") from None


def load_reward_params(model: RewardModel, *, shardings: PyTree | None = None) -> PyTree:
    """The parameters, in the places of `shardings`, a tree like `model.like`; by default on the first device."""
    from safetensors.numpy import load_file

    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: first, model.like)
    trunk = load_params(
        model.base or str(model.folder),
        model.config,
        param_dtype=model.like["model"]["embed"]["embedding"].dtype,
        shardings=shardings["model"],
        quantise=model.quantise,
        besides=(rf"^{HEAD}$",),
    )
    count = model.like["head"].shape[0]
    description, file = _description(model.folder), model.folder / MEMBERS / HEADS
    small: dict[str, Any] = {
        "head": load_file(file)["heads"] if file.exists() else read_tensor(str(model.folder), HEAD),
        "mean": np.asarray(description.get("mean", [0.0]), np.float32),
        "std": np.asarray(description.get("std", [1.0]), np.float32),
    }
    if "members" in model.like:
        adapters = [load_adapter(model.folder / MEMBERS / str(m), model.config)[1] for m in range(count)]
        small["members"] = jax.tree.map(lambda *members: np.stack(members), *adapters)

    def put(x: np.ndarray, like: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.Array:
        return jax.device_put(np.asarray(x, like.dtype), place)

    placed = {name: jax.tree.map(put, x, model.like[name], shardings[name]) for name, x in small.items()}
    return {"model": trunk, **placed}


def member_scores(graphdef: nnx.GraphDef, params: PyTree, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    """Float32[B M]: (r_m - mean_m) / std_m, with r_m read at the last token of each row; 0 in an empty row.

    Args:
      graphdef: graphdef of the reward model.
      params: a tree like its `like`.
      tokens: Int32[B T], padded on the right with any ids.
      lengths: Int32[B], tokens of each row, the terminator included.
    """
    scores = scores_at(graphdef, params, tokens, lengths, jnp.maximum(lengths - 1, 0)[:, None])[:, 0]
    return jnp.where(lengths[:, None] > 0, scores, 0.0)


def scores_at(
    graphdef: nnx.GraphDef, params: PyTree, tokens: jax.Array, lengths: jax.Array, places: jax.Array
) -> jax.Array:
    """Float32[B S M], (r_m - mean_m) / std_m at the places Int32[B S] of each row, such as the ends of steps."""
    segment_ids = (jnp.arange(tokens.shape[1])[None] < lengths[:, None]).astype(jnp.int32)

    def read(model: Any, head: jax.Array) -> jax.Array:
        hidden = model(tokens, segment_ids=segment_ids)
        return heads.scores(jnp.take_along_axis(hidden, places[..., None], axis=1), head)

    scores = heads.each_member(graphdef, params, read)
    return (scores - params["mean"][None, None]) / params["std"][None, None]
