"""A tiny policy's config, and batches of random responses of ragged length."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.batches.groups import BatchShapes, Responses
from jaxalign.data.batches.plan import Plan
from jaxalign.data.read.tokens import Examples

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
LENGTH = 20
QUICKLY = {"xla_backend_optimization_level": 0}  # the same arithmetic, in less than half the time to compile


def make_responses(count, *, k, longest=12, seed=0):
    """Groups of k responses of 2 to `longest` tokens behind one prompt of 2 to 5."""
    rng = np.random.default_rng(seed)
    parts, columns = [], {"label": rng.random(count) < 0.5}
    for _ in range(count):
        prompt = rng.integers(3, 32, rng.integers(2, 6))
        for _ in range(k):
            response = rng.integers(3, 32, rng.integers(2, longest + 1))
            ids = np.concatenate([prompt, response])
            parts.append((ids, np.arange(len(ids)) >= len(prompt)))
    return Responses(Examples.of(parts), np.arange(count * k).reshape(count, k), columns)


def batch_of(responses, *, packing=True, unit=1):
    """All groups as one batch of rows of LENGTH tokens."""
    plan = Plan(len(responses), LENGTH, unit=unit, packing=packing)
    return jax.tree.map(jnp.asarray, BatchShapes.of(responses, plan).batch(responses))
