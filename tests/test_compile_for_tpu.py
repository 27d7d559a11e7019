"""Legality, memory and collectives of train steps, by the real TPU compiler for slices that are absent.

One step is compiled to the end. The others stop at the optimised program, which says all about memory and collectives;
machine code, which takes five times as long, adds nothing to that.
"""

import dataclasses

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
from tests.absent import READABLE_ON_TPU, bytes_of, tpu_devices
from tests.shared import experiment

GIB = 2**30
collectives = experiment("benchmarks/collectives")


def program(name, topology, **mesh):
    """The SFT step of an experiment, and its batch."""
    config = dataclasses.replace(experiment(name).RUN, attention="splash")  # what "auto" is on a TPU
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    model = model_config(experiment("sft_llama3_8b").LLAMA_3_1_8B)
    mesh = places.make_mesh(**dataclasses.asdict(config.mesh), devices=tpu_devices(topology))
    step = compile_step(config, recipe(config, model, mesh), mesh, steps=1000)
    rows = NamedSharding(mesh, sharding.ROWS)
    shape = config.batch_size, config.max_length
    dtypes = jnp.int32, jnp.bool_, jnp.int32, jnp.int32
    return step, TokenBatch(*(jax.ShapeDtypeStruct(shape, dtype, sharding=rows) for dtype in dtypes))


def compile_program(*arguments, **mesh):
    """The body of another process, which ends before it returns."""
    step, batch = program(*arguments, **mesh)
    step.step.lower(step.like, step.frozen, batch).compile()


def memory(name, topology, **mesh):
    """(GiB of arguments, GiB of temporaries) of a chip."""
    step, batch = program(name, topology, **mesh)
    arguments = bytes_of((step.like, step.frozen, batch))
    code = f"from tests.test_compile_for_tpu import *; compile_program({name!r}, {topology!r}, **{mesh!r})"
    optimised = collectives.optimised("-c", code)
    assert "splash" in optimised.text
    print(f"{mesh}: {arguments / GIB:.2f} GiB of arguments, {(optimised.bytes - arguments) / GIB:.2f} of temporaries")
    return arguments / GIB, (optimised.bytes - arguments) / GIB


@pytest.mark.parametrize("mesh", [{"fsdp": -1}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_the_step_of_llama_8b_fits_a_v5p_slice_of_eight(mesh):
    arguments, temporary = memory("sft_llama3_8b", "v5p:2x2x2", **mesh)
    assert 11 < arguments < 12.5  # 8.03e9 parameters x 12 bytes / 8 chips
    assert temporary > 0 and arguments + temporary < 0.5 * 95


def test_qlora_of_llama_8b_fits_one_v5e_chip():
    arguments, temporary = memory("qlora_llama3_8b", "v5e:1x1")
    # 6.98e9 weights x 4.25 bits, 1.05e9 of embeddings x 2 bytes, 1.68e8 of adapters x 12 bytes
    assert 7.2 < arguments < 7.4
    assert temporary > 0 and arguments + temporary < 0.7 * 16


def check(text, step, sizes, *, microbatches=1):
    """The program moves weights, gradients and hidden states as often as it must, and nothing that has logits."""
    moved = collectives.received(text)
    actual = collectives.account(moved, tensor=sizes["tensor"], microbatches=microbatches)
    least = collectives.least(step, sizes, microbatches=microbatches)
    print(actual, least, sep="\n")
    assert not actual.logits and not actual.vocabulary_in_loops
    assert actual.weights == pytest.approx(least.weights, rel=0.001)
    assert actual.unembedding == pytest.approx(least.unembedding, rel=0.001)
    assert actual.its_gradient == pytest.approx(least.its_gradient, rel=0.001)
    # XLA fills up some widths, to 4,224 from 4,096
    assert least.gradients * 0.999 < actual.gradients < least.gradients * 1.05
    assert actual.activations < least.activations
    assert actual.rest < 0.1


@pytest.mark.parametrize(
    ("step", "topology", "mesh", "microbatches"),
    [("sft", "v5e:2x4", "fsdp-tensor", 2), ("dpo", "v5p:4x4x4", "all", 1), ("ppo", "v6e:8x8", "fsdp-tensor", 1)],
)
def test_a_step_gathers_each_weight_and_scatters_each_gradient_once_and_moves_no_logits(
    step, topology, mesh, microbatches
):
    tpu_devices(topology)
    sizes = collectives.sizes_of(topology, mesh)
    text = collectives.step_for(step, topology, sizes, microbatches=microbatches).text
    check(text, step, sizes, microbatches=microbatches)
    # hidden states that wait for the backward pass are cut over `tensor` along the tokens
    length, layers = collectives.LENGTH // (2 if step == "dpo" else 1), collectives.LAYERS
    planes = 2 if step == "dpo" else 1
    assert f"bf16[{layers},{planes},{length // 2},4096]" in text
    assert f"bf16[{layers},{planes},{length},4096]" not in text


def test_a_step_with_kernels_compiles_to_machine_code_and_moves_as_little():
    tpu_devices("v5p:2x2x2")
    sizes = {"data": 1, "fsdp": 4, "tensor": 2}
    lowered = collectives.lower("sft", "v5p:2x2x2", sizes, implementation="pallas")
    text = lowered.as_text()
    assert "splash" in text and "logprob_forward" in text and "logprob_backward" in text
    check(lowered.compile(READABLE_ON_TPU).as_text(), "sft", sizes)
