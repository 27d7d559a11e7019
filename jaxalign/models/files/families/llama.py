"""Llama 1 to 3.3 and the families that keep its names: Mistral, Qwen 2 and 3, Gemma 2 and 3, OLMo 2, Phi-3."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import LayerKind, ModelConfig, Rope
from jaxalign.models.files.families.base import (
    HfConfig,
    TensorMap,
    activation,
    check_read,
    fused_rows,
    kinds,
    layer_types,
    norm_eps,
    positive,
    require,
    rope,
    rope_settings,
    same,
    transposed,
)

# Values that transformers gives to fields that a config leaves out, where they are not Llama's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "head_dim": 128,
    },
    "gemma": {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    "gemma2": {
        "max_position_embeddings": 8192,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    "gemma3": {"max_position_embeddings": 131072},
    "olmo2": {"rms_norm_eps": 1e-5},
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}


def llama(hf: HfConfig) -> ModelConfig:
    bias = hf.get("attention_bias", bool, False)
    return ModelConfig(
        **_common(hf),
        **_uniform(hf, None),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=hf.get("mlp_bias", bool, False),
    )


def mistral(hf: HfConfig) -> ModelConfig:
    hf = hf.defaults(**DEFAULTS["mistral"])
    return ModelConfig(**_common(hf), **_uniform(hf, _window(hf)))


def qwen2(hf: HfConfig) -> ModelConfig:
    hf = hf.defaults(**DEFAULTS["qwen2"])
    return ModelConfig(**_common(hf), **_qwen_layers(hf), qkv_bias=True)


def qwen3(hf: HfConfig) -> ModelConfig:
    hf = hf.defaults(**DEFAULTS["qwen3"])
    bias = hf.get("attention_bias", bool, False)
    return ModelConfig(**_common(hf), **_qwen_layers(hf), qkv_bias=bias, output_bias=bias, qk_norm="head")


def gemma2(hf: HfConfig) -> ModelConfig:
    hf = hf.defaults(**DEFAULTS["gemma"], **DEFAULTS["gemma2"])
    types = layer_types(hf, ["full_attention" if i % 2 else "sliding_attention" for i in range(_layers(hf))])
    turning = rope(hf, rope_settings(hf), _head_dim(hf))
    return _gemma(hf, types, {"sliding_attention": turning, "full_attention": turning})


def gemma3(hf: HfConfig) -> ModelConfig:
    hf = hf.defaults(**DEFAULTS["gemma"], **DEFAULTS["gemma3"])
    period = hf.get("sliding_window_pattern", int, 6) or 6
    types = layer_types(hf, [f"{'sliding' if (i + 1) % period else 'full'}_attention" for i in range(_layers(hf))])
    settings, older = hf.object("rope_parameters"), hf.object("rope_scaling")
    full, sliding = settings.object("full_attention"), settings.object("sliding_attention")
    # The older `rope_scaling` is of the full layers alone.
    full = HfConfig(full.content | older.content, older.where if older.content else full.where)
    require(hf, original_max_position_embeddings=(), attn_logit_softcapping=())  # transformers reads neither
    turning = {
        "full_attention": rope(hf, full, _head_dim(hf), theta=positive(hf, "rope_theta", 1_000_000.0)),
        "sliding_attention": rope(hf, sliding, _head_dim(hf), theta=positive(hf, "rope_local_base_freq", 10_000.0)),
    }
    check_read(settings)
    return dataclasses.replace(_gemma(hf, types, turning), qk_norm="head")


def olmo2(hf: HfConfig) -> ModelConfig:
    hf = hf.defaults(**DEFAULTS["olmo2"])
    bias = hf.get("attention_bias", bool, False)
    return ModelConfig(
        **_common(hf), **_uniform(hf, None), qkv_bias=bias, output_bias=bias, qk_norm="full", norm_places="post"
    )


def phi3(hf: HfConfig) -> ModelConfig:
    hf = hf.defaults(**DEFAULTS["phi3"])
    turning = rope(
        hf,
        rope_settings(hf),
        _head_dim(hf),
        share=positive(hf, "partial_rotary_factor", 1.0),
        kinds=("default",),
    )
    hf.get("original_max_position_embeddings", int, 4096)  # of longrope only
    return ModelConfig(**_common(hf), **_uniform(hf, _window(hf), turning))


def _common(hf: HfConfig, act: str = "hidden_act") -> dict[str, Any]:
    heads = hf.size("num_attention_heads")
    return {
        "architecture": hf.texts("architectures")[0],
        "vocab_size": hf.size("vocab_size"),
        "hidden_size": hf.size("hidden_size"),
        "intermediate_size": hf.size("intermediate_size"),
        "num_layers": _layers(hf),
        "num_heads": heads,
        "num_kv_heads": hf.size("num_key_value_heads", heads),
        "head_dim": _head_dim(hf),
        "max_length": hf.size("max_position_embeddings", 2048),
        "tied": hf.get("tie_word_embeddings", bool, False),
        "activation": activation(hf, act, "silu"),
        "norm_eps": norm_eps(hf, "rms_norm_eps", 1e-6),
        "initializer_range": hf.get("initializer_range", float, 0.02),
    }


def _layers(hf: HfConfig) -> int:
    return hf.size("num_hidden_layers")


def _head_dim(hf: HfConfig) -> int:
    return hf.size("head_dim", hf.size("hidden_size") // hf.size("num_attention_heads"))


def _window(hf: HfConfig) -> int | None:
    return hf.size("sliding_window") if "sliding_window" in hf else hf.get("sliding_window", int, None)


def _uniform(hf: HfConfig, window: int | None, turning: Rope | None = None) -> dict[str, tuple]:
    alike = ["full_attention" if window is None else "sliding_attention"] * _layers(hf)
    if layer_types(hf, alike) != alike:
        raise Mistake(f"{hf.where}: 'layer_types' must hold {alike[0]} only; the layers of this family are alike")
    turning = turning or rope(hf, rope_settings(hf), _head_dim(hf))
    return kinds([LayerKind(window, turning)] * len(alike))


def _qwen_layers(hf: HfConfig) -> dict[str, tuple]:
    """Kinds of layers: with use_sliding_window, those from max_window_layers on have a window."""
    window = _window(hf)
    window = window if hf.get("use_sliding_window", bool, False) else None
    first = hf.get("max_window_layers", int, 28)
    default = [
        "sliding_attention" if window is not None and i >= first else "full_attention" for i in range(_layers(hf))
    ]
    types = layer_types(hf, default)
    if "sliding_attention" in types and window is None:
        raise Mistake(f"{hf.where}: 'layer_types' names sliding layers, and 'sliding_window' is off or absent")
    turning = rope(hf, rope_settings(hf), _head_dim(hf))
    return kinds([LayerKind(window if kind == "sliding_attention" else None, turning) for kind in types])


def _gemma(hf: HfConfig, types: list[str], turning: dict[str, Rope]) -> ModelConfig:
    bias, window = hf.get("attention_bias", bool, False), _window(hf)
    if "sliding_attention" in types and window is None:
        raise Mistake(f"{hf.where}: 'layer_types' names sliding layers, and 'sliding_window' is absent")
    scale = hf.get("query_pre_attn_scalar", float)
    if scale <= 0:
        raise Mistake(f"{hf.where}: 'query_pre_attn_scalar' is {scale:g}; it must be above 0")
    return ModelConfig(
        **_common(hf, "hidden_activation"),
        **kinds([LayerKind(window if kind == "sliding_attention" else None, turning[kind]) for kind in types]),
        qkv_bias=bias,
        output_bias=bias,
        norm_offset=1.0,
        norm_places="both",
        query_scale=scale**-0.5,
        attention_softcap=hf.get("attn_logit_softcapping", float, None),
        final_softcap=hf.get("final_logit_softcapping", float, None),
        embedding_scale=hf.size("hidden_size") ** 0.5,
    )


def tensors(config: ModelConfig) -> list[TensorMap]:
    """Tensors of all families of this file."""
    layer, block = "model.layers.{layer}", "blocks"
    table = [same("model.embed_tokens.weight", "embed/embedding"), same("model.norm.weight", "norm/scale")]
    if not config.tied:
        table.append(same("lm_head.weight", "unembedding/embedding"))
    table += [same(f"{layer}.{name}.weight", f"{block}/{leaf}/scale") for name, leaf in _norms(config)]
    fused = config.architecture == "Phi3ForCausalLM"
    table += _fused(config, layer, block) if fused else _separate(config, layer, block)
    table.append(transposed(f"{layer}.self_attn.o_proj.weight", f"{block}/attention/output/kernel"))
    table.append(transposed(f"{layer}.mlp.down_proj.weight", f"{block}/mlp/down/kernel"))
    if config.output_bias:
        table.append(same(f"{layer}.self_attn.o_proj.bias", f"{block}/attention/output/bias"))
    if config.qk_norm != "none":
        table.append(same(f"{layer}.self_attn.q_norm.weight", f"{block}/attention/query_norm/scale"))
        table.append(same(f"{layer}.self_attn.k_norm.weight", f"{block}/attention/key_norm/scale"))
    return table


def _norms(config: ModelConfig) -> list[tuple[str, str]]:
    """(tensor, leaf) of the norms: `post_attention_layernorm` follows attention; of "pre" norms it precedes the MLP."""
    return {
        "pre": [("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")],
        "post": [
            ("post_attention_layernorm", "attention_post_norm"),
            ("post_feedforward_layernorm", "mlp_post_norm"),
        ],
        "both": [
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "attention_post_norm"),
            ("pre_feedforward_layernorm", "mlp_norm"),
            ("post_feedforward_layernorm", "mlp_post_norm"),
        ],
    }[config.norm_places]


def _separate(config: ModelConfig, layer: str, block: str) -> list[TensorMap]:
    table = []
    for short, name in (("q", "query"), ("k", "key"), ("v", "value")):
        table.append(transposed(f"{layer}.self_attn.{short}_proj.weight", f"{block}/attention/{name}/kernel"))
        if config.qkv_bias:
            table.append(same(f"{layer}.self_attn.{short}_proj.bias", f"{block}/attention/{name}/bias"))
    for name in ("gate", "up"):
        table.append(transposed(f"{layer}.mlp.{name}_proj.weight", f"{block}/mlp/{name}/kernel"))
    if config.mlp_bias:
        for name in ("gate", "up", "down"):
            table.append(same(f"{layer}.mlp.{name}_proj.bias", f"{block}/mlp/{name}/bias"))
    return table


def _fused(config: ModelConfig, layer: str, block: str) -> list[TensorMap]:
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv = tuple(f"{block}/attention/{name}/kernel" for name in ("query", "key", "value"))
    gate_up = tuple(f"{block}/mlp/{name}/kernel" for name in ("gate", "up"))
    return [
        fused_rows(f"{layer}.self_attn.qkv_proj.weight", qkv, (heads, kv_heads, kv_heads)),
        fused_rows(f"{layer}.mlp.gate_up_proj.weight", gate_up, (config.intermediate_size,) * 2),
    ]
