"""Losses chosen by text: one of a table, one of your own, or a weighted sum "dpo(beta=0.1) + 0.2*sft"."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from jaxalign.losses.contract import Kind, apply, check_loss, input_names, loss_name, needs_whole_batch
from jaxalign.mistake import Mistake, about
from jaxalign.select import select_sum


@about("algorithm.loss")
def select_loss(text: str, *kinds: Kind) -> Callable:
    """The loss that `text` names, checked without device work.

    Args:
      text: as in "ipo(beta=0.05)", "my_lab.losses:slic(delta=1.0)" or "dpo(beta=0.1) + 0.2*sft".
      kinds: that of the command. Of several, the loss's is the one that has most of its inputs.

    Raises:
      Mistake: a refusal of `select` or `check_loss`, for any term, with a list of what exists; or a weight that is not
        above 0.
    """
    terms = select_sum(text, {name: loss for kind in kinds for name, loss in kind.losses.items()})
    names = {name for _, loss in terms for name in input_names(loss)}
    kind = max(kinds, key=lambda kind: len(names & kind.inputs.keys()))
    for weight, loss in terms:
        if weight <= 0:
            raise Mistake(
                f"{loss_name(loss)} has the weight {weight:g}, which must be above 0: 0 turns a loss off, and below it "
                "its opposite is learned; leave the term out, or write a loss of your own"
            )
        check_loss(loss, kind)
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1.0 else mixture(terms)


def mixture(terms: Sequence[tuple[float, Callable]]) -> Callable:
    """Σ weight · loss, element by element: a loss whose inputs are those of all its terms.

    It is called by name, and needs the whole batch if a term does. Weights are not normalised.

    Reference: as in mixed preference optimisation, Wang et al. 2024, https://arxiv.org/abs/2411.10442.
    """

    def mixed(**values: Any) -> Any:
        return sum(weight * apply(loss, values) for weight, loss in terms)

    parameters: dict[str, inspect.Parameter] = {}
    for _, loss in terms:
        signature = inspect.signature(loss).parameters
        for name in input_names(loss):
            earlier = parameters.get(name)
            if earlier is None or earlier.default is not inspect.Parameter.empty:
                parameters[name] = signature[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    # a parameter with a default may not stand before one without
    ordered = sorted(parameters.values(), key=lambda p: p.default is not inspect.Parameter.empty)
    mixed.__signature__ = inspect.Signature(ordered)
    mixed.__name__ = " + ".join(f"{weight:g}*{loss_name(loss)}" for weight, loss in terms)
    mixed.terms = [loss for _, loss in terms]
    mixed.whole_batch = any(needs_whole_batch(loss) for _, loss in terms)
    return mixed
