"""`--check-kernels`: a right kernel is let through, a wrong one stops the run before its first step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.commands import sft
from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import MeshConfig
from jaxalign.ops.logprobs_check import differences, refuse
from jaxalign.training.metrics import read_rows
from jaxalign.types import Unembedding


def config_of(tiny_model, tiny_data, output):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    options = {"steps": 1, "batch_size": 8, "microbatches": 2, "max_length": 48, "samples": 0, "remat": "none"}
    named = {"model": str(tiny_model), "data": str(tiny_data), "output": output, "mesh": mesh}
    return SFTConfig(**named, **options, check_kernels=True, implementation="pallas")


def test_a_run_with_the_kernel_checks_it_on_the_first_batch_and_trains(tiny_model, tiny_data, tmp_path, capsys):
    assert sft.main(config_of(tiny_model, tiny_data, tmp_path / "run")) == 0
    log = capsys.readouterr().err
    assert "a CPU has no kernel; the TPU's is interpreted on the first 128 tokens" in log
    assert "the log-probability kernel agrees with the chunked implementation: d_hidden " in log
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")[-1:]
    assert row.get("skipped", 0.0) == 0.0


def test_a_kernel_that_is_a_little_wrong_is_refused_and_the_message_says_where(monkeypatch):
    from jaxalign.kernels import logprob_tpu

    true = logprob_tpu.forward

    def off(*args, **options):
        stats = true(*args, **options)
        return stats._replace(chosen=stats.chosen.at[3].add(0.01))

    monkeypatch.setattr(logprob_tpu, "forward", off)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, weight = jax.random.normal(keys[0], (6, 8)), jax.random.normal(keys[1], (50, 8))
    targets = jax.random.randint(keys[2], (6,), 0, 50)
    measured = differences(hidden, Unembedding(weight), targets, jnp.ones(6, bool))
    np.testing.assert_allclose(measured["logps"].distance, 0.01, atol=1e-5)
    assert float(measured["entropy"].distance) < 1e-5 and float(measured["d_weight"].distance) < 1e-5
    with pytest.raises(
        ValueError, match=r"not to be trusted here: logps\[3\] is .* 0.01 apart, where 0.001 is allowed"
    ):
        refuse(measured)


def test_a_kernel_that_says_nan_is_refused():
    hidden = jnp.ones((4, 8)).at[2, 0].set(jnp.nan)
    measured = differences(hidden, Unembedding(jnp.ones((50, 8))), jnp.zeros(4, jnp.int32), jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"logps\[2\] is nan"):
        refuse(measured)
