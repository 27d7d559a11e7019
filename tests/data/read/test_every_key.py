"""Every key of a row is rendered, or refused by name, or listed as unread; docs/data.md says which."""

import copy
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxalign.data.read import formats, spellings
from jaxalign.data.read.feedback_formats import FEEDBACK_FORMATS, demonstrations, recognise, recognise_demonstrations
from jaxalign.data.read.formats import CONTENT, FORMATS, Conversation, normalise, unread
from jaxalign.data.read.spellings import is_empty
from jaxalign.data.sets.prompts import PROMPT_FORMATS
from jaxalign.data.sets.solutions import FORMAT as SOLUTIONS
from jaxalign.mistake import Mistake

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
ASK, ANSWER, OTHER = ({"role": r, "content": c} for r, c in (("user", "p"), ("assistant", "y"), ("assistant", "n")))
DIALOGUE = "\n\nHuman: p\n\nAssistant: "
TREE = {
    "role": "prompter",
    "text": "p",
    "replies": [{"role": "assistant", "text": t, "rank": r} for r, t in enumerate("yn")],
}
VALUES = {  # of the columns that formats need
    "messages": [ASK, ANSWER],
    "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "y"}],
    "instances": [{"input": "", "output": "y"}],
    "responses": ["y", "n"],
    "label": True,
    "desirable": True,
    "message_tree_id": "t",
    "context": "p",
    "rejected": "n",
}
PROMPTS = {"messages": [ASK], "conversations": [{"from": "human", "value": "p"}]}


def row_of(form):
    row = {column: VALUES.get(column, "y") for column in form.columns}
    if form.name == "OASST tree":
        row["prompt"] = TREE
    if form in PROMPT_FORMATS or "chosen" in form.columns:
        row |= {column: PROMPTS[column] for column in PROMPTS if column in row}
    if form.name == "pair of dialogues":
        row |= {"chosen": DIALOGUE + "y", "rejected": DIALOGUE + "n"}
    return row


ALL = [*FORMATS, *FEEDBACK_FORMATS, *PROMPT_FORMATS]
IDS = [f"{form.name} {number}" for number, form in enumerate(ALL)]
MARK = "quince"  # a text that stands nowhere else
MARKS = {
    "history": [["before", MARK]],
    "tools": [{"name": MARK, "parameters": {}}],
    "functions": f'[{{"name": "{MARK}"}}]',
    "tool_calls": [{"function": {"name": MARK, "arguments": "{}"}}],
    "function_call": {"name": MARK, "arguments": "{}"},
}
# Keys that are read for numbers or truth values, of which a text is refused
NUMBERS = {"margin", "preference", "tie", "score_chosen", "score_rejected", "ranks", "scores", "label", "desirable"}


def fate(form, row, key):
    """Fate of the text MARK under a key of a row: rendered, refused or unread; None is the fault."""
    options = [False] if form in FORMATS or form in FEEDBACK_FORMATS else []
    elsewhere = formats.OF_RESPONSES if form in PROMPT_FORMATS else ()
    try:
        normal = normalise(form, row, *options, where="d, row 3", elsewhere=elsewhere)
    except Mistake as mistake:
        assert str(mistake).startswith("d, row 3: "), mistake
        return "refused" if f"'{key}'" in str(mistake) or f"{key} is" in str(mistake) else None
    if MARK in repr(normal):
        return "rendered"
    return "unread" if any(name.split(".")[-1] == key for name in unread(form, row)) else None


@pytest.mark.parametrize("form", ALL, ids=IDS)
def test_every_column_is_rendered_or_refused_by_name_or_listed(form):
    keys = dict.fromkeys([*CONTENT, *NUMBERS, "colour"])
    for key in [key for key in keys if key not in form.columns]:
        seen = fate(form, row_of(form) | {key: MARKS.get(key, MARK)}, key)
        if key in formats.OF_RESPONSES and form in PROMPT_FORMATS:
            assert seen == "unread", key
        elif key in CONTENT:
            assert seen == ("rendered" if key in form.reads else "refused"), key
        else:
            assert seen == ("refused" if key in form.reads else "unread"), key  # a text is no number


