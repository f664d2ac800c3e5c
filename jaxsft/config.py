"""Every option of a run, in frozen dataclasses: one source of names, defaults and help.

The docstring of each field is its `--help` text. Lengths are in tokens, durations in steps.
"""

import dataclasses
import os.path
import re
from typing import Literal

# The system text of the recipe, put in front of the user's turn in training and generation alike.
ANSWER_TEMPLATE = "<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"
SYSTEM_PROMPT = (
    "You are a deep thinking AI. Think step by step about the problem and provide your reasoning "
    "between <reasoning> and </reasoning> tags. Then, provide the final answer between <answer> "
    "and </answer> tags."
)

Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The pretrained model."""

    path: str = "demo"
    """The base model: a Hugging Face directory, a name on the hub (owner/name or
    owner/name@revision), a .gguf file, a Flax checkpoint, or "demo" (Gemma 3 270M of the `demo`
    extra)."""
    tokenizer: str | None = None
    """A tokenizer.json, tokenizer.model or .gguf file; by default the tokenizer of the model."""
    dtype: Dtype = "float32"
    """Type of activations and matmuls. Adapters and their Adam moments are always float32."""
    param_dtype: Dtype = "float32"
    """Type of the frozen weights in memory."""
    remat: Literal["none", "projections", "full"] = "none"
    """What the backward pass computes again to save memory: nothing ("none"), all but the
    projections ("projections"), or whole layers ("full"). In the fused step "none" is the same as
    "projections"."""


@dataclasses.dataclass(frozen=True)
class LoraOptions:
    """The adapter."""

    r: int = 64
    """Rank of the adapter."""
    alpha: float = 64.0
    """The adapter's output is multiplied by alpha / r."""
    dropout: float = 0.0
    """Dropout rate on the adapter's input, at least 0 and below 1."""
    use_rslora: bool = False
    """Multiply by alpha / sqrt(r) instead."""
    target_modules: str = "all-linear"
    """Layers that get an adapter: Hugging Face names with commas (q_proj,v_proj,…), or
    "all-linear"."""


@dataclasses.dataclass(frozen=True)
class RowFileOptions:
    """The files of rows, and what is done with every row, in any kind of training."""

    train_files: list[str] | str = dataclasses.field(default_factory=list)
    """Training rows (prompt/response with <think>, messages, …): files of JSON, CSV, Parquet or
    Arrow, also in gzip or zstd; directories and quoted patterns (data/**/*.jsonl) of them; data
    sets of the hub: owner/name[:config][/split][slice], as openai/gsm8k:main/train[:500]. Several
    as a list, or with commas between them."""
    eval_files: list[str] | str = dataclasses.field(default_factory=list)
    """Held-out rows, to measure on; the first are asked for answers. May be empty."""
    start: int = 0
    """Number of the first training row to use, counted from 0 over all files."""
    stop: int | None = None
    """Number of the first training row not to use; by default all rows to the end are used."""
    weights: list[float] | None = None
    """How often an epoch uses the samples of each file: 2 is twice, 0.5 is one half of them, the
    same half each time. By default once."""
    columns: dict[str, str] | None = None
    """The columns that hold the parts of a row, for example {prompt: task, response: text}. Parts:
    prompt, response, reasoning, system, input, messages. Other columns are not used then. By
    default they are found by their names (jaxsft/data/README.md)."""
    max_length: int = 2048
    """Tokens in a row of the batch."""
    system_prompt: str | None = SYSTEM_PROMPT
    """Text before the first user turn of rows that have no system text of their own; null for
    none. It must ask for the tags of answer_template."""
    answer_template: str = ANSWER_TEMPLATE
    """The form of an answer that is taught. {reasoning} and {answer} are its parts."""
    max_drop: float = 0.25
    """Stop when a larger share of the rows is left out, whatever the reasons."""


