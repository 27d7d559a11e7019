"""Bytes of generation are said before it starts, and refused where they cannot fit."""

import logging

import pytest

from jaxalign.mistake import Mistake
from jaxalign.rollout.engine.memory import GIB, check_memory

NEEDS = {"weights": int(3.2 * GIB), "slots": int(1.1 * GIB), "state": int(9.4 * GIB), "way_out": "use fewer `slots`"}
SAID = "3.2 GiB of weights + up to 1.1 GiB of cache a device, beside 9.4 GiB of training state"


@pytest.mark.parametrize(("room", "warns"), [(16, False), (13, True)])
def test_the_bytes_of_a_device_are_logged_and_a_cache_that_may_not_fit_is_a_warning(room, warns, caplog):
    with caplog.at_level(logging.INFO):
        check_memory(**NEEDS, limit=room * GIB)
    assert f"decoding: {SAID}" in caplog.text
    expected = ["a device has 13.0 GiB, so decoding may run out of memory where responses are long; use fewer `slots`"]
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == (expected if warns else [])


def test_weights_and_state_that_cannot_fit_are_refused_with_the_way_out():
    with pytest.raises(Mistake, match=f"needs {SAID.replace('+', '.')}, and a device has 12.0 GiB; use fewer `slots`"):
        check_memory(**NEEDS, limit=12 * GIB)


def test_a_device_that_says_no_limit_has_none():
    check_memory(**NEEDS | {"weights": 2**60})