KEYS_OF_TURNS = [*spellings.READ, *spellings.UNREADABLE_IN_TURNS, "colour"]
FOR_USERS = {"name", "tool_call_id", *spellings.TOOLS}  # keys that a turn of the user may have too


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("at", [0, 1])
def test_every_key_of_a_turn_is_rendered_or_refused_by_name_or_listed(column, at):
    for key in KEYS_OF_TURNS:
        row = {column: copy.deepcopy(VALUES[column])}
        if key in row[column][at] or key in ("role", "from"):
            continue
        row[column][at][key] = MARKS.get(key, MARK)
        seen = fate(recognise_demonstrations(row, where="d"), row, key)
        if key in (
            *spellings.UNREADABLE_IN_TURNS,
            *spellings.LEARNED,
            "content",
            "value",
        ):  # with another text under the other name
            assert seen == "refused", key
        elif key == "colour":
            assert seen == "unread"
        else:
            assert seen == ("rendered" if at == 1 or key in FOR_USERS else "refused"), key


COLUMNS = sorted({*CONTENT, "colour", *(column for form in ALL for column in (*form.columns, *form.reads))})
EMPTY = st.sampled_from([None, "", []])
TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.sampled_from(KEYS_OF_TURNS), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_any_row_is_read_or_refused_with_its_place_and_no_content_disappears(data):
    form = data.draw(st.sampled_from(ALL))
    extra = data.draw(st.dictionaries(st.sampled_from(COLUMNS), EMPTY | ANY, max_size=3))
    row = row_of(form) | extra
    options = [] if form in PROMPT_FORMATS else [data.draw(st.booleans())]
    try:
        normalise(form, row, *options, where="d, row 3")
    except Mistake as mistake:
        assert str(mistake).startswith("d, row 3: ") and "\n" not in str(mistake) and len(str(mistake)) < 900
        return
    dropped = {k for k, v in row.items() if not is_empty(v) and not form.reads_column(k)} - unread(form, row)
    assert not dropped
    refused = {k for k in CONTENT if not is_empty(row.get(k)) and not form.reads_column(k)}
    assert refused <= set(formats.ROW_WEIGHTS)  # 1 and true, which say nothing


@settings(max_examples=30, deadline=None, derandomize=True)
@given(system=TEXTS, past=st.lists(st.tuples(TEXTS, TEXTS), max_size=2), texts=st.tuples(TEXTS, TEXTS, TEXTS, TEXTS))
def test_what_stands_around_an_instruction_is_rendered_in_order(system, past, texts):
    ask, put, context, answer = texts
    row = {"instruction": ask, "input": put, "context": context, "output": answer}
    row |= {"system": system, "history": [list(pair) for pair in past]}
    conversation = normalise(formats.ALPACA, row, where="d")
    expected = [("system", system)] if system.strip() else []
    expected += [(role, text) for pair in past for role, text in zip(("user", "assistant"), pair, strict=True)]
    paragraphs = [ask, *(text for text in (put, context) if text.strip())]
    expected += [("user", "\n\n".join(paragraphs)), ("assistant", answer)]
    assert [(m["role"], m["content"]) for m in conversation.messages] == expected


