"""Responses of `jaxalign generate` with scores: the best of several, and those that could not be scored."""

import functools
import json

import pytest

from jaxalign.cli.main import main
from jaxalign.commands import generate
from jaxalign.config.inference import GenerateConfig
from jaxalign.rollout.rewards.rewards import RewardError, Rewards
from tests.rollout.answers import answers as rollout_answers

PROMPTS = ["the cat sees", "a dog", "one red dog runs to the"]
answers = functools.partial(rollout_answers, max_new_tokens=12, batch_size=4)


def interrupted(*_):
    raise KeyboardInterrupt


def test_the_best_of_n_is_the_response_with_the_highest_score(tiny_model, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "answer": "dog"}) + "\n" for p in PROMPTS))
    options = {
        "max_new_tokens": 12,
        "n": 4,
        "seed": 3,
        "reward": "tests.commands.rewards:answered + tests.commands.rewards:dogs",
    }
    results = {}
    for keep in ("all", "best"):
        output = tmp_path / f"{keep}.jsonl"
        assert (
            generate.main(
                GenerateConfig(str(tiny_model), str(tmp_path / "prompts.jsonl"), output, keep=keep, **options)
            )
            == 0
        )
        results[keep] = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(results["all"]) == 12 and any(row["score"] > 1 for row in results["all"])
    for number, row in enumerate(results["best"]):
        assert row["prompt"] == PROMPTS[number] and row in results["all"]
        assert row["score"] == max(other["score"] for other in results["all"][4 * number : 4 * number + 4])
    with pytest.raises(ValueError, match="`keep` 'best' has no effect without `reward`"):
        generate.main(GenerateConfig(str(tiny_model), "the cat", keep="best"))


def test_responses_that_could_not_be_scored_are_kept_without_scores(tiny_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    output, reward = tmp_path / "made.jsonl", "tests.commands.rewards:hangs(seconds=300.0)"
    flags = ["--model", str(tiny_model), "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "12"]
    flags += ["--n", "2", "--batch-size", "4", "--keep", "best", "--reward", reward, "--reward-seconds", "0.2"]
    assert main(["generate", *flags, "--output", str(output)]) == 2
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [(row["response"], row["finished"]) for row in rows] == answers(tiny_model, PROMPTS, n=2)
    assert rows[0].keys() == {"prompt", "response", "finished"}
    message = capsys.readouterr().err.splitlines()[-1]
    assert "took longer than 0.2 s for 6 responses; --reward-seconds allows more" in message
    assert message.endswith(f". The 6 responses are in {output}, all without scores")
    output.unlink()
    monkeypatch.setattr(generate, "scored", interrupted)
    assert main(["generate", *flags, "--output", str(output)]) == 130
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows


def test_scores_are_printed_below_their_responses(tiny_model, capsys):
    flags = ["--model", str(tiny_model), "--prompts", "the cat sees", "--max-new-tokens", "12", "--seed", "3"]
    flags += ["--reward", "tests.commands.rewards:dogs"]
    assert main(["generate", *flags]) == 0
    [(response, _)] = answers(tiny_model, ["the cat sees"], seed=3)
    words = response.split()
    assert capsys.readouterr().out == f"{response}\n(score {words.count('dog') / len(words):.6g})\n"
    assert main(["generate", *flags, "--n", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("> the cat sees\n") == shown.count("\n(score ") == 2


def test_responses_are_scored_some_at_a_time_and_those_to_one_prompt_together(monkeypatch):
    calls, rows = [], [{"prompt": f"{i // 3}", "response": f"{i}", "finished": True} for i in range(12)]

    def rewards(prompts, responses, columns):
        calls.append(len(prompts))
        assert columns == {"answer": prompts, "finished": [True] * len(prompts)}
        return [float(message) for message in responses]

    monkeypatch.setattr(generate, "SCORED_TOGETHER", 8)
    results = generate.scored(rows, rewards, {"answer": [row["prompt"] for row in rows]}, 3)
    assert calls == [6, 6] and [row["score"] for row in results] == list(range(12))
    generate.scored(rows, rewards, {"answer": [row["prompt"] for row in rows]}, 12)
    assert calls == [6, 6, 12]


def test_a_response_that_could_not_be_scored_is_found_by_its_number(monkeypatch):
    rows = [{"prompt": "?", "response": text, "finished": True} for text in ("a", "b", "c", "")]
    monkeypatch.setattr(generate, "SCORED_TOGETHER", 2)
    with pytest.raises(RewardError, match=r"for response 1: division by zero \(counted from response 2\)"):
        generate.scored(rows, Rewards("tests.commands.rewards:each"), {}, 1)
