"""One table from each Hugging Face architecture to `ModelConfig` and to our leaf names."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.files.families import gpt, llama
from jaxalign.models.files.families.base import HfConfig, TensorMap


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
    "GPT2LMHeadModel": Family(gpt.gpt2, gpt.gpt2_tensors, (r"attn\.bias$", r"attn\.masked_bias$")),
    "GPTNeoXForCausalLM": Family(
        gpt.neox, gpt.neox_tensors, (r"rotary_emb\.inv_freq$", r"attention\.bias$", r"attention\.masked_bias$")
    ),
}


def model_config(hf: HfConfig) -> ModelConfig:
    """The neutral config of a Hugging Face config.json. Raises Mistake that names an unsupported setting."""
    names = hf.get("architectures") or []
    names = [names] if isinstance(names, str) else names
    if len(names) != 1 or names[0] not in FAMILIES:
        raise Mistake(
            f"architecture {', '.join(names) or 'unknown (config.json has no `architectures`)'} is not supported; "
            f"supported are {', '.join(FAMILIES)}"
        )
    missing = [name for name in ("vocab_size",) if name not in hf]
    if missing:
        raise Mistake(f"config.json has no {', '.join(missing)}")
    try:
        config = FAMILIES[names[0]].config({**hf, "architectures": names})
    except KeyError as error:
        raise Mistake(f"config.json of a {names[0]} has no field {error.args[0]!r}") from None
    except (TypeError, ZeroDivisionError) as error:
        raise Mistake(f"config.json of a {names[0]} has a field of the wrong type or zero ({error})") from None
    _check_sizes(config)
    return config


def _check_sizes(config: ModelConfig) -> None:
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_layers",
        "num_heads",
        "num_kv_heads",
        "head_dim",
    ):
        size = getattr(config, name)
        if not isinstance(size, int) or size < 1:
            raise Mistake(f"config.json implies {name}={size!r}; it must be a whole number above 0")
    if config.num_heads % config.num_kv_heads:
        raise Mistake(
            f"config.json has {config.num_heads} attention heads for {config.num_kv_heads} key heads; "
            "num_attention_heads must be a multiple of num_key_value_heads"
        )


def tensor_maps(config: ModelConfig) -> list[TensorMap]:
    """All tensors of a checkpoint of this architecture, with the leaves that they fill."""
    return FAMILIES[config.architecture].tensors(config)


def ignored_tensors(config: ModelConfig) -> tuple[str, ...]:
    """Patterns of tensors that a file may have and nothing reads: buffers, and the copy of a tied embedding."""
    tied = (r"^(lm_head|embed_out)\.weight$",) if config.tied else ()
    return FAMILIES[config.architecture].ignored + tied
