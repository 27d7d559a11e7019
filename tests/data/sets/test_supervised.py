"""From `data` to examples: what is read, held out, dropped and refused."""

import json
import logging

import pytest

from jaxalign.data.read.feedback_formats import PAIRS
from jaxalign.data.sets import preferences
from jaxalign.data.sets.supervised import Options, load
from tests.shared import TEMPLATE

EOS = 2


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count, **columns):
    return [{"prompt": "the cat", "completion": " ".join(["sees"] * (1 + i % 4)), **columns} for i in range(count)]


def read(path, tokenizer, *, eval_spec=None, **options):
    return load(
        str(path), tokenizer, Options(**{"max_length": 16, "terminators": (EOS,), **options}), eval_spec=eval_spec
    )


def test_a_share_is_held_out_by_the_seed_and_never_trained_on(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "the", "completion": f"{'cat ' * i}dog"} for i in range(1, 13)])
    first, again, other = (read(path, tokenizer, eval_share=0.25, seed=seed) for seed in (0, 0, 1))
    held_out, train = set(first.held_out.lengths), set(first.train.examples.lengths)
    assert len(held_out) == 3 and held_out | train == set(range(4, 16)) and not held_out & train
    assert held_out == set(again.held_out.lengths) != set(other.held_out.lengths)


def test_held_out_rows_come_from_their_own_file_or_split_before_a_share(tokenizer, tmp_path):
    rows = [*pairs(8, split="train"), *pairs(3, split="test")]
    path = write(tmp_path / "rows.jsonl", rows)
    data = read(path, tokenizer, eval_share=0.5)
    assert (len(data.train.examples), len(data.held_out)) == (8, 3)
    eval_data = write(tmp_path / "held.jsonl", pairs(5))
    assert len(read(path, tokenizer, eval_spec=eval_data).held_out) == 5
    assert len(read(path, tokenizer, eval_spec=f"{path}:train").held_out) == 8


def test_a_mixture_holds_out_a_share_of_every_set_and_weighs_the_rest(tokenizer, tmp_path):
    a, b = write(tmp_path / "a.jsonl", pairs(20)), write(tmp_path / "b.jsonl", pairs(60))
    data = read(f"{a}*0.5,{b}*0.5", tokenizer, eval_share=0.1)
    assert data.train.sizes == (18, 54) and data.train.per_epoch == (36, 36)
    assert len(data.held_out) == 8


def test_prompts_for_samples_end_where_learning_begins(tokenizer, tmp_path):
    data = read(write(tmp_path / "rows.jsonl", pairs(4)), tokenizer, eval_share=0.5)
    assert [tokenizer.decode(prompt) for prompt in data.prompts] == ["the cat", "the cat"]


def test_plain_text_files_are_split_into_windows_and_rows_of_text_only_on_request(tokenizer, tmp_path):
    text = "the cat sees a dog " * 20
    (tmp_path / "book.txt").write_text(text)
    assert read(tmp_path / "book.txt", tokenizer).train.examples.lengths.sum() == 101
    path = write(tmp_path / "rows.jsonl", [{"text": text}])
    assert read(path, tokenizer).train.examples.lengths.tolist() == [16]
    assert read(path, tokenizer, long_text="split").train.examples.lengths.sum() == 101


def test_the_log_says_what_was_read_dropped_and_shortened_and_shows_an_example(tokenizer, tmp_path, caplog):
    long = {"prompt": "the cat", "completion": "sees " * 30}
    path = write(tmp_path / "rows.jsonl", [*pairs(18), {"prompt": "a", "completion": ""}, long])
    with caplog.at_level(logging.INFO, "jaxalign"):
        data = read(path, tokenizer)
    assert len(data.train.examples) == 19
    text = caplog.text
    assert "format prompt+completion, 20 rows, 19 examples" in text
    assert f"dropped 1 rows: 1 x empty response (first: {path}, row 19)" in text
    assert "1 rows longer than 16 tokens were shortened to their first tokens" in text
    assert "the cat⟦sees </s>⟧" in text


def test_losing_many_rows_stops_the_run_unless_allowed(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*pairs(3), {"prompt": "a", "completion": " "}])
    with pytest.raises(ValueError, match=r"1 of 4 rows have nothing to learn: 1 x empty response \(first: .*row 4\)"):
        read(path, tokenizer)
    assert len(read(path, tokenizer, max_dropped=0.25).train.examples) == 3
    path = write(tmp_path / "long.jsonl", [{"prompt": "the cat " * 20, "completion": "sees"}])
    with pytest.raises(ValueError, match=r"1 x the prompt fills the window .*raise `max_length` \(16\)"):
        read(path, tokenizer, max_dropped=1.0)


def test_conversations_need_a_template_and_the_error_says_how_to_get_one(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(ValueError, match=r"rows.jsonl: the data are conversations, .*`chat_template`"):
        read(path, tokenizer)


def test_a_system_text_needs_a_template_and_the_error_names_its_row_and_column(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*pairs(2), *pairs(1, system="be brief")])
    with pytest.raises(ValueError, match=r"row 3: column 'system' makes it a conversation: .*`chat_template`"):
        read(path, tokenizer)


