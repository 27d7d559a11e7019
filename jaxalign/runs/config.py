"""What a run is told: one frozen dataclass per command, shared by the command line and experiment files.

Standard library only, so that `jaxalign --help` answers at once. The docstring under a field is its help.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping."""

    learning_rate: float = 2e-5
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up; linear and cosine fall to 0 at the last step."""
    warmup_steps: int = 0
    """Steps of linear rise to the peak."""
    weight_decay: float = 0.0
    """Decoupled decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.999
    """Decay of Adam's second moment."""
    accumulator_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of Adam's first moment; bfloat16 halves its memory."""


@dataclass(frozen=True)
class MeshConfig:
    """How many ways each mesh axis cuts; -1 takes the devices that the others leave."""

    data: int = 1
    """Replicas of the model; each takes a share of the rows."""
    fsdp: int = -1
    """Shares of parameters, gradients, optimizer state and rows."""
    tensor: int = 1
    """Shares of heads, hidden units and vocabulary."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and what is kept."""

    every: int = 200
    """Steps between checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: int = 0
    """How many checkpoints with the lowest held-out loss stay besides."""


@dataclass(frozen=True)
class LogConfig:
    """Where metrics go besides metrics.jsonl and the terminal."""

    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    wandb: str | None = None
    """Weights & Biases project (pip install 'jaxalign[wandb]')."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank on a frozen base, in place of training all parameters."""

    rank: int = 0
    """Rank of the adapters; 0 trains all parameters."""
    alpha: float = 16.0
    """The update is scaled by alpha / rank."""
    targets: str = "all-linear"
    """Adapted layers: all-linear, or names and regular expressions, 'q_proj,v_proj' or 'attention/.*'."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    dora: bool = False
    """Also train the magnitude of each output (DoRA)."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Keep the base's kernels in 8 or 4 bits (QLoRA)."""


@dataclass(frozen=True)
class TrainConfig:
    """What every command that trains is told."""

    model: str
    """A Hugging Face folder or hub name, or config:PATH to start from random weights of that config.json."""
    data: str
    """File, folder or hub name; several with weights: 'a.jsonl*0.7,b.jsonl*0.3'; one split: 'a.jsonl:train'."""
    output: Path
    """The run folder; a folder that holds the same run is resumed."""
    eval_data: str | None = None
    """Held-out data; by default the held-out split of --data, if it has one."""
    eval_share: float = 0.05
    """Without held-out data: share of the examples to hold out, at most 512; 0: none."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, if it is not the model's."""
    chat_template: str | None = None
    """A named template (chatml, llama3, ...) or a Jinja file, in place of the tokenizer's own."""
    steps: int | None = None
    """Optimizer updates; by default --epochs decides."""
    epochs: float = 1.0
    """Passes over the data, when --steps is not given."""
    batch_size: int = 8
    """Per step, over all devices: rows (sft), pairs (dpo, reward), rated responses (kto), prompts (ppo, grpo, ...)."""
    microbatches: int = 1
    """Gradient calls per step; more of them, less memory, the same result."""
    max_length: int = 1024
    """Tokens of a row, and at most of a prompt with its response."""
    packing: bool = True
    """Put several sequences in a row, kept apart by segment ids."""
    shuffle: bool = True
    """Draw examples in a seeded random order, another one each epoch."""
    seed: int = 0
    """Seed of initial weights, shuffling and samples."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of compute; auto is bfloat16 on TPU and GPU and float32 on CPU."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters; with LoRA of the frozen base, beside adapters in float32."""
    remat: Literal["none", "dots", "blocks"] = "blocks"
    """What the backward pass computes again: nothing, all but matrix products, whole blocks."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Attention implementation; auto is the fastest that fits the platform and shapes."""
    implementation: Literal["auto", "chunked", "pallas"] = "auto"
    """Of log-probabilities: XLA in chunks of the vocabulary, or the Pallas kernel; auto is chunks, as yet."""
    check_kernels: bool = False
    """Compare the kernels with XLA on the first batch, values and gradients, and refuse to train past a tolerance."""
    eval_every: int = 0
    """Steps between evaluations; 0: at the start and the end only."""
    samples: int = 4
    """Held-out prompts answered at each evaluation, in samples.jsonl."""
    max_dropped: float = 0.1
    """Share of rows without anything to learn above which the run refuses to start."""
    resume: bool = True
    """Continue the run that --output holds."""
    profile: bool = False
    """Write a profiler trace of a few steps into the run folder."""
    distributed: bool = False
    """Join the other hosts first: those of a TPU pod or Slurm job, or that JAX_COORDINATOR_ADDRESS leads to."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)


@dataclass(frozen=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning; with --model config:PATH, pretraining from scratch."""

    loss: str = "cross_entropy"
    """A loss of losses/language.py, 'cross_entropy(label_smoothing=0.1, z_loss=1e-4)', or 'my.module:function'."""
    turns: Literal["all", "last"] = "all"
    """Which assistant turns of a conversation are learned."""
    long_text: Literal["truncate", "split"] = "truncate"
    """Texts longer than --max-length keep their first tokens, or are split; plain text files are always split."""


