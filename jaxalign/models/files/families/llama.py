"""Llama 1 to 3.3 and the families that keep its names: Mistral, Qwen 2 and 3, Gemma 2 and 3, OLMo 2, Phi-3."""

from __future__ import annotations

from typing import Any

from jaxalign.models.decoder.config import LayerKind, ModelConfig
from jaxalign.models.files.families.base import (
    HfConfig,
    TensorMap,
    activation,
    fused_rows,
    kinds,
    layer_types,
    require,
    rope,
    same,
    transposed,
)

# Values that transformers gives to fields that a config leaves out, where they are not Llama's.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
    "gemma2": {"num_key_value_heads": 4, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0},
    "gemma3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
    },
    "olmo2": {"rms_norm_eps": 1e-5},
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
}


def llama(hf: HfConfig) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(
        **_common(hf),
        **_uniform(hf, None),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )


def mistral(hf: HfConfig) -> ModelConfig:
    hf = DEFAULTS["mistral"] | dict(hf)
    return ModelConfig(**_common(hf), **_uniform(hf, hf["sliding_window"]))


def qwen2(hf: HfConfig) -> ModelConfig:
    hf = DEFAULTS["qwen2"] | dict(hf)
    return ModelConfig(**_common(hf), **_qwen_layers(hf), qkv_bias=True)


def qwen3(hf: HfConfig) -> ModelConfig:
    hf = DEFAULTS["qwen3"] | dict(hf)
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(**_common(hf), **_qwen_layers(hf), qkv_bias=bias, output_bias=bias, qk_norm="head")


def gemma2(hf: HfConfig) -> ModelConfig:
    hf = DEFAULTS["gemma2"] | dict(hf)
    count = hf["num_hidden_layers"]
    types = layer_types(hf, ["full_attention" if i % 2 else "sliding_attention" for i in range(count)])
    return ModelConfig(**_gemma(hf, types), attention_softcap=hf.get("attn_logit_softcapping", 50.0))


def gemma3(hf: HfConfig) -> ModelConfig:
    hf = DEFAULTS["gemma3"] | dict(hf)
    count, period = hf["num_hidden_layers"], hf.get("sliding_window_pattern") or 6
    types = layer_types(hf, ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(count)])
    require(hf, use_bidirectional_attention=False)
    return ModelConfig(**_gemma(hf, types), attention_softcap=hf.get("attn_logit_softcapping"), qk_norm="head")


def olmo2(hf: HfConfig) -> ModelConfig:
    hf = DEFAULTS["olmo2"] | dict(hf)
    bias = bool(hf.get("attention_bias", False))
    return ModelConfig(
        **_common(hf), **_uniform(hf, None), qkv_bias=bias, output_bias=bias, qk_norm="full", norm_places="post"
    )


def phi3(hf: HfConfig) -> ModelConfig:
    hf = DEFAULTS["phi3"] | dict(hf)
    return ModelConfig(**_common(hf), **_uniform(hf, hf.get("sliding_window")))


def _common(hf: HfConfig) -> dict[str, Any]:
    heads, hidden = hf["num_attention_heads"], hf["hidden_size"]
    return {
        "architecture": hf["architectures"][0],
        "vocab_size": hf["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hidden // heads,
        "max_length": hf.get("max_position_embeddings", 2048),
        "tied": bool(hf.get("tie_word_embeddings", False)),
        "activation": activation(hf.get("hidden_act") or hf.get("hidden_activation") or "silu"),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "initializer_range": hf.get("initializer_range", 0.02),
    }


def _head_dim(hf: HfConfig) -> int:
    return hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]


def _uniform(hf: HfConfig, window: int | None) -> dict[str, tuple]:
    return kinds([LayerKind(window, rope(hf, _head_dim(hf)))] * hf["num_hidden_layers"])


def _qwen_layers(hf: HfConfig) -> dict[str, tuple]:
    """Kinds of layers: with use_sliding_window, those from max_window_layers on have a window."""
    slides = bool(hf.get("use_sliding_window")) and hf.get("sliding_window") is not None
    first = hf.get("max_window_layers", 28)
    default = [
        "sliding_attention" if slides and i >= first else "full_attention" for i in range(hf["num_hidden_layers"])
    ]
    turning = rope(hf, _head_dim(hf))
    window = hf.get("sliding_window") if slides else None
    types = layer_types(hf, default)
    return kinds([LayerKind(window if kind == "sliding_attention" else None, turning) for kind in types])


def _gemma(hf: HfConfig, types: list[str]) -> dict[str, Any]:
    hf = {**hf, "hidden_act": hf.get("hidden_activation") or "gelu_pytorch_tanh", "head_dim": hf.get("head_dim", 256)}
    require(hf, attention_bias=False)
    local = float(hf.get("rope_local_base_freq") or 10_000.0)

    def kind(layer_type: str) -> LayerKind:
        if layer_type == "full_attention":
            return LayerKind(None, rope(hf, hf["head_dim"], layer_type=layer_type))
        turning = rope(hf, hf["head_dim"], layer_type=layer_type)
        if "rope_local_base_freq" in hf and not _per_type(hf):
            turning = rope({"rope_theta": local}, hf["head_dim"])  # Gemma 3's local layers are not scaled
        return LayerKind(hf.get("sliding_window", 4096), turning)

    return {
        **_common({"tie_word_embeddings": True, **hf}),
        **kinds([kind(layer_type) for layer_type in types]),
        "norm_offset": 1.0,
        "norm_places": "both",
        "query_scale": hf.get("query_pre_attn_scalar", 256) ** -0.5,
        "final_softcap": hf.get("final_logit_softcapping"),
        "embedding_scale": hf["hidden_size"] ** 0.5,
    }


def _per_type(hf: HfConfig) -> bool:
    return "sliding_attention" in (hf.get("rope_parameters") or {})


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
