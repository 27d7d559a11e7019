"""Compiled by the real TPU compiler for slices that are not there: legality, memory and collectives."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxalign.losses.language import cross_entropy
from jaxalign.models.families import model_config
from jaxalign.runs.sft import make_program
from jaxalign.training import sharding
from jaxalign.types import TokenBatch

GIB = 2**30


def experiment(name):
    path = Path(__file__).parents[1] / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_step(config, model, topology):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh), devices=list(devices))
    program = make_program(config, model, mesh, loss=cross_entropy, steps=1000)
    rows = NamedSharding(mesh, sharding.ROWS)
    shape = config.batch_size, config.max_length
    part = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=rows)  # noqa: E731
    batch = TokenBatch(part(jnp.int32), part(jnp.bool_), part(jnp.int32), part(jnp.int32))
    lowered = program.step.lower(program.like, program.frozen, batch)
    assert "tpu_custom_call" in lowered.as_text()  # splash attention
    return lowered.compile()


@pytest.mark.parametrize("mesh", [{"fsdp": -1}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_the_step_of_llama_8b_fits_a_v5p_slice_of_eight(mesh):
    file = experiment("sft_llama3_8b")
    config = dataclasses.replace(file.RUN, attention="splash")  # what "auto" is on a TPU
    config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    step = compiled_step(config, model_config(file.LLAMA_3_1_8B), "v5p:2x2x2")
    analysis = step.memory_analysis()
    held, temporary = analysis.argument_size_in_bytes / GIB, analysis.temp_size_in_bytes / GIB
    print(f"{mesh}: a chip holds {held:.1f} GiB of state and batch, and {temporary:.1f} GiB while it computes")
    assert 11 < held < 12.5  # 8.03e9 parameters x 12 bytes / 8 chips
    assert held + temporary < 0.5 * 95


def test_qlora_of_llama_8b_fits_one_v5e_chip():
    config = dataclasses.replace(experiment("qlora_llama3_8b").RUN, attention="splash")
    model = model_config(experiment("sft_llama3_8b").LLAMA_3_1_8B)
    analysis = compiled_step(config, model, "v5e:1x1").memory_analysis()
    held, temporary = analysis.argument_size_in_bytes / GIB, analysis.temp_size_in_bytes / GIB
    print(
        f"the chip holds {held:.1f} GiB of base, adapters and Adam's state, and {temporary:.1f} GiB while it computes"
    )
    # 6.98e9 weights x 4.25 bits, 1.05e9 of embeddings x 2 bytes, 1.68e8 of adapters x 12 bytes
    assert 7.2 < held < 7.4
    assert held + temporary < 0.7 * 16