def test_a_broken_row_in_the_middle_is_named(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [*pairs(2), {"prompt": "a"}])
    with pytest.raises(ValueError, match=r"rows.jsonl, row 3: 'completion' is missing"):
        read(path, tokenizer)


REAL = {
    "alpaca-eval/gpt4_pairs_vs_davinci003.jsonl.gz": "prompt with a pair",
    "gpteacher/roleplay-instruct.jsonl.gz": "Alpaca with response",
    "gsm8k/test.jsonl.gz": "question and answer",
    "llama-factory-demos/alpaca_en_demo.jsonl.gz": "Alpaca",
    "llama-factory-demos/c4_demo.jsonl.gz": "text",
    "llms-from-scratch/instruction-data.jsonl.gz": "Alpaca",
    "oasst/en_100_tree.jsonl.gz": "OASST tree",
    "self-instruct/seed_tasks.jsonl.gz": "self-instruct",
    "tinyshakespeare/input.txt.gz": "text",
    "tinystories/sample.jsonl.gz": "text",
    "sst2/dev.jsonl.gz": "text",
    "xstest/xstest_v2_completions.jsonl.gz": "prompt+completion, desirable",
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_recognised_and_their_masks_hold_what_is_answered(shared_data, name, caplog):
    from jaxalign.data.read.chat import choose_template
    from jaxalign.models.files.huggingface import load_tokenizer

    tokenizer = load_tokenizer(str(shared_data / "tokenizers" / "mistral-v1"))
    choose_template(tokenizer, "alpaca")
    with caplog.at_level(logging.INFO, "jaxalign"):
        data = read(shared_data / name, tokenizer, max_length=512, max_dropped=0.3, eval_share=0.1)
    assert f"format {REAL[name]}," in caplog.text
    examples = data.train.examples
    assert len(data.held_out) and examples.lengths.max() <= 512
    starts, ends = examples.offsets[:-1], examples.offsets[1:] - 1
    whole = examples.lengths < 512
    assert not examples.mask[starts].any()
    assert (examples.ids[ends][whole] == EOS).all() and examples.mask[ends][whole].all()
    if REAL[name] == "text":
        assert examples.mask.sum() == len(examples.ids) - len(examples)
    else:
        assert all(0 < mask.sum() < len(mask) - 1 for _, mask in map(examples.__getitem__, range(len(examples))))
    if REAL[name] not in ("text", "OASST tree"):  # one turn, one terminator
        assert (examples.ids == EOS).sum() == (examples.ids[ends] == EOS).sum()


def test_feedback_is_learned_from_its_best_responses_and_the_log_counts_the_others(tokenizer, tmp_path, caplog):
    rated = [{"prompt": "the", "completion": word, "label": word == "cat"} for word in ("cat", "dog", "cat")]
    with caplog.at_level(logging.INFO, "jaxalign"):
        data = read(write(tmp_path / "rated.jsonl", rated), tokenizer)
    assert [tokenizer.decode(data.train.examples[i][0]) for i in range(2)] == ["the cat </s>"] * 2
    assert len(data.train.examples) == 2 and "1 rows are rated undesirable and are not learned" in caplog.text
    with pytest.raises(ValueError, match="all rows are rated undesirable, so there is nothing to imitate"):
        read(write(tmp_path / "bad.jsonl", rated[1:2]), tokenizer)


DIALOGUE = {"chosen": "\n\nHuman: a ?\n\nAssistant: cat", "rejected": "\n\nHuman: a ?\n\nAssistant: dog"}


@pytest.mark.parametrize(
    "row", [DIALOGUE, {"prompt": "the", "chosen": "cat", "rejected": "dog"}, {"prompt": "the", "chosen": "cat"}]
)
@pytest.mark.parametrize("templated", [False, True])
def test_sft_and_dpo_make_the_same_ids_of_a_pair(row, templated, tokenizer, tmp_path):
    if templated:
        tokenizer.chat_template = TEMPLATE
    path = write(tmp_path / "rows.jsonl", [row])
    options = Options(max_length=32, terminators=(EOS,), eval_share=0.0)
    ids, mask = load(path, tokenizer, options).train.examples[0]
    if "rejected" in row:
        pairs = preferences.load(path, tokenizer, options, kind=PAIRS).responses
        assert ids.tolist() == pairs.examples[0][0].tolist() and mask.tolist() == pairs.examples[0][1].tolist()
    assert ("Human" in tokenizer.decode(ids)) == (row is DIALOGUE)
    as_chat = None if not templated else load(path, tokenizer, options, as_chat=True).train.examples[0][0]
    assert as_chat is None or "Human" in tokenizer.decode(as_chat)


def test_the_log_lists_what_nothing_reads_without_control_characters(tokenizer, tmp_path, caplog):
    path = write(tmp_path / "rows.jsonl", [{**row, "\x1b[2J": 1, "id": 3, "split": ""} for row in pairs(2)])
    with caplog.at_level(logging.INFO, "jaxalign"):
        read(path, tokenizer)
    assert f"{path}: nothing reads \\x1b[2J, id" in caplog.text and "\x1b" not in caplog.text
