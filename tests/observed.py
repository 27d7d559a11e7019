"""A training command as it runs, up to its compiled step: what it reads, draws and hands on, without training.

`observe(config, monkeypatch)` runs the command's own `main`. Weights, checkpoints, engines and the loop are replaced by
objects that note what they are given, so a run costs a fraction of a second. Two observations are compared part by
part, in order of cost, the jaxpr of the train step last.
"""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.interpreters import partial_eval

from jaxalign import hosts
from jaxalign.commands import COMMANDS, name_of, reward
from jaxalign.mistake import Mistake
from jaxalign.models.decoder import decoder
from jaxalign.rollout.engine import choice
from jaxalign.rollout.engine.engine import Response, Stats
from jaxalign.rollout.rewards import rewards
from jaxalign.rollout.rewards.worker import Worker
from jaxalign.run import devices, final, reference_logps, run, samples
from jaxalign.training import part, program

STEPS = 2  # batches that are looked at
make_decoder = functools.cache(decoder.make_decoder)  # shapes only; most runs have the same, and it takes longest


def digest(value: Any) -> Any:
    """A short value that is equal where the values are; of arrays and structures, not of whole configs."""
    assert not type(value).__module__.startswith("jaxalign.config"), f"{type(value)} differs with any setting"
    if isinstance(value, jax.ShapeDtypeStruct):
        place = value.sharding
        return value.shape, str(value.dtype), place and (str(place.spec), str(place.mesh.shape), place.memory_kind)
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if isinstance(value, jax.Array | np.ndarray):
        array = np.asarray(value)
        return array.shape, str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(name): digest(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [digest(part) for part in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: digest(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return _text(value)


def _text(value: Any) -> str:
    return (
        hashlib.sha256(text.encode()).hexdigest() if len(text := re.sub(r" at 0x\w+", "", repr(value))) > 200 else text
    )


class Observation:
    """The parts of a run that settings can change: `seen`, and the jaxprs, which are made when they are asked for."""

    def __init__(self) -> None:
        self.mistake: Mistake | None = None
        self.seen: list[tuple[str, Any]] = []
        self.program: Any = None
        self.batch: Any = None
        self.metrics: dict[str, float] = {}  # of the source

    def note(self, name: str, *values: Any, **named: Any) -> None:
        self.seen.append((name, digest([*values, named])))

    @functools.cached_property
    def optimizer(self) -> Any:
        like = self.program.like
        return _jaxpr(self.program.optimizer.update, like.params, like.opt_state, like.params)

    @functools.cached_property
    def forward(self) -> Any:
        algorithm = self.program.algorithm

        def forward(state: Any, frozen: Any, batch: Any) -> Any:
            params = algorithm.assemble(state.params, frozen)
            batch = algorithm.prepare(params, frozen if algorithm.follow is None else state.reference, batch)
            _, batch = algorithm.remember(state.carry, batch)
            return algorithm.loss(params, algorithm.across(batch))

        return _jaxpr(forward, self.program.like, self.program.frozen, self.batch)

    @functools.cached_property
    def step(self) -> Any:
        return _jaxpr(self.program.step, self.program.like, self.program.frozen, self.batch)


def _jaxpr(function: Any, *arguments: Any) -> Any:
    """The jaxpr without the equations whose values nothing reads."""
    closed = jax.make_jaxpr(function)(*arguments)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _text(str(jaxpr)), digest(list(closed.consts))


def difference(before: Observation, after: Observation) -> str | None:
    """The name of the first part that differs; None where nothing does."""
    if len(before.seen) != len(after.seen):
        return "calls"
    for (name, value), (other, other_value) in zip(before.seen, after.seen, strict=True):
        if (name, value) != (other, other_value):
            return name
    if before.program is None:  # of a command that trains nothing
        return None
    return next((p for p in ("optimizer", "forward", "step") if getattr(before, p) != getattr(after, p)), None)


def observe(config: Any, monkeypatch: Any, *, fresh: bool = True) -> Observation:
    """Runs a training command's main; a `Mistake` is kept. `fresh`: the run folder is removed before."""
    observed = Observation()
    if fresh:
        shutil.rmtree(config.output, ignore_errors=True)
    with monkeypatch.context() as patch:
        _replace(patch, observed)
        try:
            observed.note("exit status", COMMANDS[name_of(config)].load()(config))
        except Mistake as mistake:
            observed.mistake = mistake
    written = Path(config.output) / samples.FILE
    observed.note("samples", written.read_text() if written.exists() else None)
    return observed


def _replace(patch: Any, observed: Observation) -> None:
    note = observed.note
    compile_step = run.compile_step

    def compiled(config: Any, recipe: Any, mesh: Any, *, steps: int, earlier: list[int]) -> Any:
        observed.program = result = compile_step(config, recipe, mesh, steps=steps, earlier=earlier)
        algorithm = result.algorithm
        note("leaves", result.like, result.frozen)
        note("algorithm", algorithm.epochs, algorithm.minibatches, algorithm.at_first, algorithm.halt is None)
        return result

    def load_params(
        source: str, model: Any, *, param_dtype: Any, shardings: Any, quantise: str = "none", besides: Any = ()
    ) -> Any:
        note("weights", str(source), param_dtype, quantise)
        return shardings

    def new_state(config: Any, program_: Any, frozen: Any) -> Any:
        key, like = jax.random.key(config.seed), program_.like
        params = program_.recipe.part.init(key, like.params, frozen)
        if program_.algorithm.follow is not None:
            program_.recipe.reference.load(like.reference)
        return dataclasses.replace(like, step=np.int32(0), params=params)

    def fit(step: Any, state: Any, frozen: Any, source: Any, hooks: Any, *, mesh: Any, **options: Any) -> Any:
        if hooks.evaluate is None:
            del options["eval_every"]  # the loop does nothing with it
        options.pop("progress")
        note("loop", dict(mesh.shape), **options)
        note("learning rates", [float(hooks.learning_rate(n)) for n in range(options["steps"])])
        note("last row", hooks.last_because and hooks.last_because({"kl": 5.0}))
        if hooks.evaluate is not None:
            hooks.evaluate(state, 0)
        for number in range(STEPS):
            observed.batch, observed.metrics = source(dataclasses.replace(state, step=np.int32(number)))
            timeless = {name: x for name, x in observed.metrics.items() if "seconds" not in name}
            note("batch", observed.batch, timeless)
        return dataclasses.replace(state, step=np.int32(options["steps"])), None

    class Checkpoints:
        def __init__(self, folder: Path, **options: Any):
            note("checkpoints", folder, **options)

        def steps(self) -> list[int]:
            return []

        def restore(self, like: Any) -> None:
            return None

        def close(self, *, tidy: bool = True) -> None:
            pass

    class Recorder:
        def __init__(self, folder: Path, *, stream: Any, flops_per_token: float, **options: Any):
            note("recorder", folder, **options)

        def close(self) -> None:
            pass

    def make_evaluate(algorithm: Any, held_out: Any, mesh: Any, frozen: Any) -> Any:
        note("held out", list(held_out))
        return lambda state: {}

    def generate_ids(graphdef: Any, params: Any, prompts: Any, key: Any, *, sampling: Any, batch_size: int) -> Any:
        note("shown prompts", prompts, sampling)
        return [([4], True)] * len(prompts)

    def save_pretrained(
        folder: Path, params: Any, model: Any, hf: Any, *, extra: Any, dtype: Any, head: Any = None, **_: Any
    ) -> None:
        note("final", extra, {name: hf[name] for name in ("architectures", "pad_token_id") if name in hf}, head, dtype)

    def compute_logps(run_: Any, plan: Any, responses: Any, source: str) -> np.ndarray:
        note("precomputed", str(source), len(responses))
        return np.zeros(responses.groups.shape, np.float32)

    patch.setattr(devices, "start_log", lambda: None)
    patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    patch.setattr(hosts, "join", lambda: note("hosts"))
    patch.setattr(decoder, "make_decoder", make_decoder)
    patch.setattr(run, "fingerprint", lambda source, **options: note("fingerprint", **options) or "1")
    patch.setattr(run, "check_files", lambda *_, **__: None)
    patch.setattr(run, "compile_step", compiled)
    patch.setattr(run, "new_state", new_state)
    patch.setattr(run, "Checkpoints", Checkpoints)
    patch.setattr(run, "check_kernels", lambda *_, **options: note("check of kernels", **options))
    patch.setattr(run, "make_evaluate", make_evaluate)
    patch.setattr(run, "CompiledStep", lambda step, *, announced: note("shapes", announced))
    patch.setattr(run.metrics, "Recorder", Recorder)
    patch.setattr(run.loop, "fit", fit)
    patch.setattr(part, "load_params", load_params)
    patch.setattr(part, "init_adapter", lambda like, key, *, base, shardings: like)
    patch.setattr(part, "_new_members", lambda key, like, base: like)
    patch.setattr(program, "offloaded", lambda leaves: leaves)
    patch.setattr(samples, "generate_ids", generate_ids)
    patch.setattr(reference_logps, "_compute", compute_logps)
    patch.setattr(final, "save_pretrained", save_pretrained)
    patch.setattr(final, "save_adapter", lambda *_, **__: None)
    patch.setattr(final, "join", lambda trained, frozen: trained)
    patch.setattr(final, "merge_by_layer", lambda params, lora: params)
    patch.setattr(final, "_first_member", lambda params, run_: None)
    patch.setattr(final, "read_rows", lambda path: [])
    patch.setattr(reward, "_reference_scores", lambda run_, data, params: np.ones((2, run_.config.members)))
    patch.setattr(rewards, "Worker", SharedWorker)
    patch.setattr(choice, "LocalEngine", functools.partial(Engine, note))
    patch.setattr(choice, "HttpEngine", functools.partial(Engine, note))


class SharedWorker(Worker):
    """The one process of a reward function in all runs: to start it takes as long as to observe a run."""

    all: ClassVar[dict[str, Worker]] = {}

    def __new__(cls, text: str) -> Worker:
        return cls.all.get(text) or super().__new__(cls)

    def __init__(self, text: str):
        if text not in self.all:
            super().__init__(text)
            self.all[text] = self


class Engine:
    """Draws fixed tokens, a function of prompt and seed, and notes what it is asked for."""

    stats = Stats(seconds=1.0, tokens=1, steps=1, prompt_tokens=1)

    def __init__(self, note: Any, *arguments: Any, **options: Any):
        self._note = note
        uncomparable = ("publish", "check", "decode_text")
        addresses = [x for x in arguments if isinstance(x, str)]  # the others are graphs, which the step shows
        note("engine", *addresses, **{name: x for name, x in options.items() if name not in uncomparable})

    def served(self) -> dict[str, Any]:
        return {"id": "model"}

    def generate(self, params: Any, requests: Any, key: Any, *, sampling: Any, watch: Any = None) -> list[Response]:
        self._note("requests", [list(request) for request in requests], key, list(sampling))
        return [self._response(sum(request.prompt), request.seed, sampling) for request in requests]

    def _response(self, prompt: int, seed: int, sampling: Any) -> Response:
        """The same response to every third prompt; to the others one with a dog where the seed is odd."""
        count = min(3 + prompt % 2, sampling.max_new_tokens)
        word = 7 if prompt % 3 and seed % 2 else 6
        finished = seed % 4 < 2
        tokens = np.array([word] * (count - 1) + [2 if finished else word], np.int32)
        logps = np.full(len(tokens), -1.0, np.float32)
        return Response(tokens, logps, logps, finished)


def to_lines(path: Path, rows: list[dict]) -> Path:
    """The rows as a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
