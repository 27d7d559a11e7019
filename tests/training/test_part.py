"""One law for every `Part`: `assemble(init(key, like, frozen), load(like))` is the tree that is saved, leaf by leaf."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxalign.config.offline import RewardConfig, SFTConfig
from jaxalign.config.on_policy import PPOConfig
from jaxalign.config.shared import LoraConfig
from jaxalign.models import heads
from jaxalign.models.adapters.lora import split
from jaxalign.models.decoder.decoder import decoder_for
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.models.files.reward import DESCRIPTION
from jaxalign.models.files.save import save_pretrained
from jaxalign.models.places import make_mesh
from jaxalign.training import part, sharding
from jaxalign.types import leaf_names

KEY = jax.random.key(3)
ADAPTERS = LoraConfig(rank=2, targets="q_proj", dora=True)
QUANTISED = dataclasses.replace(ADAPTERS, quantise="int8")


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def model(tiny_model):
    return huggingface.read_config(str(tiny_model))


@pytest.fixture(scope="module")
def loaded(tiny_model, model):
    """The weights of the folder."""
    return load_params(str(tiny_model), model, param_dtype="float32")


@pytest.fixture(scope="module")
def other_model(tiny_model, model, loaded, tmp_path_factory):
    """A folder of the same architecture with other weights, and them."""
    folder, weights = tmp_path_factory.mktemp("other") / "model", jax.tree.map(lambda x: x + 1, loaded)
    save_pretrained(folder, weights, model, huggingface.read_hf_config(str(tiny_model)))
    return str(folder), weights


@pytest.fixture
def config_of(tiny_model, tmp_path):
    def config_of(kind, **settings):
        return kind(**{"model": str(tiny_model), "data": "rows.jsonl", "output": tmp_path, **settings})

    return config_of


def assembled(whole, mesh):
    """The parameters of a part as its run sees them at step 0."""
    frozen = None if whole.frozen is None else whole.load(sharding.placed(whole.frozen, mesh))
    trained = whole.init(KEY, sharding.placed(whole.trained, mesh), frozen)
    assert described(trained) == described(whole.trained)
    return whole.assemble(trained, frozen)


def described(tree):
    """Name, shape and dtype of every leaf."""
    leaves = zip(jax.tree.leaves(leaf_names(tree)), jax.tree.leaves(tree), strict=True)
    return {name: (leaf.shape, jnp.dtype(leaf.dtype)) for name, leaf in leaves}


def assert_equal(tree, expected):
    assert described(tree) == described(expected)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), tree, expected)


def shapes(config, model, mesh, lora=None):
    return decoder_for(config, model, mesh, lora)[1]


def test_a_part_has_at_most_seven_fields():
    assert len(part.Part._fields) <= 7


def test_a_whole_language_model_is_the_loaded_one(config_of, model, loaded, mesh):
    config = config_of(SFTConfig)
    policy = part.language_model(config, model, mesh)
    params = assembled(policy, mesh)
    assert policy.frozen is None and described(params) == described(shapes(config, model, mesh))
    assert_equal(params, loaded)


@pytest.mark.parametrize("lora", [ADAPTERS, QUANTISED], ids=["plain", "quantised"])
def test_adapters_lie_on_the_loaded_base_and_their_copy_is_that_base(config_of, model, tiny_model, mesh, lora):
    config = config_of(SFTConfig, lora=lora)
    policy = part.language_model(config, model, mesh)
    params = assembled(policy, mesh)
    assert described(params) == described(shapes(config, model, mesh, part.lora_of(lora, model)))
    base, adapter = split(params)
    expected = load_params(str(tiny_model), model, param_dtype="float32", quantise=lora.quantise)
    assert_equal(base, expected)
    assert described(adapter) == described(policy.trained)
    reference = part.frozen_copy(config, model, mesh, policy)
    assert described(reference.frozen) == described(shapes(config, model, mesh))
    assert_equal(assembled(reference, mesh), expected)


def test_a_frozen_copy_is_the_loaded_model_or_that_of_another_folder(config_of, model, loaded, other_model, mesh):
    config, (folder, weights) = config_of(SFTConfig), other_model
    policy = part.language_model(config, model, mesh)
    for source, expected in ((None, loaded), (folder, weights)):
        reference = part.frozen_copy(config, model, mesh, policy, source)
        assert reference.trained == () and reference.flops == 0
        params = assembled(reference, mesh)
        assert described(params) == described(shapes(config, model, mesh))
        assert_equal(params, expected)


@pytest.mark.parametrize("freeze_trunk", [False, True])
def test_a_scorer_is_heads_on_the_loaded_trunk(config_of, model, loaded, mesh, freeze_trunk):
    config = config_of(RewardConfig, members=3, freeze_trunk=freeze_trunk)
    scorer = part.scorer(config, model, mesh)
    assert set(scorer.trained) == ({"head"} if freeze_trunk else {"head", "model"})
    params = assembled(scorer, mesh)
    assert described({"head": params["head"]}) == {"head": ((3, model.hidden_size), jnp.float32)}
    assert described(params["model"]) == described(shapes(config, heads.trunk_config(model), mesh))
    assert_equal(params["model"], loaded)


def test_a_scorer_with_adapters_has_a_stack_of_them_beside_the_loaded_base(config_of, model, loaded, mesh):
    config = config_of(RewardConfig, members=3, lora=ADAPTERS)
    trunk = heads.trunk_config(model)
    params = assembled(part.scorer(config, model, mesh), mesh)
    assert set(params) == {"head", "members", "model"} and params["head"].shape == (3, model.hidden_size)
    _, adapter = split(shapes(config, trunk, mesh, part.lora_of(ADAPTERS, trunk)))
    stacked = {name: ((3, *shape), dtype) for name, (shape, dtype) in described(adapter).items()}
    assert described(params["members"]) == stacked
    assert_equal(params["model"], loaded)


def test_a_shared_critic_is_a_head_of_zeros(config_of, model, mesh):
    config = config_of(PPOConfig)
    config = dataclasses.replace(config, critic=dataclasses.replace(config.critic, shared=True))
    policy = part.language_model(config, model, mesh)
    assert_equal(assembled(part.critic(config, model, mesh, policy), mesh), zero_head(model))


def test_an_adapted_critic_is_a_head_of_zeros_and_adapters_on_the_base_of_the_policy(config_of, model, loaded, mesh):
    config = config_of(PPOConfig, lora=ADAPTERS)
    policy = part.language_model(config, model, mesh)
    both = part.beside(policy, part.critic(config, model, mesh, policy))
    params = assembled(both, mesh)
    whole = shapes(config, model, mesh, part.lora_of(ADAPTERS, model))
    assert described(params) == described({"policy": whole, "critic": zero_head(model) | {"model": whole}})
    assert_equal({name: params["critic"][name] for name in ("head", "bias")}, zero_head(model))
    assert_equal(split(params["policy"])[0], loaded)
    assert_equal(split(params["critic"]["model"])[0], loaded)


def test_a_critic_from_a_language_model_is_a_head_of_zeros_on_its_trunk(config_of, model, loaded, other_model, mesh):
    config, (folder, weights) = config_of(PPOConfig), other_model
    policy = part.language_model(config, model, mesh)
    for source, expected in ((None, loaded), (folder, weights)):
        critic = part.critic(config, model, mesh, policy, source=source)
        params = assembled(part.beside(policy, critic), mesh)
        assert_equal(params, {"policy": loaded, "critic": zero_head(model) | {"model": expected}})


@pytest.mark.parametrize("biases", [(), (4.0, 8.0)])
def test_a_critic_from_a_reward_model_starts_at_its_normalised_scores_and_a_scorer_with_its_heads(
    config_of, model, tiny_model, other_model, mesh, tmp_path, biases
):
    """The mean over members of (h · head + b - mean) / std is one head, and one bias, Σ (b - mean) / std / 2."""
    width, (_, weights), folder = model.hidden_size, other_model, tmp_path / "reward"
    members = np.stack([np.arange(width), np.ones(width)]).astype(np.float32)
    biased = np.concatenate([members, np.reshape(biases, (2, -1))], axis=1).astype(np.float32)

    def write_members(partial):
        (partial / "members").mkdir()
        save_file({"heads": biased}, partial / "members" / "heads.safetensors")

    hf_config = huggingface.read_hf_config(str(tiny_model)) | {
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "reward"},
        "label2id": {"reward": 0},
    }
    description = {"members": 2, "rule": "mean", "mean": [1.0, 3.0], "std": [2.0, 4.0], "as_chat": False}
    description |= {"max_length": 16}
    save_pretrained(
        folder,
        weights,
        model,
        hf_config,
        extra={DESCRIPTION: description},
        head=biased.mean(axis=0, keepdims=True),
        besides=write_members,
    )
    scorer = part.scorer(config_of(RewardConfig, model=str(folder), members=2), model, mesh)
    assert_equal(assembled(scorer, mesh), {"head": biased, "model": weights})
    config = config_of(PPOConfig)
    policy = part.language_model(config, model, mesh)
    params = assembled(part.critic(config, model, mesh, policy, source=str(folder)), mesh)
    head = (members[:1] / 2 + members[1:] / 4) / 2
    bias = ((4 / 2 + 8 / 4 if biases else 0) - (0.5 + 0.75)) / 2
    expected = {"head": head, "bias": np.array([bias], np.float32), "model": weights}
    assert_equal(params, expected)


def zero_head(model):
    return {"head": np.zeros((1, model.hidden_size), np.float32), "bias": np.zeros(1, np.float32)}
