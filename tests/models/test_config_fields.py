"""Every field of every family's config: its value means what it means to transformers, or is refused by its name."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign.mistake import Mistake
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import FAMILIES, MODEL_TYPES, model_config
from jaxalign.models.files.huggingface import read_config
from jaxalign.models.files.load import load_params
from tests.models.tiny import TINY, hf_config

NAMES = {TINY[name]["model_type"]: name for name in reversed(TINY)}  # the first of each family
TOKENS = np.random.default_rng(0).integers(3, 67, (1, 12))
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}
# Other values for many fields at once, which must give transformers' logits.
BIASED = {"attention_bias": True, "hidden_act": "gelu_new", "initializer_range": 0.1, "num_key_value_heads": 1}
SLIDING = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}
GEMMA = {
    "attention_bias": True,
    "hidden_activation": "gelu",
    "hidden_act": "relu",  # which no Gemma since the second reads
    "query_pre_attn_scalar": 9,
    "final_logit_softcapping": 1.5,
    "sliding_window": 3,
    "head_dim": 8,
}
CHANGED = {
    "llama": {
        **BIASED,
        "mlp_bias": True,
        "head_dim": 16,
        "rms_norm_eps": 0.01,
        "rope_scaling": LINEAR,
        "rope_parameters": {"rope_theta": 7.0},  # the older name wins
    },
    "mistral": {"sliding_window": 3, "head_dim": 8, "rope_theta": 100.0, "hidden_act": "relu", "rms_norm_eps": 0.01},
    "qwen2": {**SLIDING, "hidden_act": "gelu", "head_dim": 16, "rope_scaling": {**LINEAR, "type": "default"}},
    "qwen3": {
        **SLIDING,
        **BIASED,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gemma2": {**GEMMA, "attn_logit_softcapping": None, "layer_types": ["full_attention"] * 3},
    "gemma3_text": {
        **GEMMA,
        "layer_types": None,
        "sliding_window_pattern": 2,
        "rope_parameters": None,
        "rope_theta": 77.0,
        "rope_local_base_freq": 33.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "olmo2": {**BIASED, "head_dim": 16, "rms_norm_eps": 0.01, "rope_parameters": {"factor": 2.0, "type": "linear"}},
    "phi3": {
        "partial_rotary_factor": 0.5,
        "sliding_window": 3,
        "head_dim": 16,
        "rope_theta": 99.0,
        "hidden_act": "gelu",
    },
    "gpt2": {"activation_function": "relu", "layer_norm_epsilon": 0.01, "n_inner": 40, "tie_word_embeddings": False},
    "gpt_neox": {
        "rotary_pct": 0.25,
        "rotary_emb_base": 50,
        "rope_theta": 9.0,  # which no GPT-NeoX reads
        "use_parallel_residual": False,
        "hidden_act": "relu",
        "layer_norm_eps": 0.01,
        "attention_bias": False,
    },
}
# Values for fields of any kind; transformers is tried with the last that has the right kind and changes nothing here.
VALUES = (None, "text", [], {}, [3], {"a": 1}, -1, 10**30, float("nan"), 2.5, 7, 0.5, True)
OTHERS = {
    "hidden_act": ("quick_gelu", "tanh", 3),
    "layer_types": (["sliding_attention"] * 3, ["chunked_attention"] * 3, ["full_attention"]),
    "rope_scaling": ({"type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": 3}),
    "rope_parameters": ({"full_attention": LINEAR}, {**LINEAR, "factor": 0}, {**LINEAR, "partial_rotary_factor": 0.5}),
    "sliding_window": (3,),
    "attn_logit_softcapping": (1.5,),
    "quantization_config": ({"quant_method": "fp8"},),
    "per_layer_config": ({"0": {"num_attention_heads": 2}},),
    "is_causal": (False,),
    "use_bidirectional_attention": (True,),
    "logit_scale": (0.5,),
    "rope_theta": (),
    "partial_rotary_factor": (0.5,),
    "head_dim": (7,),
}


def theirs(values, folder=None):
    """transformers' logits with parameters drawn from a seed; the checkpoint is written where a folder is given."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**json.loads(json.dumps(values)))
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn_like(parameter))
        if folder is not None:
            model.save_pretrained(folder)
        return model(torch.tensor(TOKENS), use_cache=False).logits.numpy()


def family(kind, **changes):
    """(config.json of a tiny model, the same without its architecture)."""
    values = {**TINY[NAMES[kind]], **changes}
    return {"architectures": [MODEL_TYPES[kind]], **values}, values


