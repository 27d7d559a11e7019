"""Whether another engine's log-probs are those of the policy that trains: else every ratio of the update is wrong."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.data.batches.plan import bucket_widths
from jaxalign.models.reading import token_logps
from jaxalign.rollout.batches import rollout_batch
from jaxalign.rollout.engine.engine import Request, Response
from jaxalign.rollout.engine.http import EngineError
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.types import PyTree

TOLERANCE = 0.1  # nats a token, on average; bfloat16 in two implementations differs by a fifth of it
TIMES = 2.0  # so much closer to the model at temperature 1 than to the tempered one is no accident


class Agreement:
    """Raises where the log-probs of a few responses are not the policy's, or not those of what they were drawn from."""

    def __init__(self, graphdef: Any, *, rows: int, max_length: int):
        """
        Args:
          graphdef: of the policy.
          rows: how many responses of a call are compared; a multiple of the devices that rows are cut over.
          max_length: tokens of the longest prompt and response.
        """
        self._rows, self._widths = rows, bucket_widths(max_length)
        self._logps = jax.jit(functools.partial(token_logps, graphdef), static_argnames="temperature")

    def __call__(
        self, params: PyTree, requests: Sequence[Request], responses: Sequence[Response], sampling: Sampling
    ) -> None:
        """Raises EngineError, with the way out."""
        prompts, responses = [r.prompt for r in requests[: self._rows]], list(responses[: self._rows])
        drawn = self._distance(params, prompts, responses, sampling.temperature)
        plain = drawn if sampling.temperature == 1 else self._distance(params, prompts, responses, 1.0)
        if drawn > TIMES * plain:
            raise EngineError(
                f"the log-probs of `engine` are those of the model itself ({plain:.3g} nats a token from ours), not of "
                f"what was drawn at `temperature` {sampling.temperature} ({drawn:.3g}); start vLLM with "
                "--logprobs-mode processed_logprobs, SGLang without SGLANG_RETURN_ORIGINAL_LOGPROB"
            )
        if not drawn <= TOLERANCE:
            raise EngineError(
                f"the log-probs of `engine` differ by {drawn:.3g} nats a token from those of the policy, more than "
                f"{TOLERANCE}: it has not loaded the policy that it was given, or computes it in too few bits; "
                "rollout/engine/servers.py says how it must be started"
            )

    def _distance(
        self, params: PyTree, prompts: Sequence[tuple[int, ...]], responses: Sequence[Response], temperature: float
    ) -> float:
        """|their log-probs - ours|, the mean over tokens."""
        longest = max(len(p) + len(r.tokens) for p, r in zip(prompts, responses, strict=True))
        nothing = np.zeros(len(prompts))
        batch = rollout_batch(
            prompts,
            responses,
            scores=nothing,
            advantages=nothing,
            width=next(width for width in self._widths if width >= longest),
            rows=self._rows,
        )
        ours = np.asarray(self._logps(params, batch.sequences, temperature=temperature))
        mask = batch.sequences.mask
        return float(np.abs(batch.columns["old_logps"] - ours)[mask].mean())
