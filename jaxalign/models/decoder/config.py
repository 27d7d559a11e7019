"""The config of a decoder in neutral words; `models/files/families/` translates each Hugging Face config into it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: pair i of the first `dims` of a head turns by position · frequency_i.

    frequency_i = theta^(-2i / dims), slowed for longer contexts: "linear" divides all by `factor`; "llama3" divides
    those with wavelength above original_length / low_freq_factor, keeps those below original_length /
    high_freq_factor, and blends between (Llama 3.1, https://arxiv.org/abs/2407.21783; RoPE, Su et al. 2021,
    https://arxiv.org/abs/2104.09864, eq. 15).
    """

    dims: int
    theta: float
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self) -> np.ndarray:
        """Float32[dims / 2], radians per position."""
        base = 1.0 / self.theta ** (np.arange(0, self.dims, 2, dtype=np.float32) / self.dims)
        if self.scaling == "linear":
            base = base / self.factor
        if self.scaling == "llama3":
            cycles = self.original_length * base / (2 * math.pi)  # in the original context
            keep = (cycles - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            keep = np.clip(keep, 0.0, 1.0)
            base = keep * base + (1 - keep) * base / self.factor
        return base.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """Settings in which layers of one stack may differ: attention window and rotary positions."""

    window: int | None = None  # a query sees keys at most window - 1 positions before it; None: all
    rope: Rope | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """All settings that change what a decoder computes. Hashable, so it can be static under jit."""

    architecture: str  # the Hugging Face class name, such as LlamaForCausalLM
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    kinds: tuple[LayerKind, ...]  # the distinct kinds of layers
    layer_kinds: tuple[int, ...]  # index into kinds, one a layer
    max_length: int  # positions that the model was trained for
    tied: bool  # the unembedding is the embedding
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma's scale is 1 + w
    norm_places: Literal["pre", "post", "both"] = "pre"  # norm on the input of a sub-layer, its output, or both
    parallel: bool = False  # attention and MLP read the same residual stream (GPT-NeoX)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # norm over each head, or over the whole projection
    query_scale: float | None = None  # default head_dim^-0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: float = 1.0
    learned_positions: int = 0  # rows of the position embedding; 0: none
    initializer_range: float = 0.02


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of a forward and backward pass of one token in a row of `length`: 6 · weights in products + attention.

    Attention adds 6 · L · length · H · Dh for causal rows (12 before halving for the causal mask), windows ignored.
    Recomputation is not counted, as in MFU (PaLM, https://arxiv.org/abs/2204.02311, appendix B).
    """
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    block = config.hidden_size * (heads + (3 if config.gated_mlp else 2) * config.intermediate_size)
    matrices = config.num_layers * block + config.vocab_size * config.hidden_size
    attention = 6.0 * config.num_layers * length * config.num_heads * config.head_dim
    return 6.0 * matrices + attention
