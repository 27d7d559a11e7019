"""Adapters of tiny models, and the logits of both libraries with them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxalign.models.adapters.lora import split
from jaxalign.models.decoder.decoder import make_decoder
from tests.models.tiny import hf_config

TOKENS = np.random.default_rng(0).integers(3, 29, (2, 12))
HF = {name: hf_config(name) for name in ("llama", "phi3", "gpt2", "gpt-neox")}


def trained(config, lora):
    """An adapter as it may be after training: A and B random, magnitudes about 1."""
    _, abstract = split(make_decoder(config, lora=lora)[1])
    draw = np.random.default_rng(0).standard_normal

    def around(x):
        return 0.1 * draw(x.shape) + (x.ndim == 2)

    return jax.tree.map(lambda x: jnp.asarray(around(x), x.dtype), abstract)


def logits_of(config, params, lora):
    graphdef, _ = make_decoder(config, lora=lora)

    @jax.jit
    def forward(params):
        model = nnx.merge(graphdef, params)
        return model(TOKENS) @ model.unembed().weight.T

    return np.asarray(forward(params))


def theirs(base_folder, adapter_folder):
    """PEFT's logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager")
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter_folder).eval()(torch.tensor(TOKENS)).logits.numpy()
