"""The sampler: the same tokens as the whole model would choose, in every batch and after every padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.decoder import init_params, make_decoder
from jaxalign.models.families import model_config
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.rollout.generate import Sampling, generate, generate_ids
from tests.models.tiny import TINY

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4]]


@pytest.fixture(scope="module")
def model():
    config = model_config({"architectures": ["LlamaForCausalLM"], **TINY["llama"]})
    graphdef, _ = make_decoder(config)
    return graphdef, init_params(config, jax.random.key(0))


def padded(prompts, width):
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
    return tokens, tokens > 0


def run(model, prompts, sampling, *, width=8, rows=None, seed=0):
    rows = np.arange(len(prompts), dtype=np.int32) if rows is None else rows
    return generate(*model, *padded(prompts, width), rows, jax.random.key(seed), sampling=sampling)


def test_log_probs_are_those_of_the_whole_sequence_in_one_pass(model):
    from flax import nnx

    out = run(model, PROMPTS, Sampling(max_new_tokens=5))
    for row, prompt in enumerate(PROMPTS):
        tokens = jnp.array([[*prompt, *out.tokens[row].tolist()]])
        decoder = nnx.merge(*model)
        found = next_token_logps(decoder(tokens), decoder.unembed(), tokens).logps
        np.testing.assert_allclose(out.logps[row], found[0, len(prompt) :], atol=1e-5)


def test_a_row_is_the_same_alone_padded_further_and_beside_others(model):
    sampling = Sampling(max_new_tokens=6)
    whole = run(model, PROMPTS, sampling)
    for row, prompt in enumerate(PROMPTS):
        alone = run(model, [prompt], sampling, width=32, rows=np.array([row], np.int32))
        assert alone.tokens[0].tolist() == whole.tokens[row].tolist()
    other = run(model, PROMPTS, sampling, seed=1)
    assert not np.array_equal(other.tokens, whole.tokens)


def test_a_response_ends_with_its_first_terminator_and_nothing_follows(model):
    free = run(model, PROMPTS, Sampling(max_new_tokens=8))
    terminator = int(free.tokens[0, 3])
    out = run(model, PROMPTS, Sampling(max_new_tokens=8, terminators=(terminator,)))
    for row in range(len(PROMPTS)):
        unended = free.tokens[row].tolist()
        length = unended.index(terminator) + 1 if terminator in unended else 8
        assert out.mask[row].tolist() == [True] * length + [False] * (8 - length)
        assert out.tokens[row, :length].tolist() == unended[:length]
        assert bool(out.finished[row]) == (terminator in unended)
        assert (out.logps[row, length:] == 0).all() and (out.tokens[row, length:] == 0).all()


def test_responses_come_in_the_order_of_the_prompts_whatever_the_batch_size(model):
    sampling = Sampling(max_new_tokens=4, temperature=0.0)
    one, three = (generate_ids(*model, PROMPTS, jax.random.key(0), sampling=sampling, batch_size=n) for n in (1, 3))
    assert one == three and len(one) == len(PROMPTS)
    ids, ended = one[0]
    cut = generate_ids(
        *model, PROMPTS, jax.random.key(0), sampling=sampling._replace(terminators=(ids[2],)), batch_size=4
    )
    assert cut[0] == (ids[: ids.index(ids[2])], True) and not ended
