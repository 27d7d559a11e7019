"""Files that settings name."""

import shutil

import pytest

from tests.observed import to_lines
from tests.shared import TEMPLATE, WORDS


@pytest.fixture(scope="module")
def files(tmp_path_factory, tiny_model) -> dict[str, str]:
    """Models, tokenizers, templates and data by the names in braces."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(tiny_model, folder / "other_model")
    order = [*WORDS[:4], *reversed(WORDS[4:])]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(order)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r" |(?=[:.?\n])|(?<=\n)"), "removed")
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder / "other_words")
    (folder / "template.jinja").write_text(TEMPLATE)
    (folder / "other_template.jinja").write_text(TEMPLATE.replace("Human", "one"))

    def prompt(i: int) -> str:
        length = 40 if i == 5 else 2 + i % 5  # one is longer than a row
        return " ".join(WORDS[4 + (i * 7 + k) % 12] for k in range(length)) + " ?"

    def answer(i: int) -> str:
        return " ".join(["the", "cat"] * (1 + i % 4)) + " ."

    count = range(48)
    talk = [{"role": "user", "content": "one ?"}, {"role": "assistant", "content": "a cat ."}]
    data = {
        "rows": [{"prompt": prompt(i), "completion": answer(i)} for i in count],
        "pairs": [{"prompt": prompt(i), "chosen": answer(i), "rejected": "a dog ."} for i in count],
        "rated": [{"prompt": prompt(i), "completion": answer(i), "label": i % 2 == 0} for i in count],
        "talks": [{"messages": [*talk, {"role": "user", "content": prompt(i % 5)}, talk[1]]} for i in count],
        "texts": [{"text": " ".join([answer(i)] * (1 + i % 9))} for i in count],
        "solutions": [{"prompt": prompt(i), "completions": ["a cat", "a dog"], "labels": [True, False]} for i in count],
        "prompts": [{"prompt": prompt(i), "answer": "1"} for i in count],
    }
    paths = {name: to_lines(folder / f"{name}.jsonl", rows) for name, rows in data.items()}
    paths |= {f"other_{name}": to_lines(folder / f"other_{name}.jsonl", rows[8:]) for name, rows in data.items()}
    paths |= {"model": tiny_model, "output": folder / "run", "other_output": folder / "elsewhere"}
    paths |= {name: folder / f"{name}.jinja" for name in ("template", "other_template")}
    paths |= {name: folder / name for name in ("other_model", "other_words")}
    return {name: str(path) for name, path in paths.items()}