@dataclasses.dataclass(frozen=True)
class DataOptions(RowFileOptions):
    """Training and held-out rows."""

    packing: bool = False
    """Put several samples into one row; they do not see each other. By default a row has one."""
    overlong: Literal["shorten", "drop", "raise"] = "shorten"
    """For samples over max_length: "shorten" cuts the reasoning (never the answer), "drop" leaves
    the sample out, "raise" stops."""
    without_thought: Literal["drop_system", "keep_plain", "reject"] = "drop_system"
    """For rows with an answer that has no thought: "drop_system" trains them without system_prompt,
    which asks for one; "keep_plain" with it, which teaches to ignore it; "reject" leaves them
    out."""
    earlier_reasoning: Literal["keep", "strip"] = "keep"
    """The reasoning of earlier turns of a chat: "keep" trains every turn and shows it to later
    ones; "strip" removes it from earlier turns, as servers do, and trains the last turn only."""
    loss_on_prompt: bool = False
    """Train on the tokens of the prompt too."""
    min_completion_tokens: int = 8
    """Leave out samples whose trained answers, tags included, have fewer tokens together."""
    drop_degenerate: bool = True
    """Leave out answers that end in a loop, and those such as "I hope this helps!" alone."""
    drop_duplicates: bool = True
    """Leave out conversations with the same text as an earlier one."""
    drop_contaminated: bool = True
    """Leave out training rows whose prompt has at least half of a held-out prompt in it."""
    prepared_dir: str | None = None
    """Directory of prepared rows (python -m jaxsft.prepare); by default in your cache directory."""


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """Measuring on held-out rows before, during and after training."""

    num_prompts: int = 16
    """Number of held-out prompts to answer at each measurement; 0 for none."""
    batch_size: int = 8
    """Rows of an evaluation or generation batch over all devices; rounded up to a multiple of the
    number of devices."""
    max_new_tokens: int = 768
    """Most tokens in a generated answer."""
    temperature: float = 0.0
    """Sampling temperature; 0 always takes the likeliest token."""
    top_k: int = 0
    """Sample from the k likeliest tokens only; 0 for all."""
    top_p: float = 1.0
    """Sample from the smallest set of likeliest tokens whose total probability reaches this."""
    seed: int = 42
    """Seed of the sampling."""


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What every training run has, whatever it learns from."""

    name: str = "run"
    """Name of the run; its results go to output_dir/name."""
    output_dir: str = "runs"
    """Directory of all runs."""
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    lora: LoraOptions = dataclasses.field(default_factory=LoraOptions)
    data: RowFileOptions = dataclasses.field(default_factory=RowFileOptions)
    eval: EvalOptions = dataclasses.field(default_factory=EvalOptions)
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step. More of them take less memory."""
    max_steps: int | None = None
    """Number of optimizer steps; overrides num_train_epochs."""
    learning_rate: float = 2e-5
    """Highest learning rate, at the end of the warm-up."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of the cosine or linear decay."""
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on matrices only."""
    adam_beta1: float = 0.9
    """Decay of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay of Adam's second moment."""
    adam_epsilon: float = 1e-8
    """Number added to the denominator of Adam's update."""
    max_grad_norm: float = 1.0
    """Clip the gradient to this norm, over all parameters; 0 for no clipping."""
    seed: int = 42
    """Seed of the adapter's initial values, the order of rows, and dropout."""
    step: Literal["auto", "fused", "plain"] = "auto"
    """How a step is computed: "fused" is fast on a TPU; "plain" is the reference, and dropout and
    fsdp need it; "auto" is fused on a TPU where possible."""
    fsdp: int = 1
    """Number of devices over which the frozen weights are sharded; with 1 each device has all."""
    loss_chunk_tokens: int = 512
    """Positions per device whose logits are computed at once; fewer take less memory."""
    logging_steps: int = 1
    """Steps between two lines of metrics."""
    eval_steps: int | None = None
    """Steps between two measurements on held-out rows; by default only before and after the run."""
    save_steps: int = 500
    """Steps between two checkpoints."""
    save_total_limit: int = 2
    """Number of newest checkpoints to keep; with eval_steps, the checkpoint with the lowest
    held-out loss is kept too."""
    max_nonfinite_steps: int = 3
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    skip_spikes_sigmas: float | None = None
    """Skip an update whose loss or gradient norm is this many standard deviations above the mean of
    the last 128 steps; null for never, 6 is usual."""
    fork_from: str | None = None
    """Start from this adapter, not from a new one: a run's directory or a PEFT adapter. Its rank,
    alpha, targets and rsLoRA are taken; a lora option that contradicts them is refused."""
    budget_hours: float | None = None
    """Most hours for the remaining steps. The run stops after its preflight if that says more."""
    deadline: str | None = None
    """Time at which your machine goes away, such as 2026-11-22T21:30 (local time) or
    2026-11-22T21:30Z. The run saves and stops before it."""
    max_seconds: float | None = None
    """The same in seconds from the start of this command, whatever becomes of the clock."""
    fit_deadline: bool = False
    """Make a new run's schedule, with its decay, short enough to finish before the deadline."""
    hang_seconds: float | None = 1800.0
    """If nothing makes progress for this many seconds, print the stacks of all threads and end the
    process; null for never."""
    multihost: bool = False
    """This is one of several processes, one on each host of a TPU slice; start the same command on
    all of them. They connect through jax.distributed. Only the first writes results; a signal to
    one process stops all."""


