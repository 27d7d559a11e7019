"""What a training method is: a differentiated loss, and a preparation without gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxalign.types import Average, PyTree

# (params, batch) -> (the Average that is minimised, Averages to log)
LossFn = Callable[[PyTree, Any], tuple[Average, dict[str, Average]]]
# (params, frozen, batch) -> batch
PrepareFn = Callable[[PyTree, PyTree, Any], Any]


def as_is(params: PyTree, frozen: PyTree, batch: Any) -> Any:
    """The preparation of methods that need none."""
    return batch


class Algorithm(NamedTuple):
    """Pure functions made by a factory, as an optimizer is in optax.

    `loss` sees only params and batch, so it can be tested without a reference model, and what frozen models say
    about a batch can equally come from disk.
    """

    loss: LossFn  # differentiated with respect to params
    prepare: PrepareFn = as_is  # no gradient; the only place where frozen models run
    epochs: int = 1  # passes over a prepared batch (PPO)
    minibatches: int = 1  # optimizer updates in each pass (PPO)
