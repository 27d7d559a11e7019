"""Full-parameter SFT of Llama-3.1-8B on UltraChat, on a v5p slice.

Paper:     Tunstall et al. 2023 (Zephyr), https://arxiv.org/abs/2310.16944: the SFT stage, its data and learning rate.
Command:   python experiments/sft_llama3_8b.py          # on every host of the slice, the same command
Hardware:  v5p:2x2x2 (8 chips) or larger; fsdp over all chips.
Expected:  held-out loss of about 1.0 nats a token after one epoch (the paper's Zephyr-7B SFT: 0.94 with its template).
Observed:  not run. tests/test_compile_for_tpu.py compiles its step for v5p:2x2x2 and prints the memory of a chip.
"""

from pathlib import Path

from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import BestCheckpointConfig, MeshConfig, OptimizerConfig

# The model's config.json, for compile tests, which have no network.
LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}

RUN = SFTConfig(
    model="meta-llama/Llama-3.1-8B",
    tokenizer="meta-llama/Llama-3.1-8B-Instruct",
    data="HuggingFaceH4/ultrachat_200k:train_sft",
    eval_data="HuggingFaceH4/ultrachat_200k:test_sft",
    output=Path("runs/sft-llama3-8b"),
    epochs=1,
    batch_size=128,
    microbatches=4,
    max_length=2048,
    precision="bfloat16",
    remat="blocks",
    eval_every=200,
    distributed=True,
    optimizer=OptimizerConfig(learning_rate=2e-5, schedule="cosine", warmup_steps=100),
    mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
    checkpoint=BestCheckpointConfig(every=200, keep=2),
)

if __name__ == "__main__":
    from jaxalign.commands.sft import main

    raise SystemExit(main(RUN))
