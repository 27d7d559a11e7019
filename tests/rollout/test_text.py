"""The text of a response, as it stands behind its prompt."""

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from jaxalign.rollout.engine.slots import Sampling
from jaxalign.rollout.respond import load_model, respond, text_after

PIECES = ["<s>", "<unk>", "▁Once", "▁upon", "▁a", "▁time", "ly", *(f"<0x{byte:02X}>" for byte in range(256))]


@pytest.fixture(scope="module")
def sentencepiece():
    """Pieces that carry the blank before them, which the first of a text loses, as Llama's and Mistral's do."""
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, [], unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def numbers(*pieces):
    return [PIECES.index(piece) for piece in pieces]


def test_a_response_keeps_the_blank_before_its_first_word(sentencepiece):
    words = numbers("▁upon", "▁a")
    assert sentencepiece.decode(words) == "upon a"
    assert text_after(sentencepiece, numbers("<s>", "▁Once"), words) == " upon a"
    assert text_after(sentencepiece, numbers("<s>", "▁Once"), numbers("ly", "▁upon")) == "ly upon"
    assert text_after(sentencepiece, numbers(*["▁time"] * 20), words) == " upon a"
    assert text_after(sentencepiece, [], words) == text_after(sentencepiece, numbers("<s>"), words) == "upon a"
    assert text_after(sentencepiece, numbers("▁Once"), []) == ""


def test_a_prompt_that_ends_within_a_character_is_left_out_of_account(sentencepiece):
    """Its bytes and the response's make one character, which neither has alone."""
    text = text_after(sentencepiece, numbers("▁Once", "<0xC3>"), numbers("<0xA9>", "▁a"))
    assert text == sentencepiece.decode(numbers("<0xA9>", "▁a"))


def test_a_real_story_goes_on_with_a_blank_and_stops_at_one(shared_data):
    model = load_model(str(shared_data / "models" / "stories260K"), dtype="float32")
    greedy = Sampling(12, temperature=0.0)
    [(text, _)] = respond(model, ["Once"], greedy)
    assert text.startswith(" upon a time")
    assert respond(model, ["Once"], greedy._replace(stop=(" upon",))) == [(" upon", True)]
