"""The page and the table of the quickstart."""

from html.parser import HTMLParser

from jaxalign.quickstart.judge import judge
from jaxalign.quickstart.pipeline import Stage, render, table
from jaxalign.quickstart.world import Question

QUESTION = Question("what is <b> & 'c' ?", "it is d .", ("it is e .",))
HOSTILE = "<script>alert('x')</script> & <img src=x onerror=alert(1)>"


def stage(name, *answers):
    return Stage(name, f"about {name}", list(answers), [judge(QUESTION, a) for a in answers], 61.4)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text = set(), ""

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)

    def handle_data(self, data):
        self.text += data


def test_what_a_model_or_a_question_says_never_becomes_html():
    page = Tags()
    page.feed(render([QUESTION], [stage("<i>base", HOSTILE)]))
    assert not page.seen & {"script", "img", "i"}
    assert HOSTILE in page.text and QUESTION.prompt in page.text and "<i>base" in page.text


def test_the_table_and_the_page_tell_the_mean_of_each_stage():
    stages = [stage("base", "it is e .", "sure , it is d ."), stage("SFT", "sure , it is d .", "sure , it is d .")]
    rows = {line.split()[0]: line.split()[1:] for line in table(stages).splitlines() if line.strip()}
    assert rows["base"] == ["0.50", "0.50", "0.50", "0.50", "1.00", "61"]
    assert rows["SFT"] == ["1.00", "1.00", "1.00", "1.00", "1.00", "61"]
    page = render([QUESTION, QUESTION], stages)
    assert "<td class=n>0.50</td>" in page and "<span class='low'>(0.0)</span>" in page
