"""`jaxalign sft`: a checkpoint and a dataset in, a better checkpoint out."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms.base import Algorithm
from jaxalign.algorithms.sft import check_loss, sft
from jaxalign.data import batches as batching
from jaxalign.data import supervised
from jaxalign.losses.language import LANGUAGE_LOSSES
from jaxalign.models import huggingface
from jaxalign.models.config import ModelConfig, train_flops_per_token
from jaxalign.models.decoder import init_params, make_decoder
from jaxalign.models.layout import Layout
from jaxalign.models.load import check_files, load_params
from jaxalign.models.lora import Lora, join
from jaxalign.runs import adapters, devices, finish, hosts, samples
from jaxalign.runs.config import SFTConfig, check, to_json
from jaxalign.runs.folder import open_run
from jaxalign.runs.vocabulary import Vocabulary, load_vocabulary
from jaxalign.select import select
from jaxalign.training import loop, metrics, optimizer, sharding
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.compiled import CompiledStep
from jaxalign.training.evaluate import make_evaluate
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a run is made of, once everything that can be wrong was found."""

    config: SFTConfig
    mesh: Mesh
    model: ModelConfig
    vocabulary: Vocabulary
    data: supervised.SupervisedData
    batches: batching.TrainBatches
    held_out: list[Any]
    loss: Callable
    lora: Lora | None

    @property
    def announced(self) -> int:
        """Shapes of batches that will occur."""
        return 1 if self.config.packing else len(batching.bucket_widths(self.config.max_length))


def run(config: SFTConfig) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    check(config)
    devices.start(distributed=config.distributed)
    devices.start_log()
    open_ = lambda write: open_run(config, command="sft", resume=config.resume, write=write)  # noqa: E731
    held = hosts.first_decides(lambda: open_(False))
    parts = _gather(config, starts=not held)
    steps = parts.batches.steps
    hosts.agree(settings=json.dumps(to_json(config)), data=parts.data.train.examples.fingerprint(), steps=steps)
    if hosts.first_decides(lambda: open_(True) and finish.is_finished(config.output, steps)):
        log.info("this run is complete: %s", Path(config.output) / "final")
        return 0
    state, stopped_by = _train(parts)
    if stopped_by is not None:
        log.warning("stopped by signal %d after step %d; the same command continues", stopped_by, int(state.step))
        return 128 + stopped_by
    if jax.process_index() == 0:
        log.info("the model is in %s", Path(config.output) / "final")
    return 0


def _gather(config: SFTConfig, *, starts: bool) -> _Parts:
    """Everything on the host, so that mistakes are told before device work, and before the run folder is made."""
    loss = select(config.loss, LANGUAGE_LOSSES)
    check_loss(loss, config.loss)
    devices.check_attention(config.attention, config.max_length)
    mesh = sharding.make_mesh(**dataclasses.asdict(config.mesh))
    sharding.check_batch_size(config.batch_size, config.microbatches, mesh)
    model = huggingface.read_config(config.model)
    if model.learned_positions and config.max_length > model.learned_positions:
        raise ValueError(
            f"--max-length {config.max_length}: {config.model} has {model.learned_positions} learned positions, and no "
            "more can be used"
        )
    if config.max_length > model.max_length:
        log.warning("--max-length %d is more than the %d the model was made for", config.max_length, model.max_length)
    lora = adapters.lora_of(config.lora, model)
    vocabulary = load_vocabulary(config, model)
    if starts and not huggingface.is_random(config.model):
        check_files(config.model, model)
    options = _data_options(config, vocabulary.terminators)
    data = supervised.load(config.data, vocabulary.tokenizer, options, eval_spec=config.eval_data)
    batches, held_out = _batches(config, data)
    _rate(config, batches.steps)
    if config.checkpoint.keep_best and not held_out:
        raise ValueError(f"--checkpoint.keep-best {config.checkpoint.keep_best} needs held-out data; give --eval-data")
    return _Parts(config, mesh, model, vocabulary, data, batches, held_out, loss, lora)


