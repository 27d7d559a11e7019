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


def collectives(text):
    """(computation, kind, dtype, dimensions) of every array that chips exchange in a compiled program."""
    computation, kinds = "", "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for line in text.splitlines():
        if line[:1] not in ("", " "):
            computation = line.split()[0]
        match = re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line)
        for dtype, dims in re.findall(r"([a-z]+\d+)\[([\d,]+)\]", match[1]) if match else ():
            yield computation, match[2], dtype, tuple(map(int, dims.split(",")))


@pytest.mark.parametrize("implementation", [None, "pallas"])
def test_a_step_cut_by_fsdp_and_tensor_moves_the_unembedding_once_and_never_logits(implementation):
    """0.4 GB of weights, in bfloat16, and 0.8 GB of its gradient, in float32, reach a chip, whatever the tiles are."""
    file = experiment("sft_llama3_8b")
    mesh = dataclasses.replace(file.RUN.mesh, fsdp=4, tensor=2)
    config = dataclasses.replace(file.RUN, attention="splash", mesh=mesh, batch_size=16, microbatches=1)
    config = dataclasses.replace(config, implementation=implementation)
    model = model_config({**file.LLAMA_3_1_8B, "num_hidden_layers": 2})
    text = compiled_step(config, model, "v5p:2x2x2", READABLE_ON_TPU).as_text()
    tokens, vocabulary = 16 * 2048 // 4, 128_256 // 2  # of a chip
    moved = list(collectives(text))
    shapes = [dims for *_, dims in moved]
    print(sorted(set(shapes)))
    # the log-sum-exp of both halves
    assert (2, 6, tokens) in shapes or (12, tokens) in shapes or (6, 2, tokens) in shapes
    assert not [dims for dims in shapes if max(dims) >= vocabulary and tokens in dims]
    of_vocabulary = [entry for entry in moved if max(entry[-1]) >= vocabulary]
    assert sorted(of_vocabulary) == [
        ("ENTRY", "all-gather", "bf16", (vocabulary, 4096)),  # the weight, whole in width
        ("ENTRY", "reduce-scatter", "f32", (vocabulary, 1024)),  # its gradient
    ]
