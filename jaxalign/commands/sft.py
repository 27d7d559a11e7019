"""`jaxalign sft`: a checkpoint and a dataset in, a better checkpoint out."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.algorithms.supervised import supervised
from jaxalign.config import limits
from jaxalign.config.offline import SFTConfig
from jaxalign.data.batches.plan import Plan
from jaxalign.data.batches.rows import TrainBatches, eval_batches
from jaxalign.data.sets.supervised import Options, load
from jaxalign.losses import LANGUAGE, select_loss
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.run import final
from jaxalign.run.run import Data, Run
from jaxalign.training import part
from jaxalign.training.program import Recipe, implementation
from jaxalign.training.sharding import check_batch_size


@hosts.failing_together()
def main(config: SFTConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    limits.check(config)
    _loss(config)
    run = Run.open(config, "sft")
    check_batch_size(config.batch_size, config.microbatches, run.mesh)
    data = load_data(config, run)
    if not run.claim(data):
        return 0
    return final.language_model(run, run.fit(recipe(config, run.model, run.mesh), data))


def recipe(config: SFTConfig, model: ModelConfig, mesh: Mesh) -> Recipe:
    """All parameters or adapters, and the mean loss over tokens."""
    policy = part.language_model(config, model, mesh)
    algorithm = supervised(policy.graphdef, loss=_loss(config), implementation=implementation(config))
    return Recipe(policy, algorithm)


def _loss(config: SFTConfig) -> Callable:
    return select_loss(config.algorithm.loss, LANGUAGE)


def load_data(config: SFTConfig, run: Run) -> Data:
    """Rows of tokens for training, and those held out."""
    options = Options.of(config, run.vocabulary.terminators, turns=config.turns, long_text=config.long_text)
    sets = load(config.data, run.vocabulary.tokenizer, options, eval_spec=config.eval_data, as_chat=config.as_chat)
    plan = Plan.of(config)
    batches = run.counted(TrainBatches(sets.train, plan))
    return Data.of(sets, batches, eval_batches(sets.held_out, plan))
