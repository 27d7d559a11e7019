"""The contract of a loss: inputs by name, hyperparameters by keyword, and one float32 value per element.

A loss declares its inputs by naming them: its positional parameters are inputs out of one of the tables below, its
keyword-only parameters are hyperparameters, whose `Annotated` types hold their limits, as those of settings do. An
algorithm computes the inputs that the loss names and passes them by name, so `dpo`, with four log-probabilities, and
`sft`, with one and a length, are called the same way, and so is a function of your own. An input with a default is
optional. A loss needs a reference model if one of its inputs does: a `ref_` one, or a statistic of log-ratios.

Statistics of the whole batch (KTO's KL, BCO's shift) are inputs too: scalars that are computed without gradient over
the global batch, so a loss stays a sum over rows and microbatches change nothing. Those that begin with `running_` are
kept from step to step; the loss's hyperparameter `momentum` sets how. A loss that cannot be written so, because it
sorts the batch, is marked by `@whole_batch`; `dpo` alone takes such losses.

Axis letters: B rows, T tokens of a row, G groups of a row, S steps of a solution, K candidates.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.config.limits import above, at_least, between, share
from jaxalign.mistake import Mistake
from jaxalign.outside import brief
from jaxalign.select import listed, nearest

PerPair = Float[Array, "B"]
# Ranges of hyperparameters, which `select` checks as the command line checks flags.
Positive = Annotated[float, above(0)]
Coefficient = Annotated[float, at_least(0)]
Share = Annotated[float, share()]
Smoothing = Annotated[float, between(0, 0.5)]  # of a label: at 1/2 it says nothing, and beyond it means its opposite
Momentum = Annotated[float | None, at_least(0, below=1)]
SIZES = {"B": 5, "T": 7, "G": 2, "S": 4, "K": 3}  # of abstract arrays; all differ, so no axis can stand for another


class Input(NamedTuple):
    """An input of losses."""

    meaning: str
    axes: str = "B"  # letters; none for a scalar
    dtype: str = "float32"


class Kind(NamedTuple):
    """The losses of one sort of element: a token, a pair, a rated response, a group of candidates, a step."""

    losses: Mapping[str, Callable]  # those known by a bare name
    inputs: Mapping[str, Input]
    axes: str  # of the values
    whole_batches: bool = False  # its algorithm can give a loss all elements of a batch in one piece


# Tokens of supervised fine-tuning. All are 0 on tokens that are not learned, and the loss's value there is dropped.
LANGUAGE_INPUTS = {
    "logps": Input("log p(token) in nats", "B T"),
    "log_normalizer": Input("log Z = log Σ_v exp z_v, with z the logits", "B T"),
    "mean_logit": Input("(1/V) Σ_v z_v", "B T"),
    "entropy": Input("-Σ_v p(v) log p(v) in nats", "B T"),
}

# Pairs of responses. Log-probabilities are in nats, of response tokens given the prompt.
PAIR_INPUTS = {
    "policy_chosen_logps": Input("log π(chosen), summed over the tokens of the response, its terminator included"),
    "policy_rejected_logps": Input("the same of the rejected response"),
    "ref_chosen_logps": Input("the same of the chosen response under the frozen reference"),
    "ref_rejected_logps": Input("the same of the rejected response under the frozen reference"),
    "chosen_lengths": Input("number of tokens that policy_chosen_logps sums over, at least 1"),
    "rejected_lengths": Input("number of tokens that policy_rejected_logps sums over, at least 1"),
    "policy_chosen_public_logps": Input("log π of the first min(chosen_lengths, rejected_lengths) tokens of chosen"),
    "policy_rejected_public_logps": Input("the same of the rejected response"),
    "ref_chosen_public_logps": Input("the same of the chosen response under the frozen reference"),
    "ref_rejected_public_logps": Input("the same of the rejected response under the frozen reference"),
    "policy_chosen_collision_logps": Input("Σ_t log Σ_v π(v)², the log-chance that two samples agree, of chosen"),
    "policy_rejected_collision_logps": Input("the same of the rejected response"),
    "mean_chosen_length": Input("mean of chosen_lengths over the global batch", ""),
    "mean_log_ratio": Input("mean of log π/π_ref over chosen and rejected responses of the global batch", ""),
    "mean_margin": Input("mean over the global batch of log π/π_ref(chosen) - log π/π_ref(rejected)", ""),
    "running_log_ratio": Input("mean_log_ratio over the batches so far, this one included", ""),
    "running_margin": Input("mean_margin over the batches so far, this one included", ""),
}

# Single responses with a label.
UNPAIRED_INPUTS = {
    "policy_logps": Input("log π(response), summed over the tokens of the response, its terminator included"),
    "ref_logps": Input("the same under the frozen reference"),
    "labels": Input("True where the response is desirable", "B", "bool"),
    "kl": Input("mean over the global batch of log π/π_ref of another row's response after this row's prompt", ""),
    "mean_desirable_log_ratio": Input("mean of log π/π_ref over the desirable rows of the global batch", ""),
    "mean_undesirable_log_ratio": Input("the same over the undesirable rows", ""),
    "running_desirable_log_ratio": Input("mean_desirable_log_ratio over the batches so far, this one included", ""),
    "running_undesirable_log_ratio": Input("the same over the undesirable rows", ""),
}

# Responses that a reward model scores, in groups of K candidates to one prompt; a pair is K = 2.
OUTCOME_INPUTS = {
    "chosen_scores": Input("r(prompt, chosen)"),
    "rejected_scores": Input("r(prompt, rejected)"),
    "margins": Input("how much better chosen is, in units of the score"),
    "preferences": Input("probability that chosen is the better one"),
    "ties": Input("True where the two were judged equal", "B", "bool"),
    "scores": Input("r of each candidate", "B K"),
    "ranks": Input("0 the best candidate; equal ranks are not compared", "B K", "int32"),
    "candidates": Input("True on the candidates that exist", "B K", "bool"),
}

# Steps of solutions that a process reward model scores.
STEP_INPUTS = {
    "step_scores": Input("logit that the step is right", "B G S"),
    "step_labels": Input("1 where the step is right, 0 where it is wrong, or a probability", "B G S"),
}

# Tokens of responses that a policy drew. Log-probabilities are in nats, at the temperature of sampling.
POLICY_INPUTS = {
    "logps": Input("log π(token) of the policy that is trained; with `level` 'sequence' see `sequence_logps`", "B T"),
    "old_logps": Input("log π(token) before the first update on this batch", "B T"),
    "advantages": Input("A of the token", "B T"),
    "ref_logps": Input("log π_ref(token) under the frozen reference, where there is one", "B T"),
    "mask": Input("True on response tokens; elsewhere the loss's value is dropped", "B T", "bool"),
}

# Statistics of log π/π_ref
OF_LOG_RATIOS = {"kl", "mean_margin", "running_margin"} | {
    name for name in (*PAIR_INPUTS, *UNPAIRED_INPUTS) if name.endswith("log_ratio")
}


def input_names(loss: Callable) -> tuple[str, ...]:
    """The names of the loss's inputs, in order: all its parameters but the keyword-only."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return tuple(n for n, p in inspect.signature(loss).parameters.items() if p.kind in kinds)


