"""`jaxalign chat`: a conversation with a model in the terminal.

Ctrl-C stops a response, which stays as far as it came; at the prompt it ends the program, as Ctrl-D does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import logging
import sys
from typing import Any

import jax

from jaxalign.commands.chat.conversation import Continuation, Conversation
from jaxalign.config.inference import ChatConfig
from jaxalign.config.limits import check
from jaxalign.mistake import Mistake
from jaxalign.models import places
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import compute_dtype
from jaxalign.models.files import huggingface
from jaxalign.rollout.engine.engine import LocalEngine, Request
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import LoadedModel, with_params, without_terminator
from jaxalign.run import devices
from jaxalign.run.terminal import Stream
from jaxalign.run.vocabulary import load_vocabulary

log = logging.getLogger(__name__)

COMMANDS = "/reset forgets the conversation, /quit ends"


def main(config: ChatConfig) -> int:
    """Responds to the lines of stdin until they end."""
    check(config)
    devices.start()
    devices.start_log()
    if huggingface.is_random(config.model):
        raise Mistake(f"`model` {config.model} has random weights, which answer nothing; name a trained model")
    model = huggingface.read_config(config.model)
    words = config.tokenizer or huggingface.tokenizer_source(config.model, config.adapter)
    vocabulary = load_vocabulary(dataclasses.replace(config, tokenizer=words), model)
    talk = _conversation(config, model, vocabulary.tokenizer)
    loaded = with_params(
        LoadedModel(config.model, model, vocabulary.tokenizer, vocabulary.terminators),
        adapter=config.adapter,
        dtype=compute_dtype(config.precision),
        mesh=places.inference_mesh(model.num_kv_heads, **dataclasses.asdict(config.mesh)),
    )
    assert loaded.graphdef is not None
    engine = LocalEngine(
        loaded.graphdef, slots=1, cache_dtype=None if config.cache_dtype == "auto" else config.cache_dtype
    )
    sampling = Sampling.of(config, vocabulary.terminators)
    decode = functools.partial(vocabulary.tokenizer.decode, skip_special_tokens=True)
    log.info("%s answers; %s", config.model, COMMANDS)
    turn = 0
    for text in _lines(talk):
        try:
            ids, dropped = talk.ask(text)
        except ValueError as error:
            log.warning("%s", error)
            continue
        if dropped:
            log.info("the window is full: the %d oldest %s are forgotten", dropped, talk.dropped_of)
        key = jax.random.fold_in(jax.random.key(config.seed), turn)
        _answer(talk, engine, loaded.params, Request(tuple(ids), 0), key, sampling, Stream(decode, sys.stdout))
        turn += 1
    return 0


def _conversation(config: ChatConfig, model: ModelConfig, tokenizer: Any) -> Conversation | Continuation:
    """Turns where the tokenizer has a chat template, else one text.

    Raises Mistake where the template refuses `system`, or there is no room.
    """
    window = model.learned_positions or model.max_length
    room = window - config.max_new_tokens
    if room < 1:
        raise Mistake(
            f"`max_new_tokens` {config.max_new_tokens} leaves no room for a question in the {window} tokens of "
            f"{config.model}"
        )
    if tokenizer.chat_template:
        talk = Conversation(tokenizer, room=room, system=config.system)
        talk.ask("?")
        talk.reset()
        return talk
    if config.system is not None:
        raise Mistake("`system` needs a chat template, which the tokenizer does not have; name one: `chat_template`")
    log.info("the tokenizer has no chat template, so your text is continued, not answered")
    return Continuation(tokenizer, room=room)


def _lines(talk: Conversation | Continuation) -> Any:
    """Lines for the model, one at a time; those for the program itself are obeyed on the way."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a byte that is no text ends no conversation
    asks = "> " if sys.stdin.isatty() else ""
    if asks:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lines can be edited then
    while True:
        try:
            line = input(asks)
        except EOFError:
            if asks:
                print()
            return
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            talk.reset()
            log.info("the conversation is forgotten")
        elif text.startswith("/") and len(text.split()) == 1:
            log.warning("%s is no command: %s", text, COMMANDS)
        elif text:
            yield line


def _answer(
    talk: Conversation | Continuation,
    engine: LocalEngine,
    params: Any,
    request: Request,
    key: jax.Array,
    sampling: Sampling,
    stream: Stream,
) -> None:
    """Prints the response as it is drawn, and adds it to the conversation."""
    try:
        [response] = engine.generate(
            params, [request], key, sampling=sampling, watch=lambda _, tokens: stream.show(tokens.tolist())
        )
        ids = without_terminator(response.tokens, sampling)
        stream.finish(ids)
    except KeyboardInterrupt:
        if not stream.text:
            talk.forget()
            log.info("no answer")
        else:
            talk.answer(stream.tokens, stream.text)
            print(" ...")
        return
    talk.answer(ids, stream.text)
    if not response.finished:
        log.info("(cut off after %d tokens)", sampling.max_new_tokens)