@dataclasses.dataclass(frozen=True)
class TrainConfig(RunConfig):
    """One run of `train`. Batch sizes are global: over all devices and micro-batches."""

    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    global_batch_size: int = 32
    """Rows of an optimizer step, on all devices together."""
    num_train_epochs: float = 1.0
    """Passes over the training rows."""
    num_workers: int = 2
    """Threads that read rows ahead."""


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """The completions that a policy is trained on."""

    num_prompts: int = 16
    """Prompts of a rollout."""
    num_generations: int = 8
    """Completions of each prompt: the group that its rewards are compared in."""
    max_new_tokens: int = 512
    """Most tokens in a completion. Prompts that leave no room for them in a row of data.max_length
    tokens are left out."""
    batch_size: int = 128
    """Completions drawn at once, over all devices. Whole groups: at least one."""
    temperature: float = 1.0
    """1 is the only value: at another one the ratios of the objective would be wrong."""
    top_k: int = 0
    """0, for all tokens, is the only value, for the same reason."""
    top_p: float = 1.0
    """1, for all tokens, is the only value, for the same reason."""


@dataclasses.dataclass(frozen=True)
class ObjectiveOptions:
    """GRPO and its variants, by the names that TRL has for them."""

    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    """How the losses of tokens are averaged: over each completion, then over completions ("grpo");
    over all tokens ("dapo"); their sum divided by completions x rollout.max_new_tokens
    ("dr_grpo")."""
    scale_rewards: Literal["none", "group", "batch"] = "none"
    """What divides an advantage, reward minus the group's mean: nothing, or the standard deviation
    of the group's or of all rewards."""
    epsilon: float = 0.2
    """The ratio of new to old probability counts down to 1 - epsilon."""
    epsilon_high: float = 0.28
    """The ratio counts up to 1 + epsilon_high."""
    beta: float = 0.02
    """Weight of the KL divergence to the adapter that the run started from; 0 needs no reference
    and saves its pass."""
    use_bias_correction_kl: bool = True
    """Multiply the KL estimate (k3) by the ratio of new to old probability, so that its gradient is
    unbiased too."""
    num_iterations: int = 1
    """Updates on each rollout. Each is a step of the run."""
    mask_truncated_completions: bool = True
    """Leave completions that max_new_tokens cut off out of the loss."""


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """What the built-in rewards ask, and how long rewards may take."""

    min_reasoning_words: int = 5
    """Words of reasoning below which the format earns nothing."""
    code_seconds: float = 2.0
    """Most seconds of a processor for the tests of one program."""
    function_seconds: float = 20.0
    """Most seconds for a call of a reward function of yours, on all completions of a rollout."""


@dataclasses.dataclass(frozen=True)
class GrpoConfig(RunConfig):
    """One run of `grpo`. A step is one update of the adapter."""

    rollout: RolloutOptions = dataclasses.field(default_factory=RolloutOptions)
    objective: ObjectiveOptions = dataclasses.field(default_factory=ObjectiveOptions)
    rewards: dict[str, float] | list[str] | str = dataclasses.field(
        default_factory=lambda: {"format": 0.2, "answer": 1.0, "tests": 1.0}
    )
    """Weight of each reward. "format": the answer's form, with reasoning in it. "answer": the one
    right number or text in it. "tests": the share of hidden tests that its code passes.
    "my_rewards.py:brevity": the function of that name in your file. A list gives each weight 1."""
    reward: RewardOptions = dataclasses.field(default_factory=RewardOptions)


def named_rewards(rewards: dict[str, float] | list[str] | str) -> dict[str, float]:
    """Weight by name of reward; those of a list or text with commas have weight 1.

    ValueError for a reward that is named twice, such as a.py:f and ./a.py:f.
    """
    names = list(rewards.split(",") if isinstance(rewards, str) else rewards)
    names = [name.strip() for name in names if name.strip()]
    same = [os.path.normpath(name) for name in names]
    if twice := [name for number, name in enumerate(same) if name in same[:number]]:
        raise ValueError(f"rewards names {twice[0]} twice: name it once, with the weight you mean")
    return dict(rewards) if isinstance(rewards, dict) else dict.fromkeys(names, 1.0)


def named_files(files: list[str] | str) -> list[str]:
    """The files that an option names: a list, or texts with commas between names.

    A text stays whole if there is a file of this name; so does a comma in brackets.
    """
    texts = [files] if isinstance(files, str) else files
    names: list[str] = []
    for text in texts:
        if "," in text and not os.path.exists(text):
            names += filter(None, map(str.strip, re.split(r",(?![^\[]*\])", text)))
        elif text:
            names.append(text)
    return names
