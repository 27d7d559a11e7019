"""Tiny Hugging Face configs, one for every family and every variant that changes the numbers."""

from jaxalign.models.files.families import MODEL_TYPES

BASE = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4, "tie_word_embeddings": True}

TINY: dict[str, dict] = {
    "llama": {"model_type": "llama", **BASE},
    "llama-tied-biased": {
        "model_type": "llama",
        **BASE,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama-rope-linear": {
        "model_type": "llama",
        **BASE,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    },
    "llama-rope-llama3": {"model_type": "llama", **BASE, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"model_type": "mistral", **BASE, "sliding_window": 5, "head_dim": 16},
    "qwen2": {"model_type": "qwen2", **BASE},
    "qwen2-sliding": {
        "model_type": "qwen2",
        **BASE,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **BASE, "head_dim": 16},
    "gemma2": {
        "model_type": "gemma2",
        **BASE,
        **GEMMA,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **BASE,
        **GEMMA,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
        },
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt-neox": {
        "model_type": "gpt_neox",
        **{k: v for k, v in BASE.items() if k != "num_key_value_heads"},
        "rotary_pct": 0.5,
    },
    "gpt-neox-serial": {
        "model_type": "gpt_neox",
        **{k: v for k, v in BASE.items() if k != "num_key_value_heads"},
        "rotary_pct": 1.0,
        "use_parallel_residual": False,
        "attention_bias": False,
    },
    "phi3": {"model_type": "phi3", **BASE, "sliding_window": 6},
    "phi3-partial": {"model_type": "phi3", **BASE, "partial_rotary_factor": 0.5, "sliding_window": None},
    "olmo2": {"model_type": "olmo2", **BASE},
}


def hf_config(name: str) -> dict:
    """config.json of a tiny model."""
    return {"architectures": [MODEL_TYPES[TINY[name]["model_type"]]], **TINY[name]}


def save_random(name: str, directory, *, dtype: str = "float32", seed: int = 0, **changes) -> None:
    """A checkpoint made by transformers with every parameter random, norms' scales and biases too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    values = {**TINY[name], **changes}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(directory)
