"""`precision` float32 is the precision of every product: on TPUs and GPUs one that names none is rounded first."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxalign.commands import COMMANDS
from jaxalign.models.adapters.lora import Lora
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files.families import model_config
from jaxalign.ops.logprobs import next_token_logps
from jaxalign.rollout.engine import slots
from jaxalign.rollout.engine.params import decoding_params
from jaxalign.rollout.engine.slots import Admitted, Sampling
from tests.models.tiny import hf_config
from tests.observed import observe
from tests.settings.cases import BASES, EVERYWHERE, TRAINING, config_of

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2


def products(jaxpr):
    """(dtypes of the operands, precision) of every product, those inside loops and kernels too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield {str(x.aval.dtype) for x in equation.invars}, equation.params["precision"]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            yield from products(inner) if hasattr(inner, "eqns") else ()


def check(function, *arguments, precision="float32"):
    """Requires the highest precision of float32 products, and the default of the others, of which some must exist."""
    of_function = list(products(jax.make_jaxpr(function)(*arguments).jaxpr))
    assert any(precision in dtypes for dtypes, _ in of_function)
    wrong = [(dtypes, by) for dtypes, by in of_function if (by == HIGHEST) != (dtypes == {"float32"})]
    assert not wrong, wrong


@pytest.mark.parametrize(("command", "precision"), [*((name, "float32") for name in TRAINING), ("sft", "bfloat16")])
def test_a_step_rounds_no_operand_of_a_product_in_float32(command, precision, files, monkeypatch):
    config = config_of(COMMANDS[command].config, EVERYWHERE | BASES[command] | {"precision": precision}, files)
    observed = observe(config, monkeypatch)
    program = observed.program
    check(program.step, program.like, program.frozen, observed.batch, precision=precision)


def abstract(family, precision, **options):
    """(graphdef, abstract params) of a tiny model whose heads are wide enough for every kernel."""
    config = model_config(hf_config(family) | {"head_dim": 64})
    return make_decoder(config, compute_dtype=jnp.dtype(precision), **options)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])  # which caps its logits, so attention is another
def test_neither_does_decoding(family, precision):
    graphdef, params = abstract(family, precision)
    sampling, tokens = Sampling(max_new_tokens=8, terminators=(2,)), jnp.ones((1, 8), jnp.int32)

    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)

    def decode(params, decoding):
        room = {"slots": 2, "prompt": 8, "response": 8, "cache_dtype": None}
        empty = slots.empty_slots(graphdef, params, sampling=sampling, **room)
        one = jnp.ones(1, jnp.int32)
        new = Admitted(tokens, tokens > 0, one, one - 1, jax.random.split(jax.random.key(0), 1), one)
        return slots.decode(graphdef, decoding, slots.admit(graphdef, decoding, empty, new), 3, 8, sampling=sampling)

    check(decode, params, decoding_params(graphdef, params, layout=None), precision=precision)


@pytest.mark.parametrize(
    "options", [{"attention": "splash"}, {"quantise": "int8"}, {"quantise": "nf4"}, {"dora": True}]
)
def test_nor_do_kernels_adapters_and_quantised_weights(options):
    if options.pop("dora", False):
        options["lora"] = Lora(rank=2, alpha=2.0, targets=("attention/query",), dora=True)
    graphdef, params = abstract("llama", "float32", **options)
    tokens = jnp.ones((1, 128), jnp.int32)

    def loss(params):
        model = nnx.merge(graphdef, params)
        return jnp.sum(next_token_logps(model(tokens), model.unembed(), tokens, implementation="pallas").logps)

    check(jax.grad(loss, allow_int=True), params)
