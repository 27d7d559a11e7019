"""The contract of a training method: a differentiated loss, and a preparation without gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxalign.types import Average, PyTree

# (params, batch) -> (the Average that is minimised, Averages to log)
LossFn = Callable[[PyTree, Any], tuple[Average, dict[str, Average]]]
# (params, frozen, batch) -> batch
PrepareFn = Callable[[PyTree, PyTree, Any], Any]
# (batch) -> batch
AcrossFn = Callable[[Any], Any]
# (carry, batch) -> (carry, batch)
RememberFn = Callable[[PyTree, Any], tuple[PyTree, Any]]
# (reference, params, step) -> reference
FollowFn = Callable[[PyTree, PyTree, jax.Array], PyTree]
# (Averages of an update, the loss's own among them) -> Bool[]: neither it nor the ones behind it are applied
HaltFn = Callable[[dict[str, Average]], jax.Array]
# (trained params, frozen) -> the params that loss and prepare see
AssembleFn = Callable[[PyTree, PyTree], PyTree]


def as_is(params: PyTree, frozen: PyTree, batch: Any) -> Any:
    """The preparation of methods that need none."""
    return batch


def rows_apart(batch: Any) -> Any:
    """The batch of methods whose rows do not concern each other."""
    return batch


def nothing_remembered(carry: PyTree, batch: Any) -> tuple[PyTree, Any]:
    """The memory of methods whose steps do not concern each other."""
    return carry, batch


def trained_only(params: PyTree, frozen: PyTree) -> PyTree:
    """The params of methods that train all of them."""
    return params


class Algorithm(NamedTuple):
    """Pure functions made by a factory, as an optimizer is in optax.

    `loss` sees only params and batch, so it can be tested without a reference model, and the outputs of frozen models
    can equally come from disk.

    Values that need all rows at once (KTO's KL, a sort, whitening) are computed by `across` from the columns that
    `prepare` added, and travel to each row as a column: microbatches then change nothing.

    Values that must outlive a step (the running means of BCO and β-DPO) are a small tree of scalars, `carry`, in the
    train state. `remember` sees the whole batch before `across` does; it makes the next carry, and adds columns to the
    batch where the loss needs it.

    A reference that moves is a part of the train state: `prepare` gets `state.reference` for `frozen`, and after the
    update `follow` makes the next one of it and of the new params.

    Where only a part of the model is trained (adapters), `assemble` combines the trained leaves with the frozen ones:
    `loss` and `prepare` see whole params, and only the trained leaves have a gradient.
    """

    loss: LossFn  # differentiated with respect to params
    prepare: PrepareFn = as_is  # no gradient; the only place where frozen models run
    across: AcrossFn = rows_apart  # on the whole batch, after prepare, no gradient
    epochs: int = 1  # passes over a prepared batch (PPO)
    minibatches: int = 1  # optimizer updates in each pass (PPO)
    rows: int | None = None  # of a batch that minibatches deal out, whatever rows fill it up; None: all
    halt: HaltFn | None = None  # ends the updates of a batch; None: all are applied
    at_first: tuple[str, ...] = ()  # metrics of a batch's first update that are logged too, as `first/<name>`
    assemble: AssembleFn = trained_only  # LoRA: models/adapters/lora.py: join
    carry: PyTree = ()  # of the state at step 0
    remember: RememberFn = nothing_remembered  # on the whole batch, between prepare and across, no gradient
    follow: FollowFn | None = None  # algorithms/follow.py; None: the reference is frozen, or there is none
