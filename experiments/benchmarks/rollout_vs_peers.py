"""Generation with a 26M-parameter Llama on a CPU: jaxalign's engine beside transformers and Tunix, in one run.

    pip install torch==2.13.0 && pip install -e '.[bench]'
    python experiments/benchmarks/rollout_vs_peers.py --rounds 3 --steps 4

The model: hidden 384, 8 layers, 6 heads, MLP 1,600, vocabulary 8,192, untied; fp32, 2 threads. `fixed`: 16 prompts of
64 tokens, 128 new tokens each, greedy and sampled at temperature 1. `spread`: 64 such prompts, sampled, with responses
of 16 to 256 tokens (uniform), 16 generated at once. Only these tokens are counted: a contender that cannot give a freed
place to the next prompt generates until the longest response of the batch has ended. `ending`: 64 such prompts, where
each token ends the response with probability 1 %, so responses have 100 tokens on average, and 1,024 are allowed; "long
rings" is the engine with room for 1,024 from the start. A step is one pass over all prompts. Contenders, speed, memory
and the time to the first step are measured as in sft_vs_peers.py.

Observed (two CPU cores, --rounds 1, one or two passes measured): tokens/s, peak GiB, first pass s. Engine of d4f8bac:

    fixed, greedy     jaxalign 1,002, 1.03, 10.8   transformers 534, 0.58, 4.1    Tunix 787, 1.02, 6.8
    ending            jaxalign 581, 1.57, 33.0     transformers 105, 0.76, 38.6   Tunix 51, 1.56, 82.8
                      long rings 426, 1.68, 28.4

Engine of 23f6c7c, whose rings had their largest length from the start:

    fixed, sampled    jaxalign 879, 0.98, 11.9     transformers 663, 0.57, 3.5    Tunix 569, 1.00, 7.6
    spread            jaxalign 630, 1.04, 25.9     transformers 307, 0.65, 28.0   Tunix 280, 1.48, 44.6
                      without refill 459, 1.00, 28.6

So jaxalign has 5.5 times the speed of transformers and 11 times that of Tunix where responses end by themselves (and
1.36 times that of long rings); 1.88 and 1.27 times greedily (1.60 and 1.42 in an earlier run of two rounds); 1.33 and
1.54 sampled; 2.05 and 2.25 on spread lengths, and there 1.37 times that of the engine without refill. The goals were 3
(transformers), 1.5 (Tunix) and 1.6 (without refill). Refill can at best take 628 decoding steps for the 970 without it,
1.54 times. A decoding step of 16 tokens takes 13 ms besides the reading of prompts: products with weights take 8, keys
and values 4.
"""

from __future__ import annotations

import functools

from side_by_side import HEADS, HIDDEN, LAYERS, VOCABULARY, hf_config, in_turns, tunix_config, word_tokenizer

SLOTS, PROMPT, NEW, LONGEST, MANY = 16, 64, 128, 256, 64
ALLOWED, TERMINATORS = 1024, tuple(range(VOCABULARY - 82, VOCABULARY))  # 1 % of what is drawn ends a response


def rows_of(kind: str, steps: int) -> list[list[tuple[list[int], int]]]:
    """For each pass, (ids of a prompt, number of tokens to generate) pairs. All passes have the same numbers.

    So contenders that compile for lengths do so in the first pass only.
    """
    import numpy as np

    rng = np.random.default_rng(0)
    spread = rng.integers(16, LONGEST + 1, MANY).tolist()
    wanted = {"spread": spread, "ending": [ALLOWED] * MANY}.get(kind, [NEW] * SLOTS)
    return [[(rng.integers(4, VOCABULARY, PROMPT).tolist(), count) for count in wanted] for _ in range(steps)]


def config_of():
    config = hf_config()
    config.max_position_embeddings = PROMPT + ALLOWED
    return config


def jaxalign(
    passes: list, mark, *, temperature: float, refill: bool = True, ends: bool = False, grows: bool = True
) -> None:
    import jax

    from jaxalign.models.decoder.decoder import init_params, make_decoder
    from jaxalign.models.files.families import model_config
    from jaxalign.rollout.engine import engine as engine_module
    from jaxalign.rollout.engine.engine import LocalEngine, Request
    from jaxalign.rollout.engine.slots import Sampling

    mark("imported", 0)
    config = model_config(config_of().to_dict() | {"architectures": ["LlamaForCausalLM"]})
    graphdef, _ = make_decoder(config)
    params = init_params(config, jax.random.key(0))
    engine = LocalEngine(graphdef, slots=SLOTS, refill=refill)
    longest = max(wanted for rows in passes for _, wanted in rows)
    if not grows:
        engine_module.FIRST_RING = longest
    for number, rows in enumerate(passes):
        requests = [Request(tuple(prompt), seed, wanted) for seed, (prompt, wanted) in enumerate(rows)]
        sampling = Sampling(longest, temperature=temperature, terminators=TERMINATORS if ends else ())
        responses = engine.generate(params, requests, jax.random.key(number), sampling=sampling)
        mark("step", sum(len(response.tokens) for response in responses))


