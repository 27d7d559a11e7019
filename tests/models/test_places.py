"""Every leaf has a rule that says where it lies, and a matrix without one is an error."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxalign.algorithms import memory
from jaxalign.config.shared import OptimizerConfig
from jaxalign.mistake import Mistake
from jaxalign.models.adapters.lora import Lora, linear_layers, split
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.models.places import RULES, decoding_tensor, inference_mesh, make_mesh, shardings
from jaxalign.training import optimizer
from jaxalign.training.state import TrainState
from jaxalign.types import leaf_names
from tests.models.tiny import TINY, hf_config


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def state_of(params, optimizer, **rest):
    """The shapes of a train state."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda params, key: TrainState.create(params, optimizer, key, **rest), params, key)


def without_a_rule(tree):
    names = jax.tree.leaves(leaf_names(tree))
    return [name for name in names if not any(re.search(pattern, name) for pattern, _ in RULES)]


@pytest.mark.parametrize("name", TINY)
def test_every_leaf_of_every_family_and_of_its_train_state_has_a_rule(name):
    config, mesh = model_config(hf_config(name)), make_mesh(fsdp=4, tensor=2)
    everywhere = tuple(linear_layers(config))
    adamw = optimizer.adamw(OptimizerConfig(), optax.constant_schedule(1e-3))
    for lora in (None, Lora(4, 8.0, everywhere), Lora(4, 8.0, everywhere, dora=True)):
        for quantise in ("none", "int8", "nf4"):
            base, adapter = split(make_decoder(config, lora=lora, quantise=quantise)[1])
            for tree in (base, state_of(base if lora is None else adapter, adamw)):
                assert without_a_rule(tree) == []
                shardings(tree, mesh)


def test_heads_critics_members_and_what_an_algorithm_remembers_have_rules():
    config = model_config(hf_config("qwen2"))
    _, adapter = split(make_decoder(config, lora=Lora(4, 8.0, tuple(linear_layers(config)), dora=True))[1])
    members = jax.tree.map(lambda x: shape(3, *x.shape), adapter)
    scorer = {"model": make_decoder(config)[1], "head": shape(3, 32), "mean": shape(3), "std": shape(3)}
    critic = {"head": shape(1, 32), "bias": shape(1), "model": adapter}
    moving_means = {"scores": memory.Spread.start(), "kl_coef": np.float32(0.1)}
    adamw = optimizer.adamw(OptimizerConfig(), optax.constant_schedule(1e-3))
    both = optimizer.partition({"policy": adamw, "critic": adamw})
    trees = [
        scorer | {"members": members},
        state_of({"head": shape(3, 32), "members": members}, adamw),
        state_of({"policy": adapter, "critic": critic}, both, carry=moving_means, reference=scorer["model"]),
    ]
    mesh = make_mesh(fsdp=4, tensor=2)
    for tree in trees:
        assert without_a_rule(tree) == []
        shardings(tree, mesh)
    placed = shardings(trees[0], mesh)
    assert placed["head"].spec == placed["mean"].spec == P()
    assert placed["members"]["blocks"]["mlp"]["up"]["adapter"]["a"].spec == P(None, None, "fsdp", None)


@pytest.mark.parametrize(
    ("tree", "name"),
    [
        ({"blocks": {"mlp": {"router": {"kernel": shape(3, 32, 8)}}}}, r"blocks/mlp/router/kernel \[3, 32, 8\]"),
        ({"members": {"mixture": shape(2, 32, 8)}}, r"members/mixture \[2, 32, 8\]"),
        ({"opt_state": {"mu": {"projection": shape(32, 8)}}}, r"opt_state/mu/projection \[32, 8\]"),
        ({"query": {"kernel": shape(32, 8)}}, r"query/kernel \[32, 8\]"),  # the rule is for a stack of such
    ],
)
def test_a_matrix_that_no_rule_fits_is_an_error_that_names_it_and_the_table(tree, name):
    with pytest.raises(Mistake, match=rf"the matrix {name} .* add a line .* to `RULES` in jaxalign/models/places.py"):
        shardings(tree, make_mesh())


def test_a_vector_that_no_rule_fits_is_replicated():
    tree = {"blocks": {"mlp": {"router": {"bias": shape(3, 8)}}}, "temperature": shape()}
    assert {place.spec for place in jax.tree.leaves(shardings(tree, make_mesh()))} == {P()}


@pytest.mark.parametrize(
    ("devices", "heads", "given", "shape"),
    [
        (8, 8, {}, (1, 1, 8)),
        (4, 8, {}, (1, 1, 4)),
        (8, 2, {}, (4, 1, 2)),
        (8, 1, {}, (8, 1, 1)),
        (8, 3, {}, (8, 1, 1)),
        (6, 12, {}, (1, 1, 6)),
        (8, 8, {"tensor": 2}, (4, 1, 2)),
        (8, 8, {"fsdp": 2}, (1, 2, 4)),
        (8, 8, {"fsdp": -1}, (1, 1, 8)),
        (8, 8, {"fsdp": -1, "tensor": 2}, (1, 4, 2)),
        (8, 2, {"data": 2}, (2, 1, 4)),
        (8, 8, {"data": 2, "fsdp": -1}, (2, 1, 4)),
        (8, 8, {"tensor": -1}, (1, 1, 8)),
    ],
    ids=str,
)
def test_generation_cuts_heads_over_all_devices_that_it_can_use(devices, heads, given, shape):
    """Sizes that are given stay; `tensor` divides devices and key heads, and no device is left out."""
    mesh = inference_mesh(heads, **given, devices=jax.devices()[:devices])
    assert tuple(mesh.shape.values()) == shape
    assert decoding_tensor(256, 32) == 8  # more shares would wait for each other longer than for their weights
