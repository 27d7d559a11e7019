"""A reward model from its folder: scores of token rows, by one member or by an ensemble.

    model = read_reward_model(folder)                        # structure and shapes; no array is made
    params = load_reward_params(model)                       # or shardings=..., a tree like model.like
    scores = member_scores(model.graphdef, params, tokens, lengths)      # [B M], a pure function
    score = combine(scores, model.rule)                      # [B]

The folder is any Hugging Face sequence classifier with one label, whose score is not changed. `jaxalign reward` writes
one, and beside it `reward.json`, which normalises scores to mean 0 and variance 1 on reference responses, and the
members of an ensemble. It also continues from one: `trunk_of` and `heads_of` read what it starts from. Text is scored
by `rollout/rewards`. Axis letters: M members, D model width.
"""

from __future__ import annotations

import dataclasses
import functools
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
from jaxalign.models.files.weights import fingerprint
from jaxalign.outside import Fields, brief, read_object
from jaxalign.select import names_own_code
from jaxalign.types import PyTree

DESCRIPTION, HEAD, BIAS = "reward.json", "score.weight", "score.bias"
SCORE = (r"^score\.(weight|bias)$",)  # tensors beside the trunk's
# In a folder of their own: loaders read every safetensors file of one.
MEMBERS, HEADS, BASE = "members", "heads.safetensors", "base.json"


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
    rule: str = "mean"  # how members' scores are combined, as `heads.combine` reads it
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
    rule: str | None = None,
) -> RewardModel:
    """The reward model of a folder or hub name; no array is made.

    Args:
      source: a sequence classifier with one label: the `final/` of `jaxalign reward`, or one made elsewhere.
      compute_dtype: dtype of the trunk's activations; scores are float32.
      param_dtype: dtype of the trunk's parameters.
      attention: an implementation of `models/decoder/attention.py`.
      layout: the mesh that cuts activations.
      quantise: format of the trunk's kernels: "none", "int8" or "nf4"; None: as the base of its adapters in training.
      rule: how members are combined, which may be code of the caller's own; None: as the folder names it, which may be
        one of `heads.RULES` only.

    Raises:
      Mistake: not a sequence classifier, or one with several labels; a damaged description, or one that names code; or
        an unknown `quantise`.
    """
    path, hf_config = huggingface.folder(source), huggingface.read_hf_config(source)
    config = heads.trunk_config(_causal_config(source, hf_config))
    description = _description(path)
    base = description.get("base", str, None)
    quantise = description.get("quantise", str, "none") if quantise is None else quantise
    if quantise not in ("none", *KINDS):
        raise Mistake(f"quantise={quantise!r} is not one of none, {', '.join(KINDS)}")
    head = _heads(path, config.hidden_size)
    count = description.get("members", int, 1)
    if count != len(head):
        raise Mistake(f"{description.where}: 'members' is {count}, and the folder has {len(head)} heads")
    max_length = description.get("max_length", int, config.max_length)
    if max_length < 1:
        raise Mistake(f"{description.where}: 'max_length' is {max_length}; it must be at least 1")
    rule = _rule(description, count) if rule is None else rule
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
    like = {"model": trunk, "head": wide(head.shape), "mean": wide((count,)), "std": wide((count,))}
    if base:
        like["members"] = jax.tree.map(lambda x: wide((count, *x.shape)), adapter)
    return RewardModel(
        path,
        config,
        graphdef,
        like,
        rule=rule,
        as_chat=description.get("as_chat", bool, False),
        max_length=max_length,
        separator=description.get("separator", str, None),
        base=base,
        quantise=quantise,
    )


def is_classifier(source: str) -> bool:
    """True if a folder holds a sequence classifier: a reward model."""
    names = huggingface.read_hf_config(source).get("architectures")
    return isinstance(names, list) and bool(names) and names[0] in list(CLASSIFIERS)


def trunk_of(source: str) -> ModelConfig:
    """The config, without an output matrix, of the language model or classifier that a reward model starts from."""
    if is_classifier(source):
        return heads.trunk_config(_causal_config(source, huggingface.read_hf_config(source)))
    return heads.trunk_config(huggingface.read_config(source))


def heads_of(source: str, members: int, *, alike: bool) -> np.ndarray | None:
    """Float32[M D], or [M D + 1] with biases: the heads that a classifier starts `members` from; None without a head.

    Args:
      source: the model that training starts from.
      members: of the ensemble.
      alike: whether members may start with the same head, as they may with different adapters.

    Raises:
      Mistake: the classifier has another number of heads, or its members are adapters.
    """
    if huggingface.is_random(source) or not is_classifier(source):
        return None
    model = read_reward_model(source, rule="mean")  # whatever the folder's is: heads are trained one by one
    if model.base:
        raise Mistake(
            f"`model` {source} is an ensemble of adapters on {model.base}, which no run continues; start from that base"
        )
    head = _heads(model.folder, model.config.hidden_size)
    if len(head) == 1 and members > 1 and alike:
        return np.repeat(head, members, axis=0)
    if len(head) != members:
        raise Mistake(
            f"`members` {members}: {source} has {len(head)} of them, and heads that start alike stay alike; give "
            f"`members` {len(head)}, or start from a language model"
        )
    return head


