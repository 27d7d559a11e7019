"""Solutions in steps: each ends where its separator does, and what the window cuts has no label."""

import json

import pytest

from jaxalign.data.sets import solutions
from jaxalign.data.sets.supervised import Options
from jaxalign.models.files.huggingface import load_tokenizer

ROW = {"prompt": "one ?", "completions": ["the cat", "a dog runs"], "labels": [True, False]}


def load(tmp_path, tiny_model, rows, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = Options(terminators=(2,), **{"max_dropped": 0.5, "eval_share": 0.0, "max_length": 16, **options})
    return solutions.load(str(path), load_tokenizer(str(tiny_model)), options).responses


def test_a_step_is_labelled_at_the_last_token_of_its_separator(tmp_path, tiny_model):
    responses = load(tmp_path, tiny_model, [ROW, {**ROW, "labels": [None, 0.25]}])
    ids, mask = responses.examples[0]
    assert ids.tolist() == [15, 21, 4, 6, 22, 5, 7, 10, 22]  # one ? the cat \n a dog runs \n
    assert mask.nonzero()[0].tolist() == [4, 8]
    assert responses.columns["step_ends"][:, :3].tolist() == [[4, 8, -1], [4, 8, -1]]
    assert responses.columns["step_labels"][:, :3].tolist() == [[1, 0, -1], [-1, 0.25, -1]]


def test_steps_beyond_the_window_have_no_label_and_solutions_without_one_are_dropped(tmp_path, tiny_model):
    long = {**ROW, "completions": ["the cat " * 5, "a"]}
    responses = load(tmp_path, tiny_model, [ROW, long], max_length=8)
    assert len(responses) == 1 and responses.lengths.tolist() == [[8]]
    assert responses.columns["step_labels"][0, :2].tolist() == [1, -1]
    with pytest.raises(ValueError, match="1 of 2 solutions have no labelled step"):
        load(tmp_path, tiny_model, [ROW, long], max_length=8, max_dropped=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True]}, "row 1: 2 completions, but 1 labels"),
        ({"labels": [True, 2]}, "a label is 2; it must be true, false, a probability or null"),
        ({"labels": [True, "false"]}, "row 1: a label is 'false'; it must be true, false, a probability or null"),
        ({"completions": None}, "row 1: 'completions' is None; it must be a list"),
        ({"prompt": [{"role": "user", "content": "one ?"}]}, "prompt and completions must be texts"),
    ],
)
def test_mistakes_name_their_row(change, message, tmp_path, tiny_model):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, tiny_model, [ROW | change])


def test_a_later_row_without_labels_is_named(tmp_path, tiny_model):
    with pytest.raises(ValueError, match="row 2: 'labels' is missing, which the format solution steps"):
        load(tmp_path, tiny_model, [ROW, {name: ROW[name] for name in ("prompt", "completions")}])
