"""What all training commands share: from checked settings to a trained, exported model, through any interruption."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.config.limits import check, to_json
from jaxalign.config.shared import TrainConfig
from jaxalign.data.batches import rows as batching
from jaxalign.mistake import Mistake
from jaxalign.models import places
from jaxalign.models.adapters.lora import Lora
from jaxalign.models.decoder.config import ModelConfig, train_flops_per_token
from jaxalign.models.decoder.decoder import init_params
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import check_files, load_params
from jaxalign.models.places import offloaded
from jaxalign.runs import adapters, devices, finish, members, samples
from jaxalign.runs.check import check_kernels
from jaxalign.runs.folder import open_run
from jaxalign.runs.program import Method, Program, learning_rate, make_program
from jaxalign.runs.vocabulary import Vocabulary, load_vocabulary
from jaxalign.training import loop, metrics
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.compiled import CompiledStep
from jaxalign.training.evaluate import make_evaluate
from jaxalign.training.state import TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Base:
    """What every run starts from."""

    mesh: Mesh
    model: ModelConfig
    vocabulary: Vocabulary
    lora: Lora | None


@dataclasses.dataclass(frozen=True)
class Task:
    """A command's run, once everything that can be wrong was found."""

    config: TrainConfig
    base: Base
    method: Method
    batches: Any  # step -> this host's batch; `steps` of them
    held_out: list[Any]
    shapes: int  # of batches that will occur
    fingerprint: int  # of the data
    prompts: list[list[int]]  # answered at every evaluation
    export: Callable[[Task, TrainState, Any], None]  # (task, state, frozen)
    held_out_fingerprint: int | None = None
    # of on-policy data: (task, program, frozen, iterator of batches, step resumed at) -> what makes them of the state
    source: Callable[..., loop.SourceFn] | None = None
    complete: Callable[[Task], Task] = lambda task: task  # device work before training, once the folder is this run's
    enough: Callable[[loop.Row], str | None] | None = None  # why a step was the last, if it was


# (config, whether the run is new) -> its task; raises on whatever is wrong, before device work
GatherFn = Callable[[Any, bool], Task]


def run(config: TrainConfig, command: str, gather: GatherFn) -> int:
    """Trains and exports; the exit status is 0, or 128 + the number of the signal that stopped the run."""
    check(config)
    devices.start(distributed=config.distributed)
    devices.start_log()
    open_ = lambda write: open_run(config, command=command, resume=config.resume, write=write)  # noqa: E731
    held = hosts.first_decides(lambda: open_(False))
    task = gather(config, not held)
    steps = task.batches.steps
    seen = {"data": task.fingerprint, "held-out data": str(task.held_out_fingerprint)}
    hosts.agree(settings=json.dumps(to_json(config)), **seen, steps=steps)
    if hosts.first_decides(lambda: open_(True) and finish.is_finished(config.output, steps)):
        log.info("this run is complete: %s", Path(config.output) / "final")
        return 0
    state, stopped_by = _train(task.complete(task))
    if stopped_by is not None:
        log.warning("stopped by signal %d after step %d; the same command continues", stopped_by, int(state.step))
        return 128 + stopped_by
    if jax.process_index() == 0:
        log.info("the model is in %s", Path(config.output) / "final")
    return 0


def load_base(config: TrainConfig, *, starts: bool) -> Base:
    """The mesh, the model's config and the vocabulary; weights are looked at, not yet read, when a run `starts`."""
    devices.check_attention(config.attention, config.max_length)
    mesh = places.make_mesh(**dataclasses.asdict(config.mesh))
    model = huggingface.read_config(config.model)
    if model.learned_positions and config.max_length > model.learned_positions:
        raise Mistake(
            f"`max_length` {config.max_length}: {config.model} has {model.learned_positions} learned positions, and no "
            "more can be used"
        )
    if config.max_length > model.max_length:
        log.warning("`max_length` %d is more than the %d the model was made for", config.max_length, model.max_length)
    lora = adapters.lora_of(config.lora, model)
    vocabulary = load_vocabulary(config, model)
    if starts and not huggingface.is_random(config.model):
        check_files(config.model, model)
    return Base(mesh, model, vocabulary, lora)


def count_steps(config: TrainConfig, per_epoch: float) -> int:
    """Of --steps, else of --epochs. Says so, and checks what depends on it."""
    steps = config.steps if config.steps is not None else max(1, int(np.ceil(config.epochs * per_epoch)))
    log.info("%d steps, %.1f of them an epoch", steps, per_epoch)
    learning_rate(config, steps)
    return steps


