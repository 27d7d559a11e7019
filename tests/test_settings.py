"""A command shows only the settings that it obeys: each, set to another value, changes the run or is refused.

What is compared is in tests/observed.py: data, shapes, calls, schedule, and the jaxpr of the train step.
"""

import dataclasses
import functools
import io
import shutil
from typing import Any, Literal, get_args, get_origin

import jax
import pytest

from jaxalign.commands import COMMANDS, export, generate
from jaxalign.commands.chat import chat
from jaxalign.config.inference import ChatConfig, ExportConfig, GenerateConfig, QuickstartConfig
from jaxalign.config.limits import settings
from jaxalign.config.offline import SFTConfig
from jaxalign.mistake import Mistake
from jaxalign.quickstart import pipeline
from jaxalign.run import devices, final, folder
from jaxalign.training import part
from tests.observed import Engine, Observation, difference, observe, to_lines
from tests.shared import TEMPLATE, WORDS

TRAINING = [name for name, command in COMMANDS.items() if command.trains]
OFFLINE = ("sft", "dpo", "kto", "reward")

# Settings of the runs that are compared; a name in braces is a file of the fixture `files`.
EVERYWHERE = {
    "model": "{model}",
    "output": "{output}",
    "steps": 2,
    "batch_size": 16,
    "max_length": 32,
    "max_dropped": 0.5,
    "remat": "none",
}
ON_POLICY = {"data": "{prompts}", "batch_size": 8, "n": 4, "max_new_tokens": 8, "reward": "tests.commands.rewards:dogs"}
BASES = {
    "sft": {"data": "{rows}"},
    "dpo": {"data": "{pairs}"},
    "kto": {"data": "{rated}"},
    "reward": {"data": "{pairs}"},
    **dict.fromkeys(("ppo", "grpo", "rloo", "online-dpo"), ON_POLICY),
}

# Other values, where "the next one" (`another`) would not do; and the settings without which one has nothing to do.
VALUES: dict[str, Any] = {
    "model": "{other_model}",
    "output": "{other_output}",
    "tokenizer": "{other_words}",
    "chat_template": "{other_template}",
    "epochs": 2.0,
    "batch_size": 32,
    "microbatches": 2,
    "max_length": 40,
    "max_dropped": 0.0,
    "precision": "bfloat16",
    "export_dtype": "bfloat16",
    "attention": "cudnn",
    "implementation": "pallas",
    "eval_data": "{other_rows}",
    "ref_model": "{other_model}",
    "log.wandb": "project",
    "optimizer.learning_rate": 1e-3,
    "lora.rank": 2,
    "lora.alpha": 8.0,
    "lora.targets": "q_proj",
    "mesh.data": 2,
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
    "max_new_tokens": 3,
    "samples": 1,
    "slots": 8,
    "reward": "tests.commands.rewards:names_dog",
    "reward_seconds": 0.02,
    "reward_clip": 0.5,
    "engine": "http://localhost:1",
    "engine_reload": '/load {"path": "{folder}"}',
    "kl_budget": 1.0,
    "temperature": 0.7,
    "min_p": 0.1,
    "top_p": 0.9,
    "combine": "min",
    "step_separator": "?",
    "pretraining_data": "{rows}",
    "critic.model": "{other_model}",
    "critic.learning_rate": 1e-3,
    "algorithm.kl_target": 3.0,
    "algorithm.clip_scores": 0.1,
    "algorithm.halt_kl": 0.1,
    "algorithm.kl_in": "loss",
    "last_turn": "continue",
}
LOSSES = {
    "sft": "dft",
    "dpo": "ipo",
    "kto": "bco",
    "reward": "bradley_terry(margin=0.5)",
    "ppo": "reinforce",
    "grpo": "reinforce",
    "rloo": "ppo_clip",
    "online-dpo": "ipo",
}
CHAT = {"chat_template": "{template}"}
LORA = {"lora.rank": 4}
SERVER = {"engine": "http://localhost:1"}
CONTEXTS: dict[str, dict[str, Any]] = {
    "epochs": {"steps": None},
    "lora.alpha": LORA,
    "lora.targets": LORA,
    "lora.rslora": LORA,
    "lora.dora": LORA,
    "lora.quantise": LORA,
    "mesh.fsdp": {"mesh.data": -1, "mesh.fsdp": 8},
    "as_chat": CHAT,
    "turns": CHAT | {"data": "{talks}"},
    "long_text": {"data": "{texts}"},
    "last_turn": CHAT | {"data": "{talks}", "last_turn": "drop", "max_length": 48, "reward": "length(target=3)"},
    "ref_update.alpha": {"ref_update.every": 1},
    "combine": {"members": 2},
    "step_separator": {"data": "{solutions}", "algorithm.loss": "process"},
    "reward_seconds": {"reward": "tests.commands.rewards:hangs(seconds=0.2)"},
    "engine_kind": SERVER,
    "engine_reload": SERVER,
    "pretraining_data": {"pretraining_data": "{texts}", "algorithm.pretraining_coef": 0.1},
    "algorithm.pretraining_coef": {"pretraining_data": "{texts}", "algorithm.pretraining_coef": 0.1},
    "algorithm.importance_cap": {"top_p": 0.9},
    "algorithm.kl_in": {"algorithm.kl_estimator": "k3"},
}
PER_COMMAND: dict[tuple[str, str], dict[str, Any]] = {
    ("sft", "chat_template"): CHAT | {"data": "{talks}"},
    **{(c, "chat_template"): CHAT | {"as_chat": True} for c in TRAINING if c != "sft"},
    **{(c, "algorithm.kl_estimator"): {"algorithm.kl_coef": 0.1} for c in ("grpo", "rloo")},
}


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


