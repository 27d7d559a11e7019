"""GPT-2, and GPT-NeoX with Pythia."""

from __future__ import annotations

import numpy as np

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import LayerKind, ModelConfig
from jaxalign.models.files.families.base import (
    HfConfig,
    TensorMap,
    activation,
    fused_last,
    kinds,
    norm_eps,
    positive,
    require,
    rope,
    rope_settings,
    same,
    transposed,
)

# Names of other families that transformers takes for GPT-2's as well.
GPT2_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def gpt2(hf: HfConfig) -> ModelConfig:
    require(hf, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    for alias, name in GPT2_ALIASES.items():
        hf = hf.defaults(**{name: hf.get(alias, int)}) if alias in hf else hf
        require(hf, **{alias: hf.size(name)})
    width, heads, layers = hf.size("n_embd"), hf.size("n_head"), hf.size("n_layer")
    if width % heads:
        raise Mistake(f"{hf.where}: 'n_embd' is {width}, which is no multiple of 'n_head' {heads}")
    return ModelConfig(
        architecture=hf.texts("architectures")[0],
        vocab_size=hf.size("vocab_size"),
        hidden_size=width,
        intermediate_size=hf.size("n_inner", 4 * width),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        **kinds([LayerKind()] * layers),
        max_length=hf.size("n_positions"),
        tied=hf.get("tie_word_embeddings", bool, True),
        activation=activation(hf, "activation_function", "gelu_new"),
        gated_mlp=False,
        norm="layer",
        norm_eps=norm_eps(hf, "layer_norm_epsilon", 1e-5),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        learned_positions=hf.size("n_positions"),
        initializer_range=hf.get("initializer_range", float, 0.02),
    )


def gpt2_tensors(config: ModelConfig) -> list[TensorMap]:
    layer, block = "transformer.h.{layer}", "blocks"
    table = [
        same("transformer.wte.weight", "embed/embedding"),
        same("transformer.wpe.weight", "embed_positions/embedding"),
        same("transformer.ln_f.weight", "norm/scale"),
        same("transformer.ln_f.bias", "norm/bias"),
    ]
    if not config.tied:
        table.append(same("lm_head.weight", "unembedding/embedding"))
    for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
        qkv = tuple(f"{block}/attention/{name}/{leaf}" for name in ("query", "key", "value"))
        table.append(fused_last(f"{layer}.attn.c_attn.{kind}", qkv, (config.hidden_size,) * 3))
        table.append(same(f"{layer}.attn.c_proj.{kind}", f"{block}/attention/output/{leaf}"))
        table.append(same(f"{layer}.mlp.c_fc.{kind}", f"{block}/mlp/up/{leaf}"))
        table.append(same(f"{layer}.mlp.c_proj.{kind}", f"{block}/mlp/down/{leaf}"))
    for name, norm in (("ln_1", "attention_norm"), ("ln_2", "mlp_norm")):
        table.append(same(f"{layer}.{name}.weight", f"{block}/{norm}/scale"))
        table.append(same(f"{layer}.{name}.bias", f"{block}/{norm}/bias"))
    return table


def neox(hf: HfConfig) -> ModelConfig:
    width, heads, layers = hf.size("hidden_size"), hf.size("num_attention_heads"), hf.size("num_hidden_layers")
    head_dim, bias = width // heads, hf.get("attention_bias", bool, True)
    require(hf, head_dim=head_dim)
    turning = rope(
        hf,
        rope_settings(hf),
        head_dim,
        theta=positive(hf, "rotary_emb_base", 10_000.0),
        share=positive(hf, "rotary_pct", 0.25),
    )
    return ModelConfig(
        architecture=hf.texts("architectures")[0],
        vocab_size=hf.size("vocab_size"),
        hidden_size=width,
        intermediate_size=hf.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        **kinds([LayerKind(None, turning)] * layers),
        max_length=hf.size("max_position_embeddings", 2048),
        tied=hf.get("tie_word_embeddings", bool, False),
        activation=activation(hf, "hidden_act", "gelu"),
        gated_mlp=False,
        norm="layer",
        norm_eps=norm_eps(hf, "layer_norm_eps", 1e-5),
        parallel=hf.get("use_parallel_residual", bool, True),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=True,
        initializer_range=hf.get("initializer_range", float, 0.02),
    )


def neox_tensors(config: ModelConfig) -> list[TensorMap]:
    layer, block = "gpt_neox.layers.{layer}", "blocks"
    table = [
        same("gpt_neox.embed_in.weight", "embed/embedding"),
        same("gpt_neox.final_layer_norm.weight", "norm/scale"),
        same("gpt_neox.final_layer_norm.bias", "norm/bias"),
    ]
    if not config.tied:
        table.append(same("embed_out.weight", "unembedding/embedding"))
    for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
        way = transposed if kind == "weight" else same
        if kind == "weight" or config.qkv_bias:
            table.append(_interleaved(config, f"{layer}.attention.query_key_value.{kind}", f"{block}/attention", leaf))
            table.append(way(f"{layer}.attention.dense.{kind}", f"{block}/attention/output/{leaf}"))
        table.append(way(f"{layer}.mlp.dense_h_to_4h.{kind}", f"{block}/mlp/up/{leaf}"))
        table.append(way(f"{layer}.mlp.dense_4h_to_h.{kind}", f"{block}/mlp/down/{leaf}"))
        side = "scale" if kind == "weight" else "bias"
        table.append(same(f"{layer}.input_layernorm.{kind}", f"{block}/attention_norm/{side}"))
        table.append(same(f"{layer}.post_attention_layernorm.{kind}", f"{block}/mlp_norm/{side}"))
    return table


def _interleaved(config: ModelConfig, name: str, prefix: str, leaf: str) -> TensorMap:
    """A fused tensor whose rows are ordered head by head: [H, (query, key, value), K, ...]."""
    shape = config.num_heads, 3, config.head_dim

    def to_ours(x: np.ndarray) -> tuple[np.ndarray, ...]:
        apart = x.reshape(*shape, *x.shape[1:])
        return tuple(apart[:, i].reshape(-1, *x.shape[1:]).T for i in range(3))

    def to_hf(parts: tuple[np.ndarray, ...]) -> np.ndarray:
        rows = [part.T.reshape(shape[0], shape[2], *part.T.shape[1:]) for part in parts]
        return np.stack(rows, axis=1).reshape(-1, *parts[0].T.shape[1:])

    return TensorMap(name, tuple(f"{prefix}/{part}/{leaf}" for part in ("query", "key", "value")), to_ours, to_hf)
