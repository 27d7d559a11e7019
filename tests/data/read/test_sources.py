"""Specs of `data`, the part of a source that is read, and the errors of files that cannot be read."""

import gzip
import json
import os

import pytest

from jaxalign.data.read import files, sources
from jaxalign.data.read.sources import Source, load, parse, parse_unweighted
from jaxalign.mistake import Mistake

ROWS = [{"text": f"row {i}"} for i in range(3)]


def write(path, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def test_a_spec_names_sets_splits_configs_and_weights(tmp_path):
    assert parse("org/set") == [Source("org/set")]
    assert parse("org/set:test") == [Source("org/set", split="test")]
    assert parse("org/set:main:test") == [Source("org/set", split="test", config="main")]
    assert parse("a*0.7, b:train*0.3") == [Source("a", weight=0.7), Source("b", split="train", weight=0.3)]


@pytest.mark.parametrize("name", ["with:colon.jsonl", "with,comma.jsonl", "with*star.jsonl"])
def test_the_name_of_a_file_may_hold_the_signs_of_a_spec(name, tmp_path):
    odd = tmp_path / name
    odd.write_text("{}")
    assert parse(str(odd)) == [Source(str(odd))]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "names nothing"),
        ("a*0.5,b", "give every source a weight"),
        ("a*half", "'half' is not a weight; write name"),
        ("a*0", "weight 0.0 must be positive"),
        ("a*nan", "weight nan must be positive"),
        ("a:b:c:d", "at most name:config:split"),
    ],
)
def test_a_spec_that_says_nothing_sensible_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        parse(spec)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_json_lines_are_read_plain_and_zipped_with_any_character_inside(tmp_path, name):
    rows = [{"text": "one\u2028line, and \x85 two"}, {"text": "é"}]
    assert load(parse(write(tmp_path / name, rows))[0]).rows == rows


def test_half_an_emoji_is_read_as_a_replacement_character(tmp_path):
    (tmp_path / "cut.jsonl").write_text(r'{"text": "\ud83d", "turns": [{"a": "\uDE00 \ud83d\ude00 \\ud83d"}]}')
    (tmp_path / "cut.json").write_text(f"[{(tmp_path / 'cut.jsonl').read_text()}]")
    for name in ("cut.jsonl", "cut.json"):
        rows = load(Source(str(tmp_path / name))).rows
        assert rows == [{"text": "\ufffd", "turns": [{"a": "\ufffd \U0001f600 \\ud83d"}]}]


def test_other_kinds_of_files_give_the_same_rows(tmp_path):
    from datasets import Dataset

    (tmp_path / "rows.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    Dataset.from_list(ROWS).to_csv(tmp_path / "rows.csv")
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.csv", "rows.parquet"):
        assert list(load(Source(str(tmp_path / name))).rows) == ROWS, name
    (tmp_path / "play.txt").write_text("\ufeffto be\nor not")
    assert load(Source(str(tmp_path / "play.txt"))).rows == [{"text": "to be\nor not"}]


def test_a_cell_of_a_csv_file_is_the_text_it_holds_unless_its_column_is_of_numbers(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,label,margin\nNA,007,True,\nnull,"a\nb",0,1.5\n,None,,x\n')
    assert load(Source(str(path))).rows == [
        {"prompt": "NA", "completion": "007", "label": True, "margin": None},
        {"prompt": "null", "completion": "a\nb", "label": 0, "margin": 1.5},
        {"prompt": "", "completion": "None", "label": None, "margin": "x"},
    ]


def test_two_columns_of_one_name_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,completion\na,b,c\n")
    with pytest.raises(ValueError, match=r"rows.csv has several columns completion; rename all but one"):
        load(Source(str(path)))


def test_a_saved_dataset_gives_its_train_split_and_holds_out_its_test_split(tmp_path):
    from datasets import Dataset, DatasetDict

    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "d")
    source = parse(str(tmp_path / "d"))[0]
    assert (len(load(source).rows), load(source).split) == (3, "train")
    assert (len(load(source, held_out=True).rows), load(source, held_out=True).split) == (1, "test")


def test_a_split_column_divides_a_file(tmp_path):
    rows = [{"text": "a", "split": "train"}, {"text": "b", "split": "heldout"}, {"text": "c", "split": "train"}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert [row["text"] for row in load(Source(path)).rows] == ["a", "c"]
    assert [row["text"] for row in load(Source(path), held_out=True).rows] == ["b"]
    assert [row["text"] for row in load(Source(path, split="heldout")).rows] == ["b"]
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has train, heldout"):
        load(Source(path, split="dev"))


def test_a_split_that_is_no_text_is_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "split": "train"}, {"text": "b", "split": ["x"]}])
    with pytest.raises(ValueError, match=r"row 2: 'split' is \['x'\]; it must be a text"):
        load(Source(path))


