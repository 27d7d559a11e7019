"""Prompts in, responses out, as texts or as ids: what generate, evaluation, samples and the quickstart share.

model = load_model("runs/sft/final", dtype=jnp.bfloat16)
[(text, finished)] = respond(model, ["Once upon a time"], Sampling(max_new_tokens=64))
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxalign.data.read.turns import with_turn_ends
from jaxalign.data.sets import prompts as prompting
from jaxalign.data.sets.prompts import LastTurn, Prompt
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import join, split
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.files.peft import load_adapter
from jaxalign.models.files.weights import trained_on_other_weights
from jaxalign.models.places import Layout, device_bytes, placed
from jaxalign.rollout.engine.engine import Engine, LocalEngine, Request, Response
from jaxalign.rollout.engine.memory import check_memory
from jaxalign.rollout.engine.params import decoding_params
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.types import PyTree

log = logging.getLogger(__name__)

CONTEXT = 8  # last tokens of a prompt that a response is decoded with: they decide how its first token is written
WAY_OUT = "raise `mesh.tensor`, or `mesh.fsdp`, which is slower, or use more devices"


class LoadedModel(NamedTuple):
    """A model that responds to texts."""

    source: str  # folder or hub name, for messages
    config: ModelConfig
    tokenizer: Any
    terminators: tuple[int, ...]  # ids that end a response
    graphdef: nnx.GraphDef | None = None
    params: PyTree | None = None  # whole, or layer by layer for generation alone; None: a server has them


def load_model(source: str, *, adapter: Path | None = None, dtype: Any) -> LoadedModel:
    """The model of a Hugging Face folder or hub name, with the adapters of a PEFT folder beside its own leaves.

    Raises:
      Mistake: what `load_tokenizer_only` raises; or weights or adapters are absent or do not fit.
    """
    return with_params(load_tokenizer_only(source, adapter), adapter=adapter, dtype=dtype)


def load_tokenizer_only(source: str, adapter: Path | None = None) -> LoadedModel:
    """The model without its params: enough to check prompts, and for a server that has them.

    A tokenizer in the folder of an adapter, with its chat template and terminators, takes the place of the model's.

    Raises:
      Mistake: random weights, no tokenizer, or one of another model.
    """
    if huggingface.is_random(source):
        raise Mistake(f"`model` {source} has random weights, which answer nothing; name a folder with *.safetensors")
    trained = huggingface.tokenizer_source(source, adapter)
    config, tokenizer = huggingface.read_config(source), huggingface.load_tokenizer(trained)
    huggingface.check_fits(tokenizer, config, trained)
    ends = [end for folder in (trained, source) for end in huggingface.terminators(folder, tokenizer)]
    terminators = with_turn_ends(tokenizer, tuple(dict.fromkeys(ends)))
    huggingface.check_ids(terminators, config, trained)
    return LoadedModel(source, config, tokenizer, terminators)


def with_params(
    model: LoadedModel, *, adapter: Path | None = None, dtype: Any, mesh: Mesh | None = None
) -> LoadedModel:
    """The model with its params, read in `dtype`, which is also that of computation.

    With a mesh every device reads its share, and the params are there once, layer by layer, for generation alone;
    without one they are whole, on the first device.
    """
    lora, adapted = (None, None) if adapter is None else load_adapter(adapter, model.config)
    if adapter is not None and trained_on_other_weights(adapter, model.source):
        log.warning(
            "%s was trained on other weights than those of %s, so its responses are others", adapter, model.source
        )
    layout = None if mesh is None or mesh.size == 1 else Layout(mesh)
    graphdef, abstract = make_decoder(model.config, compute_dtype=dtype, param_dtype=dtype, lora=lora, layout=layout)
    base_places = adapter_places = None
    if mesh is not None:
        like = placed(abstract, mesh)
        check_memory(weights=device_bytes(like), way_out=WAY_OUT)
        base_places, adapter_places = split(jax.tree.map(lambda x: x.sharding, like))
    params = load_params(model.source, model.config, param_dtype=dtype, shardings=base_places)
    if adapted is not None:
        params = join(jax.device_put(adapted, adapter_places), params)
    if mesh is not None:
        params = decoding_params(graphdef, params, free=True)
    return model._replace(graphdef=graphdef, params=params)


def respond(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    n: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    cache_dtype: Any = None,
    engine: Engine | None = None,
    on_response: Callable[[int, tuple[str, bool]], None] | None = None,
    last_turn: LastTurn = "refuse",
) -> list[tuple[str, bool]]:
    """(text, whether it ended by itself) of n responses to each prompt in turn. Texts are continued, messages answered.

    Args:
      model: from `load_model`, or from `load_tokenizer_only` for an engine that has the params.
      prompts: texts or messages.
      sampling: how tokens are drawn; the model's terminators take the place of none. A stop text that is a special
        token ends a response as a terminator does, and is no part of its text.
      n: responses to each prompt.
      batch_size: responses that are generated at once.
      seed: of sampling.
      cache_dtype: of cached keys and values; None: the dtype of computation.
      engine: draws in place of this process's devices, at a batch size of its own.
      on_response: called with (number, (text, whether it ended by itself)) of each response when it is there.
      last_turn: for messages of which the last is the assistant's: refuse, continue or drop it.

    Raises:
      Mistake: what `encode_prompts` raises, or the model has no params and there is no engine.
    """
    ids = encode_prompts(model, prompts, sampling, last_turn=last_turn)
    longest = max(map(len, ids)) + sampling.max_new_tokens
    if longest > model.config.max_length:
        log.warning(
            "the longest prompt and its response may have %d tokens, more than the %d that %s was made for",
            longest,
            model.config.max_length,
            model.source,
        )
    if not sampling.terminators:
        sampling = sampling._replace(terminators=model.terminators)
    hidden = {token.content: id for id, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    ends = [hidden[text] for text in sampling.stop if text in hidden]
    sampling = sampling._replace(terminators=tuple(dict.fromkeys([*sampling.terminators, *ends])))
    if engine is None:
        if model.params is None:
            raise Mistake(f"{model.source} was loaded without its weights; use load_model, or give an engine")
        # special tokens are decoded only where a stop text has some
        skipped = not any(special in text for text in sampling.stop for special in hidden)
        decode = functools.partial(text_after, model.tokenizer, skip_special_tokens=skipped)
        engine = LocalEngine(model.graphdef, slots=batch_size, cache_dtype=cache_dtype, decode_text=decode)
    requests = [Request(tuple(row), n * number + k) for number, row in enumerate(ids) for k in range(n)]

    def as_text(number: int, response: Response) -> tuple[str, bool]:
        # a response that continues a text is decoded behind it; one to messages is a text of its own
        prompt = prompts[number // n]
        continued = isinstance(prompt, str) or (last_turn == "continue" and prompting.ends_with_assistant(prompt))
        before = ids[number // n] if continued else ()
        return text_after(model.tokenizer, before, without_terminator(response.tokens, sampling)), response.finished

    def hand_on(number: int, response: Response) -> None:
        if on_response is not None:
            on_response(number, as_text(number, response))

    responses = engine.generate(
        model.params, requests, jax.random.key(seed), sampling=sampling, on_response=on_response and hand_on
    )
    return [as_text(number, response) for number, response in enumerate(responses)]


def encode_prompts(
    model: LoadedModel, prompts: Sequence[Prompt], sampling: Sampling, *, last_turn: LastTurn = "refuse"
) -> list[list[int]]:
    """The ids of each prompt, with room for a response behind it; needs no params.

    Raises:
      Mistake: settings of sampling that cannot be, a prompt without tokens, messages without a chat template, or a
        prompt that leaves no room for a response in the model's learned positions.
    """
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1 or sampling.top_k < 0 or sampling.max_new_tokens < 1:
        raise Mistake(
            f"`temperature` {sampling.temperature} must be at least 0, `top_p` {sampling.top_p} above 0 and at most 1, "
            f"`top_k` {sampling.top_k} at least 0 and `max_new_tokens` {sampling.max_new_tokens} at least 1"
        )
    ids = [prompting.encode(p, model.tokenizer, f"prompt {number}", last_turn) for number, p in enumerate(prompts, 1)]
    _check_lengths(ids, sampling.max_new_tokens, model.config, model.source)
    return ids


def _check_lengths(ids: list[list[int]], max_new_tokens: int, config: ModelConfig, source: str) -> None:
    """Raises Mistake on an empty prompt, or one that leaves no room in learned positions."""
    if [] in ids:
        raise Mistake(f"prompt {ids.index([]) + 1} has no tokens, so there is nothing to continue")
    longest = max(map(len, ids))
    if config.learned_positions and longest + max_new_tokens > config.learned_positions:
        raise Mistake(
            f"the longest prompt has {longest} tokens, which with `max_new_tokens` {max_new_tokens} is more than the "
            f"{config.learned_positions} positions of {source}; shorten the prompt or lower `max_new_tokens`"
        )


def generate_ids(
    graphdef: nnx.GraphDef,
    params: PyTree,
    prompts: Sequence[Sequence[int]],
    key: jax.Array,
    *,
    sampling: Sampling,
    batch_size: int = 16,
) -> list[tuple[list[int], bool]]:
    """(response ids without the terminator, whether it ended with one) for each prompt of ids, in their order."""
    requests = [Request(tuple(prompt), seed) for seed, prompt in enumerate(prompts)]
    responses = LocalEngine(graphdef, slots=batch_size).generate(params, requests, key, sampling=sampling)
    return [(without_terminator(response.tokens, sampling), response.finished) for response in responses]


def text_after(tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
    """The text that ids add to that of the prompt before them.

    Llama's and Mistral's first tokenizers write no blank before the first word of a text, so "▁upon ▁a ▁time", decoded
    alone, would lose the blank that parts it from the prompt: "Onceupon a time".
    """
    known = list(prompt[-CONTEXT:])
    decode = functools.partial(tokenizer.decode, skip_special_tokens=skip_special_tokens)
    before, whole = decode(known), decode([*known, *ids])
    # a prompt may end within a character
    return whole[len(before) :] if whole.startswith(before) else decode(list(ids))


def without_terminator(tokens: np.ndarray, sampling: Sampling) -> list[int]:
    """The ids of a response, less a terminator at its end."""
    return tokens[:-1].tolist() if tokens[-1] in sampling.terminators else tokens.tolist()
