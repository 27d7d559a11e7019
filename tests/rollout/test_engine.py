"""The engine: the tokens that the whole model would choose, whatever the slots, their neighbours and the padding."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.models import places
from jaxalign.models.decoder.decoder import init_params, make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.models.places import Layout
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.rollout.engine import engine as engine_module
from jaxalign.rollout.engine import slots as device
from jaxalign.rollout.engine.engine import LocalEngine, Request
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import generate_ids
from tests.models.tiny import TINY, hf_config

KEY = jax.random.key(0)
PROMPTS = [(5, 6, 7), (8,), (9, 10, 11, 12, 13, 14), (3, 4), (3, 4), tuple(range(3, 43)), (20, 21), (22,)]
REQUESTS = [Request(prompt, seed, 3 + 5 * (seed % 4)) for seed, prompt in enumerate(PROMPTS)]  # 3 to 18 tokens


@pytest.fixture(scope="module")
def model():
    config = model_config(hf_config("llama"))
    graphdef, _ = make_decoder(config)
    return graphdef, init_params(config, jax.random.key(0))


def generate(model, sampling, *, requests=REQUESTS, slots=4, **options):
    graphdef, params = model
    return LocalEngine(graphdef, slots=slots, **options).generate(params, requests, KEY, sampling=sampling)


def ids(responses):
    return [response.tokens.tolist() for response in responses]


@pytest.fixture(scope="module")
def scored(model):
    """A function: log p of each token of a response, in one pass over the whole text, at a temperature."""

    @functools.partial(jax.jit, static_argnums=2)
    def logps(params, tokens, temperature):
        decoder = nnx.merge(model[0], params)
        return next_token_logps(decoder(tokens), decoder.unembed(), tokens, temperature=temperature).logps[0]

    def score(prompt, response, temperature=1.0):
        row = np.zeros((1, 64), np.int32)
        whole = [*prompt, *response.tokens.tolist()]
        row[0, : len(whole)] = whole
        return np.asarray(logps(model[1], row, temperature))[len(prompt) : len(whole)]

    return score


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"top_p": 0.7}, {"temperature": 0.7, "min_p": 0.8}])
def test_behaviour_logps_are_the_scores_of_the_model_that_trains(model, scored, options):
    """At a temperature both are of the tempered model; where tokens are cut off, the model's own are returned too."""
    for request, response in zip(REQUESTS, generate(model, Sampling(18, **options)), strict=True):
        np.testing.assert_allclose(response.model_logps, scored(request.prompt, response), atol=1e-4)
        tempered = scored(request.prompt, response, options.get("temperature", 1.0))
        if Sampling(**options).truncates:
            assert (response.logps >= tempered - 1e-5).all() and (response.logps > tempered + 1e-3).any()
        else:
            np.testing.assert_allclose(response.logps, tempered, atol=1e-4)


def test_a_prompt_may_fill_its_bucket_and_not_be_padded(model, scored):
    """Prompts are padded to 32 tokens, and beyond to 64: those at the edge are read as all others are."""
    at_the_edge = [Request(tuple(range(3, 3 + length)), length) for length in (31, 32, 33)]
    for requests in (at_the_edge[:2], at_the_edge):
        for request, response in zip(requests, generate(model, Sampling(18), requests=requests), strict=True):
            assert len(response.tokens) == 18 and not response.finished
            np.testing.assert_allclose(response.model_logps, scored(request.prompt, response), atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_refilled_slots_give_what_one_request_at_a_time_gives(model, temperature):
    sampling = Sampling(18, temperature=temperature)
    engine = LocalEngine(model[0], slots=4)
    together = engine.generate(model[1], REQUESTS, KEY, sampling=sampling)
    assert [len(r.tokens) for r in together] == [r.max_new_tokens for r in REQUESTS]
    assert engine.stats.tokens == sum(r.max_new_tokens for r in REQUESTS)
    assert engine.stats.steps < 18 + 18  # two batches that wait for their longest would take so many
    alone = [generate(model, sampling, requests=[request])[0] for request in REQUESTS]
    assert ids(together) == ids(alone)
    waiting = generate(model, sampling, refill=False)
    assert ids(together) == ids(waiting)
    assert ids(together) == ids(generate(model, sampling, requests=REQUESTS[::-1])[::-1])


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3, "bad_words": ((5, 6), (9,)), "top_k": 20}])
def test_rings_that_grow_give_what_one_that_is_long_at_once_gives(model, options, monkeypatch):
    """Responses of 3 to 18 tokens in rings of 4, 8, 16 and 18, which turn before they grow."""
    sampling, coded = Sampling(18, **options), {"cache_dtype": "int8"} if options else {}
    expected = generate(model, sampling, **coded)
    monkeypatch.setattr(engine_module, "FIRST_RING", 4)
    grown = generate(model, sampling, **coded)
    assert ids(grown) == ids(expected)
    for ours, theirs in zip(grown, expected, strict=True):
        np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-5)
        np.testing.assert_allclose(ours.model_logps, theirs.model_logps, atol=1e-5)


