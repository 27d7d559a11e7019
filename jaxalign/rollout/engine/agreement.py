"""A check that another engine's log-probs are those of the policy that trains; if not, every ratio is wrong."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from jaxalign.data.batches.plan import bucket_widths
from jaxalign.models.reading import token_logps
from jaxalign.rollout.batches import token_rows
from jaxalign.rollout.engine.engine import Request, Response
from jaxalign.rollout.engine.http import EngineError
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.types import PyTree

TOLERANCE = 0.1  # nats per token, on average; two implementations in bfloat16 differ by a fifth of it
TIMES = 2.0  # log-probs this much closer to the model's at temperature 1 than to the tempered ones are the former


class Agreement:
    """Compares the log-probs of a call's first responses with the policy's, and raises where they differ."""

    def __init__(self, graphdef: nnx.GraphDef, *, rows: int, max_length: int):
        """
        Args:
          graphdef: of the policy.
          rows: number of responses that are compared; a multiple of the devices that rows are split over.
          max_length: tokens of the longest prompt and response.
        """
        self._rows, self._widths = rows, bucket_widths(max_length)
        self._logps = jax.jit(functools.partial(token_logps, graphdef), static_argnames="temperature")

    def __call__(
        self, params: PyTree, requests: Sequence[Request], responses: Sequence[Response], sampling: Sampling
    ) -> None:
        """Raises EngineError where the log-probs are not the policy's, or not at the temperature of sampling."""
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
                f"{TOLERANCE}: it has not loaded the policy that was published, or computes it in too few bits; "
                "rollout/engine/servers.py says how it must be started"
            )

    def _distance(
        self, params: PyTree, prompts: Sequence[tuple[int, ...]], responses: Sequence[Response], temperature: float
    ) -> float:
        """|their log-probs - ours| in nats, the mean over response tokens."""
        longest = max(len(p) + len(r.tokens) for p, r in zip(prompts, responses, strict=True))
        width = next(width for width in self._widths if width >= longest)
        sequences, theirs = token_rows(prompts, responses, width=width, rows=self._rows)
        ours = np.asarray(self._logps(params, sequences, temperature=temperature))
        return float(np.abs(theirs - ours)[sequences.mask].mean())
