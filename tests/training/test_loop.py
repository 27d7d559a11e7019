"""The loop on a model of one number: a step costs nothing, so every rule of the loop can be watched."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.algorithms.base import Algorithm
from jaxalign.models.places import make_mesh
from jaxalign.training.loop import Hooks, NotFiniteError, Progress, fit, offline
from jaxalign.training.signals import StopRequest
from jaxalign.training.state import TrainState
from jaxalign.training.step import make_train_step
from jaxalign.types import Average

OPTIMIZER = optax.sgd(0.5)


def half_distance(params, batch):
    return Average.of((params["w"] - batch["x"]) ** 2), {}


STEP = jax.jit(make_train_step(Algorithm(half_distance), OPTIMIZER))


class Recorder:
    """Records the calls of the loop, in order."""

    def __init__(self):
        self.rows, self.saved, self.order = [], [], []

    def hooks(self, **more):
        return Hooks(record=self.record, save=self.save, **more)

    def record(self, row):
        self.rows.append(row)
        self.order.append(("row", row["step"]))

    def save(self, state, progress, row):
        assert row["step"] == progress.step == int(state.step)
        self.saved.append(progress.step)
        self.order.append(("save", progress.step))


def run(values, recorder, *, steps, progress=None, **options):
    mesh = make_mesh(data=8, fsdp=1)
    state = TrainState.create({"w": jnp.float32(0.0)}, OPTIMIZER, jax.random.key(0))
    hooks = options.pop("hooks", None) or recorder.hooks()
    batches = ({"x": np.full((8,), x, np.float32)} for x in values)
    return fit(STEP, state, None, offline(batches), hooks, mesh=mesh, steps=steps, progress=progress, **options)


def test_every_step_has_one_row_and_a_checkpoint_comes_after_its_row():
    recorder = Recorder()
    state, stopped_by = run([1.0] * 5, recorder, steps=5, save_every=2)
    assert [row["step"] for row in recorder.rows] == [1, 2, 3, 4, 5]
    assert recorder.saved == [2, 4, 5] and stopped_by is None and int(state.step) == 5
    for step in recorder.saved:
        assert recorder.order.index(("row", step)) < recorder.order.index(("save", step))
    # w goes 0 -> 1 at once (sgd 0.5 on a square), so the losses are 1, 0, 0, ...
    np.testing.assert_allclose([row["loss"] for row in recorder.rows], [1, 0, 0, 0, 0])


@pytest.mark.parametrize("minutes, saved", [(1e-9, [1, 2, 3]), (60, [3]), (0, [3])])
def test_a_checkpoint_is_due_when_so_many_minutes_have_passed_since_the_last(minutes, saved):
    recorder = Recorder()
    run([1.0] * 3, recorder, steps=3, save_minutes=minutes)
    assert recorder.saved == saved and [row["step"] for row in recorder.rows] == [1, 2, 3]


def test_held_out_metrics_come_before_the_first_step_and_join_the_row_of_theirs():
    recorder = Recorder()
    hooks = recorder.hooks(
        evaluate=lambda state, step: {"eval_loss": float(state.params["w"])}, learning_rate=lambda n: 10 + n
    )
    run([1.0] * 4, recorder, steps=4, eval_every=2, hooks=hooks)
    assert recorder.rows[0] == {"step": 0, "eval_loss": 0.0}
    assert [row["step"] for row in recorder.rows if "eval_loss" in row] == [0, 2, 4]
    assert [row["learning_rate"] for row in recorder.rows[1:]] == [10, 11, 12, 13]


def test_a_metric_of_the_source_with_a_name_of_the_step_is_an_error():
    mesh, recorder = make_mesh(data=8, fsdp=1), Recorder()
    state = TrainState.create({"w": jnp.float32(0.0)}, OPTIMIZER, jax.random.key(0))
    batch = {"x": np.ones((8,), np.float32)}

    def source(name):
        return lambda state: (batch, {name: 7.0})

    fit(STEP, state, None, source("scores/loss"), recorder.hooks(), mesh=mesh, steps=1)
    assert recorder.rows[0]["scores/loss"] == 7.0 and recorder.rows[0]["loss"] == 1.0
    with pytest.raises(AssertionError, match="same name: loss"):
        fit(STEP, state, None, source("loss"), recorder.hooks(), mesh=mesh, steps=1)


def test_a_skipped_step_is_counted_and_does_not_advance_the_schedule():
    recorder = Recorder()
    run([1.0, np.nan, 1.0], recorder, steps=3, hooks=recorder.hooks(learning_rate=lambda n: n))
    assert [row["skipped_steps"] for row in recorder.rows] == [0, 1, 1]
    assert [row["learning_rate"] for row in recorder.rows] == [0, 1, 1]


def test_three_skipped_steps_in_a_row_stop_the_run_and_two_do_not():
    recorder = Recorder()
    run([np.nan, np.nan, 1.0, np.nan, np.nan, 1.0], recorder, steps=6)
    with pytest.raises(NotFiniteError, match="steps 2 to 4 had a loss or gradient that is not finite"):
        run([1.0, np.inf, np.inf, np.inf, 1.0, 1.0], recorder, steps=6)
    assert recorder.rows[-1]["step"] == 4 and recorder.rows[-1]["skipped_steps"] == 3


def test_an_earlier_count_of_skipped_steps_survives_a_resume():
    recorder = Recorder()
    with pytest.raises(NotFiniteError, match="steps 4 to 6"):
        run([np.nan] * 3, recorder, steps=9, progress=Progress(step=5, skipped=2, skipped_in_a_row=2))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_the_end_of_the_step_and_stops(number):
    recorder = Recorder()

    def values():
        for i in range(10):
            if i == 3:
                os.kill(os.getpid(), number)
            yield 1.0

    _, stopped_by = run(values(), recorder, steps=10)
    assert stopped_by == number and recorder.saved == [4]


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