def _heads(path: Path, width: int) -> np.ndarray:
    """Float32[M D], or [M D + 1] with a bias in the last column, of the raw scores of all members."""
    file = path / MEMBERS / HEADS
    if file.exists():
        head = read_tensor(str(file.parent), "heads")
    else:
        head = read_tensor(str(path), HEAD)
        bias = read_tensor(str(path), BIAS, absent=np.zeros(0))
        head = np.concatenate([head, bias[:, None]], axis=1) if bias.shape == head.shape[:1] else head
    if head.ndim != 2 or len(head) < 1 or head.shape[1] - width not in (0, 1) or not np.isfinite(head).all():
        raise Mistake(f"{path}: its head has shape {list(head.shape)}; it must hold [1, {width}] finite numbers")
    return head.astype(np.float32)


def _causal_config(source: str, hf_config: dict[str, Any]) -> ModelConfig:
    fields = Fields(hf_config, f"{source}: config.json")
    names = fields.texts("architectures") or ["unknown"]
    if names[0] not in CLASSIFIERS:
        raise Mistake(
            f"{source} is a {brief(names[0])}, not a reward model; those are {', '.join(CLASSIFIERS)}, and "
            "`jaxalign reward` trains one"
        )
    labels = len(fields.get("id2label", dict, {})) or fields.get("num_labels", int, 2)
    if labels != 1:
        raise Mistake(f"{source} has {labels} labels; a reward model has one, its score")
    try:
        return model_config({**hf_config, "architectures": [CLASSIFIERS[names[0]]]})
    except ValueError as error:
        raise Mistake(f"{source}: {error}") from None


def _description(path: Path) -> Fields:
    """The contents of reward.json; none in a folder that was made elsewhere."""
    file = path / DESCRIPTION
    return read_object(file) if file.exists() else Fields({}, str(file))


def _rule(description: Fields, count: int) -> str:
    """How members are combined, as a file may name it: by the table alone, for anything else would run as code."""
    rule = description.get("rule", str, "mean")
    where = f"{description.where}: 'rule' is {brief(rule)}"
    if names_own_code(rule):
        raise Mistake(
            f"{where}, code of somebody's own, which no file may make run; known are {', '.join(heads.RULES)}. If you "
            "trust it, name it yourself: reward_model(path=..., rule=...)"
        )
    try:
        jax.eval_shape(lambda scores: heads.combine(scores, rule), jax.ShapeDtypeStruct((1, count), jnp.float32))
    except (Mistake, TypeError) as error:  # of an unknown name, or a keyword of another type
        raise Mistake(f"{where}, which cannot be used ({brief(str(error), 200)})") from None
    return rule


def _statistics(description: Fields, key: str, default: float, count: int) -> np.ndarray:
    """Float32[M] under a key of the description. Raises Mistake unless they are as many finite numbers."""
    values = description.get(key, list, [default] * count)
    rule = "finite numbers" if key == "mean" else "finite numbers above 0"
    numbers = [Fields({key: value}, description.where).get(key, float) for value in values]
    if len(numbers) != count or (key == "std" and min(numbers) <= 0):
        raise Mistake(f"{description.where}: {key!r} is {brief(values)}; it must hold {count} {rule}")
    return np.asarray(numbers, np.float32)


def load_reward_params(model: RewardModel, *, shardings: PyTree | None = None) -> PyTree:
    """The parameters, in the places of `shardings`, a tree like `model.like`; by default on the first device."""
    if model.base:
        _check_base(model.folder / MEMBERS / BASE, model.base)
    if shardings is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: first, model.like)
    trunk = load_params(
        model.base or str(model.folder),
        model.config,
        param_dtype=model.like["model"]["embed"]["embedding"].dtype,
        shardings=shardings["model"],
        quantise=model.quantise,
        besides=SCORE,
    )
    description, count = _description(model.folder), model.like["head"].shape[0]
    small: dict[str, Any] = {
        "head": _heads(model.folder, model.config.hidden_size),
        "mean": _statistics(description, "mean", 0.0, count),
        "std": _statistics(description, "std", 1.0, count),
    }
    if "members" in model.like:
        adapters = [load_adapter(model.folder / MEMBERS / str(m), model.config)[1] for m in range(count)]
        small["members"] = jax.tree.map(lambda *members: np.stack(members), *adapters)

    def put(x: np.ndarray, like: jax.ShapeDtypeStruct, place: jax.sharding.Sharding) -> jax.Array:
        return jax.device_put(np.asarray(x, like.dtype), place)

    placed = {name: jax.tree.map(put, x, model.like[name], shardings[name]) for name, x in small.items()}
    return {"model": trunk, **placed}


def _check_base(file: Path, base: str) -> None:
    """Raises Mistake where the base of the members is another than they were trained on; older folders do not say."""
    recorded = read_object(file).get("fingerprint", str) if file.exists() else None
    if recorded not in (None, fingerprint(base)):
        raise Mistake(f"{file.parents[1]} has adapters on {base}, whose weights or config have changed; restore them")


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