def check_inputs(loss: Callable, known: Mapping[str, Any]) -> tuple[str, ...]:
    """The loss's input names, all of which are in `known`.

    Raises:
      Mistake: the loss names an input that is not known; the message lists those that are.
    """
    names = input_names(loss)
    for name in names:
        if name not in known:
            raise Mistake(
                f"{loss_name(loss)} has an unknown input {name!r}{nearest(name, list(known))}; known inputs are "
                f"{listed(list(known))}. A hyperparameter must be keyword-only: put it after * in the definition"
            )
    return names


def check_loss(loss: Callable, kind: Kind) -> None:
    """Calls the loss on abstract arrays of the kind's shapes, without device work.

    Raises:
      Mistake: an unknown input, an error of the loss's own, values that are not one float32 per element, or a mark
        `@whole_batch` where batches come in parts.
    """
    if needs_whole_batch(loss) and not kind.whole_batches:
        raise Mistake(
            f"{loss_name(loss)} is marked @whole_batch, and only losses of pairs get a batch in one piece; write it "
            "with statistics of the batch as inputs, or take the mark off"
        )
    running, momentum = any(n.startswith("running_") for n in input_names(loss)), keyword(loss, "momentum", None)
    if running and momentum is not None and not (isinstance(momentum, int | float) and 0 <= momentum < 1):
        raise Mistake(f"{loss_name(loss)}: momentum={brief(repr(momentum))} must be at least 0 and below 1, or None")
    values = {name: _abstract(*kind.inputs[name][1:]) for name in check_inputs(loss, kind.inputs)}
    shape = _abstract(kind.axes).shape
    try:
        jax.eval_shape(lambda values: checked(loss, values, shape), values)
    except Mistake:
        raise
    except Exception as error:  # a user's function raises what it likes
        first_line = (str(error).strip().splitlines() or ["no message"])[0]
        raise Mistake(
            f"{loss_name(loss)} fails for {_described(values)}: {type(error).__name__}: {first_line}"
        ) from error


