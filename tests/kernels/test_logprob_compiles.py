"""The compilers' own account of the log-probability kernel at the shapes of published models, for chips not present.

JAXALIGN_COMPILE_ALL=1 compiles every chip, model and dtype (40 programs, about ten minutes on two cores).
"""

import itertools
import os
import re

import jax
import jax.numpy as jnp
import pytest

from jaxalign.kernels import logprob
from jaxalign.kernels.runtime import target_of
from tests.absent import GPUS, READABLE_ON_TPU, device, like

TOKENS = 8192
MODELS = {  # width, vocabulary, soft-cap
    "llama-3-8b": (4096, 128_256, None),
    "qwen3-0.6b": (1024, 151_936, None),
    "qwen3-8b": (4096, 151_936, None),
    "gemma-2-2b": (2304, 256_000, 30.0),
}
CHIPS = ("v5e:2x2", "v5p:2x2x2", "v6e:2x2", "h100", "h200")
ALWAYS = (
    ("v5p:2x2x2", "gemma-2-2b", "float32"),  # the tightest fit of VMEM
    ("v5e:2x2", "gemma-2-2b", "bfloat16"),
    ("v6e:2x2", "qwen3-0.6b", "bfloat16"),
    *(("h100", model, "bfloat16") for model in MODELS),
    ("h200", "gemma-2-2b", "float32"),
)
ALL = tuple(itertools.product(CHIPS, MODELS, ("bfloat16", "float32")))


def compiled(chip, model, dtype):
    """The gradient of everything the kernel offers; weights are float32, as trained parameters are."""
    width, vocabulary, softcap = MODELS[model]
    place = device(chip)
    options = logprob.Options(softcap, entropy=True, mean_logit=True, correct=True)

    def loss(hidden, weight, targets, mask):
        actual = logprob.token_logps(options, target_of([place]), hidden, weight, None, targets, mask)
        names = ("logps", "entropy", "log_normalizer", "mean_logit")
        return sum(actual[name].sum() for name in names), actual["correct"]

    hidden, weight = like(place, TOKENS, width, dtype=dtype), like(place, vocabulary, width, dtype=jnp.float32)
    tokens = like(place, TOKENS, dtype=jnp.int32), like(place, TOKENS, dtype=jnp.bool_)
    return (
        jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        .lower(hidden, weight, *tokens)
        .compile(READABLE_ON_TPU if chip not in GPUS else None)
    )


@pytest.mark.parametrize("chip, model, dtype", ALL if os.environ.get("JAXALIGN_COMPILE_ALL") else ALWAYS)
def test_the_kernel_compiles_and_there_are_no_logits(chip, model, dtype):
    program = compiled(chip, model, dtype)
    width, vocabulary, _ = MODELS[model]
    text = program.as_text()
    assert "custom-call" in text and "logprob_forward" in text and "logprob_backward" in text
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", text)}
    assert (vocabulary, width) in shapes
    assert not [dims for dims in shapes if TOKENS in dims and max(dims) >= vocabulary]
    # The weight in the dtype of compute and padded, its padded gradient, and 512 MiB for what has the size of tokens or
    # of a chunk; logits alone would take N V 4 bytes.
    padded = vocabulary + 1024
    temporary = program.memory_analysis().temp_size_in_bytes
    print(f"{chip} {model} {dtype}: {temporary / 2**20:,.0f} MiB temporary, logits {TOKENS * vocabulary / 2**18:,.0f}")
    assert temporary < padded * width * (jnp.dtype(dtype).itemsize + 4) + 2**29
