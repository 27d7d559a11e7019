"""Rewards: the scores of each function, sums, the data's columns, and every way to be wrong."""

import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxalign.mistake import Mistake
from jaxalign.rollout.rewards.functions import REWARDS
from jaxalign.rollout.rewards.rewards import RewardError, Rewards


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("so it is 18", "a + b = 18\n#### 18", 1),
        ("#### 1,234\nor 7", "#### 1234", 1),
        ("12 then 18.0", "18", 1),
        ("costs $18", "#### 18", 1),
        ("-18", "18", 0),
        ("none", "18", 0),
        ("so it is 18.0", 18, 1),
        ("so it is 0.00001", 1e-05, 1),
        ("none", 18, 0),
    ],
)
def test_numbers_match_as_gsm8k_writes_them(response, answer, score):
    assert REWARDS["numeric_match"](["?"], [response], answer=[answer]) == [score]


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        (".5", "5"),
        ("1e3", "3"),
        ("−5", "5"),
        ("-.25", "25"),
        ("3/4", "4"),
        ("1 000", "0"),
        ("9007199254740992", "9007199254740993"),
        (9007199254740992, "9007199254740993"),
        ("50%", "0.5"),
        ("1/3", "0.333"),
    ],
)
def test_another_number_does_not_match(answer, response):
    assert REWARDS["numeric_match"]("?", [response], answer=[answer]) == [0]


@pytest.mark.parametrize(
    ("answer", "response"),
    [
        (".5", "0.5"),
        ("0.5", r"\boxed{\frac{1}{2}}"),
        (0.1, "1/10"),
        ("1e3", "1,000"),
        ("−5", "-5.0"),
        ("50%", r"50\%"),
        (r"so it is \boxed{-\dfrac{3}{4}\text{ cm}}", "-0.75"),
        (1e22, "10^22"),
    ],
)
def test_the_same_number_matches_however_it_is_written(answer, response):
    assert REWARDS["numeric_match"]("?", [response], answer=[answer]) == [1]


@pytest.mark.parametrize(
    "answer", ["n/a", "", "(3, 4)", r"2\sqrt{3}", "#### none", float("nan"), float("inf"), "\x1b[2J"]
)
def test_an_answer_that_no_number_can_match_is_named_before_anything_is_drawn(answer):
    with pytest.raises(Mistake, match=r"^the reward numeric_match: prompt 2, '2 \+ 2\?': `answer` holds .*no number"):
        Rewards("numeric_match").check(["1 + 1?", "2 + 2?"], {"answer": ["#### 1,234", answer]})


def test_counts_of_tokens_in_the_data_are_whole_numbers():
    rewards, columns = Rewards("overlong(max_length=4, buffer=2)"), {"tokens": ["many"]}
    rewards.check(["?"], columns, later=["tokens"])
    with pytest.raises(
        Mistake, match="the reward overlong: prompt 1, '\\?': `tokens` holds 'many'; it must be a whole"
    ):
        rewards.check(["?"], columns)


@pytest.mark.parametrize("name", ["numeric_match", "exact_match"])
@pytest.mark.parametrize("answer", [None, True, ["4"]])
def test_a_row_without_an_answer_is_named_before_anything_is_drawn(name, answer):
    message = re.escape(f"the reward {name}: prompt 2, '2 + 2?': `answer` holds {answer!r}; it must be a text or a")
    rewards = Rewards(f"0.5*{name}")
    rewards.check(["1 + 1?", "2 + 2?"], {"answer": [2, "4"]})
    with pytest.raises(ValueError, match=message):
        rewards.check(["1 + 1?", "2 + 2?"], {"answer": [2, answer]})


def test_what_the_other_rewards_say(tmp_path):
    responses = ["yes ", "no", '{"a": 1}']
    assert REWARDS["exact_match"]("???", responses, answer=["yes", "yes", "x"]) == [1, 0, 0]
    assert REWARDS["exact_match"]("?", ["4 "], answer=[4]) == [1]
    assert REWARDS["regex"]("???", responses, pattern=r"^y|n.$") == [1, 1, 0]
    assert REWARDS["json_schema"]("???", responses, required=["a"]) == [0, 0, 1]
    deep, large, constant = "[" * 100_000, f'{{"a": {"9" * 5000}}}', '{"a": NaN}'
    assert REWARDS["json_schema"]("????", [deep, large, constant, "[]"], required=["a"]) == [0, 1, 0, 0]
    assert REWARDS["length"]("??", ["a b c", "a"], target=2) == [-0.5, -0.5]
    penalties = REWARDS["overlong"]("????", responses, tokens=[6, 8, 9, 12], max_length=10, buffer=4)
    assert penalties == [0, -0.5, -0.75, -1]  # DAPO's eq. 13
    (tmp_path / "words.txt").write_text("good\t1.5\tmore\nbad\t-2.0\n")
    path = str(tmp_path / "words.txt")
    assert REWARDS["lexicon"]("??", ["Good, good dog", "not bad"], path=path) == [3.0, -2.0]


