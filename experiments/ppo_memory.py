"""Memory of a chip in a PPO step of Llama-3.2-1B, for several choices, by the compilers of chips that are absent.

Command:   python experiments/ppo_memory.py [--chips v5e:2x2 h100] [--rows four lora ...]
           TPUs need libtpu; GPUs jax-cuda13-plugin, and ptxas on the PATH. Nothing is downloaded, and no array made.
Hardware:  none. A row is one compilation of a minute or two.
Step:      64 responses of 1,024 tokens with their prompts, 16 microbatches, 4 epochs, bfloat16 compute, float32 params,
           remat blocks; on v5e:2x2 fsdp=4. Arguments stay on a device between steps, during rollouts too: models,
           Adam's moments, batch. Temporaries exist only within the step.
Observed:  GiB per device, arguments + temporaries (compiled by libtpu and the CUDA plugin of jax 0.10.2; not run):

    row              flags                                      v5e:2x2 (15.75 a chip)    H100 (80 GB)
    four             policy, critic, reference, each its own    8.06 + 5.75 = 13.81       32.23 + 16.72 = 48.95
    offload          --offload-reference                        6.91 + 6.32 = 13.23       (see below)
    shared           --critic.shared                            4.60 + 3.39 =  7.99       18.42 + 10.50 = 28.92
    shared-offload   both                                       3.45 + 3.39 =  6.85       (see below)
    bfloat16         --param-dtype bfloat16                     6.33 + 4.04 = 10.37       25.32 + 13.77 = 39.09
    lora             --lora.rank 64                             1.91 + 1.34 =  3.26        5.61 +  2.01 =  7.63
    lora-bfloat16    --lora.rank 64 --param-dtype bfloat16      1.34 + 0.77 =  2.10        3.31 +  2.01 =  5.32

           The fourth model, the reward model, is outside the step. One of the same size takes 4.60 GiB in float32, 1.91
           with quantise='int8' and 1.46 with 'nf4' (embeddings stay float32), whole on the first device; with
           offload=True it is there only while it scores, and its host holds as much.
           Offloading the reference frees its 1.15 GiB a chip for the caches of a rollout. At the step's peak it frees
           all of it beside a shared critic, but only half beside a separate critic, where the temporaries grow by 0.57.
           The memory kinds of an absent GPU cannot be named, so those rows are left out.
           Not counted: the weights of a rollout, which --decode-layout tensor makes whole on each chip of mesh.tensor=1
           (2.3 GiB in bfloat16), and its cache.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "CUDA_VISIBLE_DEVICES": "-1"}

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxalign.commands.ppo import recipe
from jaxalign.config.on_policy import CriticConfig, PPOConfig
from jaxalign.config.shared import LoraConfig, MeshConfig
from jaxalign.models import places
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.models.heads import trunk_config
from jaxalign.training import sharding
from jaxalign.training.program import compile_step
from jaxalign.types import RolloutBatch, TokenBatch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from absent import device, tpu_devices

GIB = 2**30
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
RUN = PPOConfig(
    model="config:Llama-3.2-1B",  # no file is read
    data="prompts.jsonl",
    output=Path("runs/ppo-llama3-1b"),
    reward="length(target=256)",
    batch_size=64,
    microbatches=16,
    max_length=1024,
    max_new_tokens=512,
    precision="bfloat16",
    remat="blocks",
    mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
)
ADAPTERS = LoraConfig(rank=64, alpha=64.0)
CHOICES: dict[str, dict[str, Any]] = {
    "four": {},
    "offload": {"offload_reference": True},
    "shared": {"critic": CriticConfig(shared=True)},
    "shared-offload": {"critic": CriticConfig(shared=True), "offload_reference": True},
    "bfloat16": {"param_dtype": "bfloat16"},
    "lora": {"lora": ADAPTERS},
    "lora-bfloat16": {"lora": ADAPTERS, "param_dtype": "bfloat16"},
}


def memory(chips: str, choice: str) -> tuple[float, float, float]:
    """GiB of (arguments on a device, temporaries on a device, arguments in its host's memory)."""
    on_gpu = ":" not in chips
    config = dataclasses.replace(RUN, attention="xla" if on_gpu else "splash", **CHOICES[choice])
    devices = [device(chips)] if on_gpu else tpu_devices(chips)
    mesh = places.make_mesh(**dataclasses.asdict(config.mesh), devices=devices)
    model = model_config(LLAMA_3_2_1B)
    program = compile_step(config, recipe(config, model, mesh), mesh, steps=1000)
    rows = NamedSharding(mesh, sharding.ROWS)

    def column(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=rows)

    width = config.max_length
    tokens = TokenBatch(*(column(dtype, width) for dtype in (jnp.int32, jnp.bool_, jnp.int32, jnp.int32)))
    columns = {"old_logps": column(jnp.float32, width), "scores": column(jnp.float32), "ended": column(jnp.bool_)}
    compiled = program.step.lower(program.like, program.frozen, RolloutBatch(tokens, columns)).compile()
    sizes = compiled.memory_analysis()
    return tuple(
        size / GIB
        for size in (sizes.argument_size_in_bytes, sizes.temp_size_in_bytes, sizes.host_argument_size_in_bytes)
    )


def reward_model_bytes(model: ModelConfig) -> dict[str, float]:
    """`quantise` -> GiB of a reward model of the same size, whole on one device."""
    abstract = {kind: make_decoder(trunk_config(model), quantise=kind)[1] for kind in ("none", "int8", "nf4")}
    return {
        kind: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / GIB for kind, tree in abstract.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", nargs="+", default=["v5e:2x2", "h100"])
    parser.add_argument("--rows", nargs="+", default=list(CHOICES), choices=list(CHOICES))
    args = parser.parse_args()
    for kind, size in reward_model_bytes(model_config(LLAMA_3_2_1B)).items():
        print(f"reward model, quantise={kind}: {size:.2f} GiB")
    for chips in args.chips:
        for choice in args.rows:
            if ":" not in chips and CHOICES[choice].get("offload_reference"):
                continue  # jax 0.10.2 cannot name the memories of a GPU that is absent
            fixed, temporary, host = memory(chips, choice)
            total = f"{fixed:6.2f} + {temporary:5.2f} = {fixed + temporary:6.2f} GiB"
            print(f"{chips:8} {choice:16} {total}; host {host:.2f}", flush=True)


if __name__ == "__main__":
    main()
