"""Settings that several commands share, as mixins and groups."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from jaxalign.config.limits import above, at_least, positive_share, share


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, its schedule and clipping."""

    learning_rate: Annotated[float | None, at_least(0)] = None
    """Peak learning rate; none: the one named above, or that of the run which --output holds."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after warm-up. 'linear' and 'cosine' fall to 0 at the last step."""
    extend: Literal["refuse", "restart", "stretch"] = "refuse"
    """Schedule of a run continued to another last step. 'restart': the planned schedule ends as planned, then warm-up\
 and schedule begin anew over the added steps, with Adam's moments kept; 'stretch': from now on rates are those of a\
 run planned for all steps, so the next one jumps; 'refuse': neither, the run is not continued."""
    warmup_steps: Annotated[int, at_least(0)] = 0
    """Number of optimizer updates during which the learning rate rises linearly to its peak."""
    weight_decay: Annotated[float, at_least(0)] = 0.0
    """Decoupled weight decay, applied to matrices only."""
    max_grad_norm: Annotated[float, at_least(0)] = 1.0
    """Largest global norm of the gradients; larger ones are scaled down to it. 0 turns clipping off."""
    b1: Annotated[float, at_least(0, below=1)] = 0.9
    """Decay of Adam's first moment, per update."""
    b2: Annotated[float, at_least(0, below=1)] = 0.999
    """Decay of Adam's second moment, per update."""
    accumulator_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of Adam's first moment; 'bfloat16' halves its memory."""


@dataclass(frozen=True)
class MeshConfig:
    """Number of parts that each mesh axis cuts arrays into; at most one may be -1, for all remaining devices."""

    data: int = 1
    """Number of model replicas; each reads a share of the rows."""
    fsdp: int = -1
    """Number of parts of parameters, optimizer state and rows; -1: all devices left."""
    tensor: int = 1
    """Number of shares of attention heads, hidden units and vocabulary."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints: when they are written, and how many stay."""

    every: Annotated[int, at_least(0)] = 200
    """Number of steps between checkpoints. The last step is always saved; 0: checkpoints by the clock alone."""
    minutes: Annotated[float, at_least(0)] = 30.0
    """Minutes since a checkpoint after which the next step is saved too, whatever --checkpoint.every is; 0: never."""
    keep: Annotated[int, at_least(1)] = 2
    """Number of newest checkpoints that stay on disk."""


@dataclass(frozen=True)
class BestCheckpointConfig(CheckpointConfig):
    """Checkpoints: when they are written, and how many stay."""

    keep_best: Annotated[int, at_least(0)] = 0
    """Number of checkpoints with the lowest held-out loss that stay besides the newest."""


@dataclass(frozen=True)
class LogConfig:
    """Metrics trackers, besides metrics.jsonl and the terminal."""

    tensorboard: bool = False
    """Write TensorBoard events into the run folder."""
    wandb: str | None = None
    """Weights & Biases project to log to (pip install 'jaxalign[wandb]'); none: no project."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on a frozen base, in place of training all parameters."""

    rank: Annotated[int, at_least(0)] = 0
    """Rank of the adapters; 0 trains all parameters instead."""
    alpha: Annotated[float, above(0)] = 16.0
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    targets: str = "all-linear"
    """Layers that get adapters: 'all-linear', names, or regular expressions: 'q_proj,v_proj', 'attention/.*'."""
    rslora: bool = False
    """Scale adapters by alpha / sqrt(rank) (rsLoRA)."""
    dora: bool = False
    """Train a magnitude for each output, too (DoRA)."""
    quantise: Literal["none", "int8", "nf4"] = "none"
    """Format of the frozen base's kernels: 'int8' is 8 bits, 'nf4' 4 bits (QLoRA), 'none' full precision."""


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    """Settings of commands that respond to prompts."""

    last_turn: Literal["refuse", "continue", "drop"] = "refuse"
    """Treatment of prompts whose last turn is the assistant's: an error ('refuse'), or the response goes on with it\
 ('continue'), or it is taken off ('drop')."""