def test_a_ring_that_grows_keeps_each_step_where_the_clock_will_look_for_it(model):
    """Steps 2 to 5 lie at their number mod 4, and then at their number mod 8, behind a prompt's room of 2."""
    empty = device.empty_slots(*model, slots=1, prompt=2, response=4, sampling=Sampling(8), cache_dtype=None)
    slots = dataclasses.replace(
        empty,
        clock=jnp.int32(6),
        tokens=jnp.array([[4, 5, 2, 3]], jnp.int32),
        cache=dataclasses.replace(empty.cache, positions=jnp.array([[8, 9, 4, 5, 2, 3]], jnp.int32)),
    )
    grown = device.grow(slots, 8)
    assert grown.tokens.tolist() == [[0, 0, 2, 3, 4, 5, 0, 0]]
    assert grown.cache.positions.tolist() == [[8, 9, 0, 0, 2, 3, 4, 5, 0, 0]]
    assert {layer.key.shape[2] for layer in grown.cache.layers} == {10}


def test_rings_do_not_grow_for_responses_that_might_be_long(model, monkeypatch):
    monkeypatch.setattr(engine_module, "FIRST_RING", 4)
    monkeypatch.setattr(device, "grow", lambda *_: pytest.fail("no response has more than one token"))
    requests = [request._replace(max_new_tokens=None) for request in REQUESTS]
    everything = tuple(range(TINY["llama"]["vocab_size"]))
    responses = generate(model, Sampling(18, terminators=everything), requests=requests)
    assert [len(response.tokens) for response in responses] == [1] * len(requests)


def test_the_number_of_slots_changes_nothing(model):
    sampling = Sampling(18, temperature=0.7)
    assert ids(generate(model, sampling, slots=3)) == ids(generate(model, sampling))


def test_samples_of_one_prompt_differ_by_their_seeds_alone(model):
    requests = [Request((5, 6, 7), seed) for seed in (1, 2, 1, 3)]
    engine = LocalEngine(model[0], slots=4)
    samples = ids(engine.generate(model[1], requests, KEY, sampling=Sampling(12)))
    assert samples[0] == samples[2] and len({tuple(x) for x in samples}) == 3
    assert engine.stats.prompt_tokens == 3  # read once


def test_a_response_ends_with_its_first_terminator(model):
    free = generate(model, Sampling(18))
    terminator = int(free[3].tokens[4])
    for before, after in zip(free, generate(model, Sampling(18, terminators=(terminator,))), strict=True):
        whole = before.tokens.tolist()
        end = whole.index(terminator) + 1 if terminator in whole else len(whole)
        assert after.tokens.tolist() == whole[:end]
        assert after.finished == (terminator in whole)
        np.testing.assert_allclose(after.logps, before.logps[:end], atol=1e-5)


def test_all_rows_may_end_at_once(model):
    greedy = Sampling(18, temperature=0.0)
    request = Request((5, 6, 7), 0)
    first = int(generate(model, greedy, requests=[request], slots=4)[0].tokens[0])
    responses = generate(model, greedy._replace(terminators=(first,)), requests=[request] * 6)
    assert ids(responses) == [[first]] * 6 and all(r.finished for r in responses)


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(model):
    def to_text(tokens):
        return "".join(f"<{t}>" for t in tokens)

    def decode_text(prompt, tokens):
        return to_text(tokens)

    free = generate(model, Sampling(18), decode_text=decode_text)
    third, fourth = free[3].tokens[2:4]
    stop = f"{third}><{fourth}>"  # no token holds it
    stopped = generate(model, Sampling(18, stop=(stop, "never")), decode_text=decode_text)
    assert stopped[3].tokens.tolist() == free[3].tokens[:4].tolist() and stopped[3].finished
    for before, after in zip(free, stopped, strict=True):
        assert after.finished == (stop in to_text(before.tokens))
        assert before.tokens[: len(after.tokens)].tolist() == after.tokens.tolist()


def test_who_waits_goes_on_waiting_while_nothing_was_found_and_no_slot_is_free(model):
    """Stop strings are looked for, and a watcher is shown what there is, before anybody has ended."""
    expected = ids(generate(model, Sampling(18), slots=2))
    stops, text = Sampling(18, stop=("no such text",)), lambda prompt, tokens: str(tokens)
    assert ids(generate(model, stops, slots=2, decode_text=text)) == expected
    graphdef, params = model
    watched = LocalEngine(graphdef, slots=2).generate(
        params, REQUESTS, KEY, sampling=Sampling(18), watch=lambda number, tokens: None
    )
    assert ids(watched) == expected