PAIR = {"chosen": "y", "rejected": "n"}
SAME = [
    {"prompt": "p", **PAIR},
    {"prompt": "p", "system": "s", **PAIR},
    {"prompt": "p", "context": "x", **PAIR},
    {"prompt": [ASK], "chosen": [ANSWER], "rejected": [OTHER]},
    {"prompt": "p", "chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
    {"chosen": [ASK, ANSWER], "rejected": [ASK, OTHER]},
    {"messages": [ASK], "chosen": ANSWER, "rejected": OTHER},
    {"conversations": PROMPTS["conversations"], "chosen": {"from": "gpt", "value": "y"}, "rejected": OTHER},
    {"instruction": "p", "input": "i", "output": "o", **PAIR},
    {"question": "p", "system": "s", **PAIR},
    {"chosen": DIALOGUE + "y", "rejected": DIALOGUE + "n"},
    {"prompt": "p", "responses": ["n", "y"], "scores": [1, 2]},
    {"prompt": "p", "completion": "y", "label": True},
    {"prompt": "p", "completion": "y", "desirable": 1},
    {"messages": [ASK, ANSWER], "label": True, "tools": [{"name": "f"}]},
]


@pytest.mark.parametrize("as_chat", [False, True])
@pytest.mark.parametrize("as_texts", [False, True])
@pytest.mark.parametrize("row", SAME)
def test_a_file_of_feedback_means_the_same_sequences_to_sft_as_to_dpo_kto_and_reward(row, as_texts, as_chat):
    read = [recognise(row, where="d", dialogues_as_texts=as_texts)]
    read.append(recognise_demonstrations(row, where="d", dialogues_as_texts=as_texts))
    [group], imitated = (normalise(form, row, as_chat, where="d") for form in read)
    assert demonstrations(imitated) == [group.sequences[0]]


def test_sft_learns_no_undesirable_response_and_takes_other_labels_for_no_rating():
    bad = {"prompt": "p", "completion": "y", "label": False}
    assert demonstrations(normalise(recognise_demonstrations(bad, where="d"), bad, False, where="d")) == []
    named = bad | {"label": "news"}
    form = recognise_demonstrations(named, where="d")
    assert form.name == "prompt+completion" and unread(form, named) == {"label"}


def test_a_conversation_may_begin_with_the_assistant():
    row = {"conversations": [{"from": "gpt", "value": "hello"}, *VALUES["conversations"]]}
    conversation = normalise(recognise_demonstrations(row, where="d"), row, False, where="d")
    assert isinstance(conversation, Conversation)
    assert [m["role"] for m in conversation.messages] == ["assistant", "user", "assistant"]


def test_the_documents_list_every_format_with_the_keys_that_it_reads():
    text = DOCS.read_text()
    groups = {
        f"*{name}*": names for name, names in re.findall(r"^- \*(\w+)\*: ((?:`\w+`(?:, )?)+)", text, re.MULTILINE)
    }
    for name, names in groups.items():
        text = text.replace(f" {name}", f" {names}")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|", text, re.MULTILINE)
    documented = {(row[0], *(frozenset(re.findall(r"`(\w+)`", cell)) for cell in row[1:])) for row in rows}
    for form in [*ALL, SOLUTIONS, recognise(["chosen", "rejected"], where="d", dialogues_as_texts=True)]:
        row = form.name.replace("'", "`"), frozenset(form.columns), frozenset(form.reads)
        assert row in documented, row
    assert all(
        f"`{name}`" in text for name in [*CONTENT, *spellings.READ, *spellings.UNREADABLE_IN_TURNS, *spellings.ROLES]
    )


ARGUMENTS = {"city": "Bonn"}


@pytest.mark.parametrize("key", ["args", "input", "kwargs"])
def test_arguments_of_a_call_under_an_unknown_name_are_refused(key):
    row = {"messages": [ASK, {"role": "assistant", "tool_calls": [{"name": "f", key: ARGUMENTS}]}]}
    with pytest.raises(Mistake, match=f"d: a call of a tool has '{key}', which is not read"):
        normalise(formats.MESSAGES, row, False, where="d")


def test_arguments_of_a_call_are_read_under_both_names_and_once():
    turn = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {}, "parameters": ARGUMENTS}]}
    assert spellings.message(turn)["tool_calls"][0]["function"]["arguments"] == ARGUMENTS
    turn["tool_calls"][0]["arguments"] = {"city": "Ulm"}
    with pytest.raises(Mistake, match="both 'arguments' and 'parameters'"):
        spellings.message(turn)


