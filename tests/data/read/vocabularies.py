"""Tokenizers and templates made here. Pieces begin with the blank before a word, as SentencePiece has them."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

MARKERS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

# A template that writes thoughts in the last turn only (Qwen3), one whose generation prompt opens them as well, one
# that opens them and never writes them (R1), and one that ends the last turn otherwise than earlier ones (gpt-oss).
THINKS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set content = m.content %}"
    "{% if m.role == 'assistant' %}{% set thoughts = m.reasoning_content or '' %}"
    "{% if '</think>' in content %}{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.last %}{{ '<think>\n' + thoughts + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ content }}{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name }}"
    "{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENS = THINKS.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
HIDES = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
CLOSES = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|eot_id|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def of_bytes(**special):
    """Every byte is a token, but "Ġy" and "yo" are one, too."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, "yo", "Ġyo"])}
    inner = Tokenizer(models.BPE(vocabulary, [("y", "o"), ("Ġ", "yo")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return _finished(inner, **special)


def of_pieces(**special):
    """Characters, bytes and pieces; a blank is put before every stretch of text, as Llama's first tokenizer does."""
    characters = ["▁", *map(chr, range(33, 127))]
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *characters, "▁h", "yo", "▁yo", "▁["]
    merges = [("▁", "h"), ("y", "o"), ("▁", "yo"), ("▁", "[")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    return _finished(inner, bos=True, **special)


def _finished(inner, *, bos=False, eos=False, markers=MARKERS):
    """The tokenizer with <s>, </s> and the markers, which puts <s> before (`bos`) and </s> behind (`eos`) a text."""
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", *markers)])
    template = f"{'<s> ' * bos}$A{' </s>' * eos}"
    ends = [(t, inner.token_to_id(t)) for t in ("<s>", "</s>")]
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
