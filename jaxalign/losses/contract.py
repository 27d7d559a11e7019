"""What a loss asks for, read from the names of its parameters.

A loss declares its inputs by naming them: its positional parameters are inputs out of one of the tables below, its
keyword-only parameters are hyperparameters. An algorithm computes what is asked for and passes it by name, so
`dpo`, which wants four log-probabilities, and `sft`, which wants one and a length, are called the same way, and so is a
function of your own. A loss without a `ref_` input needs no reference model. An input with a default is optional.

Statistics of the whole batch (KTO's KL, BCO's shift) are inputs too: scalars that are computed without gradient over
the global batch, so a loss stays a sum over rows and microbatches change nothing. Those that begin with `running_` are
kept from step to step; the loss's hyperparameter `momentum` says how. A loss that cannot be written so, because it
sorts the batch, is marked by `@whole_batch`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.mistake import Mistake
from jaxalign.select import listed, nearest

# Of pairs: one value per pair [B] unless a scalar. Log-probabilities are in nats, of response tokens given the prompt.
PAIR_INPUTS = {
    "policy_chosen_logps": "log π(chosen), summed over the tokens of the response, its terminator included",
    "policy_rejected_logps": "the same of the rejected response",
    "ref_chosen_logps": "the same of the chosen response under the frozen reference",
    "ref_rejected_logps": "the same of the rejected response under the frozen reference",
    "chosen_lengths": "number of tokens that policy_chosen_logps sums over, at least 1",
    "rejected_lengths": "number of tokens that policy_rejected_logps sums over, at least 1",
    "policy_chosen_public_logps": "log π summed over the first min(chosen_lengths, rejected_lengths) tokens of chosen",
    "policy_rejected_public_logps": "the same of the rejected response",
    "ref_chosen_public_logps": "the same of the chosen response under the frozen reference",
    "ref_rejected_public_logps": "the same of the rejected response under the frozen reference",
    "policy_chosen_collision_logps": "Σ_t log Σ_v π(v)², the log-chance that two samples agree, over chosen's tokens",
    "policy_rejected_collision_logps": "the same of the rejected response",
    "mean_chosen_length": "scalar: mean of chosen_lengths over the global batch",
    "mean_log_ratio": "scalar: mean of log π/π_ref over chosen and rejected responses of the global batch",
    "mean_margin": "scalar: mean over the global batch of log π/π_ref(chosen) - log π/π_ref(rejected)",
    "running_log_ratio": "scalar: mean_log_ratio over the batches so far, this one included",
    "running_margin": "scalar: mean_margin over the batches so far, this one included",
}

# Of single responses with a label: one value per row [B] unless a scalar.
UNPAIRED_INPUTS = {
    "policy_logps": "log π(response), summed over the tokens of the response, its terminator included",
    "ref_logps": "the same under the frozen reference",
    "labels": "True where the response is desirable",
    "policy_mismatched_logps": "log π of another row's response given this row's prompt, summed over its tokens",
    "ref_mismatched_logps": "the same under the frozen reference",
    "kl": "scalar: mean of policy_mismatched_logps - ref_mismatched_logps over the global batch, not yet clamped at 0",
    "mean_desirable_log_ratio": "scalar: mean of log π/π_ref over the desirable rows of the global batch",
    "mean_undesirable_log_ratio": "the same over the undesirable rows",
    "running_desirable_log_ratio": "scalar: mean_desirable_log_ratio over the batches so far, this one included",
    "running_undesirable_log_ratio": "the same over the undesirable rows",
}

# Of reward models.
RANKING_INPUTS = {
    "chosen_scores": "r(prompt, chosen) [B]",
    "rejected_scores": "r(prompt, rejected) [B]",
    "margins": "how much better chosen is, in units of the score [B]",
    "preferences": "probability that chosen is the better one [B]",
    "ties": "True where the two were judged equal [B]",
    "scores": "of the candidates of one prompt [B, K]",
    "ranks": "of the candidates, 0 the best; equal ranks are not compared [B, K]",
    "candidates": "True on the candidates that exist [B, K]",
    "step_scores": "logits, one for each step of a solution [...]",
    "step_labels": "1 where the step is right, 0 where it is wrong, or a probability [...]",
}


def input_names(loss: Callable) -> tuple[str, ...]:
    """The names of the loss's inputs, in order: all its parameters but the keyword-only."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return tuple(n for n, p in inspect.signature(loss).parameters.items() if p.kind in kinds)


def check_inputs(loss: Callable, known: Mapping[str, str]) -> tuple[str, ...]:
    """The loss's input names, once they are found to be in `known`.

    Raises:
      Mistake: the loss names an input that is not known; the message lists those that are.
    """
    names = input_names(loss)
    for name in names:
        if name not in known:
            raise Mistake(
                f"{loss_name(loss)} asks for an input {name!r}{nearest(name, list(known))}; known inputs are "
                f"{listed(list(known))}. A hyperparameter must be keyword-only: put it after * in the definition"
            )
    return names


def needs_reference(loss: Callable) -> bool:
    """Whether the loss asks for anything of the reference model."""
    return any(name.startswith("ref_") for name in input_names(loss))


def apply(loss: Callable, values: Mapping[str, Any]) -> Any:
    """The loss, given by name exactly those of `values` that it asks for.

    Raises:
      Mistake: an input without a default is not among the values.
    """
    signature = inspect.signature(loss).parameters
    missing = [n for n in input_names(loss) if n not in values and signature[n].default is inspect.Parameter.empty]
    if missing:
        raise Mistake(f"{loss_name(loss)} asks for {listed(missing)}, but there is only {listed(list(values))}")
    return loss(**{name: values[name] for name in input_names(loss) if name in values})


def keyword(loss: Callable, name: str, default: Any) -> Any:
    """The value that a hyperparameter of the loss has; of a sum, of the first term that has it; else `default`."""
    for part in (loss, *getattr(loss, "terms", ())):
        parameter = inspect.signature(part).parameters.get(name)
        if parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            return parameter.default
    return default


def momenta(loss: Callable) -> dict[str, float | None]:
    """The `running_` inputs of the loss, each with the `momentum` of the term that asks for it.

    m < 1 is the moving average m · (so far) + (1 - m) · (this batch), from 0; None, or a loss without that
    hyperparameter, the mean over everything so far.
    """
    found: dict[str, float | None] = {}
    for part in getattr(loss, "terms", (loss,)):
        for name in input_names(part):
            if name.startswith("running_"):
                found.setdefault(name, keyword(part, "momentum", None))
    return found


def whole_batch(loss: Callable) -> Callable:
    """Marks a loss that compares rows with each other: the global batch must reach it in one piece, not in parts."""
    loss.whole_batch = True
    return loss


def needs_whole_batch(loss: Callable) -> bool:
    """Whether the loss is marked by `@whole_batch`, its hyperparameters bound or not."""
    return getattr(_unbound(loss), "whole_batch", False)


def loss_name(loss: Callable) -> str:
    """What to call the loss in a message."""
    return getattr(_unbound(loss), "__name__", repr(loss))


def _unbound(loss: Callable) -> Callable:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss
