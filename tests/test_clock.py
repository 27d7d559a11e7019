"""Speeds are those of compiled programs: the first step is as fast as the others."""

import threading
import time

import jax
import jax.numpy as jnp
import pytest

from jaxalign.clock import Spans, elapsed


def test_time_within_several_spans_counts_once():
    spans = Spans()
    for start, end in [(1, 2), (3, 4), (3.5, 5), (2.5, 6), (8, 9)]:  # an inner one ends first
        spans.add(start, end)
    assert spans.overlap(0, 10) == 1 + 3.5 + 1
    assert spans.overlap(1.5, 3) == 0.5 + 0.5 and spans.overlap(6, 8) == 0


def compile_something():
    def wide(x):
        for _ in range(200):
            x = jnp.sin(x) + jax.jit(jnp.cos)(x)
        return x

    jax.jit(wide)(jnp.ones(3)).block_until_ready()


@pytest.mark.parametrize("thread", [False, True])
def test_compilation_takes_no_time_whichever_thread_it_is_in(thread):
    began = time.perf_counter()
    if thread:
        worker = threading.Thread(target=compile_something)
        worker.start()
        worker.join()
    else:
        compile_something()
    whole, seconds = time.perf_counter() - began, elapsed(began)
    assert 0 <= seconds < whole / 2


def test_all_else_does():
    began = time.perf_counter()
    time.sleep(0.05)
    assert elapsed(began) >= 0.05
