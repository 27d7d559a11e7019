"""`jaxalign sft`: a checkpoint and a dataset in, a better checkpoint out."""

from __future__ import annotations

from collections.abc import Callable

from jax.sharding import Mesh

from jaxalign.algorithms.supervised import check_loss, sft
from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import TrainConfig
from jaxalign.data.batches import rows as batching
from jaxalign.data.sets import supervised
from jaxalign.losses.language import LANGUAGE_LOSSES
from jaxalign.models.decoder.config import ModelConfig
from jaxalign.runs import program, train
from jaxalign.select import select
from jaxalign.training.sharding import check_batch_size


def run(config: SFTConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    return train.run(config, "sft", _gather)


def _gather(config: SFTConfig, starts: bool) -> train.Task:
    loss = select(config.algorithm.loss, LANGUAGE_LOSSES)
    check_loss(loss, config.algorithm.loss)
    base = train.load_base(config, starts=starts)
    check_batch_size(config.batch_size, config.microbatches, base.mesh)
    options = data_options(config, base.vocabulary.terminators, turns=config.turns, long_text=config.long_text)
    data = supervised.load(config.data, base.vocabulary.tokenizer, options, eval_spec=config.eval_data)
    plan = batching.Plan(config.batch_size, config.max_length, config.packing, config.shuffle, config.seed)
    batches = batching.TrainBatches(data.train, plan, steps=1, **train.host())
    batches.steps = train.count_steps(config, batches.rows_per_epoch() / config.batch_size)
    held_out = batching.eval_batches(data.held_out, plan, **train.host())
    train.check_held_out(config, held_out)
    return train.Task(
        config,
        base,
        _method(config, loss),
        batches,
        held_out,
        shapes=1 if config.packing else len(batching.bucket_widths(config.max_length)),
        fingerprint=data.train.examples.fingerprint(),
        held_out_fingerprint=data.held_out.fingerprint(),
        prompts=data.prompts,
        export=train.export_language_model,
    )


def data_options(config: TrainConfig, terminators: tuple[int, ...], **more: str) -> supervised.Options:
    """How rows become examples, by the settings that all commands have."""
    return supervised.Options(
        max_length=config.max_length,
        terminators=terminators,
        max_dropped=config.max_dropped,
        eval_share=config.eval_share,
        seed=config.seed,
        **more,
    )


def _method(config: SFTConfig, loss: Callable) -> program.Method:
    implementation = program.implementation(config)
    return program.Method(lambda graphdef, _: sft(graphdef, loss=loss, implementation=implementation))


def make_program(config: SFTConfig, model: ModelConfig, mesh: Mesh, *, loss: Callable, steps: int) -> program.Program:
    """The train step of a config on a mesh; the mesh may be of devices that are not there."""
    return program.make_program(config, model, mesh, _method(config, loss), steps=steps)
