"""A run of a training command, in three calls: `open`, `claim`, `fit`. The command gathers its data in between.

run = Run.open(config, "dpo")                  # hosts, log, mesh, model config, vocabulary; the folder is looked at
...                                            # whatever can be wrong with the data is found here
if not run.claim(steps=..., data=...):         # the hosts agree, and the folder becomes this run's
    return 0                                   # it is complete already
outcome = run.fit(recipe, batches, held_out)   # through any interruption
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign import hosts
from jaxalign.config.effects import default_of
from jaxalign.config.limits import to_json
from jaxalign.config.shared import TrainConfig
from jaxalign.data.batches.plan import Batches, iterate
from jaxalign.data.sets.split import Set
from jaxalign.mistake import Mistake
from jaxalign.models import places
from jaxalign.models.adapters.lora import Lora
from jaxalign.models.decoder.config import ModelConfig, train_flops_per_token
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import check_files
from jaxalign.models.files.reward import SCORE, trunk_of
from jaxalign.models.files.weights import fingerprint, stored_dtype
from jaxalign.rollout.rewards.rewards import reward_models
from jaxalign.run import devices, lock
from jaxalign.run.check_kernels import check_kernels
from jaxalign.run.extend import SCHEDULE, counted_steps, earlier_ends
from jaxalign.run.folder import is_finished, learning_rate_of, open_run
from jaxalign.run.samples import Sampler
from jaxalign.run.vocabulary import Vocabulary, load_vocabulary
from jaxalign.training import loop, metrics
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.compiled import CompiledStep
from jaxalign.training.evaluate import make_evaluate
from jaxalign.training.part import lora_of
from jaxalign.training.program import (
    Program,
    Recipe,
    compile_step,
    frozen_of_files,
    learning_rate,
    load_frozen,
    new_state,
)
from jaxalign.training.state import TrainState
from jaxalign.types import PyTree

log = logging.getLogger(__name__)

SUMMARY = "summary"  # in the extras of a checkpoint
BatchesT = TypeVar("BatchesT", bound=Batches)
ConfigT = TypeVar("ConfigT", bound=TrainConfig)
# (params as the algorithm sees them, step) -> (a batch, metrics of how it was made)
SourceFn = Callable[[PyTree, int], tuple[Any, dict[str, float]]]


class Outcome(NamedTuple):
    """The end of a fit."""

    state: TrainState
    frozen: PyTree | None
    stopped_by: int | None  # the signal that stopped it
    is_new: bool  # no model of this step has been exported yet
    summary: dict[str, Any] | None = None  # of the last checkpoint

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return int(self.state.step)


@dataclasses.dataclass(frozen=True)
class Data:
    """Training and held-out data of a run."""

    batches: Batches  # step -> a batch; `steps` of them. On-policy: the numbers of the step's prompts
    shapes: int  # of batches that will occur
    fingerprint: int  # of the rows
    held_out: Sequence[Any] = ()
    held_out_fingerprint: int | None = None
    prompts: Sequence[Sequence[int]] = ()  # to which the model responds at every evaluation

    @classmethod
    def of(cls, sets: Set[Any], batches: Batches, held_out: Sequence[Any]) -> Data:
        """The data of sets for training and held out, in batches."""
        fingerprints = sets.train.examples.fingerprint(), sets.held_out.fingerprint()
        return cls(batches, batches.shape_count, fingerprints[0], held_out, fingerprints[1], sets.prompts)


@dataclasses.dataclass(frozen=True)
class Run(Generic[ConfigT]):
    """A run of a training command: its settings, devices, model and vocabulary."""

    config: ConfigT
    command: str
    mesh: Mesh
    model: ModelConfig
    vocabulary: Vocabulary
    lora: Lora | None
    exists: bool  # the folder holds this run already

    @classmethod
    def open(cls, config: ConfigT, command: str, *, scores: bool = False) -> Run[ConfigT]:
        """Joins the hosts, starts the log and reads all but weights. The folder is looked at, not yet made."""
        devices.start(distributed=config.distributed)
        devices.start_log()
        metrics.check_wandb(config.log.wandb)
        exists = hosts.first_decides(lambda: open_run(config, command=command, resume=config.resume, write=False))
        if config.optimizer.learning_rate is None:
            stored = learning_rate_of(config.output) if exists else None
            peak = config.peak_learning_rate if stored is None else stored
            config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=peak))
        run = cls.read(config, command, exists=exists, scores=scores)
        if not exists and not huggingface.is_random(config.model):
            check_files(config.model, run.model, besides=SCORE if scores else ())
        return run

    @classmethod
    def read(cls, config: ConfigT, command: str, *, exists: bool = True, scores: bool = False) -> Run[ConfigT]:
        """The run of a config without its folder: mesh, model config, vocabulary and adapters.

        With `scores` the model is a trunk under heads, and may be read from a classifier.
        """
        devices.check_attention(config.attention, config.max_length)
        mesh = places.make_mesh(**dataclasses.asdict(config.mesh))
        model = (trunk_of if scores else huggingface.read_config)(config.model)
        if model.learned_positions and config.max_length > model.learned_positions:
            raise Mistake(
                f"`max_length` {config.max_length}: {config.model} has {model.learned_positions} learned positions, "
                "and no more can be used"
            )
        if config.max_length > model.max_length:
            log.warning("max_length %d is more than the %d the model was made for", config.max_length, model.max_length)
        lora = lora_of(config.lora, model)
        return cls(config, command, mesh, model, load_vocabulary(config, model), lora, exists)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    @property
    def unit(self) -> int:
        """Parts that rows are cut into by devices and microbatches."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"] * self.config.microbatches

    def counted(self, batches: BatchesT, *, updates: int = 1) -> BatchesT:
        """The batches, as many as `steps`, else as `epochs` hold. Logs the number, and checks the schedule over it."""
        config, per_epoch = self.config, batches.steps_per_epoch
        steps = counted_steps(config.steps, config.epochs, per_epoch)
        log.info("%d steps, %.1f of them an epoch", steps, per_epoch)
        learning_rate(config, steps, self._earlier_ends(batches, steps, updates=updates), updates=updates)
        if config.profile and steps < loop.PROFILED_STEPS.stop - 1:
            raise Mistake(
                f"`profile` traces steps {loop.PROFILED_STEPS.start} to {loop.PROFILED_STEPS.stop - 1}, after "
                f"compilation, and the run has {steps}; leave it out, or raise `steps`"
            )
        return batches.with_steps(steps)

    def _earlier_ends(self, batches: Batches, steps: int, *, updates: int, logs: bool = False) -> list[int]:
        return earlier_ends(
            self.config, steps, per_epoch=batches.steps_per_epoch, exists=self.exists, updates=updates, logs=logs
        )

    @lock.released_on_error
    def claim(self, data: Data) -> bool:
        """Makes the folder this run's, once all hosts agree on settings and data. False if the run is complete."""
        config, steps = self.config, data.batches.steps
        if self._keep_best and not data.held_out:
            raise Mistake(f"`checkpoint.keep_best` {self._keep_best} needs held-out data; give `eval_data`")
        if hasattr(config, "eval_data") and not data.held_out:
            for name in ("eval_every", "samples"):
                value = getattr(config, name, None)
                if value not in (None, 0, default_of(type(config), name)):
                    raise Mistake(f"`{name}` {value} has no effect without held-out data; give `eval_data`")
        fingerprints = {"data": data.fingerprint, "held-out data": str(data.held_out_fingerprint)}
        weights = self._weights()
        hosts.agree(settings=json.dumps(to_json(config)), **fingerprints, steps=steps, **weights)

        def write() -> bool:
            if not is_finished(self.folder, steps):
                lock.acquire(self.folder)
            complete = is_finished(self.folder, steps)  # by another process meanwhile, perhaps
            compared = None if complete else weights
            exists = open_run(config, command=self.command, resume=config.resume, write=True, weights=compared)
            if exists and not self.exists and not complete:
                raise Mistake(
                    f"`output` {self.folder} was begun by another process while this one read its data; run the same "
                    "command again, which continues it"
                )
            return exists and complete

        if not hosts.first_decides(write):
            return True
        lock.release(self.folder)
        log.info("this run is complete: %s", self.folder / "final")
        return False

    @lock.released_on_error
    def fit(
        self,
        recipe: Recipe,
        data: Data,
        *,
        source: SourceFn | None = None,
        summary: Callable[[PyTree], dict[str, Any]] | None = None,
        last_because: Callable[[loop.Row], str | None] | None = None,
    ) -> Outcome:
        """Trains from the newest checkpoint, or from the start, to the last step or a signal.

        Args:
          recipe: what is trained, and how.
          data: batches by their step, unless `source` makes them.
          source: on-policy: makes each batch of the params as they are.
          summary: what a checkpoint says about its params, so that they can be exported without the data.
          last_because: the reason why a row of metrics ends the run; None while it goes on.
        """
        config, steps = self.config, data.batches.steps
        earlier = self._earlier_ends(data.batches, steps, updates=recipe.updates, logs=True)
        program = compile_step(config, recipe, self.mesh, steps=steps, earlier=earlier)
        checkpoints = Checkpoints(self.folder / "checkpoints", keep=config.checkpoint.keep, keep_best=self._keep_best)
        self._check_not_beyond(checkpoints, steps)
        frozen = load_frozen(program)
        state, progress = self._start_or_resume(program, frozen, data, checkpoints)
        if getattr(config, "check_kernels", False):
            params = program.algorithm.assemble(state.params, frozen)
            check_kernels(recipe.part.graphdef, params, data.batches[0], self.mesh, microbatches=config.microbatches)
        recorder = self._recorder(recipe, steps, progress.step)
        rates = np.asarray(jax.vmap(program.schedule)(jnp.arange(steps * recipe.updates)), np.float64)

        last: dict[str, Any] = {}

        def record(row: loop.Row) -> None:
            lock.check(self.folder)
            recorder(row)

        def save(state: TrainState, progress: loop.Progress, row: loop.Row) -> None:
            hosts.first_decides(lambda: lock.check(self.folder) is None)
            seen = {"data": data.fingerprint, "held_out": data.held_out_fingerprint}
            if summary is not None:
                last[SUMMARY] = summary(program.algorithm.assemble(state.params, frozen))
            extras = {"progress": dataclasses.asdict(progress), SCHEDULE: [*earlier, steps], **seen, **last}
            checkpoints.save(progress.step, state, extras, metric=row.get("eval_loss"))

        def on_policy(state: TrainState) -> tuple[Any, loop.Row]:
            assert source is not None
            lock.check(self.folder)
            return source(program.algorithm.assemble(state.params, frozen), int(state.step))

        hooks = loop.Hooks(
            record,
            save,
            self._evaluation(program, frozen, data, progress.step),
            lambda step: rates[step * recipe.updates],
            last_because,
        )
        whole = False
        try:
            state, stopped_by = loop.fit(
                CompiledStep(program.step, announced=data.shapes),
                state,
                frozen,
                loop.offline(self._from(data.batches, progress.step)) if source is None else on_policy,
                hooks,
                mesh=self.mesh,
                steps=progress.step if progress.ended else steps,
                progress=progress,
                eval_every=config.eval_every,
                save_every=config.checkpoint.every,
                save_minutes=config.checkpoint.minutes,
                profile=self.folder / "profile" if config.profile else None,
            )
            whole = True
        except loop.NotFiniteError as error:
            checkpoints.wait()
            raise loop.NotFiniteError(f"{error}; {checkpoints.last_good()}") from None
        finally:
            recorder.close()
            checkpoints.close(tidy=whole)
        is_new = stopped_by is None and not hosts.first_decides(lambda: is_finished(self.folder, progress.step))
        if is_new:
            frozen = frozen_of_files(config, program, frozen, self.mesh)
        return Outcome(state, frozen, stopped_by, is_new, last.get(SUMMARY))

    def end(self, outcome: Outcome) -> int:
        """The exit status: 0, or 128 + the number of the signal that stopped the run; logged. Unlocks the folder."""
        lock.release(self.folder)
        if outcome.stopped_by is not None:
            log.warning(
                "stopped by signal %d after step %d; the same command continues", outcome.stopped_by, outcome.step
            )
            return 128 + outcome.stopped_by
        if jax.process_index() == 0:
            log.info("the model is in %s", self.folder / "final")
        return 0

    def _weights(self) -> dict[str, str]:
        """Fingerprints of the models that the run reads, by their setting and source as errors name them."""
        config, critic = self.config, getattr(self.config, "critic", None)
        sources = [("`model`", config.model), ("`ref_model`", getattr(config, "ref_model", None))]
        sources.append(("`critic.model`", getattr(critic, "model", None)))
        if reward := getattr(config, "reward", None):
            sources += [("`reward`", folder) for folder in reward_models(reward)]
        named = [(f"{name} {source}", source) for name, source in sources if source is not None]
        weights = {name: fingerprint(source) for name, source in named}
        if config.fingerprints == "whole":
            weights |= {f"{name} (all bytes)": fingerprint(source, whole=True) for name, source in named}
        return weights

    @property
    def export_dtype(self) -> str:
        """Dtype of exported weights: `export_dtype`, else that of the model's files, else `param_dtype`."""
        config = self.config
        if config.export_dtype != "auto":
            return config.export_dtype
        stored = None if huggingface.is_random(config.model) else stored_dtype(config.model)
        return stored or config.param_dtype

    @property
    def _keep_best(self) -> int:
        return getattr(self.config.checkpoint, "keep_best", 0)

    def _check_not_beyond(self, checkpoints: Checkpoints, steps: int) -> None:
        done = max(checkpoints.steps(), default=0)
        if done > steps:
            raise Mistake(
                f"{self.config.output} has trained {done} steps already, more than the {steps} asked for; raise "
                "`steps`, or export an earlier checkpoint with jaxalign export"
            )

    def _from(self, batches: Any, step: int) -> Any:
        """The batches from a step on, read ahead."""
        iterator = iterate(batches)
        if step:
            iterator.set_state({"next_index": step})
        return iterator

    def _start_or_resume(
        self, program: Program, frozen: PyTree | None, data: Data, checkpoints: Checkpoints
    ) -> tuple[TrainState, loop.Progress]:
        config = self.config
        restored = checkpoints.restore(program.like)
        if restored is None:
            return new_state(config, program, frozen), loop.Progress()
        state, extras = restored
        if extras.get("data", int) != data.fingerprint:
            raise Mistake(
                f"the data of `data` {config.data} have changed since {config.output} was started, so the run cannot "
                "continue bit for bit; restore them, or name a new `output`"
            )
        # checkpoints of older versions have none
        if extras.get("held_out", int, None) not in (None, data.held_out_fingerprint):
            held_out = getattr(config, "eval_data", None) or config.data
            raise Mistake(
                f"the held-out data of {held_out} have changed since {config.output} was started, so its evaluations "
                "would not compare; restore them, or name a new `output`"
            )
        progress = loop.Progress.read(extras.object("progress"))
        log.info("continuing after step %d of %d", progress.step, data.batches.steps)
        return state, progress

    def _recorder(self, recipe: Recipe, steps: int, resumed_at: int) -> Any:
        if jax.process_index() != 0:
            return metrics.Silent()
        config, peak = self.config, metrics.peak_flops(jax.devices()[0].device_kind)
        return metrics.Recorder(
            self.folder,
            total_steps=steps,
            resumed_at=resumed_at if resumed_at else -1,
            flops_per_token=recipe.flops * train_flops_per_token(self.model, config.max_length),
            peak_flops=None if peak is None else peak * self.mesh.size,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            stream=sys.stderr,
        )

    def _evaluation(
        self, program: Program, frozen: PyTree | None, data: Data, resumed_at: int
    ) -> Callable[[TrainState, int], dict[str, float]] | None:
        """Held-out metrics and, beside them, a few responses; None without held-out data."""
        if not data.held_out:
            return None
        held_out_metrics = make_evaluate(program.algorithm, data.held_out, self.mesh, frozen)
        if not (data.prompts and getattr(self.config, "samples", 0)):  # a reward model has none
            return lambda state, step: held_out_metrics(state)
        graphdef = program.recipe.part.graphdef
        sampler = Sampler(self.config, graphdef, self.model, self.vocabulary, resumed_at)

        def evaluate(state: TrainState, step: int) -> dict[str, float]:
            sampler.write(program.algorithm.assemble(state.params, frozen), step, data.prompts)
            return held_out_metrics(state)

        return evaluate