def host() -> dict[str, int]:
    """Which of the hosts this is, as batches want to know."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def check_held_out(config: TrainConfig, held_out: list[Any]) -> None:
    """Raises Mistake when the best checkpoint is to be kept and nothing says which that is."""
    if config.checkpoint.keep_best and not held_out:
        raise Mistake(f"`checkpoint.keep_best` {config.checkpoint.keep_best} needs held-out data; give `eval_data`")


def export_language_model(task: Task, state: TrainState, frozen: Any) -> None:
    """`final/`, and the adapter of a LoRA run beside it."""
    adapters.export_final(task.config, task.base.model, task.base.vocabulary, task.base.lora, state, frozen)


def _train(task: Task) -> tuple[TrainState, int | None]:
    config, steps = task.config, task.batches.steps
    program = make_program(config, task.base.model, task.base.mesh, task.method, steps=steps)
    checkpoints = Checkpoints(
        Path(config.output) / "checkpoints", keep=config.checkpoint.keep, keep_best=config.checkpoint.keep_best
    )
    _check_not_beyond(task, checkpoints)
    frozen = load_frozen(task, program)
    state, progress, iterator = _start_or_resume(task, checkpoints, program, frozen)
    if config.check_kernels:
        params = program.algorithm.assemble(state.params, frozen)
        check_kernels(program.graphdef, params, task.batches[0], task.base.mesh, microbatches=config.microbatches)
    recorder = _recorder(task, progress.step)
    updates = task.method.updates
    rates = np.asarray(jax.vmap(program.rate)(jnp.arange(steps * updates)), np.float64)
    source = (
        loop.offline(iterator) if task.source is None else task.source(task, program, frozen, iterator, progress.step)
    )

    def save(state: TrainState, progress: loop.Progress, row: loop.Row) -> None:
        seen = {"data": task.fingerprint, "held_out": task.held_out_fingerprint}
        extras = {"progress": dataclasses.asdict(progress), **seen}
        checkpoints.save(progress.step, state, extras, metric=row.get("eval_loss"))

    evaluate = _evaluation(task, program, progress.step, frozen)
    last = progress.step if progress.ended else steps
    try:
        state, stopped_by = loop.fit(
            CompiledStep(program.step, announced=task.shapes),
            state,
            frozen,
            source,
            loop.Hooks(recorder, save, evaluate, lambda step: rates[step * updates], task.enough),
            mesh=task.base.mesh,
            steps=last,
            progress=progress,
            eval_every=config.eval_every,
            save_every=config.checkpoint.every,
            profile=Path(config.output) / "profile" if config.profile else None,
        )
    finally:
        recorder.close()
        checkpoints.close()
    if stopped_by is None and not finish.is_finished(config.output, progress.step):
        task.export(task, state, frozen)
    return state, stopped_by


def _check_not_beyond(task: Task, checkpoints: Checkpoints) -> None:
    done = max(checkpoints.steps(), default=0)
    if done > task.batches.steps:
        raise Mistake(
            f"{task.config.output} has trained {done} steps already, more than the {task.batches.steps} asked for; "
            "raise `steps`, or export an earlier checkpoint with `jaxalign export `step``"
        )


def load_frozen(task: Task, program: Program) -> Any:
    """The base of adapters, or a reference of its own: in no checkpoint of the run, so read at every start."""
    config, model = task.config, task.base.model
    if program.frozen is None:
        return None
    if task.method.heads:
        return {"model": adapters.load_base(config, model, program.frozen["model"])}
    if task.base.lora is not None:
        return adapters.load_base(config, model, program.frozen)
    return _load_reference(task, program.frozen)


def _load_reference(task: Task, like: Any) -> Any:
    """Loaded on the devices, wherever it then lies: nothing else is there yet."""
    config, placed = task.config, jax.tree.map(lambda x: x.sharding.with_memory_kind("device"), like)
    source = getattr(config, "ref_model", None) or config.model
    params = load_params(source, task.base.model, param_dtype=config.param_dtype, shardings=placed)
    return offloaded(params) if task.method.offload else params


def _start_or_resume(
    task: Task, checkpoints: Checkpoints, program: Program, frozen: Any
) -> tuple[TrainState, loop.Progress, Any]:
    iterator = batching.iterate(task.batches)
    restored = checkpoints.restore(program.like)
    if restored is None:
        return _new_state(task, program, frozen), loop.Progress(), iterator
    state, extras = restored
    if extras["data"] != task.fingerprint:
        raise Mistake(
            f"the data of `data` {task.config.data} have changed since {task.config.output} was started, so the run "
            "cannot continue bit for bit; restore them, or name a new `output`"
        )
    if extras.get("held_out") not in (None, task.held_out_fingerprint):  # checkpoints of older versions have none
        raise Mistake(
            f"the held-out data of {task.config.eval_data or task.config.data} have changed since {task.config.output} "
            "was started, so its evaluations would not compare; restore them, or name a new `output`"
        )
    progress = loop.Progress(**extras["progress"])
    iterator.set_state({"next_index": progress.step})
    log.info("continuing after step %d of %d", progress.step, task.batches.steps)
    return state, progress, iterator


def _new_state(task: Task, program: Program, frozen: Any) -> TrainState:
    placed = jax.tree.map(lambda x: x.sharding, program.like)
    params_key, state_key = jax.random.split(jax.random.key(task.config.seed))
    params = _new_params(task, program.like.params, params_key, frozen)
    reference = () if task.method.follow is None else _load_reference(task, program.like.reference)
    adamw, carry = program.adamw, program.algorithm.carry
    start = lambda p, k, r: TrainState.create(p, adamw, k, carry=carry, reference=r)  # noqa: E731
    return jax.jit(start, out_shardings=placed, donate_argnums=(0, 2))(params, state_key, reference)


def _new_params(task: Task, like: Any, key: jax.Array, frozen: Any) -> Any:
    if (critic := task.method.critic) is not None:
        beside = critic.new(like["critic"], jax.random.fold_in(key, 3), frozen)
        return {"policy": _new_model(task, like["policy"], key, frozen), "critic": beside}
    if not task.method.heads:
        return _new_model(task, like, key, frozen)
    made = {"head": members.new_heads(like["head"], jax.random.fold_in(key, 2))}
    if "members" in like:
        made["members"] = members.new_adapters(like["members"], jax.random.fold_in(key, 1), frozen["model"])
    if "model" in like:
        made["model"] = _new_model(task, like["model"], key, frozen)
    return made


def _new_model(task: Task, like: Any, key: jax.Array, frozen: Any) -> Any:
    config, placed = task.config, jax.tree.map(lambda x: x.sharding, like)
    if task.base.lora is not None:
        return adapters.new_adapter(like, jax.random.fold_in(key, 1), frozen)
    if huggingface.is_random(config.model):
        return init_params(task.base.model, key, param_dtype=config.param_dtype, shardings=placed)
    return load_params(config.model, task.base.model, param_dtype=config.param_dtype, shardings=placed)


def _recorder(task: Task, resumed_at: int) -> Callable:
    if jax.process_index() != 0:
        return metrics.Silent()
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    share = _share_of_flops(task)
    return metrics.Recorder(
        Path(task.config.output),
        total_steps=task.batches.steps,
        resumed_at=resumed_at if resumed_at else -1,
        flops_per_token=share * train_flops_per_token(task.base.model, task.config.max_length),
        peak_flops=None if peak is None else peak * task.base.mesh.size,
        tensorboard=task.config.log.tensorboard,
        wandb=task.config.log.wandb,
        stream=sys.stderr,
    )


def _share_of_flops(task: Task) -> float:
    """Operations of a step, in forward and backward passes over its tokens; a forward alone is a third of one."""
    method = task.method
    if method.freeze_trunk:
        return 1 / 3
    critic = method.critic is not None and method.critic.own_trunk
    trained = adapters.gradient_share(task.base.lora) * method.epochs
    return trained * (1 + critic) + (method.reference + critic) / 3


def _evaluation(task: Task, program: Program, resumed_at: int, frozen: Any) -> Callable | None:
    """Held-out metrics and, beside them, a few answers; None without held-out data."""
    if not task.held_out:
        return None
    held_out_metrics = make_evaluate(program.algorithm, task.held_out, task.base.mesh, frozen)
    if task.method.heads:  # a model that scores has no answers
        return lambda state, step: held_out_metrics(state)
    sampler = samples.Sampler(task.config, program.graphdef, task.base.model, task.base.vocabulary, resumed_at)

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        sampler.write(program.algorithm.assemble(state.params, frozen), step, task.prompts)
        return held_out_metrics(state)

    return evaluate
