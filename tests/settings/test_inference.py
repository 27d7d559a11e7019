"""Commands that train nothing show only the settings that they obey; compared are the arguments of what they call."""

import functools
import io

from jaxalign.commands import COMMANDS, export, generate
from jaxalign.commands.chat import chat
from jaxalign.config.inference import ChatConfig, ExportConfig, GenerateConfig, QuickstartConfig
from jaxalign.config.offline import SFTConfig
from jaxalign.mistake import Mistake
from jaxalign.quickstart import pipeline
from jaxalign.run import devices, final, folder
from jaxalign.training import part
from tests.observed import Engine, Observation
from tests.settings.cases import BASES, EVERYWHERE, config_of, disobeyed


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


OTHERS = {"repetition_penalty": 2.0, "max_new_tokens": 3, "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
OTHERS |= {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 4}


def with_params_into(note):
    """A replacement for `with_params`, which reads no weights."""

    def with_params(model, *, adapter, dtype, mesh):
        note("weights", model.source, adapter, dtype, dict(mesh.shape))
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
    others = OTHERS | {
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

    others = OTHERS | {
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

            def close(self, **options):
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
