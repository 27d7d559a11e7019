"""Settings of the commands that train nothing: generate, chat, export, quickstart."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from jaxalign.config.limits import EMPTY_IS_MEANT, FUNCTION, WORDS, above, at_least
from jaxalign.config.shared import PromptSettings, TruncationSettings


@dataclass(frozen=True)
class DecodingMeshConfig:
    """Number of parts that each mesh axis cuts arrays into; by default all devices share the model."""

    data: int | None = None
    """Number of model replicas, each with a share of the responses; none or -1: all devices left."""
    fsdp: int = 1
    """Number of parts of weights and responses; each token gathers the weights anew. -1: all devices left."""
    tensor: int | None = None
    """Number of shares of attention heads, hidden units and vocabulary; none: as many as divide devices and key heads,\
 at most 8."""


@dataclass(frozen=True)
class InferenceConfig(TruncationSettings):
    """A model that responds, and how its tokens are sampled."""

    model: str
    """Hugging Face folder (the final/ of a run is one) or hub name."""
    _: KW_ONLY
    adapter: Path | None = None
    """Folder of LoRA adapters of --model in PEFT's format, such as a run's adapter/; none: no adapters."""
    repetition_penalty: Annotated[float, above(0)] = 1.0
    """Factor above 0 against repeated tokens, the prompt's included; 1: no penalty."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Dtype of cached keys and values. 'auto' is --precision's."""
    seed: Annotated[int, at_least(0, below=2**32)] = 0
    """Seed of sampling."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of computation, of every matrix product's inputs too. 'auto': bfloat16 on TPU and GPU, float32 on CPU."""
    mesh: DecodingMeshConfig = field(default_factory=DecodingMeshConfig)


@dataclass(frozen=True)
class GenerateConfig(PromptSettings, InferenceConfig):
    """Responses of a model to prompts."""

    prompts: Annotated[str, EMPTY_IS_MEANT]
    """Prompts: a file (.jsonl with columns prompt or messages, .txt with one per line), FILE:SPLIT, or a text."""
    output: Path | None = None
    """File (.jsonl) for prompts and responses, which must not exist yet; none: they are printed."""
    max_new_tokens: Annotated[int, at_least(1)] = 128
    """Length limit of a response, in tokens."""
    temperature: Annotated[float, at_least(0)] = 1.0
    """Sampling temperature; 0 always takes the most likely token."""
    stop: tuple[str, ...] = ()
    """Texts that end a response and stay in it; a special token, such as '<|im_end|>', ends it and is left out."""
    n: Annotated[int, at_least(1)] = 1
    """Number of responses to each prompt."""
    reward: Annotated[str | None, FUNCTION] = None
    """Reward that scores responses, as for grpo: 'reward_model(path=...)', 'my.module:function'; none: no scores."""
    reward_seconds: Annotated[float, above(0)] = 300.0
    """Time limit, in seconds, of reward functions for 64 responses. They run in parallel. Reward models have none."""
    keep: Literal["all", "best"] = "all"
    """Responses that are kept: 'all', or each prompt's 'best' by --reward (best-of-n)."""
    batch_size: Annotated[int, at_least(1)] = 16
    """Number of responses generated at once; one that ends makes room for the next prompt."""
    engine: Annotated[str | None, WORDS] = None
    """Address of a server that generates, http://host:port; --model gives the tokenizer; none: this machine does."""
    engine_kind: Literal["vllm", "sglang"] = "vllm"
    """Software of --engine's server; rollout/engine/servers.py has its start command."""


@dataclass(frozen=True)
class ChatConfig(InferenceConfig):
    """A conversation with a model in the terminal."""

    system: Annotated[str | None, WORDS] = None
    """System message at the start of the conversation; none: no message."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; none: the model's own."""
    chat_template: str | None = None
    """Chat template: plain, alpaca, chatml, llama3 or a Jinja file; none: the tokenizer's own."""
    max_new_tokens: Annotated[int, at_least(1)] = 512
    """Length limit of a response, in tokens; the rest of the model's window holds the conversation so far."""
    temperature: Annotated[float, at_least(0)] = 0.7
    """Sampling temperature; 0 always takes the most likely token."""


@dataclass(frozen=True)
class ExportConfig:
    """A finished or interrupted run as a Hugging Face folder."""

    run: Path
    """Run folder."""
    output: Path
    """Folder to write; it must be empty or not exist."""
    step: int | None = None
    """Step whose checkpoint is exported; none: the newest."""
    best: bool = False
    """Export the kept checkpoint with the lowest held-out loss."""
    adapter: bool = False
    """Export only the adapters of a LoRA run, in PEFT's format; otherwise they are merged into the base."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the exported weights. 'auto' is the run's own: --export-dtype, else that of its model's files."""


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole pipeline on an embedded tiny world: no network, no data, minutes on a laptop."""

    output: Path = Path("quickstart")
    """Folder for the runs and the page of results."""
    seed: Annotated[int, at_least(0, below=2**32)] = 0
    """Seed of the world, the weights and the samples."""