def another(hint: Any, value: Any) -> Any:
    """Another value of a setting's type."""
    plain = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    if get_origin(plain) is Literal:
        return next(choice for choice in get_args(plain) if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    assert isinstance(value, float), f"{value!r} of {hint}: give another value in VALUES"
    return value / 2 if value else 0.1


def config_of(kind: type, values: dict[str, Any], files: dict[str, str]) -> Any:
    """A config from dotted names; texts in braces become paths."""
    groups: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, str) and value[:1] == "{" and value[1:-1] in files:
            value = files[value[1:-1]]
        group, dot, inner = name.partition(".")
        (groups.setdefault(group, {}) if dot else top)[inner if dot else group] = value
    config = kind(**top)
    return dataclasses.replace(config, **{g: dataclasses.replace(getattr(config, g), **v) for g, v in groups.items()})


def value_of(config: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def disobeyed(kind, values, files, run, *, contexts, others):
    """Settings that neither change what `run(config)` observes nor are refused, with the reason.

    Args:
      kind: the class of the settings.
      values: of the config, by dotted name.
      files: for names in braces.
      run: config -> Observation.
      contexts: name -> settings without which it has nothing to do.
      others: name -> another value.
    """
    seen, reasons = {}, []
    for name, hint in settings(kind).items():
        context = values | contexts.get(name, {})
        config, key = config_of(kind, context, files), repr(contexts.get(name))
        if key not in seen:
            seen[key] = run(config)
            assert seen[key].mistake is None, (name, seen[key].mistake)
        other = others[name] if name in others else another(hint, value_of(config, name))
        after = run(config_of(kind, context | {name: other}, files))
        if after.mistake is not None:
            if after.mistake.setting != name and f"`{name}`" not in str(after.mistake):
                reasons.append(f"{name}={other!r}: {after.mistake}")
        elif difference(seen[key], after) is None:
            reasons.append(f"{name}={other!r} changes nothing")
    return reasons


@pytest.mark.parametrize("command", TRAINING)
def test_every_setting_of_a_command_that_trains_changes_its_run_or_is_refused(command, files, monkeypatch):
    kind, values = COMMANDS[command].config, EVERYWHERE | BASES[command]
    contexts = CONTEXTS | {name: context for (of, name), context in PER_COMMAND.items() if of == command}
    other_data = BASES[command]["data"].replace("{", "{other_")
    others = VALUES | {"algorithm.loss": LOSSES[command], "data": other_data, "eval_data": other_data}
    if command not in OFFLINE:
        others |= {"batch_size": 16}

    def run(config):
        if config.resume is False:  # a setting of the second call
            observe(dataclasses.replace(config, resume=True), monkeypatch)
        return observe(config, monkeypatch, fresh=config.resume)

    assert not disobeyed(kind, values, files, run, contexts=contexts, others=others)


def test_a_setting_that_nothing_reads_is_found(files, monkeypatch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithUnused(SFTConfig):
        unused: bool = False

    monkeypatch.setitem(COMMANDS, "sft", COMMANDS["sft"]._replace(config=WithUnused))
    monkeypatch.setattr(f"{__name__}.settings", lambda kind: {"unused": bool, "seed": int})
    values = EVERYWHERE | BASES["sft"]

    def run(config):
        return observe(config, monkeypatch)

    reasons = disobeyed(WithUnused, values, files, run, contexts={}, others={})
    assert reasons == ["unused=True changes nothing"]


def noted(monkeypatch, replace, command, config, *, ends=()):
    """Observation of a command that trains nothing: arguments of the functions that `replace(patch, note)` puts in."""
    observation = Observation()
    with monkeypatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", "")
        patch.setattr(devices, "start_log", lambda: None)
        replace(patch, observation.note)
        try:
            COMMANDS[command].load()(config)
        except Mistake as mistake:
            observation.mistake = mistake
        except ends:
            pass
    return observation


SAMPLING = {"repetition_penalty": 2.0, "max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1}


def with_params_into(note):
    """A replacement for `with_params`, which reads no weights."""

    def with_params(model, *, adapter, dtype):
        note("weights", model.source, adapter, dtype)
        return model._replace(graphdef="graph", params="params")

    return with_params


def test_every_setting_of_generate_changes_what_it_hands_on_or_is_refused(files, monkeypatch, tmp_path, capsys):
    output = tmp_path / "responses.jsonl"

    def replace(patch, note):
        def respond(model, prompts, sampling, *, n, engine, **options):
            note("responses", model.source, prompts, list(sampling), n, **options)
            return [(f"{'dog ' * k}cat", True) for _ in prompts for k in range(n)]

        patch.setattr(generate, "with_params", with_params_into(note))
        patch.setattr(generate, "respond", respond)
        patch.setattr(generate, "HttpEngine", lambda url, **options: note("engine", url, **options))

    def run(config):
        output.unlink(missing_ok=True)
        observation = noted(monkeypatch, replace, "generate", config)
        observation.note("written", output.read_text() if output.exists() else None, capsys.readouterr().out)
        return observation

    rewarded = {"reward": "tests.commands.rewards:dogs", "n": 2}
    contexts = {
        "batch_size": {"n": 40},
        "keep": rewarded,
        "reward_seconds": {"reward": "tests.commands.rewards:hangs(seconds=0.2)"},
        "engine_kind": {"engine": "http://localhost:1"},
    }
    others = SAMPLING | {
        "model": "{other_model}",
        "adapter": tmp_path / "adapter",
        "precision": "bfloat16",
        "prompts": "two ?",
        "output": None,
        "stop": (".",),
        "reward": "tests.commands.rewards:dogs",
        "reward_seconds": 0.02,
        "engine": "http://localhost:1",
    }
    values = {"model": "{model}", "prompts": "one ?", "output": output}
    assert not disobeyed(GenerateConfig, values, files, run, contexts=contexts, others=others)


def test_every_setting_of_chat_changes_what_it_hands_on_or_is_refused(files, monkeypatch, tmp_path):
    def replace(patch, note):
        patch.setattr(chat, "with_params", with_params_into(note))
        patch.setattr(chat, "LocalEngine", functools.partial(Engine, note))
        patch.setattr("sys.stdin", io.StringIO("one ?\n"))

    def run(config):
        return noted(monkeypatch, replace, "chat", config)

    others = SAMPLING | {
        "model": "{other_model}",
        "adapter": tmp_path / "adapter",
        "precision": "bfloat16",
        "system": "the dog",
        "tokenizer": "{other_words}",
        "chat_template": "{other_template}",
    }
    values = {"model": "{model}", "max_new_tokens": 8, "chat_template": "{template}"}
    assert not disobeyed(ChatConfig, values, files, run, contexts={}, others=others)


def test_every_setting_of_export_changes_what_it_hands_on(files, monkeypatch, tmp_path):
    runs = []
    for name in ("run", "other"):
        values = EVERYWHERE | BASES["sft"] | {"output": str(tmp_path / name), "lora.rank": 2}
        trained = config_of(SFTConfig, values, files)
        folder.open_run(trained, command="sft", resume=True, write=True)
        (tmp_path / name / "checkpoints").mkdir()
        runs.append(tmp_path / name)

    def replace(patch, note):
        class Checkpoints:
            def __init__(self, path):
                note("checkpoints", path)

            def best_step(self):
                return 1

            def restore_part(self, prefix, like, *, step):
                note("restored", prefix, step)
                return like, step or 2

            def close(self):
                pass

        patch.setattr(export, "Checkpoints", Checkpoints)
        patch.setattr(export, "join", lambda trained, frozen: trained)
        patch.setattr(export, "merge_by_layer", lambda params, lora: params)
        patch.setattr(part, "load_params", lambda *_, shardings, **__: shardings)
        for function in ("save_model", "save_lora"):
            patch.setattr(
                final, function, lambda path, run, *_, function=function: note(function, path, run.export_dtype)
            )

    def run(config):
        return noted(monkeypatch, replace, "export", config)

    values = {"run": runs[0], "output": tmp_path / "exported"}
    others = {"run": runs[1], "output": tmp_path / "elsewhere", "step": 3, "export_dtype": "bfloat16"}
    assert not disobeyed(ExportConfig, values, files, run, contexts={}, others=others)


def test_every_setting_of_quickstart_changes_what_it_hands_on(files, monkeypatch, tmp_path):
    class Enough(Exception):
        pass

    def replace(patch, note):
        def plan(output, seed):
            note("plan", output, seed)
            raise Enough

        patch.setattr(pipeline, "_write_world", lambda folder, seed: note("world", folder, seed))
        patch.setattr(pipeline, "plan", plan)

    def run(config):
        return noted(monkeypatch, replace, "quickstart", config, ends=Enough)

    values, others = {"output": tmp_path / "quickstart"}, {"output": tmp_path / "elsewhere"}
    assert not disobeyed(QuickstartConfig, values, files, run, contexts={}, others=others)


@pytest.mark.parametrize("command", [name for name in TRAINING if name not in OFFLINE])
def test_a_step_and_its_responses_share_no_name_of_a_metric(command, files, monkeypatch):
    """Also where reward functions are called as metrics are: their scores are scores/<name>."""
    reward = "tests.commands.rewards:chosen + tests.commands.rewards:margins"
    values = EVERYWHERE | BASES[command] | {"reward": reward}
    observed = observe(config_of(COMMANDS[command].config, values, files), monkeypatch)
    program = observed.program
    _, of_step = jax.eval_shape(program.step, program.like, program.frozen, observed.batch)
    assert {"scores/chosen", "scores/margins"} <= set(observed.metrics)
    assert not set(observed.metrics) & set(of_step)


@pytest.mark.parametrize("command", TRAINING)
def test_the_same_settings_are_the_same_observation(command, files, monkeypatch):
    """Otherwise the comparison would find differences that no setting makes."""
    config = config_of(COMMANDS[command].config, EVERYWHERE | BASES[command], files)
    first, second = observe(config, monkeypatch), observe(config, monkeypatch)
    assert first.mistake is None and difference(first, second) is None
