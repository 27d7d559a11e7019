"""A trained reward model as a folder: what transformers reads as a sequence classifier, and the members besides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxalign.config.offline import RewardConfig
from jaxalign.models.adapters.lora import join
from jaxalign.models.adapters.merge import merge_by_layer
from jaxalign.models.files import huggingface
from jaxalign.models.files.peft import save_adapter
from jaxalign.models.files.reward import DESCRIPTION, HEADS, MEMBERS, classifier_name
from jaxalign.models.files.save import gather, save_pretrained
from jaxalign.runs import finish
from jaxalign.runs.train import Base
from jaxalign.runs.vocabulary import Vocabulary
from jaxalign.types import PyTree

FLAT = 1e-6  # a standard deviation below it says nothing; dividing by it would make scores of rounding


def save(
    folder: Path,
    config: RewardConfig,
    base: Base,
    params: PyTree,
    mean: np.ndarray,
    std: np.ndarray,
    step: int,
    separator: str | None = None,
) -> None:
    """Writes the folder that `models/files/reward.py` and transformers read.

    To transformers the score is that of the mean of the heads on one trunk, or, of several adapters, that of the first
    member, merged; it is not normalised. The other members' adapters lie in PEFT's format beside it, and name their
    base.

    Args:
      folder: made anew.
      params: the whole of what was trained and what was frozen.
      mean: [M], of each member's scores of the reference responses.
      std: [M], their standard deviations.
      step: updates that the params have seen.
      separator: the text behind each step, of a model that scores steps.
    """
    from safetensors.numpy import save_file

    several = "members" in params and config.members > 1
    tops = gather(params["head"])
    tokenizer, pad = padded(base.vocabulary)
    described = {
        "members": len(tops),
        "rule": config.combine,
        "mean": [float(x) for x in mean],
        "std": [float(x) if x > FLAT else 1.0 for x in std],
        "as_chat": config.as_chat,
        "max_length": config.max_length,
    }
    if separator is not None:
        described["separator"] = separator
    if several:
        described |= {"base": huggingface.lasting(config.model), "quantise": config.lora.quantise}

    def members(partial: Path) -> None:
        if jax.process_index() == 0:
            (partial / MEMBERS).mkdir()
            save_file({"heads": tops}, partial / MEMBERS / HEADS)
        for m in range(len(tops) if several else 0):
            alone = jax.tree.map(lambda x, m=m: x[m], params["members"])
            save_adapter(partial / MEMBERS / str(m), alone, base.lora, base.model, base_model=described["base"])

    save_pretrained(
        folder,
        _first(params, base),
        base.model,
        _hf_config(config, pad),
        tokenizer=tokenizer,
        generation_config=finish.generation_config(config.tokenizer or config.model, base.vocabulary.terminators),
        model_card=finish.model_card(config, step),
        extra={DESCRIPTION: described, finish.MARK_FILE: finish.mark(step)},
        head=tops[:1] if several else tops.mean(axis=0, keepdims=True),
        besides=members,
    )


def _first(params: PyTree, base: Base) -> PyTree:
    """The trunk, with the first member's adapters merged into it."""
    if "members" not in params:
        return params["model"]
    return merge_by_layer(join(jax.tree.map(lambda x: x[0], params["members"]), params["model"]), base.lora)


def _hf_config(config: RewardConfig, pad: int) -> dict[str, Any]:
    held = huggingface.read_hf_config(config.model)
    named = {"architectures": [classifier_name(held["architectures"][0])], "pad_token_id": pad}
    return held | named | {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}


def padded(vocabulary: Vocabulary) -> tuple[Any, int]:
    """The tokenizer and a pad token that ends no text: transformers reads the score at the last other token."""
    tokenizer = copy.deepcopy(vocabulary.tokenizer)
    ends = {*vocabulary.terminators, tokenizer.eos_token_id}
    named = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    usable = [i for i in named if i is not None and i not in ends]
    # a vocabulary with nothing but an eos token: the last word, which texts that were not cut do not end with
    pad = usable[0] if usable else max(set(tokenizer.get_vocab().values()) - ends)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer, pad
