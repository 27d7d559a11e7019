"""Legality, memory and collectives of train steps, by the real TPU compiler for slices that are absent."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxalign.commands.sft import recipe
from jaxalign.models import places
from jaxalign.models.files.families import model_config
from jaxalign.training import sharding
from jaxalign.training.program import compile_step
from jaxalign.types import TokenBatch
from tests.absent import READABLE_ON_TPU, tpu_devices
from tests.shared import experiment

GIB = 2**30


def compiled_step(config, model, topology, options=None):
    mesh = places.make_mesh(**dataclasses.asdict(config.mesh), devices=tpu_devices(topology))
    program = compile_step(config, recipe(config, model, mesh), mesh, steps=1000)
    rows = NamedSharding(mesh, sharding.ROWS)
    shape = config.batch_size, config.max_length
    columns = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in (jnp.int32, jnp.bool_, jnp.int32, jnp.int32)
    )
    batch = TokenBatch(*columns)
    lowered = program.step.lower(program.like, program.frozen, batch)
    text = lowered.as_text()
    assert "splash" in text
    assert ("logprob_forward" in text and "logprob_backward" in text) == (config.implementation == "pallas")
    return lowered.compile(options)


@pytest.mark.parametrize("mesh", [{"fsdp": -1}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_the_step_of_llama_8b_fits_a_v5p_slice_of_eight(mesh):
    file = experiment("sft_llama3_8b")
    config = dataclasses.replace(file.RUN, attention="splash")  # what "auto" is on a TPU
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    step = compiled_step(config, model_config(file.LLAMA_3_1_8B), "v5p:2x2x2")
    analysis = step.memory_analysis()
    arguments, temporary = analysis.argument_size_in_bytes / GIB, analysis.temp_size_in_bytes / GIB
    print(f"{mesh}: a chip holds {arguments:.1f} GiB of state and batch, and {temporary:.1f} GiB of temporaries")
    assert 11 < arguments < 12.5  # 8.03e9 parameters x 12 bytes / 8 chips
    assert arguments + temporary < 0.5 * 95


def test_qlora_of_llama_8b_fits_one_v5e_chip():
    config = dataclasses.replace(experiment("qlora_llama3_8b").RUN, attention="splash")
    model = model_config(experiment("sft_llama3_8b").LLAMA_3_1_8B)
    analysis = compiled_step(config, model, "v5e:1x1").memory_analysis()
    arguments, temporary = analysis.argument_size_in_bytes / GIB, analysis.temp_size_in_bytes / GIB
    print(f"the chip holds {arguments:.1f} GiB of base, adapters, Adam's state, and {temporary:.1f} GiB of temporaries")
    # 6.98e9 weights x 4.25 bits, 1.05e9 of embeddings x 2 bytes, 1.68e8 of adapters x 12 bytes
    assert 7.2 < arguments < 7.4
    assert arguments + temporary < 0.7 * 16


def test_a_step_cut_by_fsdp_and_tensor_exchanges_six_numbers_a_token_and_never_logits():
    file = experiment("sft_llama3_8b")
    mesh = dataclasses.replace(file.RUN.mesh, fsdp=4, tensor=2)
    config = dataclasses.replace(file.RUN, attention="splash", mesh=mesh, batch_size=16, microbatches=1)
    config = dataclasses.replace(config, implementation="pallas")
    model = model_config({**file.LLAMA_3_1_8B, "num_hidden_layers": 2})
    text = compiled_step(config, model, "v5p:2x2x2", READABLE_ON_TPU).as_text()
    assert "logprob_forward" in text and "logprob_backward" in text
    tokens, vocabulary = 16 * 2048 // 4, 128_256 // 2  # of a chip
    moved = [
        tuple(map(int, dims.split(",")))
        for line in text.splitlines()
        if re.search(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line)
        for dims in re.findall(r"\w\d+\[([\d,]+)\]", line.split("(%")[0])
    ]
    print(sorted(set(moved)))
    assert (2, 6, tokens) in moved or (12, tokens) in moved or (6, 2, tokens) in moved  # the log-sum-exp of both halves
    assert not [dims for dims in moved if max(dims) >= vocabulary and tokens in dims]
    assert not [dims for dims in moved if max(dims) >= vocabulary and 2048 in dims and 4096 not in dims]
    assert (vocabulary, 4096) in moved  # the weight, whole in width
