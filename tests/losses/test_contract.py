"""One convention for all losses: named inputs, checked before device work, in tables, sums and modules of one's own."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses
from jaxalign.losses import LANGUAGE, OUTCOME, PAIR, POLICY, STEPS, UNPAIRED, select_loss
from jaxalign.losses.contract import SIZES, apply, check_loss, checked
from jaxalign.mistake import Mistake

# (kind, an input of it, one input more that has the shape of the values)
KINDS = {
    "language": (LANGUAGE, "logps", "entropy"),
    "pair": (PAIR, "policy_chosen_logps", "chosen_lengths"),
    "unpaired": (UNPAIRED, "policy_logps", "ref_logps"),
    "outcome": (OUTCOME, "chosen_scores", "rejected_scores"),
    "step": (STEPS, "step_scores", "step_labels"),
    "policy": (POLICY, "logps", "advantages"),
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes lab.py, with a loss `f` of such inputs and such a body."""
    monkeypatch.syspath_prepend(tmp_path)

    def to_file(inputs, body):
        monkeypatch.delitem(sys.modules, "lab", raising=False)
        importlib.invalidate_caches()
        lines = "import jax.numpy as jnp", "", f"def f({', '.join(inputs)}, *, x=1.0):", f"    {body}", ""
        path = tmp_path / "lab.py"
        path.unlink(missing_ok=True)
        path.write_text("\n".join(lines))

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return to_file


@pytest.fixture(params=KINDS)
def own(request):
    """(kind, two of its inputs, the shape of its values)"""
    kind, *inputs = KINDS[request.param]
    return kind, inputs, [SIZES[axis] for axis in kind.axes.split()]


def refusal(text, *kinds):
    with pytest.raises(Mistake) as refused:
        select_loss(text, *kinds)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_loss_of_ones_own_has_the_inputs_that_it_names(own, write):
    kind, (first, second), shape = own
    write([first, second], f"return {first} - x * {second}")
    values = {name: jnp.full(shape, number) for name, number in ((first, 3.0), (second, 1.0), ("other", 9.0))}
    np.testing.assert_array_equal(apply(select_loss("lab:f(x=2.0)", kind), values), jnp.ones(shape))


def test_an_unknown_input_is_named_with_those_that_exist(own, write):
    kind, *_ = own
    write(["tokens"], "return tokens")
    text = refusal("lab:f", kind)
    assert text.startswith("lab:f has an unknown input 'tokens'") and ", ".join(kind.inputs) in text


def test_values_of_another_shape_or_dtype_are_refused(own, write):
    kind, inputs, shape = own
    first = inputs[0]
    for result, described in (
        (f"{first}.mean()", "float32[]"),
        (f"{first}[..., :1]", f"float32{[*shape[:-1], 1]}"),
        (f"{first}.astype(jnp.bfloat16)", f"bfloat16{shape}"),
        (f"{first} > 0", f"bool{shape}"),
        (f"({first}, {first})", "a tuple"),
        ("None", "a NoneType"),
    ):
        write(inputs, f"return {result}")
        text = refusal("lab:f", kind)
        assert text.startswith(f"lab:f returned {described} for {first} float32{shape}, "), text
        assert text.endswith(f"it must return float32{shape}, one value for each element"), text


def test_an_error_inside_a_loss_is_reported_in_one_line(own, write):
    kind, inputs, shape = own
    write(inputs, "raise KeyError('no such\\nthing')")
    text = refusal("lab:f", kind)
    assert text.startswith(f"lab:f fails for {inputs[0]} float32{shape}, ") and ": KeyError: 'no such" in text


def test_a_term_of_a_sum_is_checked_by_itself(write):
    """A mean plus one value per pair is one value per pair."""
    write(["policy_chosen_logps"], "return policy_chosen_logps.mean()")
    assert "lab:f returned float32[]" in refusal("dpo + 0.1*lab:f", PAIR)


@pytest.mark.parametrize("kind", [kind for kind, *_ in KINDS.values()], ids=KINDS)
def test_every_loss_of_a_table_keeps_the_contract(kind):
    for name, loss in kind.losses.items():
        check_loss(loss, kind)
        assert select_loss(name, kind) is loss


def test_losses_of_tokens_add_up():
    logps = jnp.log(jnp.array([[0.25, 0.5]]))
    zeros = jnp.zeros((1, 2))
    mixed = select_loss("cross_entropy(z_loss=0.5) + 0.1*dft", LANGUAGE)
    values = {"logps": logps, "log_normalizer": zeros + 2, "mean_logit": zeros}
    np.testing.assert_allclose(apply(mixed, values), -logps + 0.5 * 4 - 0.1 * jnp.exp(logps) * logps, rtol=1e-6)
    mixed = select_loss("2*ppo_clip(clip_epsilon=0.1) + reinforce", POLICY)
    values = {"logps": logps, "old_logps": logps, "advantages": zeros + 3}
    np.testing.assert_allclose(apply(mixed, values), zeros - 9, rtol=1e-6)


def test_the_kind_of_a_loss_of_reward_models_is_that_of_its_inputs():
    assert select_loss("kwise", OUTCOME, STEPS) is losses.kwise
    assert select_loss("process", OUTCOME, STEPS) is losses.process
    assert "process has an unknown input 'step_scores'" in refusal("bradley_terry + process", OUTCOME, STEPS)


def test_every_loss_is_in_one_namespace_and_has_a_name_of_its_own():
    tables = [kind.losses for kind, *_ in KINDS.values()]
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    for table in tables:
        for name, loss in table.items():
            assert getattr(losses, name) is loss


def test_a_hyperparameter_that_cannot_be_is_refused_before_a_step():
    assert refusal("robust(label_smoothing=0.7)", PAIR).startswith("label_smoothing=0.7 must be in [0, 0.5)")


def test_values_are_checked_where_a_program_is_traced():
    def total(logps):
        return logps.sum()

    with pytest.raises(Mistake, match=r"total returned float32\[\] for logps float32\[2, 3\]; it must return float32"):
        jax.jit(lambda logps: checked(total, {"logps": logps}, (2, 3)))(jnp.zeros((2, 3)))