@dataclass(frozen=True)
class DPOAlgorithm:
    """What is minimised over pairs."""

    loss: str = "dpo"
    """Of losses/pairs/margin.py: 'ipo(beta=0.05)', a sum 'dpo(beta=0.1) + 0.2*sft', or 'my.module:function(x=1)'."""


@dataclass(frozen=True)
class KTOAlgorithm:
    """What is minimised over rated responses."""

    loss: str = "kto"
    """Of losses/unpaired.py: 'kto(beta=0.1, lambda_d=1.33)', or 'my.module:function(x=1)'."""


@dataclass(frozen=True)
class RefUpdateConfig:
    """Whether the reference follows the policy (TR-DPO), and how."""

    every: int = 0
    """Steps from one update of the reference to the next; 0: it is frozen."""
    alpha: float = 0.6
    """The policy's share in an update, weight by weight; 1 copies the policy."""


@dataclass(frozen=True)
class FeedbackConfig(TrainConfig):
    """What the commands that learn from feedback are told besides."""

    as_chat: bool = False
    """Text prompts are turns of the user, responses of the assistant: they are rendered with the chat template."""
    ref_model: str | None = None
    """The frozen reference, if it is not --model; with LoRA it is always the base."""
    precompute_reference: bool = False
    """Run the reference once over all data before training, which then holds one model."""
    ref_update: RefUpdateConfig = field(default_factory=RefUpdateConfig)


@dataclass(frozen=True)
class DPOConfig(FeedbackConfig):
    """Direct preference optimisation and its family, from pairs of responses."""

    share_prompt: bool = False
    """Compute a pair's prompt once, where both responses fit behind it in a row; by XLA's attention or cuDNN's."""
    algorithm: DPOAlgorithm = field(default_factory=DPOAlgorithm)


@dataclass(frozen=True)
class KTOConfig(FeedbackConfig):
    """Kahneman-Tversky optimisation and its family, from responses that are good or bad."""

    algorithm: KTOAlgorithm = field(default_factory=KTOAlgorithm)


@dataclass(frozen=True)
class RewardAlgorithm:
    """What is minimised over the scores of a prompt's responses."""

    loss: str = "bradley_terry"
    """Of losses/ranking.py: 'bradley_terry(margin=0.1, centering_coef=0.01)', 'kwise', 'process' (a score a step), or
    'my.module:function(x=1)'."""