def test_bad_words_are_never_completed_and_their_beginnings_may_be(model):
    greedy = Sampling(12, temperature=0.0)
    request = Request((5, 6, 7), 0)
    free = generate(model, greedy, requests=[request])[0].tokens.tolist()
    pair = (free[0], free[1])
    banned = generate(model, greedy._replace(bad_words=(pair, (62,))), requests=[request])[0].tokens.tolist()
    assert banned[0] == free[0] and banned[1] != free[1] and 62 not in banned
    assert pair not in list(itertools.pairwise(banned))
    # a bad word that the prompt has begun
    prompt_pair = (7, free[0])
    assert generate(model, greedy._replace(bad_words=(prompt_pair,)), requests=[request])[0].tokens[0] != free[0]


def test_a_penalty_on_repetition_counts_prompt_and_response(model):
    """A penalty so large that a seen token loses to every other: no token comes twice, nor one of the prompt."""
    greedy = Sampling(18, temperature=0.0, repetition_penalty=1e6)
    for request, response in zip(REQUESTS[:5], generate(model, greedy, requests=REQUESTS[:5]), strict=True):
        tokens = response.tokens.tolist()
        assert len(set(tokens)) == len(tokens)
        assert not set(tokens) & set(request.prompt)


def test_sampled_frequencies_are_the_distribution_of_the_model(model):
    """Chi-square over 2,000 draws of a first token: below the 99.9% point for the degrees of freedom."""
    requests = [Request((5, 6, 7), seed, 1) for seed in range(2000)]
    tokens = np.concatenate([r.tokens for r in generate(model, Sampling(1), requests=requests, slots=512)])

    @jax.jit
    def probabilities(params):
        decoder = nnx.merge(model[0], params)
        hidden = decoder(jnp.array([[5, 6, 7]]))
        return jax.nn.softmax(hidden[0, -1] @ decoder.unembed().weight.T)

    expected = 2000 * np.asarray(probabilities(model[1]), np.float64)
    counts = np.bincount(tokens, minlength=len(expected))
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_square < freedom + 3.1 * np.sqrt(2 * freedom) + 10


@pytest.mark.parametrize("layout", ["training", "tensor", "auto"])
def test_a_mesh_gives_the_tokens_of_one_device(model, layout, monkeypatch):
    """Sampled, too: each request has a key of its own. `auto` moves the params to a mesh of generation's own."""
    sampling = Sampling(18)
    expected = ids(generate(model, sampling))
    monkeypatch.setattr(engine_module, "FIRST_RING", 9)
    mesh = places.make_mesh(fsdp=8) if layout == "auto" else places.make_mesh(data=2, fsdp=2, tensor=2)
    config = model_config(hf_config("llama"))
    wide = places.decoding_mesh(mesh, config.num_kv_heads)
    assert wide.shape["tensor"] == 2
    graphdef, abstract = make_decoder(config, layout=Layout(wide))
    params = jax.device_put(model[1], places.shardings(abstract, mesh))
    layout = "training" if layout == "training" else "tensor"
    assert ids(generate((graphdef, params), sampling, slots=3, layout=layout)) == expected  # slots become four


def test_a_cache_of_int8_hardly_changes_the_scores(model, scored):
    """Codes are within 0.4% of a head's largest value; log-probs move by a few hundredths of a nat."""
    coded = generate(model, Sampling(18), cache_dtype="int8")
    errors = [np.abs(r.model_logps - scored(q.prompt, r)) for q, r in zip(REQUESTS, coded, strict=True)]
    assert 0 < max(e.max() for e in errors) < 0.05


def test_what_cannot_be_answered_is_refused(model):
    for request, options, message in (
        (Request((), 0), {}, "request 0 has an empty prompt"),
        (Request((5,), 0, 9), {}, "asks for 9 tokens; it must be 1 to max_new_tokens=4"),
        (Request((5,), 0), {"stop": ("x",)}, "need decode_text"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, Sampling(4, **options), requests=[request])
    with pytest.raises(ValueError, match="layout='fsdp' is not one of training, tensor"):
        LocalEngine(model[0], layout="fsdp")
    assert generate(model, Sampling(4), requests=[]) == []


def test_responses_come_in_the_order_of_the_prompts_without_their_terminators(model):
    greedy = Sampling(4, temperature=0.0)
    one, three = (generate_ids(*model, PROMPTS, KEY, sampling=greedy, batch_size=n) for n in (4, 3))
    assert one == three and len(one) == len(PROMPTS)
    first, ended = one[0]
    cut = generate_ids(*model, PROMPTS, KEY, sampling=greedy._replace(terminators=(first[2],)), batch_size=4)
    assert cut[0] == (first[: first.index(first[2])], True) and not ended