def _abstract(axes: str, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    """An array with those axes."""
    return jax.ShapeDtypeStruct(tuple(SIZES[axis] for axis in axes.split()), dtype)


def checked(loss: Callable, values: Mapping[str, Any], shape: tuple[int, ...]) -> jax.Array:
    """The loss of those of `values` that it names, float32 of `shape`.

    Raises:
      Mistake: an input without a default is not among the values, or the loss returned anything else.
    """
    result = apply(loss, values)
    try:
        chex.assert_shape([result], shape)
        chex.assert_type([result], jnp.float32)
    except AssertionError:
        inputs = {name: values[name] for name in input_names(loss) if name in values}
        raise Mistake(
            f"{loss_name(loss)} returned {_described(result)} for {_described(inputs)}; it must return "
            f"{_described(jax.ShapeDtypeStruct(shape, jnp.float32))}, one value for each element"
        ) from None
    return result


def _described(tree: Any) -> str:
    """The dtypes and shapes of arrays, behind the names that a mapping gives them."""
    if isinstance(tree, Mapping):
        return ", ".join(f"{name} {_described(value)}" for name, value in tree.items()) or "no inputs"
    if not hasattr(tree, "dtype"):
        return f"a {type(tree).__name__}"
    return f"{tree.dtype}{list(tree.shape)}"


def needs_reference(loss: Callable) -> bool:
    """True if an input of the loss is made with the reference model."""
    return any(name.startswith("ref_") or name in OF_LOG_RATIOS for name in input_names(loss))


def apply(loss: Callable, values: Mapping[str, Any]) -> Any:
    """The loss, called by name with exactly those of `values` that it names.

    Raises:
      Mistake: an input without a default is not among the values.
    """
    signature = inspect.signature(loss).parameters
    missing = [n for n in input_names(loss) if n not in values and signature[n].default is inspect.Parameter.empty]
    if missing:
        raise Mistake(f"{loss_name(loss)} requires {listed(missing)}, but there is only {listed(list(values))}")
    return loss(**{name: values[name] for name in input_names(loss) if name in values})


def keyword(loss: Callable, name: str, default: Any) -> Any:
    """The value of a hyperparameter of the loss; of a sum, of the first term that has it; else `default`."""
    for term in (loss, *getattr(loss, "terms", ())):
        parameter = inspect.signature(term).parameters.get(name)
        if parameter is not None and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            return parameter.default
    return default


def momenta(loss: Callable) -> dict[str, float | None]:
    """The `running_` inputs of the loss, each with the `momentum` of the first term that names it.

    m < 1 is the moving average m · (so far) + (1 - m) · (this batch), from 0; None, or a loss without that
    hyperparameter, the mean over everything so far.
    """
    by_input: dict[str, float | None] = {}
    for term in getattr(loss, "terms", (loss,)):
        for name in input_names(term):
            if name.startswith("running_"):
                by_input.setdefault(name, keyword(term, "momentum", None))
    return by_input


def whole_batch(loss: Callable) -> Callable:
    """Marks a loss that compares rows with each other: the global batch must reach it in one piece, not in parts."""
    loss.whole_batch = True
    return loss


def needs_whole_batch(loss: Callable) -> bool:
    """True if the loss is marked by `@whole_batch`, its hyperparameters bound or not."""
    return getattr(_unbound(loss), "whole_batch", False)


def loss_name(loss: Callable) -> str:
    """The name of the loss in a message: that of its table, or module:function."""
    function = _unbound(loss)
    module, name = getattr(function, "__module__", None), getattr(function, "__name__", repr(function))
    return name if module is None or module.startswith("jaxalign.") else f"{module}:{name}"


def _unbound(loss: Callable) -> Callable:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss
