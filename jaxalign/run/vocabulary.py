"""A run's tokenizer, with its chat template, and the tokens that end a text."""

from __future__ import annotations

from typing import Any, NamedTuple

from jaxalign.data.read import chat
from jaxalign.data.read.turns import with_turn_ends
from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files import huggingface


class Vocabulary(NamedTuple):
    """The tokenizer of a run, and its terminators."""

    tokenizer: Any
    terminators: tuple[int, ...]  # the first is appended in training; all of them stop generation


def load_vocabulary(config: Any, model: ModelConfig) -> Vocabulary:
    """From `config.tokenizer`, else `config.model`, with `config.chat_template`.

    Raises:
      Mistake: a template that does not fit, or no token, or none that the model has, to end a response.
    """
    source = config.tokenizer or config.model
    tokenizer = huggingface.load_tokenizer(source)
    huggingface.check_fits(tokenizer, model, source)
    chat.choose_template(tokenizer, config.chat_template)
    named = config.chat_template in chat.TEMPLATES
    terminators = with_turn_ends(tokenizer, huggingface.terminators(source, tokenizer), first=named)
    if not terminators:
        raise Mistake(f"{source} names no eos token, so nothing can end a response; set eos_token_id in its config")
    huggingface.check_ids(terminators, model, source)
    return Vocabulary(tokenizer, terminators)
