"""One convention for all losses: named inputs, checked before device work, in tables, sums and modules of one's own."""

import importlib
import inspect
import sys
from typing import Annotated, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses
from jaxalign.config.limits import Limit, between
from jaxalign.losses import LANGUAGE, OUTCOME, PAIR, POLICY, STEPS, UNPAIRED, select_loss
from jaxalign.losses.contract import SIZES, apply, check_loss, checked, needs_reference, needs_whole_batch
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
    setting, _, text = str(refused.value).partition(": ")
    assert setting == "`algorithm.loss`" and "\n" not in text
    return text


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("robust(label_smoothing=0.7)", "robust: label_smoothing=0.7 must be at least 0 and below 0.5"),
        ("dpo(label_smoothing=5)", "dpo: label_smoothing=5 must be at least 0 and at most 0.5"),
        ("dpo(beta=-1)", "dpo: beta=-1 must be above 0"),
        ("dpo(beta=0)", "dpo: beta=0 must be above 0"),
        ("dpo(beta=inf)", "dpo: beta=inf must be a finite number"),
        ("dpo(beta=1e999)", "dpo: beta=inf must be a finite number"),
        ("dpo(beta=1e300)", "dpo: beta=1e+300 must be a finite number, at most 3.4028234e+38"),
        ("ipo(beta=nan)", "ipo: beta=nan must be above 0"),
        ("dpo(beta='text')", "dpo: beta='text' must be a number"),
        ("dpo(beta=[0.1])", "dpo: beta=[0.1] must be a number"),
        ("dpo(beta=True)", "dpo: beta=True must be a number"),
        ("dpo(beta=None)", "dpo: beta=None must be a number"),
        ("ipo(average=1)", "ipo: average=1 must be True or False"),
        ("wpo(max_weight='1')", "wpo: max_weight='1' must be a number or None"),
        ("sft + aot(beta=-1)", "aot: beta=-1 must be above 0"),
        ("0*dpo", "dpo has the weight 0, which must be above 0"),
        ("dpo + -0.2*sft", "sft has the weight -0.2, which must be above 0"),
        ("1e-400*dpo", "dpo has the weight 0, which must be above 0"),
        (f"dpo(beta={'[' * 100_000}", "'dpo(beta=[[["),
    ],
)
def test_a_hyperparameter_that_cannot_be_is_refused_before_a_step(text, message):
    assert refusal(text, PAIR).startswith(message)


@pytest.mark.parametrize("kind", [kind for kind, *_ in KINDS.values()], ids=KINDS)
def test_every_number_of_a_loss_of_a_table_has_a_range_that_holds_its_default(kind):
    for name, loss in kind.losses.items():
        hints = get_type_hints(loss, include_extras=True)
        for keyword, parameter in inspect.signature(loss).parameters.items():
            if parameter.kind is not parameter.KEYWORD_ONLY or hints[keyword] is bool:
                continue
            assert any(isinstance(mark, Limit) for mark in hints[keyword].__metadata__), (name, keyword)
            select_loss(f"{name}({keyword}={parameter.default!r})", kind)
            for text in ("-1", "1e999", "nan", "'a'", "[1]", "{}", "True"):
                assert refusal(f"{name}({keyword}={text})", kind).startswith(f"{name}: {keyword}=")


def test_a_keyword_of_ones_own_loss_has_the_type_and_limits_of_its_annotation(write):
    write(["policy_chosen_logps"], "return x * policy_chosen_logps")
    assert refusal("lab:f(x='a')", PAIR).startswith("lab:f fails for policy_chosen_logps")  # no annotation: it is tried
    assert refusal("tests.losses.test_contract:annotated(x=2)", PAIR).endswith("x=2 must be at least 0 and at most 1")
    assert refusal("tests.losses.test_contract:annotated(x='a')", PAIR).endswith("x='a' must be a number")


def test_the_momentum_of_ones_own_loss_is_a_share():
    text = "tests.losses.test_contract:running"
    assert select_loss(f"{text}(momentum=0.5)", PAIR) and select_loss(text, PAIR)
    for value in ("1", "-0.1", "'a'"):
        assert f"momentum={value} must be at least 0 and below 1" in refusal(f"{text}(momentum={value})", PAIR)


def running(policy_chosen_logps, running_margin, *, momentum=None):
    return policy_chosen_logps - running_margin


def annotated(policy_chosen_logps, *, x: Annotated[float, between(0, 1)] = 0.5):
    return x * policy_chosen_logps


def test_a_loss_of_log_ratios_needs_a_reference(write):
    """Also where it names no log-probability of the reference itself."""
    for kind, inputs in (
        (PAIR, ["policy_chosen_logps", "mean_margin"]),
        (PAIR, ["policy_chosen_logps", "running_log_ratio"]),
        (UNPAIRED, ["policy_logps", "kl"]),
        (UNPAIRED, ["policy_logps", "mean_desirable_log_ratio"]),
    ):
        write(inputs, f"return {' + '.join(inputs)}")
        assert needs_reference(select_loss("lab:f", kind))
    write(["policy_chosen_logps", "mean_chosen_length"], "return policy_chosen_logps / mean_chosen_length")
    assert not needs_reference(select_loss("lab:f", PAIR))


def test_a_loss_that_sorts_is_refused_where_batches_come_in_parts(write):
    for kind, first, _ in KINDS.values():
        write([first], f"return {first}\n\nf.whole_batch = True")
        if kind is PAIR:
            assert needs_whole_batch(select_loss("lab:f", kind))
        else:
            assert refusal("lab:f", kind).startswith("lab:f is marked @whole_batch")


def test_values_are_checked_where_a_program_is_traced():
    def total(logps):
        return logps.sum()

    with pytest.raises(Mistake, match=r"total returned float32\[\] for logps float32\[2, 3\]; it must return float32"):
        jax.jit(lambda logps: checked(total, {"logps": logps}, (2, 3)))(jnp.zeros((2, 3)))
