"""The tokens that end responses: in training, in generation and in what is exported."""

import json
import shutil
from types import SimpleNamespace

import pytest

from jaxalign.data.read.chat import TEMPLATES
from jaxalign.data.read.formats import Conversation, PromptCompletion
from jaxalign.data.read.tokens import Encoder, show
from jaxalign.models.files import huggingface
from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import encode_prompts, load_tokenizer_only
from jaxalign.run.final import generation_config
from jaxalign.run.vocabulary import load_vocabulary

TALK = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"})


@pytest.fixture(scope="module")
def chat_stories(shared_data, tmp_path_factory):
    """stories260K with the tokens of ChatML and a template of its own; a turn ends with another token than its eos."""
    folder = tmp_path_factory.mktemp("stories") / "model"
    source = shared_data / "models/stories260K"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("original", "*.safetensors", "golden.json"))
    tokenizer = huggingface.load_tokenizer(str(source))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = TEMPLATES["chatml"]
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer), "eos_token_id": 2}))
    (folder / "generation_config.json").unlink()
    return str(folder)


def vocabulary_of(model, **settings):
    config = SimpleNamespace(**{"model": model, "tokenizer": None, "chat_template": None} | settings)
    return load_vocabulary(config, huggingface.read_config(model))


@pytest.mark.parametrize(("template", "terminators"), [(None, (2, 513)), ("chatml", (513, 2)), ("plain", (2,))])
def test_the_end_of_the_templates_turn_is_a_terminator_and_exported(chat_stories, template, terminators):
    vocabulary = vocabulary_of(chat_stories, chat_template=template)
    assert vocabulary.terminators == terminators
    ids = generation_config(chat_stories, terminators)["eos_token_id"]
    assert ids == (list(terminators) if len(terminators) > 1 else 2)
    assert load_tokenizer_only(chat_stories).terminators == (2, 513)


@pytest.mark.parametrize("template", [None, "chatml"])
def test_training_generation_and_transformers_read_the_same_ids(chat_stories, template):
    tokenizer, terminators = vocabulary_of(chat_stories, chat_template=template)
    [(ids, mask)] = Encoder(tokenizer, terminators, 100).encode(Conversation((*TALK, *TALK)), where="")
    theirs = [
        tokenizer.apply_chat_template(list(t), add_generation_prompt=True)["input_ids"]
        for t in (TALK[:1], [*TALK, TALK[0]])
    ]
    ours = encode_prompts(load_tokenizer_only(chat_stories), [TALK[:1], [*TALK, TALK[0]]], Sampling(4))
    assert ours == theirs and theirs[0][:2] == [512, 318]
    assert [ids[:k].tolist() for k in range(1, len(ids)) if mask[k] and not mask[k - 1]] == theirs
    assert show(tokenizer, ids, mask).count("yo<|im_end|>⟧") == 2


def test_eos_that_a_post_processor_puts_behind_texts_ends_no_prompt(chat_stories, tmp_path):
    from tokenizers import processors

    shutil.copytree(chat_stories, tmp_path / "closed")
    tokenizer = huggingface.load_tokenizer(chat_stories)
    plain = tokenizer("Once upon a time")["input_ids"]
    ends = [("<s>", 1), ("</s>", 2)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    tokenizer.save_pretrained(tmp_path / "closed")
    model = load_tokenizer_only(str(tmp_path / "closed"))
    assert model.tokenizer("Once upon a time")["input_ids"] == [*plain, 2]
    assert encode_prompts(model, ["Once upon a time"], Sampling(4)) == [plain]
    [(ids, mask)] = Encoder(model.tokenizer, (2,), 100).encode(PromptCompletion("Once upon", " a time</s>"), where="")
    assert ids.tolist() == [*plain, 2] and ids[~mask].tolist() == plain[: (~mask).sum()]
