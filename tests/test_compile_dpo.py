"""Memory of LoRA DPO of an 8B model on one small chip, by the compilers of chips that are absent."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxalign.commands.dpo import recipe
from jaxalign.config.shared import LoraConfig
from jaxalign.models import places
from jaxalign.models.files.families import model_config
from jaxalign.training import sharding
from jaxalign.training.program import compile_step
from jaxalign.types import ResponseBatch, TokenBatch
from tests.absent import GPUS, bytes_of, device
from tests.shared import experiment

GIB = 2**30


def program(chip, **changes):
    """A step, and its batch, whose rows are full, as many rows as pairs."""
    config = dataclasses.replace(experiment("dpo_lora_llama3_8b").RUN, **changes)
    model = model_config(experiment("sft_llama3_8b").LLAMA_3_1_8B)
    mesh = places.make_mesh(data=1, fsdp=1, tensor=1, devices=[device(chip)])
    step = compile_step(config, recipe(config, model, mesh), mesh, steps=1000)
    rows = NamedSharding(mesh, sharding.ROWS)

    def column(dtype, *shape):
        return jax.ShapeDtypeStruct((config.batch_size, *shape), dtype, sharding=rows)

    tokens = [column(dtype, 2, config.max_length) for dtype in (jnp.int32, jnp.bool_, jnp.int32, jnp.int32)]
    return step, ResponseBatch(TokenBatch(*tokens), column(jnp.int32, 8, 2), {}, stride=17)


def compile_program(chip, **changes):
    step, batch = program(chip, **changes)
    return step.step.lower(step.like, step.frozen, batch).compile()


def memory(chip, **changes):
    """(GiB of arguments, GiB of temporaries); of a TPU from the optimised program, before it is machine code."""
    if chip in GPUS:
        analysis = compile_program(chip, **changes).memory_analysis()
        arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    else:
        step, batch = program(chip, **changes)
        arguments = bytes_of((step.like, step.frozen, batch))
        code = f"from tests.test_compile_dpo import *; compile_program({chip!r}, **{changes!r})"
        temporary = experiment("benchmarks/collectives").optimised("-c", code).bytes - arguments
    print(f"{chip} {changes}: {arguments / GIB:.2f} GiB of arguments, {temporary / GIB:.2f} GiB of temporaries")
    return arguments / GIB, temporary / GIB


def test_lora_dpo_of_llama_8b_in_four_bits_fits_one_v5e_chip():
    arguments, temporary = memory("v5e:1x1", attention="splash")
    # 6.98e9 weights x 4.25 bits, 1.05e9 of embeddings x 2 bytes, 1.68e8 of adapters x 12 bytes
    assert 7.2 < arguments < 7.4
    assert arguments + temporary < 15.75


GPU_24_GB = 24e9 / GIB  # 22.4, of which a driver and a desktop take some


@pytest.mark.parametrize(
    ("most_arguments", "changes"),
    [
        (7.4, {"max_length": 1024}),
        (15.6, {"max_length": 512, "microbatches": 32, "lora": LoraConfig(rank=16, alpha=16.0)}),
    ],
    ids=["nf4", "bfloat16"],
)
def test_lora_dpo_of_llama_8b_fits_a_gpu_of_24_gb(most_arguments, changes):
    """The program is compiled for an H100; its memory does not depend on the memory of the GPU."""
    arguments, temporary = memory("h100", attention="xla", **changes)
    assert arguments < most_arguments
    assert arguments + temporary < GPU_24_GB - 1
