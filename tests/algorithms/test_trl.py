"""Five optimizer steps of DPO's losses, KTO and reward models agree with TRL's trainers, on the same ids.

TRL pads, each response in a row of its own; here several stand in a row. What is known to differ: TRL divides by the
norm + 1e-6 when it clips, a relative 1e-6 that Adam undoes; adds 1 to `apo_zero`; and logs KTO's `kl` clamped at 0.
"""

import functools
import json
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.algorithms.pairwise import pairwise
from jaxalign.algorithms.reward import reward
from jaxalign.algorithms.unpaired import unpaired
from jaxalign.config.shared import OptimizerConfig
from jaxalign.data.batches.groups import BatchShapes, Responses
from jaxalign.data.batches.plan import Plan
from jaxalign.data.read.tokens import Examples
from jaxalign.losses import OUTCOME, PAIR, UNPAIRED, select_loss
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.models.files.load import load_params
from jaxalign.models.files.save import save_pretrained
from jaxalign.models.heads import trunk_config
from jaxalign.training.optimizer import adamw, learning_rate_schedule
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from jaxalign.types import UnpairedBatch
from tests.algorithms import make_trl_golden
from tests.algorithms.make_trl_golden import FILE, PAIRS, ROWS, SHARED, STEPS, some

LOSSES = {
    "dpo": "dpo",
    "ipo": "ipo",
    "robust": "robust(label_smoothing=0.2)",
    "apo_zero": "apo_zero",
    "kto": "kto(lambda_d=0.75, lambda_u=1.5)",
    "reward": "bradley_terry",
    "reward_graded": "graded_bradley_terry(centering_coef=0.01)",
}
ADDED_BY_TRL = {"apo_zero": 1.0}
WIDTH = 32  # of a row: two to three responses


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """Numbers of the TRL that is installed."""
    if find_spec("trl") is None:
        pytest.skip("trl is not installed; the golden file stands for it")
    file = tmp_path_factory.mktemp("trl") / "live.npz"
    subprocess.run([sys.executable, make_trl_golden.__file__, file], check=True)
    return dict(np.load(file))


@pytest.fixture(scope="module", params=["golden", "live"])
def theirs(request):
    return dict(np.load(FILE)) if request.param == "golden" else request.getfixturevalue("live")


@pytest.fixture(scope="module")
def start(theirs, tmp_path_factory):
    """Parameters that training starts from, of policy, reference and reward model, by way of files as a user's."""
    folder, models = tmp_path_factory.mktemp("start"), []
    for kind in ("policy", "reference"):
        path = folder / kind
        path.mkdir()
        tensors = {n.removeprefix(f"{kind}:"): v.astype(np.float32) for n, v in theirs.items() if n.startswith(kind)}
        save_file(tensors, path / "model.safetensors")
        models.append(load_params(str(path), model_config(json.loads(str(theirs["config"])))))
    policy, reference = models
    trunk = {name: leaf for name, leaf in policy.items() if name != "unembedding"}
    return policy, reference, {"model": trunk, "head": jnp.asarray(theirs["head"], jnp.float32)}


def responses(theirs, part, step, *, columns=None):
    """Row i of K·N is response i // N of group i % N: TRL puts the chosen of all pairs before the rejected."""
    ids, there = (theirs[f"{part}:{name}"][step] for name in ("input_ids", "attention_mask"))
    learned = theirs.get(f"{part}:completion_mask", theirs[f"{part}:attention_mask"])[step]
    lengths = there.sum(1)
    examples = Examples.of([(i[:n], m[:n] > 0) for i, m, n in zip(ids, learned, lengths, strict=True)])
    k = 2 if part in ("pairs", "scored") else 1
    return Responses(examples, np.arange(len(ids)).reshape(k, -1).T, columns or {})


def batches(theirs, name):
    """The five batches, packed, in rows of one shape."""
    paired = name != "kto"

    def packed(part, columns=lambda step: {}):
        sets = [responses(theirs, part, step, columns=columns(step)) for step in range(STEPS)]
        layout = BatchShapes.of(sets[0], Plan(PAIRS if paired else ROWS, WIDTH, shuffle=False))
        rows = max(len(layout.rows(each)) for each in sets)
        return [jax.tree.map(jnp.asarray, layout.batch(each, min_rows=rows)) for each in sets]

    if name == "reward_graded":
        return packed("scored", lambda step: {"margin": theirs["margins"][step].astype(np.float32)})
    if paired:
        return packed("scored" if name == "reward" else "pairs")
    rated = packed("rated", lambda step: {"label": theirs["labels"][step].astype(bool)})
    return [UnpairedBatch(*parts) for parts in zip(rated, packed("mismatched"), strict=True)]


