"""Prompts of `jaxalign generate`: a text, or the rows of files."""

import json

import pytest

from jaxalign.commands import generate


def test_prompts_are_read_from_files_and_anything_else_is_the_prompt_itself(tmp_path):
    assert generate.read_rows("tell me of prompts")[0] == ["tell me of prompts"]
    assert generate.read_rows("\udcff of the command line")[0] == ["\ufffd of the command line"]
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"prompt": "a"}\n{"other": "b"}\n')
    with pytest.raises(ValueError, match=r"mixed.jsonl, row 2: 'prompt' holds None"):
        generate.read_rows(str(path))[0]
    path.write_text('{"messages": [{"role": "user"}]}\n')
    with pytest.raises(ValueError, match=r"mixed.jsonl, row 1: 'content' is missing"):
        generate.read_rows(str(path))[0]


def test_a_value_is_a_name_of_files_if_it_looks_like_one_and_has_no_blank(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for prompt in ("Tell me about notes.txt", "either/or, he said", "Compare a.txt, b.txt", "notes", "e.g. x.md"):
        assert generate.read_rows(prompt)[0] == [prompt]
    for name in ("my notes.txt", "notes"):
        (tmp_path / name).write_text("a\nb\n")
    assert generate.read_rows("my notes.txt")[0] == ["a", "b"] and generate.read_rows("notes")[0] == ["notes"]
    for typo in ("note.txt", "note.txt:test", "note.txt*0.5", "my notes.txt,note.txt", "folder/notes", "3/4"):
        with pytest.raises(ValueError, match=r"does not exist|there is no such file"):
            generate.read_rows(typo)


def test_all_rows_of_all_files_are_prompts_unless_a_split_is_named(tmp_path):
    rows = [{"prompt": p, "split": "test" if p == "b" else "train"} for p in "abc"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.jsonl").write_text('{"prompt": "d", "answer": "e"}\n')
    prompts, columns = generate.read_rows(f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl")
    assert prompts == ["a", "b", "c", "d"]
    assert columns == {"split": ["train", "test", "train", None], "answer": [None, None, None, "e"]}
    assert generate.read_rows(f"{tmp_path}/a.jsonl:test")[0] == ["b"]
    with pytest.raises(ValueError, match="has no split 'held'"):
        generate.read_rows(f"{tmp_path}/a.jsonl:held")[0]
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"b.jsonl is empty"):
        generate.read_rows(f"{tmp_path}/b.jsonl")[0]


def test_lines_of_a_text_end_with_a_newline_alone(tmp_path):
    (tmp_path / "lines.txt").write_bytes("a\u2028b\x0bc\r\n \nd\x85e".encode())
    assert generate.read_rows(str(tmp_path / "lines.txt"))[0] == ["a\u2028b\x0bc", "d\x85e"]
