"""Frozen leaves in the dtype of computation: half the memory, and the same steps to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.commands import grpo
from jaxalign.config.on_policy import GRPOAlgorithm, GRPOConfig
from jaxalign.config.shared import LoraConfig, OptimizerConfig
from jaxalign.models.files import huggingface
from jaxalign.models.places import device_bytes, make_mesh
from jaxalign.training.program import abstract_state, compile_step, frozen_of_files, load_frozen, new_state
from jaxalign.types import RolloutBatch, TokenBatch


@pytest.fixture
def run(tiny_model, tmp_path):
    """(config, mesh, a function that compiles it) of GRPO in bfloat16 with adapters, whose base is the reference."""
    config = GRPOConfig(
        model=str(tiny_model),
        data="d",
        output=tmp_path,
        precision="bfloat16",
        remat="none",
        algorithm=GRPOAlgorithm(kl_coef=0.1),
        lora=LoraConfig(rank=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, schedule="constant"),
    )
    mesh, model = make_mesh(devices=jax.devices()[:1]), huggingface.read_config(str(tiny_model))
    return config, mesh, lambda config: compile_step(config, grpo.recipe(config, model, mesh), mesh, steps=4)


def batch():
    draw, rows, width = np.random.default_rng(0), 4, 8
    tokens = draw.integers(3, 23, (rows, width)).astype(np.int32)
    mask = np.broadcast_to(np.arange(width) >= 3, (rows, width))
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    columns = {"old_logps": np.full((rows, width), -3.0, np.float32), "scores": np.zeros(rows, np.float32)}
    advantages = np.where(mask, draw.normal(size=(rows, 1)), 0).astype(np.float32)
    columns |= {"advantages": advantages, "ended": np.ones(rows, bool)}
    return RolloutBatch(TokenBatch(tokens, mask, positions, np.ones((rows, width), np.int32)), columns)


def test_steps_on_a_base_in_bfloat16_are_those_on_one_in_float32_to_the_bit(run):
    """Products, lookups and log-probabilities read nothing but a copy of it in bfloat16, forwards and backwards."""
    config, mesh, compiled = run
    program = compiled(config)
    narrow = load_frozen(program)
    wide = frozen_of_files(config, program, narrow, mesh)  # the files are float32
    dtypes = [{x.dtype for x in jax.tree.leaves(tree) if x.ndim > 2} for tree in (narrow, wide)]
    assert dtypes == [{jnp.dtype("bfloat16")}, {jnp.dtype("float32")}]
    norms = [x.dtype for x in jax.tree.leaves(narrow["blocks"]["mlp_norm"])]
    assert norms == [jnp.float32]  # which are read in float32
    ends = []
    for frozen in (narrow, wide):
        state = new_state(config, program, wide)
        for _ in range(2):
            state, metrics = program.step(state, frozen, batch())
        ends.append(jax.device_get((state.params, state.opt_state, metrics)))
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert ends[0][2]["kl"] > 0


def test_what_norms_read_and_what_moves_keeps_its_dtype(run):
    config, mesh, compiled = run
    dora = compiled(dataclasses.replace(config, lora=LoraConfig(rank=2, dora=True)))
    whole = compiled(dataclasses.replace(config, precision="float32"))
    for program in (dora, whole):
        assert {x.dtype for x in jax.tree.leaves(program.frozen)} == {jnp.dtype("float32")}
    narrow = abstract_state(config, whole.recipe, mesh)[1]
    norms = device_bytes([narrow["norm"], narrow["blocks"]["attention_norm"], narrow["blocks"]["mlp_norm"]])
    assert 2 * device_bytes(narrow) == device_bytes(whole.frozen) + norms
