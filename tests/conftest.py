"""Eight fake devices on the CPU, strict shapes, and the real data where it is at hand."""

import os
import signal
from pathlib import Path

import pytest

from tests.shared import WORDS, on_one_device

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # two workers may compile for TPUs at once
# The programs of tests are small and run a few times each: most of the tests' time went into optimising their code.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")
)
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_configure():
    """Imports jax only now, since it reads the variables above, and before any test imports the package."""
    import jax
    from jaxtyping import install_import_hook

    jax.config.update("jax_numpy_rank_promotion", "raise")
    # Shapes are checked where all arguments are arrays: not on pytree dataclasses, which tree.map rebuilds with others.
    install_import_hook(["jaxalign.ops", "jaxalign.losses", "jaxalign.kernels"], "beartype.beartype")


@pytest.fixture(autouse=True)
def compilation_cache_goes_with_the_test():
    """A command turns it on for its process, and programs for devices that are absent cannot be read from it."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    yield
    if jax.config.jax_compilation_cache_dir is not None:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the tests run in the background, whose processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def one_device():
    """The mesh of a run consists of the first device only."""
    with on_one_device():
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and small trained models beside the repository; tests that use it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder.name}: it is not part of the project")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama with a tokenizer of words, as a Hugging Face folder; its pad token is its eos."""
    import jax
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from jaxalign.models.decoder.decoder import init_params
    from jaxalign.models.files.families import model_config
    from jaxalign.models.files.save import save_pretrained

    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    }
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r" |(?=[:.?\n])|(?<=\n)"), "removed")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    )
    config = model_config(hf)
    path = tmp_path_factory.mktemp("tiny") / "model"
    save_pretrained(path, init_params(config, jax.random.key(0)), config, hf, tokenizer=tokenizer)
    return path


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """200 rows of prompt and completion of ragged length, and a split of 20 held out."""
    import json
    import random

    draw = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with path.open("w") as file:
        for i in range(220):
            question = " ".join(draw.choices(WORDS[4:17], k=draw.randint(2, 9)))
            answer = " ".join(["the", "cat"] * draw.randint(1, 6))
            row = {"prompt": f"{question} ?", "completion": f"{answer} .", "split": "test" if i % 11 == 0 else "train"}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def server(tiny_model):
    """A server that generates with the tiny model."""
    from tests.rollout.server import Server

    with Server(tiny_model) as server:
        yield server
