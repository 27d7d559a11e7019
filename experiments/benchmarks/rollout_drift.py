"""Drift between the log-probs that responses are drawn with, token by token, and those that training reads at once.

    python experiments/benchmarks/rollout_drift.py MODEL [--prompt TEXT] [--responses 32] [--tokens 200]

Measured: responses drawn by `LocalEngine`, scored by `models/reading.py: token_logps`, both in one dtype of
computation. d is the difference in nats a token, rho = exp(d) the ratio of a policy that has not moved, which is 1 but
for rounding. Losses of policies (ppo_clip, reinforce, cispo) divide by the probability that a token was drawn with, so
each token is weighted by rho: rollouts of this process are importance-corrected without a further pass. What is left
is noise in weights and metrics (`ratio_deviation`, `clip_fraction`), and in `kl` of the policy that drew.

Observed on a CPU, 32 responses of 200 tokens to "Once upon a time", parameters in float32:
                                  mean |d|   rms d    max |d|   mean rho   |rho - 1| > 0.2   rms of a response's sum
    stories260K          bfloat16  1.3e-2   2.3e-2    0.37      0.99976     5e-4 of tokens    0.30
    stories260K          float32   1.1e-6   1.9e-6    2e-5      1.00000     0                 0.000
    babyllama-char361    bfloat16  6.2e-3   1.5e-2    0.34      1.00003     2e-4 of tokens    0.22
"""

from __future__ import annotations

import argparse
import functools

import jax
import numpy as np

from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.reading import token_logps
from jaxalign.rollout.batches import token_rows
from jaxalign.rollout.engine.engine import LocalEngine, Request
from jaxalign.rollout.engine.slots import Sampling


def drift(source: str, prompt: str, *, responses: int, tokens: int, dtype: str) -> np.ndarray:
    """Float64[responses T], log p in one pass - log p as drawn; NaN where there is no token of a response."""
    config, tokenizer = huggingface.read_config(source), huggingface.load_tokenizer(source)
    ids = tuple(tokenizer(prompt)["input_ids"])
    tokens = min(tokens, config.max_length - len(ids))
    graphdef, _ = make_decoder(config, compute_dtype=dtype)
    params = load_params(source, config)
    requests = [Request(ids, seed) for seed in range(responses)]
    drawn = LocalEngine(graphdef, slots=responses).generate(
        params, requests, jax.random.key(0), sampling=Sampling(tokens)
    )
    rows, logps = token_rows([ids] * responses, drawn, width=len(ids) + tokens, rows=responses)
    scored = jax.jit(functools.partial(token_logps, graphdef))(params, rows)
    return np.where(rows.mask, np.float64(scored) - logps, np.nan)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    options = parser.parse_args()
    for dtype in ("bfloat16", "float32"):
        d = drift(options.model, options.prompt, responses=options.responses, tokens=options.tokens, dtype=dtype)
        rho, sums = np.exp(d), np.nansum(d, axis=1)
        size = np.abs(d)
        print(
            f"{dtype:9} mean |d| {np.nanmean(size):.1e}  rms {np.sqrt(np.nanmean(d**2)):.1e}  max {np.nanmax(size):.1e}"
            f"  mean rho {np.nanmean(rho):.5f}  beyond 1 ± 0.2: {np.mean(abs(rho[~np.isnan(d)] - 1) > 0.2):.1e}"
            f"  rms of a response's sum {np.sqrt(np.mean(sums**2)):.1e}"
        )


if __name__ == "__main__":
    main()
