"""`jaxalign chat`: what is said on stdin is answered as the model answers it, and nothing harms the terminal."""

import io
import json
import shutil
import signal

import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.cli.main import main
from jaxalign.commands.chat.conversation import Continuation, Conversation
from jaxalign.models.files import huggingface
from jaxalign.outside import visible
from jaxalign.run.terminal import Stream
from tests.rollout.answers import answers
from tests.shared import TEMPLATE, WORDS

FLAGS = ["--max-new-tokens", "6", "--temperature", "0"]
SAYS = range(WORDS.index("the"), WORDS.index("\n"))  # what the model of these tests may say: words


def with_first_dimension(model, folder, value, at):
    """The model with a first hidden dimension of 10, and `value` there in the embeddings of the ids `at`.

    Embeddings are tied, and all logits hold the product of the two: below 10 such a token is never said, above always.
    """
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 0] = 10.0
    weights["model.embed_tokens.weight"][at, 0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def plain_model(tiny_model, tmp_path_factory):
    """The tiny model, which says words alone."""
    silent = [i for i in range(32) if i not in SAYS]
    return with_first_dimension(tiny_model, tmp_path_factory.mktemp("plain") / "model", -10.0, silent)


@pytest.fixture(scope="module")
def chat_model(plain_model, tmp_path_factory):
    """The same with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(plain_model, folder)
    described = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(described | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def say(monkeypatch, capsys):
    """A function: what the program writes to (stdout, stderr) when these lines are typed."""

    def say(model, text, *flags, status=0):
        typed = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        assert main(["chat", "--model", str(model), *FLAGS, *flags]) == status
        return capsys.readouterr()

    return say


def greedy(model, prompt):
    return answers(model, [prompt], max_new_tokens=6, temperature=0.0, batch_size=1)[0][0]


def test_a_conversation_is_what_the_model_answers_to_all_turns_before(chat_model, say):
    output = say(chat_model, "the cat ?\n\na dog ?\n/reset\nthe cat ?\n/quit\nnot read\n")
    turns, expected = [], []
    for text in ("the cat ?", "a dog ?"):
        turns.append({"role": "user", "content": text})
        turns.append({"role": "assistant", "content": greedy(chat_model, turns)})
        expected.append(turns[-1]["content"])
    assert output.out.splitlines() == [*expected, expected[0]]  # /reset makes the first question the first again
    assert "the conversation is forgotten" in output.err and "(cut off after 6 tokens)" in output.err


def test_the_system_message_stands_before_everything(chat_model, say):
    turns = [{"role": "system", "content": "red"}, {"role": "user", "content": "the cat ?"}]
    assert say(chat_model, "the cat ?\n", "--system", "red").out == greedy(chat_model, turns) + "\n"


def test_a_model_without_a_template_continues_the_text_and_says_so(plain_model, say):
    output = say(plain_model, "the cat\na dog\n/nonsense\n")
    assert "no chat template, so your text is continued" in output.err and "/nonsense is no command" in output.err
    first = greedy(plain_model, "the cat").removeprefix(" ")  # on a line of its own
    assert len(first.split()) == 6
    assert output.out.splitlines() == [first, greedy(plain_model, f"the cat {first}\na dog").removeprefix(" ")]
    assert "--system needs a chat template" in say(plain_model, "", "--system", "red", status=2).err


def test_when_the_window_is_full_the_oldest_turns_are_forgotten(chat_model, say):
    """58 tokens are left for the prompt; what is too long for it alone is not said, and forgets nothing."""
    long = " ".join(["cat"] * 40)
    output = say(chat_model, f"the dog ?\n{long}\na dog ?\n{long} {long}\na cat ?\n")
    assert "the window is full: the 2 oldest turns are forgotten" in output.err
    assert "that has 86 tokens and there is room for 58" in output.err
    assert len(output.out.splitlines()) == 4


def test_what_is_dropped_is_the_oldest_and_never_the_system_message(chat_model):
    tokenizer = huggingface.load_tokenizer(str(chat_model))
    talk = Conversation(tokenizer, room=30, system="red")
    for _ in range(9):
        ids, dropped = talk.ask("the cat ?")
        talk.answer([], "a dog .")
    text = tokenizer.decode(ids)
    assert len(ids) <= 30 and dropped == 2 and text.count("red") == 1 and text.endswith("the cat ? \n Assistant :")
    talk.ask("a")
    talk.forget()
    assert talk.ask("a").dropped == 0
    talk.forget()
    with pytest.raises(ValueError, match="that has 51 tokens and there is room for 30"):
        talk.ask(" ".join(["cat"] * 41))


def test_a_text_that_outgrows_the_window_loses_its_beginning(tiny_model):
    talk = Continuation(huggingface.load_tokenizer(str(tiny_model)), room=5)
    assert talk.ask("the cat") == ([4, 6], 0)
    talk.answer([8, 9], "sees likes")
    assert talk.ask("a") == ([6, 8, 9, 22, 5], 1)
    talk.forget()
    assert talk.ask("dog") == ([6, 8, 9, 22, 7], 0)


def test_a_byte_that_is_no_text_ends_no_conversation(chat_model, say):
    assert len(say(chat_model, b"the \xff cat ?\na dog ?\n").out.splitlines()) == 2


@pytest.mark.usefixtures("interruptible")
def test_an_answer_is_written_as_it_grows_and_an_interrupt_keeps_what_was_written(chat_model, say, monkeypatch):
    """Ctrl-C comes with the first words of the first answer; the second question is answered after them."""
    written = []

    class Terminal(io.StringIO):
        encoding = "utf-8"

        def write(self, text):
            written.extend([text] if text else [])  # the prompt of a stdin that is no terminal is empty
            if len(written) == 1 and text:
                signal.raise_signal(signal.SIGINT)
            return len(text)

    monkeypatch.setattr("sys.stdout", Terminal())
    say(chat_model, "the cat ?\na dog ?\n")
    turns = [{"role": "user", "content": "the cat ?"}]
    whole = greedy(chat_model, turns)
    assert whole.startswith(written[0]) and len(written[0].split()) == 4
    assert "".join(written[1:]).startswith(" ...\n")
    turns += [{"role": "assistant", "content": written[0]}, {"role": "user", "content": "a dog ?"}]
    assert "".join(written[1:]) == f" ...\n{greedy(chat_model, turns)}\n"


def test_a_word_that_would_clear_the_screen_is_shown_and_not_obeyed(chat_model, tmp_path, say):
    evil = with_first_dimension(chat_model, tmp_path / "model", 30.0, [WORDS.index("dog")])  # it says nothing else
    described = json.loads((evil / "tokenizer.json").read_text())
    words = described["model"]["vocab"]
    words["\x1b[2J"] = words.pop("dog")
    (evil / "tokenizer.json").write_text(json.dumps(described))
    assert say(evil, "the cat ?\n").out == " ".join([r"\x1b[2J"] * 6) + "\n"


def test_what_a_terminal_obeys_is_written_as_its_number():
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x1b]0;title\x07\r\x9b1m\u202e\ud800") == r"\x1b]0;title\x07\r\x9b1m\u202e\ud800"
    assert visible("é 👩\u200d🚀") == "é 👩\u200d🚀" and visible("é", "ascii") == r"\xe9"


def test_half_a_character_waits_for_its_other_half():
    out = io.StringIO()
    stream = Stream(lambda tokens: bytes(tokens).decode("utf-8", "replace"), out)
    stream.show(b"a\xc3")
    assert out.getvalue() == "a"
    stream.show(b"a\xc3\xa9")
    stream.finish(b"a\xc3\xa9\xff")
    assert stream.text == "aé\ufffd" and out.getvalue() == "aé\ufffd\n"


def test_what_cannot_be_talked_to_is_told_in_one_line(chat_model, tmp_path, say):
    assert (
        "leaves no room for a question in the 64 tokens" in say(chat_model, "", "--max-new-tokens", "64", status=2).err
    )
    assert "random weights" in say(f"config:{chat_model}", "", status=2).err
    path = tmp_path / "refuses.jinja"
    path.write_text("{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}")
    output = say(chat_model, "", "--chat-template", str(path), "--system", "red", status=2).err
    assert "the chat template cannot render a conversation of system, user: no system" in output
