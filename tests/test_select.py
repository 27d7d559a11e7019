import pytest

from jaxalign.select import names_own_code, select, select_sum


def ipo(x, *, beta=0.1):
    return x * beta


TABLE = {"ipo": ipo}


def test_a_bare_name_is_the_function_itself():
    assert select("ipo", TABLE) is ipo


def test_keywords_are_bound():
    assert select("ipo(beta=0.5)", TABLE)(4.0) == 2.0


def test_a_function_of_any_module_can_be_named():
    assert select("math:sqrt", TABLE)(9.0) == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ipoo", "did you mean 'ipo'"),
        ("ipo(bta=1)", "has no keyword 'bta' .did you mean 'beta'"),
        ("ipo(beta=__import__('os'))", "literal values"),
        ("ipo(0.5)", "form name"),
        ("ipo(beta=0.5", "form name"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("math:sqroot", "has no function 'sqroot'"),
    ],
)
def test_a_mistake_is_named_with_the_way_out(text, message):
    with pytest.raises(ValueError, match=message):
        select(text, TABLE)


def test_a_sum_is_its_weighted_terms():
    terms = select_sum("ipo(beta=0.5) + 0.2*ipo + 1e+1 * math:sqrt", TABLE)
    assert [weight for weight, _ in terms] == [1.0, 0.2, 10.0]
    assert terms[0][1](4.0) == 2.0 and terms[1][1] is ipo and terms[2][1](9.0) == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ipo + 0.2*sftt", "unknown name 'sftt'"),
        ("ipo + ipo(bta=1)", "has no keyword 'bta'"),
        ("ipo*0.2", "'ipo' is not a finite number; a weight stands before"),
        ("nan*ipo", "'nan' is not a finite number"),
        ("ipo + -inf * ipo", "'-inf' is not a finite number"),
        ("1e999*ipo", "'1e999' is not a finite number"),
        ("ipo + 0.2*", "term without a function"),
        ("ipo +", "term without a function"),
        ("ipo(beta=(1", "form name"),
    ],
)
def test_a_mistake_in_a_sum_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        select_sum(text, TABLE)


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("dpo(beta=0.1) + 0.2*sft", False),
        ('regex(pattern="a:b + c:d")', False),
        ("reward_model(path='C:/models', rule='min')", False),
        ("dpo(x='+a:b", False),
        ("os:system", True),
        ("dpo + 0.2*my.losses:mine(x=1)", True),
        (" my.losses:mine", True),
        ("2*a:b", True),
        ("length(target=3) + 2*reward_model(path='m', rule='os:system')", True),
    ],
)
def test_code_of_a_users_own_is_told_from_names_of_the_table(text, own):
    assert names_own_code(text) is own
