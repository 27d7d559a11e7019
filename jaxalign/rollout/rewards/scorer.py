"""Text to scores: a reward model with its own tokenizer and chat template, whatever those of the policy are.

scorer = load_reward_model("runs/rm/final")
scores = scorer(["What is 2 + 2?"], ["It is 4."])               # [N], the members combined
members = scorer.members(prompts, responses)                    # [N M]; their spread is `heads.disagreement`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.read.feedback_formats import sequence
from jaxalign.data.read.formats import Conversation
from jaxalign.data.read.tokens import Encoder
from jaxalign.data.read.turns import with_turn_ends
from jaxalign.data.sets.solutions import MOST_STEPS, encode
from jaxalign.mistake import Mistake
from jaxalign.models import heads
from jaxalign.models.files import huggingface
from jaxalign.models.files.reward import RewardModel, load_reward_params, member_scores, read_reward_model, scores_at
from jaxalign.models.places import Layout, fetched, make_mesh, offloaded, shardings
from jaxalign.types import PyTree

Prompt = str | Sequence[dict[str, str]]  # a text, or messages


def load_reward_model(
    source: str,
    *,
    dtype: Any = jnp.float32,
    batch_size: int = 16,
    quantise: str | None = None,
    rule: str | None = None,
    offload: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> Scorer:
    """The scorer of a folder or hub name: what `jaxalign reward` wrote, or any sequence classifier with one label.

    Args:
      source: the folder or name.
      dtype: of the trunk's parameters and activations; scores are float32.
      batch_size: rows that are scored together; rounded up to a multiple of the devices.
      quantise: format of the trunk's kernels, as in `read_reward_model`.
      rule: how members are combined, as there.
      offload: keep the parameters in the host's memory, and on the device only while texts are scored.
      devices: of this host; each holds an equal share of the parameters and scores as many rows. None: the first one.

    Raises:
      Mistake: not a reward model, or its tokenizer has no token that ends a response.
    """
    mesh = make_mesh(devices=list(devices)) if devices is not None and len(devices) > 1 else None
    model = read_reward_model(
        source,
        compute_dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype),
        layout=None if mesh is None else Layout(mesh),
        quantise=quantise,
        rule=rule,
    )
    tokenizer = huggingface.load_tokenizer(source)
    terminators = with_turn_ends(tokenizer, huggingface.terminators(source, tokenizer))
    if not terminators:
        raise Mistake(f"{source} names no eos token, so nothing can end a response; set eos_token_id in its config")
    huggingface.check_fits(tokenizer, model.config, source)
    huggingface.check_ids(terminators, model.config, source)
    params = load_reward_params(model, shardings=None if mesh is None else shardings(model.like, mesh))
    if mesh is not None:
        batch_size = -(-batch_size // mesh.size) * mesh.size
    return Scorer(model, offloaded(params) if offload else params, tokenizer, terminators, batch_size, offload)


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A reward model that scores texts. Rows are padded to powers of two, so that few programs are compiled."""

    model: RewardModel
    params: PyTree
    tokenizer: Any
    terminators: tuple[int, ...]
    batch_size: int = 16
    offload: bool = False  # whether the params are in the host's memory

    def __call__(self, prompts: Sequence[Prompt], responses: Sequence[str], **options: Any) -> np.ndarray:
        """Float32[N], the members combined by the model's rule; options as for `members`."""
        return np.asarray(heads.combine(self.members(prompts, responses, **options), self.model.rule))

    def members(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, finished: Sequence[bool] | None = None
    ) -> np.ndarray:
        """Float32[N M], the score of each member.

        Args:
          prompts: texts or messages. Texts become turns of a conversation if they did so in training.
          responses: one to each prompt; an empty one has a score like any other.
          finished: False where a response was cut off, which is read without a terminator. Default: all True.

        Raises:
          Mistake: a prompt leaves no room for a response.
        """
        ended = [True] * len(responses) if finished is None else finished
        return self.rows([self.ids(*texts) for texts in zip(prompts, responses, ended, strict=True)])

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises Mistake, with the count and the first of them, if prompts leave no room for a response."""
        full = [prompt for prompt in prompts if not self._encoded(prompt, "a")]  # whatever the response is
        if full:
            raise Mistake(f"{len(full)} of {len(prompts)} prompts are too long: {self._fills(full[0])}")

    def ids(self, prompt: Prompt, response: str, ended: bool = True) -> np.ndarray:
        """Int32[T]: prompt and response as the model was trained on them, cut at its `max_length`."""
        examples = self._encoded(prompt, response)
        if not examples:
            raise Mistake(self._fills(prompt))
        ids = examples[0][0]
        return ids if ended or ids[-1] not in self.terminators else ids[:-1]

    def _encoded(self, prompt: Prompt, response: str) -> list[tuple[np.ndarray, np.ndarray]]:
        row = sequence(prompt, response, self.model.as_chat)
        if isinstance(row, Conversation) and len(row.messages) > 1 and row.messages[-2]["role"] == "assistant":
            *before, begun, rest = row.messages  # the response continues the last turn of the prompt
            row = Conversation((*before, begun | {"content": begun["content"] + rest["content"]}), row.tools)
        return self._encoder.encode(row, where="scoring")

    def _fills(self, prompt: Prompt) -> str:
        return (
            f"a prompt fills all {self.model.max_length} tokens that the reward model reads: {str(prompt)[:80]!r}; "
            "leave it out of the data, or train the reward model with a greater `max_length`"
        )

    def rows(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """Float32[N M] of rows of ids, in their order; rows of similar length are scored together."""
        scores = np.zeros((len(rows), self.params["head"].shape[0]), np.float32)
        order, params = sorted(range(len(rows)), key=lambda i: -len(rows[i])), self._on_device()
        for at in range(0, len(order), self.batch_size):
            part = order[at : at + self.batch_size]
            tokens = np.zeros((self.batch_size, self._width(len(rows[part[0]]))), np.int32)
            lengths = np.zeros(self.batch_size, np.int32)
            for b, i in enumerate(part):
                tokens[b, : len(rows[i])], lengths[b] = rows[i], len(rows[i])
            scores[part] = np.asarray(self._compiled(params, tokens, lengths))[: len(part)]
        return scores

    def steps(self, prompt: str, steps: Sequence[str]) -> np.ndarray:
        """Float32[S M], logits of a process reward model that each of a solution's S steps is right.

        Raises:
          Mistake: the model scores whole responses, or the solution is longer than it reads.
        """
        if self.model.separator is None:
            raise Mistake(
                f"{self.model.folder} scores whole responses; train a model of steps with jaxalign reward, "
                "`algorithm.loss` process"
            )
        ids, ends = encode(self._encoder, prompt, steps, self.model.separator)
        if len(ids) > self.model.max_length:
            raise Mistake(
                f"a solution of {len(ids)} tokens, and the model reads {self.model.max_length}; shorten it, or train "
                "the model with a greater `max_length`"
            )
        tokens = np.zeros((1, self._width(len(ids))), np.int32)
        tokens[0, : len(ids)] = ids
        places = np.zeros(
            (1, MOST_STEPS * -(-len(ends) // MOST_STEPS)), np.int32
        )  # padded, so that few programs are compiled
        places[0, : len(ends)] = ends
        scores = self._compiled_at(self._on_device(), tokens, np.array([len(ids)], np.int32), places)
        return np.asarray(scores)[0, : len(ends)]

    def _on_device(self) -> PyTree:
        return fetched(self.params) if self.offload else self.params

    def _width(self, longest: int) -> int:
        """The next power of two, at most what the model reads, or the longest row if that is more."""
        return min(max(16, 1 << (longest - 1).bit_length()), max(self.model.max_length, longest))

    @functools.cached_property
    def _compiled_at(self) -> Any:
        return jax.jit(functools.partial(scores_at, self.model.graphdef))

    @functools.cached_property
    def _compiled(self) -> Any:
        return jax.jit(functools.partial(member_scores, self.model.graphdef))

    @functools.cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.terminators, self.model.max_length, "last", keeps_empty=True)