@dataclass(frozen=True)
class RefUpdateConfig:
    """Updates of the reference towards the policy (TR-DPO)."""

    every: Annotated[int, at_least(0)] = 0
    """Number of steps between updates of the reference; 0 keeps it frozen."""
    alpha: Annotated[float, above(0)] = 0.6
    """Weight of the policy in an update of the reference, above 0 and at most 1; 1 copies the policy."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings that every command that trains obeys."""

    default_learning_rate: ClassVar[float] = 2e-5  # for all parameters; each command has a published one of its own
    lora_factor: ClassVar[float] = 10.0  # of adapters: Schulman et al. 2025, https://thinkingmachines.ai/blog/lora/

    model: str
    """Model to start from: Hugging Face folder or hub name; config:PATH gives random weights (sft, reward only)."""
    data: str
    """Data: a file, folder or hub name; several with weights 'a.jsonl*0.7,b.jsonl*0.3'; one split 'NAME:train'."""
    output: Path
    """Run folder. If it holds the same run already, that run continues."""
    tokenizer: str | None = None
    """Folder or hub name of the tokenizer; none: the model's own."""
    chat_template: str | None = None
    """Chat template: plain, alpaca, chatml, llama3 or a Jinja file; none: the tokenizer's own."""
    steps: Annotated[int | None, at_least(1)] = None
    """Number of steps, each one optimizer update; none: as many as --epochs needs."""
    epochs: Annotated[float, above(0)] = 1.0
    """Number of passes over the data, when --steps is not given."""
    batch_size: Annotated[int, at_least(1)] = 8
    """Number of rows per step, over all devices."""
    microbatches: Annotated[int, at_least(1)] = 1
    """Number of parts that a batch is computed in. More parts need less memory and give the same result."""
    max_length: Annotated[int, at_least(2)] = 1024  # the first token is never learned
    """Length limit of prompt and response together, in tokens; more is cut or dropped."""
    max_dropped: Annotated[float, share()] = 0.1
    """Largest share of unusable data rows, 0 to 1, with which the run starts."""
    shuffle: bool = True
    """Draw rows in a seeded random order, a new one each epoch."""
    seed: Annotated[int, at_least(0, below=2**32)] = 0
    """Seed of initial weights, data order and sampling."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of computation, of every matrix product's inputs too. 'auto': bfloat16 on TPU and GPU, float32 on CPU."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the parameters. With LoRA, dtype of the frozen base; adapters are always float32."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the exported model; checkpoints and adapters keep theirs. 'auto' is that of --model's files."""
    remat: Literal["none", "dots", "blocks"] = "blocks"
    """Activations that the backward pass recomputes: 'none', 'dots' (all but matrix products), 'blocks' (all)."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Attention implementation. 'auto' is the fastest that runs on the platform and fits the shapes."""
    eval_every: Annotated[int, at_least(0)] = 0
    """Number of steps between evaluations; 0 evaluates at the start and the end only."""
    resume: bool = True
    """Continue the run that --output holds; with --no-resume a folder that holds a run is refused."""
    profile: bool = False
    """Write a profiler trace of a few steps into the run folder."""
    distributed: bool = False
    """Join the other hosts first: a TPU pod's, a Slurm job's, or those at JAX_COORDINATOR_ADDRESS."""
    fingerprints: Literal["sample", "whole"] = "sample"
    """Bytes of the models' files that are compared at a resume and between hosts: a sample of each tensor, or all."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def peak_learning_rate(self) -> float:
        """`optimizer.learning_rate`; where it is None the command's own, times `lora_factor` for adapters."""
        if self.optimizer.learning_rate is not None:
            return self.optimizer.learning_rate
        return self.default_learning_rate * (self.lora_factor if self.lora.rank else 1.0)


@dataclass(frozen=True, kw_only=True)
class LogpSettings:
    """Settings of commands that read log-probabilities of tokens."""

    implementation: Literal["auto", "chunked", "pallas"] = "auto"
    """Implementation of token log-probabilities: 'chunked' (XLA; 'auto' picks it) or the 'pallas' kernel."""


@dataclass(frozen=True, kw_only=True)
class KernelCheckSettings(LogpSettings):
    """Settings of commands whose first batch is known before training."""

    check_kernels: bool = False
    """Compare values and gradients of the Pallas kernels with XLA's on the first batch; refuse if they differ."""


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(TrainConfig):
    """Settings of commands that learn from a fixed data set."""

    eval_data: str | None = None
    """Held-out data, given as --data is; none: the held-out split of --data, if any."""
    eval_share: Annotated[float, at_least(0, below=1)] = 0.05
    """Share of --data, 0 to below 1, held out if nothing else is; at most 512 rows."""
    eval_every: Annotated[int, at_least(0)] = 0
    """Number of steps between evaluations on held-out data; 0 evaluates at the start and the end only."""
    packing: bool = True
    """Put several sequences into one row, kept apart by segment ids."""
    checkpoint: BestCheckpointConfig = field(default_factory=BestCheckpointConfig)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Settings of commands that show responses of the model while it learns."""

    samples: Annotated[int, at_least(0)] = 4
    """Number of held-out prompts responded to at each evaluation, in samples.jsonl; 0 writes none."""


@dataclass(frozen=True, kw_only=True)
class ChatRowSettings:
    """Settings of commands whose prompts may be plain text."""

    as_chat: bool = False
    """Render text prompts and responses with the chat template, as turns of the user and the assistant."""


@dataclass(frozen=True, kw_only=True)
class TruncationSettings:
    """Settings of sampling that never draws unlikely tokens."""

    top_p: Annotated[float, positive_share()] = 1.0
    """Share of probability, above 0 to 1, that the fewest likely tokens hold; only they are sampled."""
    top_k: Annotated[int, at_least(0)] = 0
    """Number of most likely tokens that are sampled from; 0 samples from all."""
    min_p: Annotated[float, at_least(0, below=1)] = 0.0
    """Smallest probability sampled, as a share of the largest, 0 to below 1; 0 samples from all."""
