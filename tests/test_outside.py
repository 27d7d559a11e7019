"""Files of others: typed, limited, and named in the error; texts of others: safe to print."""

import json
import os

import pytest

from jaxalign.mistake import Mistake
from jaxalign.outside import Fields, brief, read_object


def test_a_value_has_the_type_that_the_reader_names():
    fields = Fields({"r": 8, "alpha": 16, "on": True, "none": None, "names": ["q"], "inner": {"x": "y"}}, "file.json")
    assert fields.get("r", int) == 8 and fields.get("alpha", float) == 16.0 and fields.get("on", bool) is True
    assert fields.get("none", str, "absent") == "absent" and "none" not in fields
    assert (
        fields.texts("names") == ["q"] and fields.object("inner").get("x", str) == "y" and not list(fields.object("no"))
    )


@pytest.mark.parametrize(
    ("key", "kind", "message"),
    [
        ("r", int, "file.json: 'r' is 8.5; it must be a whole number"),
        ("flag", int, "file.json: 'flag' is True; it must be a whole number"),
        ("huge", float, "file.json: 'huge' is inf; it must be a finite number"),
        ("text", list, r"file.json: 'text' is a\x1b[31mb; it must be a list"),
        ("absent", dict, "file.json: 'absent' is absent; it must hold an object"),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_file_and_its_rule(key, kind, message):
    content = {"r": 8.5, "flag": True, "huge": float("inf"), "text": "a\x1b[31mb"}
    with pytest.raises(Mistake) as error:
        Fields(content, "file.json").get(key, kind)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "not an object"),
        (b"null", "not an object"),
        (b"{", "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "is not JSON"),
        (b"\xff{}", "is not UTF-8"),
        (json.dumps({"a": "b" * 100}).encode(), "more than the 50 bytes"),
    ],
)
def test_a_damaged_file_is_a_mistake_that_names_it(tmp_path, content, message):
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(Mistake, match=message) as error:
        read_object(path, limit=50 if "bytes" in message else 1 << 20)
    assert str(path) in str(error.value)


def test_a_pipe_a_device_and_a_folder_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(Mistake, match="not a regular file"):
            read_object(path)


def test_a_value_in_an_error_is_one_short_line():
    assert brief("a\nb\x1b]0;t\x07") == r"a b\x1b]0;t\x07" and len(brief("x" * 500)) == 80 and brief(["a"]) == "['a']"
