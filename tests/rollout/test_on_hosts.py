"""Two real processes score responses: each scores its share with a reward model, the first alone calls a function."""

import json
import re
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxalign.rollout.rewards import rewards
from jaxalign.rollout.rewards.rewards import Rewards
from tests.shared import run_on_hosts

PROMPTS = ["one cat", "two", "one dog sees", "two", "one"]
RESPONSES = ["sees", "dogs run", "", "to the cat", "runs to"]

# prints a host's scores and the responses that its reward model read, one line for each job
HOST = """
import json, sys
from jaxalign import hosts
hosts.join()
import jax, numpy as np
from jaxalign.rollout.rewards import on_hosts, rewards, scorer
members = scorer.Scorer.members
for prompts, responses, reward in json.loads(sys.argv[1]):
    read = []
    scorer.Scorer.members = lambda self, p, r, **options: (read.extend(r), members(self, p, r, **options))[1]
    columns = {"finished": [True] * len(responses)}
    try:
        scores = on_hosts.scores_by_function(rewards.Rewards(reward), prompts, responses, columns)
        result = [{name: values.tolist() for name, values in scores.items()}, read]
    except Exception as error:
        hosts.stop_together(error)  # as the loop does
        result = f"{type(error).__name__}: {error}"
    print("result", json.dumps(result))
"""


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    """A sequence classifier with one label on the tiny model."""
    path = tmp_path_factory.mktemp("rm")
    for file in tiny_model.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    classifier = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    (path / "config.json").write_text(json.dumps(config | classifier))
    head = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    save_file(load_file(path / "model.safetensors") | {"score.weight": head}, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def results(folder):
    """Results of each host for each job, by the job's name: the hosts take one after the other, the failure last."""
    model = f"reward_model(path={str(folder)!r})"
    jobs = {
        "share": (PROMPTS, RESPONSES, f"{model} + 0.5*tests.commands.rewards:first_host_only"),
        "one": (PROMPTS[:1], RESPONSES[:1], model),
        "failure": (["one", "cat " * 80], RESPONSES[:2], model),
    }
    _, printed, _ = run_on_hosts([sys.executable, "-c", HOST, json.dumps([*jobs.values()])])
    lines = ([line for line in text.splitlines() if line.startswith("result ")] for text in printed)
    of_hosts = [[json.loads(line.removeprefix("result ")) for line in of_host] for of_host in lines]
    return dict(zip(jobs, zip(*of_hosts, strict=True), strict=True))


def test_hosts_share_what_a_reward_model_reads_and_know_all_scores(folder, results):
    (scores, read), (scores_of_second, read_by_second) = results["share"]
    assert scores == scores_of_second and list(scores) == ["reward_model", "first_host_only"]
    assert (read, read_by_second) == (RESPONSES[:2], RESPONSES[2:])
    expected = Rewards(f"reward_model(path={str(folder)!r})")(PROMPTS, RESPONSES, {"finished": [True] * 5})
    np.testing.assert_allclose(scores["reward_model"], expected, atol=1e-5)
    assert scores["first_host_only"] == [float(len(response)) for response in RESPONSES]


def test_a_host_with_nothing_to_read_waits(results):
    (scores, read), (scores_of_second, read_by_second) = results["one"]
    assert scores == scores_of_second and (read, read_by_second) == ([], RESPONSES[:1])


def test_a_host_that_fails_ends_all_with_its_message(results):
    first, second = results["failure"]
    message = "the reward reward_model raised Mistake: a prompt fills all 64 tokens"
    assert second.startswith(f"RewardError: {message}")
    assert re.fullmatch(r"HostError: host 1 \(.+\) has failed: (.*)", first)[1] == second.removeprefix("RewardError: ")


def test_the_time_limit_is_that_of_functions_not_of_reward_models(folder, monkeypatch):
    """The first call of a model compiles, which takes longer than any function may."""
    monkeypatch.setattr(rewards, "GRACE", 0.0)
    columns = {"finished": [True]}
    model = f"reward_model(path={str(folder)!r})"
    assert np.isfinite(Rewards(model, seconds=1e-9)(PROMPTS[:1], RESPONSES[:1], columns))
    with pytest.raises(rewards.RewardError, match=r"the reward hangs took longer than 1e-09 s"):
        Rewards(f"{model} + tests.commands.rewards:hangs(seconds=0.2)", seconds=1e-9)(PROMPTS[:1], ["a"], columns)
