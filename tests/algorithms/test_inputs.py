"""Every input that a loss may name is one that its algorithm computes: nothing is documented and then missing."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.algorithms.pairwise import pairwise
from jaxalign.algorithms.policy_gradient import policy_gradient
from jaxalign.algorithms.ppo import ppo
from jaxalign.algorithms.process import process_reward
from jaxalign.algorithms.reward import reward
from jaxalign.algorithms.supervised import supervised
from jaxalign.algorithms.unpaired import unpaired
from jaxalign.config.on_policy import GRPOAlgorithm, PPOAlgorithm
from jaxalign.data.batches.groups import Responses, UnpairedBatches
from jaxalign.data.batches.plan import Mixture, Plan
from jaxalign.data.sets.preferences import mismatched
from jaxalign.losses import LANGUAGE, OUTCOME, PAIR, POLICY, STEPS, UNPAIRED
from jaxalign.models import heads
from tests.algorithms.shared import batch_of, make_responses


def of_all_inputs(kind, seen):
    """A loss that names every input of the kind, none of them optional, and notes their shapes."""

    def loss(**inputs):
        seen.update({name: value.shape for name, value in inputs.items()})
        shape = next(value.shape for value in inputs.values() if value.ndim == len(kind.axes.split()))
        return jnp.zeros(shape, jnp.float32)

    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in kind.inputs]
    loss.__signature__ = inspect.Signature(parameters)
    return loss


def compared(count):
    """Pairs with all columns that data may have."""
    pairs = make_responses(count, k=2, seed=4)
    columns = {
        "margin": np.ones(count, np.float32),
        "preference": np.ones(count, np.float32),
        "tie": np.zeros(count, bool),
    }
    return batch_of(Responses(pairs.examples, pairs.groups, columns))


def solved(count):
    one = make_responses(count, k=1)
    ends = np.zeros((count, 2), np.int32)
    return batch_of(
        Responses(one.examples, one.groups, {"step_ends": ends, "step_labels": np.ones((count, 2), np.float32)})
    )


def rated(count):
    data, plan = make_responses(count, k=1), Plan(count, 20)
    return UnpairedBatches(Mixture.of(data, [count], [None]), mismatched(data, seed=0), plan, steps=1)[0]


ALGORITHMS = {  # (kind, loss and graphdef -> algorithm, rollouts -> batch, what the params are)
    "sft": (LANGUAGE, lambda f, g: supervised(g, loss=f), lambda rollouts: rollouts.sequences, "policy"),
    "dpo": (PAIR, lambda f, g: pairwise(g, g, loss=f), lambda _: compared(4), "policy"),
    "kto": (UNPAIRED, lambda f, g: unpaired(g, g, loss=f), lambda _: rated(4), "policy"),
    "reward": (OUTCOME, lambda f, g: reward(g, loss=f), lambda _: compared(4), "scorer"),
    "process": (STEPS, lambda f, g: process_reward(g, loss=f), lambda _: solved(4), "scorer"),
    "grpo": (POLICY, lambda f, g: policy_gradient(GRPOAlgorithm(), g, g, loss=f), lambda rollouts: rollouts, "policy"),
    "ppo": (POLICY, lambda f, g: ppo(PPOAlgorithm(), g, g, g, loss=f), lambda rollouts: rollouts, "both"),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_gives_a_loss_every_input_that_its_table_documents(name, tiny, rolled_out):
    kind, make, to_batch, whose = ALGORITHMS[name]
    graphdef, policy, reference = tiny
    scorer = {"model": policy, "head": heads.init_head(jax.random.key(0), 1, 32)}
    critic = scorer | {"bias": jnp.zeros(1)}
    params = {"policy": policy, "scorer": scorer, "both": {"policy": policy, "critic": critic}}[whose]
    seen = {}
    algorithm = make(of_all_inputs(kind, seen), graphdef)

    def run(params, reference, batch):
        _, batch = algorithm.remember(algorithm.carry, algorithm.prepare(params, reference, batch))
        return algorithm.loss(params, algorithm.across(batch))

    jax.eval_shape(run, params, reference, jax.tree.map(jnp.asarray, to_batch(rolled_out)))
    assert seen.keys() == kind.inputs.keys()
    for input_name, shape in seen.items():
        assert len(shape) == len(kind.inputs[input_name].axes.split()), input_name