def test_splits_that_name_no_training_part_must_be_chosen(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "split": "easy"}, {"text": "b", "split": "hard"}])
    with pytest.raises(ValueError, match=r"has splits easy, hard; choose one: .*:easy"):
        load(Source(path))


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*['{"text": "x"}'] * 6, '{"text": "x"', '{"text": "x"}']))
    with pytest.raises(ValueError, match=r"line 7: not JSON .*'\{\"text\": \"x\"'"):
        load(Source(str(path)))
    path.write_text('{"text": "x"}\n["x"]\n')
    with pytest.raises(ValueError, match="line 2: a list, not an object of columns"):
        load(Source(str(path)))


def test_files_that_cannot_be_read_say_why(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}' * 99)[:-9])
    (tmp_path / "odd.xml").write_text("<a/>")
    (tmp_path / "bad.json").write_text('{"rows": 3}')
    (tmp_path / "bad.parquet").write_text("no")
    for name, message in {
        "empty.jsonl": "is empty",
        "latin.jsonl": "line 1: not UTF-8 at byte 13",
        "cut.jsonl.gz": "is not readable",
        "odd.xml": "unknown kind '.xml'; known are .jsonl",
        "bad.json": "is not a list of objects",
        "bad.parquet": "cannot be read as .parquet",
    }.items():
        with pytest.raises(ValueError, match=message):
            load(Source(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n": %s}' % ("1" * 5000), "a number has more than 4300 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"text": "\x1b[2J"} x', r"not JSON \(Invalid control character at\): '.*\\x1b"),
    ],
)
def test_a_row_that_no_reader_should_follow_is_named_with_its_line(text, message, tmp_path):
    good = '{"text": "x"}'
    (tmp_path / "rows.jsonl").write_text(f"{good}\n{good}\n{text}\n")
    (tmp_path / "lines.json").write_text(f"{good}\n{good}\n{text}\n")
    (tmp_path / "list.json").write_text(f"[{good},\n{good},\n{text}]\n")
    for name in ("rows.jsonl", "lines.json", "list.json"):
        with pytest.raises(Mistake, match=rf"{name}, line 3: .*{message}") as error:
            load(Source(str(tmp_path / name)))
        assert len(str(error.value)) < 400 and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('{"text": "a"}\n\n{"text": "b"}\n', [{"text": "a"}, {"text": "b"}]),
        ('{"version": 1, "tags": ["x"], "data": [{"text": "a"}]}', [{"text": "a"}]),
        ('{"prompt": "p", "completion": "c"}', [{"prompt": "p", "completion": "c"}]),
        ('{"messages": [{"role": "user", "content": "a"}]}', [{"messages": [{"role": "user", "content": "a"}]}]),
    ],
)
def test_a_json_file_holds_a_list_or_an_object_with_one_or_json_lines(text, rows, tmp_path):
    (tmp_path / "rows.json").write_text(text)
    assert load(Source(str(tmp_path / "rows.json"))).rows == rows


def test_an_object_with_two_lists_of_rows_is_refused_by_their_names(tmp_path):
    (tmp_path / "rows.json").write_text('{"train": [{"text": "a"}], "test": [{"text": "b"}]}')
    with pytest.raises(Mistake, match="several lists of rows, train, test; write each into a file"):
        load(Source(str(tmp_path / "rows.json")))


def test_what_never_ends_is_refused_before_it_is_read(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("rows.jsonl", "zero.txt"):
        with pytest.raises(Mistake, match="is not a regular file"):
            load(Source(str(tmp_path / name)))
    monkeypatch.setattr(files, "UNPACKED", 1000)
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(b" " * 1_000_000))
    with pytest.raises(Mistake, match=r"bomb.jsonl.gz unpacks to more than [\d,]+ bytes, 100 times its size"):
        load(Source(str(bomb)))


