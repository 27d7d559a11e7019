"""Starting point of the quickstart, a Hugging Face folder: a tokenizer of the world's words, a small Llama's config."""

from __future__ import annotations

import json
from pathlib import Path

from jaxalign.quickstart import world

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<assistant>"]
TEMPLATE = (
    "<s> {% for m in messages %}{% if m.role == 'assistant' %}<assistant> {{ m.content }} </s> "
    "{% else %}<user> {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def vocabulary() -> list[str]:
    """The special tokens, then all words of the grammar, sorted; the same for every seed."""
    texts = [world.POLITE, world.DECLINE, world.RUDE, *world.PRINCIPLES, "people should not do that ."]
    texts += [*world.NUMBERS, *world.COLOUR_OF, *world.COLOURS, *world.HOME_OF, *world.HOMES, *world.OPPOSITE_OF]
    texts += [*world.KINDS, *world.HARMS, *world.HARMS.values(), *world.THINGS]
    texts += [member for members in world.KINDS.values() for member in members]
    texts += ["what colour is the ?", "where does live lives in", "plus", "opposite of", "repeat this :", "and"]
    texts += ["please name two", "tell me two give", "how do i a my friend 's", "to you use", "i can help you"]
    return SPECIAL + sorted({word for text in texts for word in text.split()})


def write_start(folder: Path) -> None:
    """Writes config.json and tokenizer files; `model` config:FOLDER starts from them with random weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = vocabulary()
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": -(-len(words) // 16) * 16,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
