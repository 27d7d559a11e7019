"""Two published models, compared with an independent float64 run and with their published losses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.data.batches.plan import Plan
from jaxalign.data.batches.rows import eval_batches
from jaxalign.data.read import sources
from jaxalign.data.read.formats import Text
from jaxalign.data.read.tokens import Encoder, Examples
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.huggingface import load_tokenizer, read_config, terminators
from jaxalign.models.files.load import load_params
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.rollout.respond import Sampling, generate_ids

HELD_OUT_LOSS = {"stories260K": 1.458, "babyllama-char361": 0.665}  # nats a token, 300 held-out stories


@pytest.fixture(scope="module", params=HELD_OUT_LOSS)
def real(request, shared_data):
    """(name, folder, graphdef, params, golden cases)"""
    path = shared_data / "models" / request.param
    config = read_config(str(path))
    cases = json.loads((path / "golden.json").read_text())["cases"]
    return request.param, path, make_decoder(config)[0], load_params(str(path), config), cases


def test_log_probs_are_those_of_a_float64_run_of_the_original_weights(real):
    _, path, graphdef, params, cases = real
    tokenizer = load_tokenizer(str(path))
    model = nnx.merge(graphdef, params)
    for case in cases:
        assert tokenizer(case["prompt"])["input_ids"] == case["prompt_ids"]
        tokens = jnp.array([case["greedy_ids"]])
        logps = next_token_logps(model(tokens), model.unembed(), tokens).logps[0]
        np.testing.assert_allclose(logps[1:], case["next_token_logprobs"], atol=1e-4)


def test_greedy_continuations_are_the_golden_ones(real):
    _, _, graphdef, params, cases = real
    new = min(len(case["greedy_ids"]) - len(case["prompt_ids"]) for case in cases)
    sampling = Sampling(max_new_tokens=new, temperature=0.0)
    prompts = [case["prompt_ids"] for case in cases]
    responses = generate_ids(graphdef, params, prompts, jax.random.key(0), sampling=sampling, batch_size=len(prompts))
    for case, prompt, (ids, _) in zip(cases, prompts, responses, strict=True):
        assert prompt + ids == case["greedy_ids"][: len(prompt) + new]


def test_held_out_loss_is_the_published_one(real, shared_data):
    name, path, graphdef, params, _ = real
    tokenizer, config = load_tokenizer(str(path)), read_config(str(path))
    rows = sources.load(sources.parse(f"{shared_data / 'tinystories' / 'sample.jsonl.gz'}")[0], held_out=True).rows
    encoder = Encoder(tokenizer, terminators(str(path), tokenizer), config.max_length)
    parts = [part for row in rows[:300] for part in encoder.encode(Text(row["text"]), where="stories")]
    plan = Plan(batch_size=8, max_length=config.max_length)

    @jax.jit
    def loss(batch):
        model = nnx.merge(graphdef, params)
        hidden = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        logps = next_token_logps(hidden, model.unembed(), batch.tokens, batch.mask).logps
        return -jnp.sum(logps), jnp.sum(batch.mask)

    totals = [loss(batch) for batch in eval_batches(Examples.of(parts), plan)]
    mean = sum(float(total) for total, _ in totals) / sum(int(count) for _, count in totals)
    assert abs(mean - HELD_OUT_LOSS[name]) < 0.05, f"{name}: {mean:.4f}"