def test_a_line_of_a_csv_file_with_other_cells_than_the_first_is_named(tmp_path):
    for line, message in {"c": "1 cells", "c,d,e": "3 cells", 'c,"d': "cannot be read as .csv"}.items():
        (tmp_path / "rows.csv").write_text(f"prompt,completion\na,b\n{line}\n")
        with pytest.raises(Mistake, match=f"rows.csv, line 3: {message}"):
            load(Source(str(tmp_path / "rows.csv")))


def test_rows_of_no_split_are_counted_in_the_log(tmp_path, caplog):
    path = write(
        tmp_path / "rows.jsonl", [{"text": "a", "split": "train"}, {"text": "b"}, {"text": "c", "split": "test"}]
    )
    assert [row["text"] for row in load(Source(path)).rows] == ["a"]
    assert "1 rows are in no split and are not read" in caplog.text


def test_names_of_splits_and_columns_are_shown_safely(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a", "split": "\x1b[2Jx"}, {"text": "b", "split": "y" * 999}])
    with pytest.raises(Mistake) as error:
        load(Source(path))
    assert "\x1b" not in str(error.value) and "\\x1b[2Jx" in str(error.value) and len(str(error.value)) < 700


def test_arrow_adds_no_keys_to_tools_and_calls(tmp_path):
    from datasets import Dataset

    def row(name, **values):
        call = {"function": {"name": name, "arguments": values}}
        return {"messages": [{"role": "assistant", "content": None, "tool_calls": [call]}], "tools": [{"name": name}]}

    rows = [row("f", x=1), row("g", y="2")]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    assert list(load(Source(str(tmp_path / "rows.parquet"))).rows) == rows


def test_an_absent_file_names_those_that_are_alike(tmp_path):
    write(tmp_path / "stories.jsonl", ROWS)
    with pytest.raises(Mistake, match=r"storys.jsonl does not exist; .* has stories.jsonl"):
        load(Source(str(tmp_path / "storys.jsonl")))
    with pytest.raises(Mistake, match=r"there is no folder .*elsewhere"):
        load(Source(str(tmp_path / "elsewhere" / "rows.jsonl")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(Mistake, match="not a dataset saved with save_to_disk"):
        load(Source(str(tmp_path / "folder")))


def test_a_hub_name_that_cannot_be_reached_says_so(monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(Mistake, match="'org/nothing' is no local file and could not be fetched"):
        sources.load(Source("org/nothing"))


def test_a_key_that_an_object_has_twice_is_refused_with_its_line(tmp_path):
    good, bad = (
        '{"prompt": "a", "messages": [{"role": "user"}]}',
        '{"prompt": "a", "messages": [{"role": 1, "role": 2}]}',
    )
    for name, text in {"rows.jsonl": f"{good}\n{bad}\n", "rows.json": f"[{good},\n{bad},\n{good}]"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(Mistake, match=rf"{name}, line 2: the key 'role' stands twice in an object"):
            load(Source(str(tmp_path / name)))


TURNS = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "tools": [{"name": "f"}]},
        {"images": [{"path": "x"}], "conversations": TURNS},
        {"prompt": "p", "answers": [{"answer": "a", "rank": 1}]},
    ],
)
def test_an_object_in_a_json_file_that_is_a_row_is_one_whatever_lists_it_has(tmp_path, row):
    (tmp_path / "row.json").write_text(json.dumps(row, indent=1))
    assert load(Source(str(tmp_path / "row.json"))).rows == [row]


def test_what_stands_beside_the_rows_of_a_json_file_is_refused_or_listed(tmp_path, caplog):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"version": 2, "data": ROWS}, indent=1))
    with caplog.at_level("INFO"):
        assert load(Source(str(path))).rows == ROWS
    assert "the rows are in 'data'; nothing reads version beside it" in caplog.text
    path.write_text(json.dumps({"system": "s", "data": ROWS}, indent=1))
    with pytest.raises(Mistake, match="'system' stands beside the rows; write it into each of them"):
        load(Source(str(path)))


def test_names_that_no_file_can_have_are_told_in_one_short_line():
    for name in ("./" + "x" * 5000 + ".jsonl", "./a\0b.jsonl", "/tmp/\udcff.jsonl"):
        with pytest.raises(Mistake, match=r"data file .* does not exist") as error:
            load(Source(name))
        assert len(str(error.value)) < 800


def test_weights_are_refused_where_every_row_counts_once():
    with pytest.raises(Mistake, match=r"`eval_data` name\*0.5: name has a weight, and every row counts once"):
        parse_unweighted("name*0.5", "eval_data")
