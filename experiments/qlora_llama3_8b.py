"""QLoRA SFT of Llama-3.1-8B on UltraChat, on one chip of 16 GiB.

Paper:     Dettmers et al. 2023, https://arxiv.org/abs/2305.14314: NF4 base, adapters of rank 64 on all linear layers,
           alpha 16, constant learning rate 2e-4, gradients clipped at 0.3, Adam's second decay 0.999.
Command:   python experiments/qlora_llama3_8b.py
Hardware:  one TPU v5e chip (16 GiB), or a GPU of 24 GB.
Expected:  the held-out loss of LoRA on a bfloat16 base (the paper's section 4 finds no loss against 16 bits).
Observed:  not run. tests/test_compile_for_tpu.py compiles its step for a v5e chip and prints its memory.
           A bfloat16 base (15.0 GiB) leaves no room for activations there; int8 does.
"""

from pathlib import Path

from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import BestCheckpointConfig, LoraConfig, MeshConfig, OptimizerConfig

RUN = SFTConfig(
    model="meta-llama/Llama-3.1-8B",
    tokenizer="meta-llama/Llama-3.1-8B-Instruct",
    data="HuggingFaceH4/ultrachat_200k:train_sft",
    eval_data="HuggingFaceH4/ultrachat_200k:test_sft",
    output=Path("runs/qlora-llama3-8b"),
    epochs=1,
    batch_size=16,
    microbatches=16,
    max_length=1024,
    precision="bfloat16",
    param_dtype="bfloat16",
    remat="blocks",
    eval_every=500,
    lora=LoraConfig(rank=64, alpha=16.0, targets="all-linear", quantise="nf4"),
    optimizer=OptimizerConfig(learning_rate=2e-4, schedule="constant", warmup_steps=100, max_grad_norm=0.3),
    mesh=MeshConfig(data=1, fsdp=1, tensor=1),
    checkpoint=BestCheckpointConfig(every=500, keep=2),
)

if __name__ == "__main__":
    from jaxalign.commands.sft import main

    raise SystemExit(main(RUN))
