"""The page and the table of the quickstart."""

from html.parser import HTMLParser

import numpy as np
import pytest

from jaxalign.quickstart.judge import judge
from jaxalign.quickstart.page import Stage, render, table
from jaxalign.quickstart.policy_stage import Course
from jaxalign.quickstart.reward_stage import Agreement, agreement
from jaxalign.quickstart.world import Question

QUESTION = Question("what is <b> & 'c' ?", "it is d .", ("it is e .",))
HOSTILE = "<script>alert('x')</script> & <img src=x onerror=alert(1)>"


def stage(name, *answers):
    verdicts = [judge(QUESTION, answer) for answer in answers]
    return Stage(name, f"about {name}", list(answers), verdicts, 61.4, kl=0.254 if name == "PPO" else None)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text, self.pictures = set(), "", 0

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.pictures += tag == "svg"

    def handle_data(self, data):
        self.text += data


def test_what_a_model_or_a_question_says_never_becomes_html():
    page = Tags()
    page.feed(render([QUESTION], [stage("<i>base", HOSTILE)]))
    assert not page.seen & {"script", "img", "i"}
    assert HOSTILE in page.text and QUESTION.prompt in page.text and "<i>base" in page.text


def test_the_table_and_the_page_show_the_mean_of_each_stage():
    stages = [stage("base", "it is e .", "sure , it is d ."), stage("SFT", "sure , it is d .", "sure , it is d .")]
    rows = {line.split()[0]: line.split()[1:] for line in table(stages).splitlines() if line.strip()}
    assert rows["base"] == ["0.50", "0.50", "0.50", "0.50", "1.00", "-", "61"]
    assert rows["SFT"] == ["1.00", "1.00", "1.00", "1.00", "1.00", "-", "61"]
    page = render([QUESTION, QUESTION], stages)
    assert "a standard error of at most 0.50" in page  # scores 0 and 1: a deviation of 1/√2, over √2
    assert "<td class=n>0.50</td>" in page and "<span class='low'>(0.0)</span>" in page


def test_agreement_counts_pairs_of_answers_to_one_question_that_the_judge_orders():
    gold = np.array([[1.0, 0.5], [0.0, 0.5], [0.6, 1.0]])  # three answers to each of two questions
    scores = np.array([[3.0, 0.0], [1.0, 5.0], [2.0, -1.0]])
    assert agreement(scores, gold) == (3 / 5, 5)  # the first as the judge; of the second a tie, and two orders reversed


def test_the_page_says_what_the_reward_model_is_worth():
    measured = Agreement(0.97, 140, 0.9, 55, 12.3)
    page = Tags()
    page.feed(render([QUESTION], [stage("base", "it is d .")], measured))
    assert measured.sentence() in page.text
    assert "0.97 of 140" in page.text and "0.90 of 55" in page.text and "in 12 seconds" in page.text


def test_a_policys_course_is_summarised_by_its_first_and_last_five_steps_and_its_names_are_escaped():
    course = Course("PPO", "<b>'s score", [0.0] * 5 + [9.0] * 3 + [1.0] * 5, [0.0] * 8 + [0.3, 0.1, 0.2, 0.4, 0.5])
    assert course.kl == pytest.approx(0.3)
    page = Tags()
    stages = [stage("SFT", "it is d ."), stage("PPO", "sure , it is d .")]
    page.feed(render([QUESTION], stages, courses=[course]))
    assert (
        "PPO: in 13 steps <b>'s score goes from 0.00 to 1.00, and the policy ends 0.30 nats per answer from the SFT "
        "model. On held-out questions the judge's score goes from 0.80 to 1.00."
    ) in page.text
    assert page.pictures == 2 and "0.25" in page.text  # the KL of the stage, in the table