def test_a_sum_is_weighted_and_columns_go_to_those_who_name_them():
    rewards = Rewards("0.5*tests.commands.rewards:answered(worth=4.0) + tests.commands.rewards:dogs")
    scores = rewards(["?", "?"], ["a dog", "a cat"], {"answer": ["dog", "dog"], "other": [1, 2]})
    np.testing.assert_allclose(scores, [2.5, 0.0])
    assert scores.dtype == np.float32


@pytest.mark.parametrize("what", ["numpy bool", "numpy half", "jax scalar", "jax bool", "jax bfloat16"])
def test_a_score_is_a_number_of_any_library(what):
    assert Rewards(f"tests.commands.rewards:gives(what={what!r})")(["?"], ["a"], {}).tolist() == [1.0]


@pytest.mark.parametrize(
    ("what", "shown"),
    [
        ("complex", "1j"),
        ("numpy complex", "np.complex64(1+0j)"),
        ("jax complex", "Array("),
        ("huge integer", "1000000000"),
        ("beyond float32", "1e+39"),
        ("text", "'1.0'"),
        ("several", "[1.0]"),
        ("nothing", "None"),
    ],
)
def test_what_is_not_one_real_number_of_float32_is_no_score(what, shown):
    with pytest.raises(RewardError, match=re.escape(f"the reward gives gave {shown}")) as raised:
        Rewards(f"tests.commands.rewards:gives(what={what!r})")(["?"], ["a"], {})
    assert str(raised.value).endswith(" for response 0; a score must be a finite number in float32")


def test_rewards_that_add_up_to_more_than_float32_holds_are_refused():
    with pytest.raises(RewardError, match=r"the scores of response 0 add up to 6e\+38; a float32 holds 3.4e\+38"):
        Rewards("2*tests.commands.rewards:huge")(["?"], ["a"], {})


def test_what_is_awaited_is_a_reward_like_others_and_single_responses_are_judged_at_once():
    rewards = Rewards("tests.commands.rewards:asked + 10*tests.commands.rewards:asked_each")
    began = time.monotonic()
    scores = rewards(["?"] * 50, ["a dog", "a cat"] * 25, {"answer": ["dog"] * 50, "response": ["x"] * 50})
    assert time.monotonic() - began < 10  # one after the other they would take 25 s
    np.testing.assert_allclose(scores, [15.0, 5.0] * 25)


def test_terms_are_told_apart_by_name():
    rewards = Rewards("2*length(target=2) + length(target=4) + tests.commands.rewards:dogs")
    scores = rewards.scores_by_function(["?"], ["a dog"], {})
    assert {name: values.tolist() for name, values in scores.items()} == {
        "length": [0.0],
        "length_2": [-0.5],
        "dogs": [0.5],
    }
    assert rewards.weighted_sum(scores).tolist() == [0.0]