def sft(row, as_chat=False):
    [sequence] = demonstrations(normalise(recognise_demonstrations(row, where="d"), row, as_chat, where="d"))
    return sequence


def learned(row):
    return [m["content"] for m in sft(row).messages if m["role"] == "assistant" and m.get("learn", True)]


def test_of_a_prompt_of_messages_the_turns_of_the_assistant_are_context_unless_marked():
    prompt = [ASK, {"role": "assistant", "content": "before"}, ASK]
    for row in ({"prompt": prompt, "completion": [ANSWER]}, {"prompt": prompt, "chosen": [*prompt, ANSWER]}):
        assert learned(row) == ["y"]
    assert learned({"prompt": [ASK, prompt[1] | {"weight": 1}, ASK], "completion": [ANSWER]}) == ["before", "y"]
    assert learned({"instruction": "p", "output": "y", "history": [["a", "b"]]}) == ["b", "y"]


def test_a_completion_may_repeat_its_prompt_and_does_not_begin_with_the_user():
    assert sft({"prompt": [ASK], "completion": [ASK, ANSWER]}).messages == (ASK, ANSWER)
    with pytest.raises(Mistake, match="begins with user and does not repeat the prompt"):
        sft({"prompt": [ASK], "completion": [{"role": "user", "content": "other"}, ANSWER]})


def test_a_response_that_goes_on_may_hold_the_words_of_the_prompt_again():
    chosen = [ANSWER, ASK, OTHER]
    row = {"prompt": [ASK], "chosen": chosen, "rejected": [*chosen[:-1], ANSWER]}
    assert sft(row).messages == (ASK, ANSWER, ASK, OTHER)


@pytest.mark.parametrize("responses", ["yes", {"a": "b"}, ["a", None], [1, 2]])
def test_responses_are_a_list_of_texts_or_messages(responses):
    row = {"prompt": "p", "responses": responses}
    with pytest.raises(Mistake, match=r"'responses' holds .*; it must be a list of texts or messages"):
        normalise(recognise(row, where="d"), row, False, where="d")


def test_a_ranking_has_ranks_or_scores_and_not_both():
    row = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2], "scores": [1, 2]}
    with pytest.raises(Mistake, match="both 'ranks' and 'scores'"):
        normalise(recognise(row, where="d"), row, False, where="d")


COMPLETED = {"prompt": "p", "completion": "y"}


@pytest.mark.parametrize(
    ("first", "later"),
    [
        (COMPLETED, COMPLETED | {"label": False}),
        (COMPLETED | {"label": None}, COMPLETED | {"label": False}),
        (COMPLETED, COMPLETED | {"messages": [ASK, ANSWER]}),
        (COMPLETED, COMPLETED | {"chosen": "y", "rejected": "n"}),
        ({"text": "t"}, {"text": "t", "prompt": "p", "completion": "y"}),
    ],
)
def test_a_row_of_another_format_than_the_first_is_refused(first, later):
    form = recognise_demonstrations(first, where="d")
    normalise(form, first, False, where="d, row 1")
    with pytest.raises(Mistake, match=r"d, row 57: a row of format .*, and the first row is of format"):
        normalise(form, later, False, where="d, row 57")


@pytest.mark.parametrize("label", ["false", "True", -1, "0"])
def test_a_label_that_is_meant_as_a_rating_is_refused_in_another_spelling(label):
    with pytest.raises(Mistake, match=r"column 'label' holds .*, not true or false"):
        sft(COMPLETED | {"label": label})


def test_weights_of_rows_that_change_nothing_may_be_the_texts_of_a_csv_file():
    assert sft(COMPLETED | {"weight": "1"}) == sft(COMPLETED)
    with pytest.raises(Mistake, match=r"column 'weight' holds 0.5"):
        sft(COMPLETED | {"weight": "0.5"})
