"""One table from each Hugging Face architecture to `ModelConfig` and to our leaf names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files.families import gpt, llama
from jaxalign.models.files.families.base import HfConfig, TensorMap, check_read, require
from jaxalign.outside import brief

LARGEST_MATRIX = 1 << 36  # numbers


class Family(NamedTuple):
    config: Callable[[HfConfig], ModelConfig]
    tensors: Callable[[ModelConfig], list[TensorMap]]
    ignored: tuple[str, ...] = (r"rotary_emb\.inv_freq$",)  # tensors of old files that follow from the config


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(llama.llama, llama.tensors),
    "MistralForCausalLM": Family(llama.mistral, llama.tensors),
    "Qwen2ForCausalLM": Family(llama.qwen2, llama.tensors),
    "Qwen3ForCausalLM": Family(llama.qwen3, llama.tensors),
    "Gemma2ForCausalLM": Family(llama.gemma2, llama.tensors),
    "Gemma3ForCausalLM": Family(llama.gemma3, llama.tensors),
    "Olmo2ForCausalLM": Family(llama.olmo2, llama.tensors),
    "Phi3ForCausalLM": Family(llama.phi3, llama.tensors),
    "GPT2LMHeadModel": Family(gpt.gpt2, gpt.gpt2_tensors, (r"\battn\.bias$", r"\battn\.masked_bias$")),
    "GPTNeoXForCausalLM": Family(
        gpt.neox, gpt.neox_tensors, (r"rotary_emb\.inv_freq$", r"attention\.bias$", r"attention\.masked_bias$")
    ),
}

MODEL_TYPES = {  # which transformers goes by, where 'architectures' names another class
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
}

# Fields that change no logit of these families: sizes of training, dropout (never applied), ids, names, caches, and
# what describes the file, classifier heads and generation.
HARMLESS_NAMES = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path _sliding_window_pattern
    architectures attention_dropout attn_implementation attn_pdrop auto_map bad_words_ids begin_suppress_tokens
    bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout cross_attention_hidden_size
    decoder_start_token_id do_sample dtype early_stopping embd_pdrop eos_token_id experts_implementation
    finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout id2label
    is_decoder label2id length_penalty max_length max_sequence_length min_length model_type n_ctx name_or_path
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type remove_invalid_values
    repetition_penalty reorder_and_upcast_attn resid_pdrop return_dict return_dict_in_generate sep_token_id
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_last_hidden_states
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version typical_p
    unsloth_fixed unsloth_version use_bfloat16 use_cache _unsloth_version
"""
HARMLESS = frozenset(HARMLESS_NAMES.split())
# Fields that change what a model computes, in transformers or in the family that they come from, with the value at
# which they do nothing. They are refused wherever the family's function has not read them.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "alibi": False,
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": 1.0,
    "final_logit_softcapping": (),
    "is_causal": True,
    "is_encoder_decoder": False,
    "layer_types": (),
    "lm_head_bias": False,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "per_layer_config": ({},),
    "pruned_heads": ({},),
    "qk_layernorm": False,
    "quantization_config": (),
    "residual_multiplier": 1.0,
    "rope_interleaved": False,
    "sliding_window": (),
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_qk_norm": False,
}


def model_config(hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The neutral config of a Hugging Face config.json. Raises Mistake that names an unsupported setting.

    Every field is read by its family, stands in HARMLESS, has its value of NEUTRAL, or is logged as one that nothing
    reads.
    """
    if isinstance(hf.get("architectures"), str):
        hf = {**hf, "architectures": [hf["architectures"]]}
    fields = HfConfig(dict(hf), where)
    names = fields.texts("architectures")
    if len(names) != 1 or names[0] not in FAMILIES:
        raise Mistake(
            f"architecture {brief(', '.join(names)) or 'unknown (config.json has no `architectures`)'} is not "
            f"supported; supported are {', '.join(FAMILIES)}"
        )
    kind = fields.get("model_type", str, "")
    if MODEL_TYPES.get(kind, names[0]) != names[0]:
        raise Mistake(
            f"{where}: 'model_type' is {kind}, and 'architectures' names {names[0]}; transformers goes by the first, "
            "jaxalign by the second, so make the two agree"
        )
    config = FAMILIES[names[0]].config(fields)
    if not fields.get("use_sliding_window", bool, True):
        fields.keys_read.add("sliding_window")
    require(fields, **{name: value for name, value in NEUTRAL.items() if name not in fields.keys_read})
    check_read(fields, tuple(HARMLESS))
    _check_sizes(config, where)
    return config


def _check_sizes(config: ModelConfig, where: str) -> None:
    if config.num_heads % config.num_kv_heads:
        raise Mistake(
            f"{where} has {config.num_heads} attention heads for {config.num_kv_heads} key heads; "
            "num_attention_heads must be a multiple of num_key_value_heads"
        )
    for name in ("vocab_size", "intermediate_size", "num_heads"):
        size = getattr(config, name) * (config.head_dim if name == "num_heads" else 1)
        if size * config.hidden_size > LARGEST_MATRIX:
            raise Mistake(
                f"{where} implies a matrix of {config.hidden_size:,} x {size:,}; the largest may have "
                f"{LARGEST_MATRIX:,} numbers"
            )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """All tensors of a checkpoint of this architecture, with the leaves that they fill."""
    return FAMILIES[config.architecture].tensors(config)


def embedding_names(config: ModelConfig) -> tuple[str, str]:
    """Names in the file of the embedding, and of the output matrix if it is another one."""
    table = tensor_maps(dataclasses.replace(config, tied=False))
    by_leaf = {tensor.leaves[0]: tensor.name for tensor in table}
    return by_leaf["embed/embedding"], by_leaf["unembedding/embedding"]


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    """Patterns of tensors that a file may have and nothing reads: buffers, and the copy of a tied embedding."""
    tied = (r"^(lm_head|embed_out)\.weight$",) if config.tied else ()
    return FAMILIES[config.architecture].ignored + tied