@dataclass(frozen=True)
class RewardConfig(TrainConfig):
    """Reward models, from pairs or rankings of responses."""

    as_chat: bool = False
    """Text prompts are turns of the user, responses of the assistant: they are rendered with the chat template."""
    members: int = 1
    """Of an ensemble, whose disagreement is told: heads on the one trunk; with LoRA, adapters with a head each."""
    combine: str = "mean"
    """Of the members' scores, in what reads the model: 'mean', 'min' or 'mean_minus_std(k=1.0)'."""
    step_separator: str = "\n"
    """Text behind each step of a solution, at which its score is read; of the losses of steps."""
    freeze_trunk: bool = False
    """Train the heads alone, on a trunk that stays as it is."""
    algorithm: RewardAlgorithm = field(default_factory=RewardAlgorithm)


@dataclass(frozen=True)
class ExportConfig:
    """A finished or interrupted run as a Hugging Face folder."""

    run: Path
    """The run folder."""
    output: Path
    """The folder to write; it must not exist, or be empty."""
    step: int | None = None
    """The checkpoint to export; by default the newest."""
    best: bool = False
    """Export the kept checkpoint with the lowest held-out loss."""
    adapter: bool = False
    """Export the adapters of a LoRA run alone, in PEFT's format; by default they are merged into the base."""


@dataclass(frozen=True)
class AnsweringConfig:
    """A model that answers, and how its tokens are drawn."""

    model: str
    """A Hugging Face folder (a run's final/ is one) or hub name."""
    _: KW_ONLY
    adapter: Path | None = None
    """A folder of LoRA adapters in PEFT's format, of --model: a run's adapter/ is one."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens that holds this share of the probability."""
    top_k: int = 0
    """Sample from the k most likely tokens; 0: from all."""
    min_p: float = 0.0
    """Sample from tokens at least this share as likely as the most likely one; 0: from all."""
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt and of the response so far are divided by it; 1: not."""
    cache_dtype: Literal["auto", "float32", "bfloat16", "int8"] = "auto"
    """Dtype of the cached keys and values; auto is that of compute."""
    seed: int = 0
    """Seed of sampling."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of compute; auto is bfloat16 on TPU and GPU and float32 on CPU."""


@dataclass(frozen=True)
class GenerateConfig(AnsweringConfig):
    """Answers of a model to prompts."""

    prompts: str
    """Files of prompts (.jsonl with `prompt` or `messages`, .txt one a line), FILE:SPLIT, or the prompt itself."""
    output: Path | None = None
    """A .jsonl file of prompt and response; by default they are printed."""
    max_new_tokens: int = 128
    """Length limit of a response, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, which holds them."""
    n: int = 1
    """Responses to each prompt."""
    reward: str | None = None
    """Score the responses: 'reward_model(path=...)', 'my.module:function', as of jaxalign grpo."""
    reward_seconds: float = 300.0
    """That the reward functions, side by side, may take for 64 responses, which are scored together."""
    keep: Literal["all", "best"] = "all"
    """Keep all responses, or each prompt's best by --reward (best-of-n)."""
    batch_size: int = 16
    """Responses generated side by side; one that ends makes room for the next prompt at once."""
    engine: str | None = None
    """Address of a server that answers with what it serves, http://host:port; --model gives the tokenizer."""
    engine_kind: Literal["vllm", "sglang"] = "vllm"
    """What the server is; rollout/engine/servers.py says how it must be started."""


@dataclass(frozen=True)
class ChatConfig(AnsweringConfig):
    """A conversation with a model in the terminal."""

    system: str | None = None
    """What the model is told before the conversation."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, if it is not the model's."""
    chat_template: str | None = None
    """A named template (chatml, llama3, ...) or a Jinja file, in place of the tokenizer's own."""
    max_new_tokens: int = 512
    """Length limit of an answer, in tokens; the rest of the model's window is for what was said before."""
    temperature: float = 0.7
    """Sampling temperature; 0 takes the most likely token."""


@dataclass(frozen=True)
class QuickstartConfig:
    """The whole pipeline on an embedded tiny world: no network, no data, minutes on a laptop."""

    output: Path = Path("quickstart")
    """The folder for runs and the page of results."""
    seed: int = 0
    """Seed of the world, the weights and the samples."""
