import logging

import jax
import jax.numpy as jnp

from jaxalign.training.compiled import CompiledStep


def add(state, frozen, batch):
    return state + jnp.sum(batch), {"sum": state}


def test_a_new_shape_after_warm_up_is_a_warning_that_names_it(caplog):
    caplog.set_level(logging.INFO)
    step = CompiledStep(jax.jit(add))
    state, _ = step(jnp.float32(0), None, jnp.ones((2, 3)))
    state, _ = step(state, None, jnp.ones((2, 3)))
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.INFO
    state, _ = step(state, None, jnp.ones((2, 5)))
    assert caplog.records[1].levelno == logging.WARNING
    assert "compiled again for a batch of [2, 5]" in caplog.records[1].message
    assert state == 22


def test_shapes_that_were_announced_are_no_surprise(caplog):
    step = CompiledStep(jax.jit(add), announced=2)
    for width in (3, 5):
        step(jnp.float32(0), None, jnp.ones((2, width)))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