def _data_options(config: SFTConfig, terminators: tuple[int, ...]) -> supervised.Options:
    return supervised.Options(
        max_length=config.max_length,
        terminators=terminators,
        turns=config.turns,
        long_text=config.long_text,
        max_dropped=config.max_dropped,
        eval_share=config.eval_share,
        seed=config.seed,
    )


def _batches(config: SFTConfig, data: supervised.SupervisedData) -> tuple[batching.TrainBatches, list[Any]]:
    plan = batching.Plan(config.batch_size, config.max_length, config.packing, config.shuffle, config.seed)
    host = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    batches = batching.TrainBatches(data.train, plan, steps=1, **host)
    per_epoch = batches.rows_per_epoch() / config.batch_size
    batches.steps = config.steps if config.steps is not None else max(1, math.ceil(config.epochs * per_epoch))
    log.info("%d steps, %.1f of them an epoch", batches.steps, per_epoch)
    return batches, batching.eval_batches(data.held_out, plan, **host)


class Program(NamedTuple):
    """What is compiled, and the shapes and places of what it is compiled for."""

    graphdef: Any
    algorithm: Algorithm
    adamw: Any
    rate: Callable
    like: TrainState  # ShapeDtypeStructs with shardings
    frozen: Any  # the same of what is never trained; None when everything is
    step: Any  # the jitted train step


def make_program(config: SFTConfig, model: ModelConfig, mesh: Mesh, *, loss: Callable, steps: int) -> Program:
    """The train step of a config on a mesh; the mesh may be of devices that are not there."""
    lora = adapters.lora_of(config.lora, model)
    graphdef, abstract = make_decoder(
        model,
        compute_dtype=devices.compute_dtype(config.precision),
        param_dtype=config.param_dtype,
        remat=config.remat,
        attention=None if config.attention == "auto" else config.attention,
        layout=Layout(mesh) if mesh.size > 1 else None,
        lora=lora,
        quantise=config.lora.quantise,
    )
    trained, frozen = adapters.divide(abstract, lora)
    rate = _rate(config, steps)
    adamw = _optimizer(config, rate)
    algorithm = sft(graphdef, loss=loss)
    if lora is not None:
        algorithm = algorithm._replace(assemble=join)
    key = jax.eval_shape(lambda: jax.random.key(0))
    like = jax.eval_shape(lambda p, k: TrainState.create(p, adamw, k), trained, key)
    like, frozen = sharding.placed(like, mesh), sharding.placed(frozen, mesh)
    train_step = make_train_step(algorithm, adamw, microbatches=config.microbatches)
    return Program(graphdef, algorithm, adamw, rate, like, frozen, sharding.jit_step(train_step, like, frozen, mesh))


def _train(parts: _Parts) -> tuple[TrainState, int | None]:
    config, steps = parts.config, parts.batches.steps
    program = make_program(config, parts.model, parts.mesh, loss=parts.loss, steps=steps)
    checkpoints = Checkpoints(
        Path(config.output) / "checkpoints", keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best
    )
    frozen = adapters.load_base(config, parts.model, program.frozen) if parts.lora else None
    state, progress, iterator = _start_or_resume(parts, checkpoints, program, frozen)
    recorder = _recorder(parts, progress.step)
    rates = np.asarray(jax.vmap(program.rate)(jnp.arange(steps)), np.float64)
    fingerprint = parts.data.train.examples.fingerprint()

    def save(state: TrainState, progress: loop.Progress, row: loop.Row) -> None:
        extras = {"progress": dataclasses.asdict(progress), "data": fingerprint}
        checkpoints.save(progress.step, state, extras, metric=row.get("eval_loss"))

    try:
        state, stopped_by = loop.fit(
            CompiledStep(program.step, announced=parts.announced),
            state,
            frozen,
            iterator,
            loop.Hooks(
                recorder, save, _evaluation(parts, program, progress.step, frozen), lambda update: rates[update]
            ),
            mesh=parts.mesh,
            steps=steps,
            progress=progress,
            eval_every=config.eval_every,
            save_every=config.checkpoint.every,
            profile=Path(config.output) / "profile" if config.profile else None,
        )
    finally:
        recorder.close()
        checkpoints.close()
    if stopped_by is None:
        adapters.export_final(config, parts.model, parts.vocabulary, parts.lora, state, frozen)
    return state, stopped_by