@pytest.mark.parametrize("kind", NAMES)
def test_many_fields_at_once_give_the_logits_of_transformers(kind, tmp_path):
    pytest.importorskip("torch")
    hf, values = family(kind, **CHANGED[kind])
    expected = theirs(values, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf))  # as people have it, and not as transformers writes it
    config = read_config(str(tmp_path))
    graphdef, _ = make_decoder(config)

    @jax.jit
    def forward(params):
        model = nnx.merge(graphdef, params)
        unembedding = model.unembed()
        logits = model(jnp.asarray(TOKENS)) @ unembedding.weight.T
        return logits if unembedding.softcap is None else unembedding.softcap * jnp.tanh(logits / unembedding.softcap)

    np.testing.assert_allclose(forward(load_params(str(tmp_path), config)), expected, atol=2e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", NAMES)
def test_each_field_is_read_or_changes_nothing_in_transformers_or_is_refused_by_name(kind):
    pytest.importorskip("torch")
    from transformers import CONFIG_MAPPING

    fields = {field.name: field for field in dataclasses.fields(CONFIG_MAPPING[kind])}
    hf, values = family(kind)
    before, without_effect = model_config(hf), {}
    wrong = []
    for key in sorted({*fields, *OTHERS} - {"architectures", "model_type", "dtype"}):
        for value in (*VALUES, *OTHERS.get(key, ())):
            try:
                after = model_config({**hf, key: value})
            except Mistake as mistake:
                text = str(mistake)
                wrong += [] if key in text and "\n" not in text and len(text) < 400 else [(key, value, text)]
                continue
            # the sizes of the context and of initial weights are no part of the function
            sizes = {"max_length": before.max_length, "initializer_range": before.initializer_range}
            if dataclasses.replace(after, **sizes) == before and _of_its_kind(fields.get(key), value):
                without_effect[key] = value
    assert not wrong
    accepted = {key: value for key, value in without_effect.items() if _accepted({**values, key: value})}
    assert {"use_cache", "bos_token_id"} <= set(accepted)
    np.testing.assert_allclose(theirs({**values, **accepted}), theirs(values), atol=1e-5)


def _accepted(values):
    from transformers import AutoConfig

    try:
        AutoConfig.for_model(**json.loads(json.dumps(values)))
    except Exception:  # of many classes
        return False
    return True


def _of_its_kind(field, value):
    """True if transformers may take the value: it checks the kinds of the fields that it has."""
    kinds = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict}
    return any((field is None or name in str(field.type)) and type(value) is kind for name, kind in kinds.items())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"architectures": {"a": 1}}, "'architectures' is {'a': 1}; it must be a list"),
        ({"architectures": [3]}, "'architectures' holds 3; it must hold texts"),
        ({"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1000000000; it must be from 1 to 10,000"),
        ({"hidden_size": 10**12}, "'hidden_size' is 1000000000000; it must be from 1 to 16,777,216"),
        ({"hidden_size": 2**24, "vocab_size": 2**24, "head_dim": 8}, "implies a matrix of 16,777,216 x 16,777,216"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' is false; it must be true or false"),
        ({"rms_norm_eps": "1e-5"}, "'rms_norm_eps' is 1e-5; it must be a number"),
        ({"rope_scaling": [1]}, "'rope_scaling' is [1]; it must be an object"),
        ({"hidden_act": "\x1b[31m" + "x" * 999}, r"'\\x1b[31mxxx"),
    ],
)
def test_a_damaged_config_is_named_in_one_line(change, message):
    with pytest.raises(Mistake) as raised:
        model_config({**hf_config("llama"), **change})
    assert message in str(raised.value) and "\n" not in str(raised.value) and "\x1b" not in str(raised.value)


def test_keys_that_nothing_reads_are_logged(caplog):
    caplog.set_level("INFO")
    model_config({**hf_config("llama"), "partial_rotary_factor": 0.5, "surprise": 1, "use_cache": False}, "this config")
    assert [record.getMessage() for record in caplog.records] == [
        "this config: nothing reads partial_rotary_factor, surprise"
    ]


def test_all_families_are_tried():
    assert {MODEL_TYPES[kind] for kind in NAMES} == set(FAMILIES) and set(CHANGED) == set(NAMES)


def test_a_model_type_of_another_family_is_refused():
    with pytest.raises(Mistake, match="'model_type' is mistral, and 'architectures' names LlamaForCausalLM"):
        model_config(hf_config("llama") | {"model_type": "mistral"})


@pytest.mark.parametrize("eps", [-1e-5, None])
def test_an_epsilon_that_no_norm_has_is_refused(eps):
    with pytest.raises(Mistake, match=r"'rms_norm_eps' is .*; it must be a number of at least 0"):
        model_config(hf_config("llama") | {"rms_norm_eps": eps})
