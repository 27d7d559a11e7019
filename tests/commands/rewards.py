"""Reward functions as a user's module has them, right and wrong ones."""

import asyncio
import os
import re
import signal
import sys
import time

import numpy as np


def dogs(prompts, responses):
    """Share of words that are `dog`."""
    return [text.split().count("dog") / max(len(text.split()), 1) for text in responses]


def chosen(prompts, responses):
    """Named as a metric of DPO is."""
    return dogs(prompts, responses)


def margins(prompts, responses):
    """Named as a metric of DPO is."""
    return dogs(prompts, responses)


def names_dog(prompt, response):
    """1 where one of the words is `dog`: of few responses to a prompt, all are often worth the same."""
    return float("dog" in response.split())


def answered(prompts, responses, *, answer, worth=1.0):
    return [worth * (right in text.split()) for text, right in zip(responses, answer, strict=True)]


def needs(prompts, responses, *, solution):
    return [float(text in right) for text, right in zip(responses, solution, strict=True)]


def raises(prompts, responses):
    return [1 / len(text) for text in [*responses, ""]]


def short(prompts, responses):
    return [0.0]


def undefined(prompts, responses):
    return [*[0.0] * (len(responses) - 1), float("nan")]


def gives(prompts, responses, *, what):
    """`what` for each response: numbers of several libraries, and what is none."""
    import jax.numpy as jnp

    kinds = {
        "numpy bool": np.bool_(True),
        "numpy half": np.float16(1.0),
        "jax scalar": jnp.float32(1.0),
        "jax bool": jnp.array(True),
        "jax bfloat16": jnp.bfloat16(1.0),
        "complex": 1j,
        "numpy complex": np.complex64(1.0),
        "jax complex": jnp.complex64(1.0),
        "huge integer": 10**400,
        "beyond float32": 1e39,
        "text": "1.0",
        "several": [1.0],
        "nothing": None,
    }
    return [kinds[what]] * len(responses)


def huge(prompts, responses):
    return [3e38] * len(responses)


def leaves(prompts, responses):
    sys.exit(3)


def exits(prompts, responses, *, status=0):
    os._exit(status)


def crashes(prompt, response):
    if response == "":
        os.kill(os.getpid(), signal.SIGSEGV)
    return 1.0


def becomes_another_program(prompts, responses):
    os.execv("/bin/sleep", ["sleep", "30"])


def exits_later(prompt, response):
    """Works for 66 responses, then never again."""
    exits_later.calls = getattr(exits_later, "calls", 0) + 1
    if exits_later.calls > 66:
        os._exit(0)
    return float("dog" in response.split())


def searches(prompt, response):
    """Without end for some responses, and without letting another thread run."""
    return float(re.search(r"(a+)+$", response) is not None)


def rude(prompts, responses):
    raise RuntimeError("\x1b[2Jcleared\nand more")


def talks(prompts, responses):
    print("to the terminal")
    sys.stdin.read()
    return [0.0] * len(responses)


def uses_a_clock_that_needs_the_main_thread(prompts, responses):
    """As graders that limit their own time do."""
    signal.alarm(30)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(0)
    return [1.0] * len(responses)


def gives_its_process(prompts, responses):
    return [os.getpid()] * len(responses)


def hangs(prompts, responses, *, seconds=3.0):
    time.sleep(seconds)
    return [0.0] * len(responses)


def times_out(prompts, responses):
    raise TimeoutError("no answer from the judge")


def fails_later(prompts, responses):
    """Works twice, then never again."""
    fails_later.calls = getattr(fails_later, "calls", 0) + 1
    if fails_later.calls > 2:
        raise RuntimeError("the judge has gone home")
    return dogs(prompts, responses)


async def asked(prompts, responses):
    """As a service that is asked once."""
    await asyncio.sleep(0.01)
    return [float(len(said)) for said in responses]


async def asked_each(prompt, response, *, answer):
    """As a service that is asked for each response, half a second each."""
    await asyncio.sleep(0.5)
    return float(answer in response)


def each(prompt, response):
    return 1 / len(response)


def first_host_only(prompts, responses):
    """As a service that the first host alone may ask."""
    if os.environ.get("JAX_PROCESS_ID", "0") != "0":
        raise RuntimeError("asked on another host")
    return [float(len(text)) for text in responses]