def _rate(config: SFTConfig, steps: int) -> Callable:
    return optimizer.learning_rate_schedule(
        config.optimizer.learning_rate,
        schedule=config.optimizer.schedule,
        steps=steps,
        warmup_steps=config.optimizer.warmup_steps,
    )


def _optimizer(config: SFTConfig, rate: Any) -> Any:
    return optimizer.adamw(
        rate,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        b1=config.optimizer.b1,
        b2=config.optimizer.b2,
        accumulator_dtype=config.optimizer.accumulator_dtype,
    )


def _start_or_resume(
    parts: _Parts, checkpoints: Checkpoints, program: Program, frozen: Any
) -> tuple[TrainState, loop.Progress, Any]:
    iterator = batching.iterate(parts.batches)
    done = max(checkpoints.steps(), default=0)
    if done > parts.batches.steps:
        raise ValueError(
            f"{parts.config.output} has trained {done} steps already, more than the {parts.batches.steps} asked for; "
            "raise --steps, or export an earlier checkpoint with `jaxalign export --step`"
        )
    restored = checkpoints.restore(program.like)
    if restored is None:
        return _new_state(parts, program, frozen), loop.Progress(), iterator
    state, extras = restored
    if extras["data"] != parts.data.train.examples.fingerprint():
        raise ValueError(
            f"the data of --data {parts.config.data} have changed since {parts.config.output} was started, so the run "
            "cannot continue bit for bit; restore them, or name a new --output"
        )
    progress = loop.Progress(**extras["progress"])
    iterator.set_state({"next_index": progress.step})
    log.info("continuing after step %d of %d", progress.step, parts.batches.steps)
    return state, progress, iterator


def _new_state(parts: _Parts, program: Program, frozen: Any) -> TrainState:
    config, dtype = parts.config, parts.config.param_dtype
    placed = jax.tree.map(lambda x: x.sharding, program.like)
    params_key, state_key = jax.random.split(jax.random.key(config.seed))
    if parts.lora is not None:
        params = adapters.new_adapter(program.like.params, jax.random.fold_in(params_key, 1), frozen)
    elif huggingface.is_random(config.model):
        params = init_params(parts.model, params_key, param_dtype=dtype, shardings=placed.params)
    else:
        params = load_params(config.model, parts.model, param_dtype=dtype, shardings=placed.params)
    create = jax.jit(lambda p, k: TrainState.create(p, program.adamw, k), out_shardings=placed, donate_argnums=0)
    return create(params, state_key)


def _recorder(parts: _Parts, resumed_at: int) -> Callable:
    if jax.process_index() != 0:
        return metrics.Silent()
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    return metrics.Recorder(
        Path(parts.config.output),
        total_steps=parts.batches.steps,
        resumed_at=resumed_at if resumed_at else -1,
        flops_per_token=train_flops_per_token(parts.model, parts.config.max_length)
        * adapters.gradient_share(parts.lora),
        peak_flops=None if peak is None else peak * parts.mesh.size,
        tensorboard=parts.config.log.tensorboard,
        wandb=parts.config.log.wandb,
        stream=sys.stderr,
    )


def _evaluation(parts: _Parts, program: Program, resumed_at: int, frozen: Any) -> Callable | None:
    """Held-out loss and, beside it, a few answers; None without held-out data."""
    if not parts.held_out:
        return None
    sampler = samples.Sampler(parts.config, program.graphdef, parts.model, parts.vocabulary, resumed_at)
    held_out_metrics = make_evaluate(program.algorithm, parts.held_out, parts.mesh, frozen)

    def evaluate(params: Any, step: int) -> dict[str, float]:
        sampler.write(program.algorithm.assemble(params, frozen), step, parts.data.prompts)
        return held_out_metrics(params)

    return evaluate
