"""One training step for every algorithm: prepare, then for each minibatch the gradient of a total, divided once.

It knows no mesh and is not jitted; `training/sharding.py` does both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithms.base import Algorithm, as_is
from jaxalign.mistake import Mistake
from jaxalign.training.optimizer import skipping
from jaxalign.training.state import TrainState
from jaxalign.types import Average, PyTree, TokenBatch

TrainStep = Callable[[TrainState, PyTree, Any], tuple[TrainState, dict[str, jax.Array]]]


def make_train_step(
    algorithm: Algorithm, optimizer: optax.GradientTransformation, *, microbatches: int = 1
) -> TrainStep:
    """A pure `train_step(state, frozen, batch) -> (state, metrics)`.

    Gradients of the loss's `total` are summed over microbatches in float32 and divided by the summed `count` once,
    so any number of microbatches and any sharding give the same update, also on ragged masks. `prepare` is cut into
    the same microbatches, which bounds the activations of frozen models as well. Both receive the parameters that
    `assemble` makes from `state.params` and `frozen`; the gradient is with respect to `state.params` alone.

    If the loss or a gradient is not finite, parameters, optimizer and carry stay as they were, and `skipped` is 1.

    Metrics are scalars: `loss`, `grad_norm` (before clipping), `skipped`, `tokens` (of the batch, without padding), and
    the algorithm's own. Over several updates in one step (epochs, minibatches) they are merged: `grad_norm` is the
    largest, and `first/<name>` has the value at the first update of each metric in `at_first`. If the algorithm may
    halt, `updates` counts the updates applied; those after the halt are not computed and not in the metrics.
    """
    prepare = _prepare_in_parts(algorithm, microbatches)
    update = _make_update(algorithm, optimizer, microbatches)

    def train_step(state: TrainState, frozen: PyTree, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        tokens = count_tokens(batch)
        reference = frozen if algorithm.follow is None else state.reference
        batch = prepare(algorithm.assemble(state.params, frozen), reference, batch)
        carry, batch = algorithm.remember(state.carry, batch)
        batch = algorithm.across(batch)
        trained = state.params, state.opt_state
        once = algorithm.epochs == algorithm.minibatches == 1
        if once:
            trained, (averages, grad_norm, finite) = update(trained, frozen, batch)
            first = averages
        else:
            parts = _minibatches(algorithm, jax.random.fold_in(state.key, state.step), batch)
            trained, outcomes, applied = _updates(algorithm, update, trained, frozen, parts)
            averages, grad_norm, finite = _merge(outcomes)
            first = jax.tree.map(lambda x: x[0], outcomes[0])
        metrics = {name: average.compute() for name, average in averages.items()}
        metrics |= {f"first/{name}": first[name].compute() for name in algorithm.at_first}
        metrics |= {"grad_norm": grad_norm, "skipped": 1.0 - finite, "tokens": tokens}
        if not once and algorithm.halt is not None:
            metrics["updates"] = jnp.sum(applied)
        carry = jax.tree.map(lambda after, before: jnp.where(finite > 0, after, before), carry, state.carry)
        step, reference = state.step + 1, state.reference
        if algorithm.follow is not None:
            reference = algorithm.follow(reference, trained[0], step)
        return TrainState(step, *trained, state.key, carry, reference), metrics

    return train_step


def _updates(
    algorithm: Algorithm, update: Callable, trained: tuple, frozen: PyTree, parts: Any
) -> tuple[tuple, tuple, jax.Array]:
    """Updates one after the other until the algorithm halts: (trained, outcomes [U ...], 1.0 where applied [U])."""
    if algorithm.halt is None:
        trained, outcomes = jax.lax.scan(lambda trained, rows: update(trained, frozen, rows), trained, parts)
        return trained, outcomes, outcomes[2]
    shapes = jax.eval_shape(update, trained, frozen, jax.tree.map(lambda x: x[0], parts))[1]
    averages, grad_norm, finite = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    nothing = averages, grad_norm, finite + 1

    def until_halted(carry: tuple, rows: Any) -> tuple[tuple, tuple]:
        trained, halted = carry
        skip, go_on = lambda: (trained, nothing), lambda: update(trained, frozen, rows)
        trained, outcome = jax.lax.cond(halted, skip, go_on)
        halted |= algorithm.halt(outcome[0])
        return (trained, halted), (outcome, jnp.where(halted, 0.0, outcome[2]))

    (trained, _), (outcomes, applied) = jax.lax.scan(until_halted, (trained, jnp.zeros((), bool)), parts)
    return trained, outcomes, applied


def _make_update(algorithm: Algorithm, optimizer: optax.GradientTransformation, microbatches: int) -> Callable:
    gradient, optimizer = _accumulate(algorithm, microbatches), skipping(optimizer)

    def update(trained: tuple, frozen: PyTree, batch: Any) -> tuple[tuple, tuple]:
        params, opt_state = trained
        grads, averages = gradient(params, frozen, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(grad_norm) & jnp.isfinite(averages["loss"].total)
        apply = finite if algorithm.halt is None else finite & ~algorithm.halt(averages)
        updates, opt_state = optimizer.update(grads, opt_state, params, apply=apply)
        return (optax.apply_updates(params, updates), opt_state), (averages, grad_norm, finite.astype(jnp.float32))

    return update


def _accumulate(algorithm: Algorithm, microbatches: int) -> Callable:
    """(params, frozen, batch) -> (gradient of the mean in float32, Averages with `loss` among them)."""

    def total(params: PyTree, frozen: PyTree, batch: Any) -> tuple[jax.Array, dict[str, Average]]:
        loss, metrics = algorithm.loss(algorithm.assemble(params, frozen), batch)
        return loss.total, {"loss": loss, **metrics}

    def part(params: PyTree, frozen: PyTree, batch: Any) -> tuple[PyTree, dict[str, Average]]:
        (_, averages), grads = jax.value_and_grad(total, has_aux=True)(params, frozen, batch)
        return jax.tree.map(lambda g: g.astype(jnp.float32), grads), averages

    def gradient(params: PyTree, frozen: PyTree, batch: Any) -> tuple[PyTree, dict[str, Average]]:
        if microbatches == 1:
            grads, averages = part(params, frozen, batch)
        else:
            parts = cut(batch, microbatches)
            shapes = jax.eval_shape(part, params, frozen, jax.tree.map(lambda x: x[0], parts))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

            def add(sums: Any, rows: Any) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, sums, part(params, frozen, rows)), None

            (grads, averages), _ = jax.lax.scan(add, zeros, parts)
        count = jnp.where(averages["loss"].count == 0, 1.0, averages["loss"].count)
        return jax.tree.map(lambda g: g / count, grads), averages

    return gradient


def _prepare_in_parts(algorithm: Algorithm, microbatches: int) -> Callable:
    if microbatches == 1 or algorithm.prepare is as_is:
        return algorithm.prepare

    def prepare(params: PyTree, frozen: PyTree, batch: Any) -> Any:
        parts = jax.lax.map(lambda rows: algorithm.prepare(params, frozen, rows), cut(batch, microbatches))
        return join(parts)

    return prepare


def _minibatches(algorithm: Algorithm, key: jax.Array, batch: Any) -> Any:
    """[updates, rows / minibatches, ...], with a new random order of rows in each epoch.

    Rows that fill a batch up, which depend on the number of devices, are behind the others and have no order.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    dealt = rows if algorithm.rows is None else algorithm.rows
    filling = jnp.arange(dealt, rows)

    def order(key: jax.Array) -> jax.Array:
        shuffled = jax.random.permutation(key, dealt)
        return jnp.concatenate([shuffled, filling]) if rows > dealt else shuffled

    orders = [order(epoch_key) for epoch_key in jax.random.split(key, algorithm.epochs)]
    epochs = [cut(jax.tree.map(lambda x, order=order: x[order], batch), algorithm.minibatches) for order in orders]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *epochs)


def _merge(outcomes: tuple) -> tuple[dict[str, Average], jax.Array, jax.Array]:
    averages, grad_norms, finite = outcomes
    return jax.tree.map(jnp.sum, averages), jnp.max(grad_norms), jnp.min(finite)


def count_tokens(batch: Any) -> jax.Array:
    """Number of tokens in the TokenBatches of a batch, over all devices and hosts, without padding."""
    parts = jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, TokenBatch))
    return sum(jnp.sum(part.segment_ids > 0) for part in parts if isinstance(part, TokenBatch)) + jnp.int32(0)


def cut(batch: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...], where part i takes rows i, i + parts, i + 2 parts, ...

    Strided because devices hold contiguous rows: so each owns an equal share of every part, and no row moves.
    """

    def cut_leaf(x: jax.Array) -> jax.Array:
        if x.shape[0] % parts:
            raise Mistake(
                f"`batch_size` {x.shape[0]} cannot be cut into {parts} equal parts; "
                f"the largest batch that can is {x.shape[0] - x.shape[0] % parts}"
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)

    return jax.tree.map(cut_leaf, batch)


def join(parts: Any) -> Any:
    """The inverse of `cut`."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]), parts)
