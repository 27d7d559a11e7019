"""The controlled sentiment task of the DPO paper in miniature, up to where alignment begins.

Reviews are cut into pieces of one to a few sentences. A small Llama is trained from scratch on pieces of IMDb's
training reviews. It then continues the first 2 to 8 tokens of pieces of test reviews, several times each, and a scorer,
fitted to the labels of the training reviews, scores the continuations. The same samples give pairs for DPO (the best
and the worst of each prompt) and rated responses for KTO (above or below the median of all).

Difference from the paper: its policy is a fine-tuned GPT-2-large, its scorer a fine-tuned RoBERTa.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import imdb_scorer
import jax
import numpy as np

from jaxalign.commands import sft
from jaxalign.config.offline import SFTConfig
from jaxalign.config.shared import OptimizerConfig
from jaxalign.models.decoder.decoder import make_decoder
from jaxalign.models.files import huggingface
from jaxalign.models.files.load import load_params
from jaxalign.rollout.respond import Sampling, generate_ids

log = logging.getLogger("jaxalign.experiments")

LEAST_WORDS, MOST_WORDS = 10, 26  # limits on the length of a piece
LEAST_PROMPT, MOST_PROMPT, MOST_RESPONSE = 2, 8, 48  # tokens
LENGTH = 64  # room for <s>, a prompt, a response and </s>
SPECIAL = ["<pad>", "<s>", "</s>"]
TAG, SENTENCE_END = re.compile(r"<[^>]*>"), re.compile(r"(?<=[.!?])\s+")


class Size(NamedTuple):
    """Sizes of data, model, training and evaluation."""

    reviews: int = 25_000  # of the training set, and of the test set
    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    sft_steps: int = 1500
    sft_rows: int = 32  # of LENGTH tokens, packed
    prompts: int = 1200  # whose samples become feedback
    samples: int = 6  # per prompt
    steps: int = 96  # of alignment
    every: int = 24  # steps between evaluations
    batch: int = 16  # pairs; KTO takes twice as many rated responses
    measured: int = 512  # prompts of an evaluation, with one fresh sample each
    betas: tuple[float, ...] = (0.05, 0.1, 0.3, 1.0)


QUICK = Size(
    reviews=1000, vocabulary=1024, width=48, layers=1, sft_steps=200, sft_rows=16,
    prompts=64, samples=4, steps=2, every=2, batch=8, measured=64, betas=(0.1,),
)  # fmt: skip


class Piece(NamedTuple):
    """Consecutive sentences of a review, in lower case, and the review's label."""

    text: str
    label: int  # 1 if positive, else 0


class Policy(NamedTuple):
    """A language model, ready to generate."""

    graphdef: Any
    params: Any
    tokenizer: Any
    terminators: tuple[int, ...]


class Sample(NamedTuple):
    """A response; samples are in the order of their prompts."""

    ids: list[int]  # without a terminator
    ended: bool
    text: str


class Task(NamedTuple):
    """Starting point of alignment: a reference, feedback on its samples, a scorer, and prompts for evaluation."""

    reference: Path  # a Hugging Face folder
    pairs: Path  # prompt, chosen, rejected
    rated: Path  # prompt, completion, label
    scorer: imdb_scorer.Scorer
    prompts: list[list[int]]  # for evaluation, from other reviews than the feedback's


def read_reviews(path: Path, count: int) -> list[Piece]:
    """Whole reviews: the first `count` after a seeded shuffle."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    order = np.random.default_rng(0).permutation(len(rows))[:count]
    return [Piece(rows[i]["text"], rows[i]["label"]) for i in order]


def pieces(review: str) -> list[str]:
    """Runs of whole sentences of LEAST_WORDS to MOST_WORDS words, without markup; other sentences are left out."""
    runs, current = [], []
    for sentence in SENTENCE_END.split(" ".join(TAG.sub(" ", review).lower().split())):
        words = sentence.split()
        if len(current) + len(words) > MOST_WORDS:
            runs.append(current)
            current = []
        current = current + words if len(words) <= MOST_WORDS else []
    return [" ".join(words) for words in [*runs, current] if len(words) >= LEAST_WORDS]


def cut(reviews: Sequence[Piece]) -> list[Piece]:
    """All pieces of all reviews, in order."""
    return [Piece(text, review.label) for review in reviews for text in pieces(review.text)]


def prepare(folder: Path, output: Path, size: Size) -> Task:
    """Prepares everything before alignment. Files that the output folder holds already are used as they are.

    Args:
      folder: folder with imdb/train.jsonl.gz and imdb/test.jsonl.gz.
      output: folder for the reference and the feedback.
      size: sizes of data, model, training and evaluation.
    """
    train, test = (read_reviews(folder / "imdb" / f"{name}.jsonl.gz", size.reviews) for name in ("train", "test"))
    learned, half = cut(train), len(test) // 2
    feedback, held_out = cut(test[:half]), cut(test[half:])
    scorer = imdb_scorer.fit([p.text for p in learned], np.array([p.label for p in learned]))
    reference = _train_reference(output, learned, held_out[:512], size)
    policy = load_policy(reference)
    _write_feedback(output, policy, prompts_of(feedback, policy.tokenizer, size.prompts), scorer, size)
    log.info(
        "scorer: %d words; of the test reviews it labels %.1f%% of pieces and %.1f%% of whole reviews correctly",
        len(scorer.column),
        100 * scorer.accuracy([p.text for p in held_out], np.array([p.label for p in held_out])),
        100 * scorer.accuracy([r.text for r in test], np.array([r.label for r in test])),
    )
    prompts = prompts_of(held_out[512:], policy.tokenizer, size.measured)
    return Task(reference, output / "pairs.jsonl", output / "rated.jsonl", scorer, prompts)


def _train_reference(output: Path, learned: list[Piece], held_out: list[Piece], size: Size) -> Path:
    write_start(output / "start", [p.text for p in learned], size)
    _write_rows(output / "train.jsonl", [{"text": p.text} for p in learned])
    _write_rows(output / "held.jsonl", [{"text": p.text} for p in held_out])
    config = SFTConfig(
        model=f"config:{output / 'start'}",
        data=str(output / "train.jsonl"),
        eval_data=str(output / "held.jsonl"),
        output=output / "sft",
        steps=size.sft_steps,
        batch_size=size.sft_rows,
        max_length=LENGTH,
        samples=0,
        remat="none",
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=size.sft_steps // 10, weight_decay=0.1, b2=0.95),
    )
    _finish(sft.main(config))
    return output / "sft" / "final"


def _finish(status: int) -> None:
    """Ends the program with the run's exit status if a signal stopped the run; the same command continues it."""
    if status:
        raise SystemExit(status)