def batches_of(rows: list):
    """(prompts, tokens to generate for each, tokens that count) of each batch, for contenders without refill."""
    for start in range(0, len(rows), SLOTS):
        part = rows[start : start + SLOTS]
        yield [prompt for prompt, _ in part], max(wanted for _, wanted in part), sum(wanted for _, wanted in part)


def transformers(passes: list, mark, *, sampled: bool, ends: bool = False) -> None:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(2)
    mark("imported", 0)
    model = LlamaForCausalLM(config_of()).eval()
    model.generation_config.eos_token_id = list(TERMINATORS) if ends else None
    for rows in passes:
        total = 0
        for prompts, longest, wanted in batches_of(rows):
            ids = torch.tensor(prompts)
            options = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {"do_sample": False}
            options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
            out = model.generate(ids, max_new_tokens=longest, min_new_tokens=0 if ends else longest, **options)
            assert ends or out.shape[1] == PROMPT + longest
            total += drawn(out[:, PROMPT:].numpy()) if ends else wanted
        mark("step", total)


def drawn(tokens) -> int:
    """Number of the tokens [B R] up to each row's first terminator, included."""
    import numpy as np

    ended = np.isin(tokens, TERMINATORS)
    return int(np.where(ended.any(axis=1), ended.argmax(axis=1) + 1, tokens.shape[1]).sum())


def tunix(passes: list, mark, *, sampled: bool, ends: bool = False) -> None:
    import jax
    from flax import nnx
    from transformers import PreTrainedTokenizerFast
    from tunix.generate.sampler import CacheConfig, Sampler
    from tunix.models.llama3.model import Llama3

    mark("imported", 0)
    config = tunix_config()
    tokenizer = word_tokenizer(PreTrainedTokenizerFast)
    longest_of_all = max(wanted for rows in passes for _, wanted in rows)
    cache = CacheConfig(PROMPT + longest_of_all, LAYERS, HEADS, HIDDEN // HEADS)
    with jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2):
        sampler = Sampler(Llama3(config, rngs=nnx.Rngs(0)), tokenizer, cache)
        for number, rows in enumerate(passes):
            total = 0
            for prompts, longest, wanted in batches_of(rows):
                texts = [" ".join(f"w{i}" for i in prompt[1:]) for prompt in prompts]  # it adds a first token
                options = {"temperature": 1.0, "top_p": 1.0, "seed": number} if sampled else {"temperature": 0.0}
                eos = list(TERMINATORS) if ends else [VOCABULARY - 1]
                out = sampler(texts, longest, max_prompt_length=PROMPT, eos_tokens=eos, **options)
                total += sum(len(row) + (len(row) < longest) for row in out.tokens) if ends else wanted
            mark("step", total)


CONTENDERS = {
    "fixed, greedy": {
        "jaxalign": functools.partial(jaxalign, temperature=0.0),
        "transformers": functools.partial(transformers, sampled=False),
        "Tunix": functools.partial(tunix, sampled=False),
    },
    "fixed, sampled": {
        "jaxalign": functools.partial(jaxalign, temperature=1.0),
        "transformers": functools.partial(transformers, sampled=True),
        "Tunix": functools.partial(tunix, sampled=True),
    },
    "spread": {
        "jaxalign": functools.partial(jaxalign, temperature=1.0),
        "jaxalign, without refill": functools.partial(jaxalign, temperature=1.0, refill=False),
        "transformers": functools.partial(transformers, sampled=True),
        "Tunix": functools.partial(tunix, sampled=True),
    },
    "ending": {
        "jaxalign": functools.partial(jaxalign, temperature=1.0, ends=True),
        "jaxalign, long rings": functools.partial(jaxalign, temperature=1.0, ends=True, grows=False),
        "transformers": functools.partial(transformers, sampled=True, ends=True),
        "Tunix": functools.partial(tunix, sampled=True, ends=True),
    },
}


if __name__ == "__main__":
    in_turns(__doc__, CONTENDERS, rows_of)
