"""Every family against transformers on tiny random checkpoints: unpadded, padded left and right, packed, and cached."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.models.decoder.cache import empty_cache
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import MODEL_TYPES, model_config
from jaxalign.models.files.huggingface import read_config
from jaxalign.models.files.load import load_params
from tests.models.tiny import TINY, hf_config, save_random

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = (12, 7)


def logits_of(model, hidden):
    unembedding = model.unembed()
    logits = hidden @ unembedding.weight.T
    cap = unembedding.softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def run(config, params, tokens, positions=None, segment_ids=None):
    graphdef, _ = make_decoder(config)

    @jax.jit
    def forward(params, tokens, positions, segment_ids):
        model = nnx.merge(graphdef, params)
        return logits_of(model, model(tokens, positions=positions, segment_ids=segment_ids))

    return np.asarray(forward(params, tokens, positions, segment_ids))


@pytest.fixture(scope="module", params=TINY)
def checkpoint(request, tmp_path_factory):
    """(config, params, rows of ids, transformers' logits of each row alone)."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp(request.param)
    save_random(request.param, folder)
    config = read_config(str(folder))
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 67, length) for length in LENGTHS]
    with torch.no_grad():
        expected = [theirs(torch.tensor(row[None])).logits[0].numpy() for row in rows]
    return config, load_params(str(folder), config), rows, expected


def layout(rows, width, *, side):
    """Rows in [B, width] with padding on one side."""
    tokens, positions, segments = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    for b, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[b, at], positions[b, at], segments[b, at] = row, np.arange(len(row)), 1
    return tokens, positions, segments


def agree(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-4)
    np.testing.assert_array_equal(actual.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_equal_transformers_whatever_the_padding(checkpoint, side):
    config, params, rows, expected = checkpoint
    tokens, positions, segments = layout(rows, 15, side=side)
    actual = run(config, params, tokens, positions, segments)
    assert np.isfinite(actual).all()
    for b in range(len(rows)):
        agree(actual[b][segments[b] > 0], expected[b])


def test_packed_sequences_do_not_see_each_other(checkpoint):
    config, params, rows, expected = checkpoint
    tokens = np.concatenate([*rows, [0, 0]])[None]
    positions = np.concatenate([np.arange(12), np.arange(7), [0, 0]])[None]
    segments = np.array([[1] * 12 + [2] * 7 + [0] * 2])
    for chosen in (positions, None):  # by default each segment's positions start from 0
        actual = run(config, params, tokens, chosen, segments)[0]
        agree(actual[:12], expected[0])
        agree(actual[12:19], expected[1])


def test_a_whole_row_without_positions_and_a_cache_filled_in_two_calls(checkpoint):
    config, params, rows, expected = checkpoint
    agree(run(config, params, rows[0][None])[0], expected[0])
    graphdef, _ = make_decoder(config)
    tokens, positions, segments = layout(rows, 12, side="left")

    @jax.jit
    def read(params, cache, tokens, positions, segments):
        model = nnx.merge(graphdef, params)
        hidden, cache = model(tokens, positions=positions, segment_ids=segments, cache=cache)
        return logits_of(model, hidden), cache

    first, cache = read(params, empty_cache(config, 2, 14), *(x[:, :6] for x in (tokens, positions, segments)))
    second, _ = read(params, cache, *(x[:, 6:] for x in (tokens, positions, segments)))
    actual = np.concatenate([first, second], axis=1)
    for b in range(2):
        agree(actual[b][segments[b] > 0], expected[b])


@pytest.mark.parametrize("name", TINY)
def test_logits_equal_the_golden_ones_without_torch(name, tmp_path):
    from safetensors.numpy import save_file

    golden = np.load(GOLDEN / f"{name}.npz")
    tensors = {k.removeprefix("tensor:"): golden[k] for k in golden.files if k.startswith("tensor:")}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(str(golden["config"]))
    config = read_config(str(tmp_path))
    params = load_params(str(tmp_path), config)
    agree(run(config, params, golden["tokens"].astype(np.int32)), golden["logits"])


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "architecture MixtralForCausalLM is not supported; supported are Llama",
        ),
        ({"architectures": None}, "config.json has no `architectures`"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type='yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
    ],
)
def test_what_is_not_supported_is_named(change, message):
    values = {"architectures": ["LlamaForCausalLM"], **TINY["llama"], **change}
    values = {k: v for k, v in values.items() if v is not None or k == "architectures"}
    with pytest.raises(ValueError, match=message):
        model_config(values)


def test_a_llama_config_of_before_transformers_five_means_the_same():
    new = {"architectures": ["LlamaForCausalLM"], **TINY["llama-rope-linear"]}
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert model_config(old) == model_config(new)
    assert json.loads(json.dumps(old)) == old


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_a_field_that_is_left_out_means_what_it_means_to_transformers(name):
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] == MODEL_TYPES[name]
    # as many heads as the largest default of key heads
    sizes = {"vocab_size": 151_936, "num_hidden_layers": 8, "num_attention_heads": 32}
    sizes |= {"hidden_size": 256, "intermediate_size": 96}
    if name == "gpt2":
        sizes = {"vocab_size": 151_936, "n_embd": 64, "n_layer": 8, "n_head": 16, "n_positions": 64}
    whole = AutoConfig.for_model(name, **sizes).to_dict()
    named = {"architectures": [MODEL_TYPES[name]]}
    assert model_config(sizes | named) == model_config(whole | named)


def test_a_decoder_refuses_what_it_would_get_wrong():
    config = model_config(hf_config("llama"))
    with pytest.raises(ValueError, match="attention='flash' is not one of xla, splash, cudnn"):
        make_decoder(config, attention="flash")
    with pytest.raises(ValueError, match="remat='some' is not one of none, dots, blocks"):
        make_decoder(config, remat="some")
    graphdef, abstract = make_decoder(config)
    tokens, cache = jnp.ones((1, 2), jnp.int32), empty_cache(config, 1, 4)
    with pytest.raises(ValueError, match="with a cache the positions of the new tokens must be given"):
        jax.eval_shape(lambda params: nnx.merge(graphdef, params)(tokens, cache=cache), abstract)