def algorithm(name, model):
    if name.startswith("reward"):
        return reward(make_decoder(trunk_config(model))[0], loss=select_loss(LOSSES[name], OUTCOME))
    method, kind = (unpaired, UNPAIRED) if name == "kto" else (pairwise, PAIR)
    graphdef = make_decoder(model)[0]
    return method(graphdef, graphdef, loss=select_loss(LOSSES[name], kind))


@functools.cache
def stepper(name, config):
    """The optimizer and the compiled step, one for both sources of TRL's numbers."""
    model = model_config(json.loads(config))
    names = "learning_rate", "weight_decay", "max_grad_norm"
    config = OptimizerConfig(schedule="linear", **{name: SHARED[name] for name in names})
    optimizer = adamw(config, learning_rate_schedule(config, steps=STEPS))
    step = make_train_step(algorithm(name, model), optimizer)
    # the same arithmetic, in less than half the time to compile
    return optimizer, jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})


def five_steps(name, theirs, start, folder):
    """(metrics by name [STEPS], final tensors by their Hugging Face names)"""
    policy, reference, scored = start
    scores = name.startswith("reward")
    optimizer, step = stepper(name, str(theirs["config"]))
    # on a device from the start, as all later states are: one compilation
    state = jax.device_put(
        TrainState.create(scored if scores else policy, optimizer, jax.random.key(0)), jax.devices()[0]
    )
    logs = []
    for batch in batches(theirs, name):
        state, metrics = step(state, None if scores else reference, batch)
        logs.append(jax.device_get(metrics))
    assert step._cache_size() == 1
    hf, params = json.loads(str(theirs["config"])), state.params
    if scores:
        save_pretrained(folder, params["model"], trunk_config(model_config(hf)), hf, head=params["head"])
    else:
        save_pretrained(folder, params, model_config(hf), hf)
    return {key: np.array([log[key] for log in logs]) for key in logs[0]}, load_file(folder / "model.safetensors")


def of_run(name, theirs):
    """TRL's logs [STEPS] each, and entries of its final tensors."""
    mine = {key.removeprefix(f"{name}:"): value for key, value in theirs.items() if key.startswith(f"{name}:")}
    final = {key.removeprefix("final:"): value for key, value in mine.items() if key.startswith("final:")}
    return {key: value for key, value in mine.items() if not key.startswith("final:")}, final


@pytest.mark.parametrize("name", LOSSES)
def test_losses_gradients_metrics_and_weights_of_five_steps_are_those_of_trl(name, theirs, start, tmp_path):
    ours, final = five_steps(name, theirs, start, tmp_path)
    logs, weights = of_run(name, theirs)
    ours["loss"] = ours["loss"] + ADDED_BY_TRL.get(name, 0.0)
    np.testing.assert_allclose(ours["grad_norm"], logs.pop("grad_norm"), rtol=1e-4)
    if name == "kto":
        assert 0 < np.sum(logs["kl"] > 0) < STEPS  # the clamp has something to do, but not always
        ours["kl"] = np.maximum(ours["kl"], 0)
        ours["rewards/margins"] = ours["rewards/chosen"] - ours["rewards/rejected"]
    for key, value in logs.items():
        rtol = 0 if key == "loss" else 1e-6  # sums of log-probabilities are tens of nats
        np.testing.assert_allclose(ours[key], value, rtol=rtol, atol=2e-5, err_msg=key)
    assert weights.keys() == final.keys()
    for key, value in weights.items():
        np.testing.assert_allclose(some(final[key]), value, rtol=0, atol=2e-5, err_msg=key)


def test_the_golden_file_is_what_trl_does(live):
    golden = dict(np.load(FILE))
    assert golden.keys() == live.keys()
    for key, value in golden.items():
        if key == "config":
            continue
        np.testing.assert_allclose(live[key], value, rtol=1e-5, atol=2e-5, err_msg=key)