def write_start(folder: Path, texts: Sequence[str], size: Size) -> None:
    """Writes a small Llama's config.json and a byte-level BPE trained on the texts, as `model` config:FOLDER needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocabulary,
        "hidden_size": size.width,
        "intermediate_size": size.width * 8 // 3,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2 * LENGTH,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_policy(folder: Path) -> Policy:
    """The model of a Hugging Face folder, in float32."""
    config, tokenizer = huggingface.read_config(str(folder)), huggingface.load_tokenizer(str(folder))
    graphdef, _ = make_decoder(config)
    params = load_params(str(folder), config)
    return Policy(graphdef, params, tokenizer, huggingface.terminators(str(folder), tokenizer))


def prompts_of(choices: Sequence[Piece], tokenizer: Any, count: int) -> list[list[int]]:
    """Ids of `count` prompts: <s> and the first LEAST_PROMPT to MOST_PROMPT tokens of a piece, drawn with a seed.

    Prompts whose text is tokenized differently are left out, since the feedback files hold texts.
    """
    draw, prompts = np.random.default_rng(1), []
    for i in draw.permutation(len(choices)):
        ids = tokenizer(choices[i].text)["input_ids"][: 1 + draw.integers(LEAST_PROMPT, MOST_PROMPT + 1)]
        if tokenizer(tokenizer.decode(ids[1:]))["input_ids"] == ids:
            prompts.append(ids)
        if len(prompts) == count:
            return prompts
    raise ValueError(f"{len(choices)} pieces give {len(prompts)} prompts, and {count} are needed; read more reviews")


def sample(policy: Policy, prompts: Sequence[list[int]], key: jax.Array) -> list[Sample]:
    """Draws a response to each prompt at temperature 1, of at most MOST_RESPONSE tokens."""
    sampling = Sampling(MOST_RESPONSE, terminators=policy.terminators)
    batch = min(256, len(prompts))
    responses = generate_ids(policy.graphdef, policy.params, prompts, key, sampling=sampling, batch_size=batch)
    return [Sample(ids, ended, policy.tokenizer.decode(ids)) for ids, ended in responses]


def _write_feedback(
    output: Path, policy: Policy, prompts: list[list[int]], scorer: imdb_scorer.Scorer, size: Size
) -> None:
    if (output / "rated.jsonl").exists():
        return
    start = time.perf_counter()
    repeated = [prompt for prompt in prompts for _ in range(size.samples)]
    samples = sample(policy, repeated, jax.random.key(11))
    seconds = time.perf_counter() - start
    texts = [policy.tokenizer.decode(prompt[1:]) for prompt in repeated]
    scores = scorer([s.text for s in samples])
    is_usable = np.array([usable(s, policy.tokenizer) for s in samples])
    pairs, rated = feedback_rows(texts, samples, scores, is_usable)
    _write_rows(output / "pairs.jsonl", pairs)
    _write_rows(output / "rated.jsonl", rated)
    log.info(
        "%d samples in %.0f s, score %.3f ± %.3f (s.d.), %.1f%% ended by themselves, %.1f%% usable as text; "
        "%d pairs, %d rated",
        len(samples), seconds, scores.mean(), scores.std(), 100 * np.mean([s.ended for s in samples]),
        100 * is_usable.mean(), len(pairs), len(rated),
    )  # fmt: skip


def usable(drawn: Sample, tokenizer: Any) -> bool:
    """True if training on the text trains on the sampled tokens: it ended, is not blank, and tokenizes back to them."""
    same = tokenizer(drawn.text, add_special_tokens=False)["input_ids"] == drawn.ids
    return drawn.ended and bool(drawn.text.strip()) and same


def feedback_rows(
    prompts: Sequence[str], samples: Sequence[Sample], scores: np.ndarray, is_usable: np.ndarray
) -> tuple[list[dict], list[dict]]:
    """(pairs, rated responses) of the usable samples. Samples of one prompt are neighbours."""
    places = np.flatnonzero(is_usable)
    if not len(places):
        raise ValueError(f"none of {len(samples)} samples is usable as text; train the reference longer")
    median = float(np.median(scores[places]))
    rated = [{"prompt": prompts[i], "completion": samples[i].text, "label": bool(scores[i] > median)} for i in places]
    pairs = []
    begins = [i for i in range(1, len(places)) if prompts[places[i]] != prompts[places[i - 1]]]
    for group in np.split(places, begins):
        best, worst = group[np.argmax(scores[group])], group[np.argmin(scores[group])]
        if scores[best] > scores[worst]:
            pairs.append({"prompt": prompts[best], "chosen": samples[best].text, "rejected": samples[worst].text})
    return pairs, rated


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