def test_a_reward_that_hangs_does_not_keep_the_process_from_its_end():
    code = (
        "from jaxalign.rollout.rewards.rewards import Rewards\n"
        "try: Rewards('tests.commands.rewards:hangs(seconds=300.0)', seconds=0.2)(['?'], ['a'], {})\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert "took longer than 0.2 s" in done.stdout


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("regex(pattern='(')", "regex(pattern='(') cannot be used: missing ), unterminated subpattern"),
        ("lexicon(path='/nofile')", "lexicon(path='/nofile') cannot be used: /nofile cannot be read: No such file"),
        ("length(target=0)", "length(target=0) cannot be used: target=0 must be above 0"),
        ("length(target='60')", "length: target='60' must be a whole number"),
        ("overlong(max_length=4, buffer=5)", "cannot be used: buffer=5 must be above 0 and at most max_length=4"),
        ("length", "length needs target; give it as length(target=...)"),
        ("reward_model", "reward_model needs path; give it as reward_model(path=...)"),
        ("reward_model(quantise='int8')", "reward_model needs path; give it as reward_model(path=...)"),
        ("length(target=1e999)", "length: target=inf must be a whole number"),
        ("regex(pattern=b'a')", "regex: pattern=b'a' must be a text"),
        ("json_schema(required='answer')", "cannot be used: required='answer' must be a list of texts"),
        ("lexicon(path='/dev/zero')", "cannot be used: /dev/zero is not a regular file"),
        ("overlong(max_length=4)", "overlong needs buffer; give it as overlong(buffer=...)"),
    ],
)
def test_what_a_reward_is_told_wrongly_is_said_before_it_is_asked(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Rewards(f"numeric_match + 0.1*{text}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "the reward raises raised ZeroDivisionError: division by zero"),
        ("each", "the reward each raised ZeroDivisionError for response 1: division by zero"),
        ("short", "the reward short gave 1 scores for 2 responses"),
        ("undefined", "the reward undefined gave nan for response 1; a score must be a finite number"),
        ("leaves", r"the reward leaves raised RuntimeError: it called sys.exit\(3\)"),
        ("times_out", "the reward times_out raised TimeoutError: no answer from the judge"),
        ("hangs", r"the reward hangs took longer than 0.2 s for 2 responses"),
        ("answered", "the data have no column 'answer'; they have none"),
        ("exits", r"the reward exits ended its process \(exit status 0\)$"),
        ("exits(status=3)", r"the reward exits ended its process \(exit status 3\)$"),
        ("crashes", r"the reward crashes ended its process \(signal SIGSEGV\), at response 1$"),
        ("rude", r"the reward rude raised RuntimeError: \\x1b\[2Jcleared and more$"),
    ],
)
def test_a_reward_that_is_wrong_is_named(name, message):
    with pytest.raises(RewardError, match=message):
        Rewards(f"tests.commands.rewards:{name}", seconds=0.2)(["?", "?"], ["a", ""], {})


@pytest.mark.parametrize("text", ["regex(pattern='(a+)+$')", "tests.commands.rewards:searches"])
def test_a_search_without_end_is_ended_at_the_time_limit_and_the_response_named(text):
    rewards, began = Rewards(text, seconds=0.5), time.monotonic()
    responses = ["a", "a" * 50 + "b", "b"]
    with pytest.raises(
        RewardError, match=r"took longer than 0.5 s for 3 responses, at response 1; `reward_sec"
    ) as raised:
        rewards("???", responses, {})
    assert raised.value.row == 1 and time.monotonic() - began < 20
    assert rewards("??", ["a", "b"], {}).tolist() == [1.0, 0.0]  # in a new process


def test_a_function_that_becomes_another_program_is_noticed():
    with pytest.raises(RewardError, match=r"becomes_another_program closed its connection to the run$"):
        Rewards("tests.commands.rewards:becomes_another_program")(["?"], ["a"], {})


def test_a_function_has_a_main_thread_no_input_and_the_terminal_for_output(capfd):
    own = "tests.commands.rewards:talks + tests.commands.rewards:uses_a_clock_that_needs_the_main_thread"
    assert Rewards(own)(["?"], ["a"], {}).tolist() == [1.0]
    assert capfd.readouterr().out == "to the terminal\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import os; os._exit(0)", r": the import of its module ended its process \(exit status 0\)$"),
        ("raise SystemExit(0)", r": cannot import '\w+' \(SystemExit: 0\)"),
        ("raise ValueError('\\x1b[2J')", r": cannot import '\w+' \(ValueError: \\x1b\[2J\)"),
    ],
)
def test_a_module_that_ends_its_process_as_it_is_imported_is_noticed(line, message, tmp_path, monkeypatch):
    (tmp_path / "ends_at_import.py").write_text(line)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Mistake, match="ends_at_import:score'" + message):
        Rewards("ends_at_import:score")


def test_the_process_of_a_function_ends_with_its_rewards():
    rewards = Rewards("tests.commands.rewards:gives_its_process")
    process = int(rewards(["?"], ["a"], {})[0])
    del rewards
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_function_that_takes_no_prompts_and_responses_is_refused_before_anything_is_drawn():
    rewards = Rewards("os:getpid")
    with pytest.raises(Mistake, match=r"getpid\(\) cannot be called as getpid\(prompts, responses\)"):
        rewards.check(["a"], {})
