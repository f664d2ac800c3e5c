"""Every option of a run, in frozen dataclasses: one source of names, defaults and help.

The docstring of each field is its `--help` text. Lengths are in tokens, durations in steps.
"""

import dataclasses
import math
import operator
import os.path
import re
from collections import Counter
from typing import Any, Literal

# The system text of the recipe, put in front of the user's turn in training and generation alike.
ANSWER_TEMPLATE = "<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"
SYSTEM_PROMPT = (
    "You are a deep thinking AI. Think step by step about the problem and provide your reasoning "
    "between <reasoning> and </reasoning> tags. Then, provide the final answer between <answer> "
    "and </answer> tags."
)

Dtype = Literal["float32", "bfloat16"]
MIN_LENGTH = 16  # tokens of a row


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
class DataOptions:
    """Training and held-out rows."""

    train_files: list[str] | str = dataclasses.field(default_factory=list)
    """Training rows (prompt/response with <think>, messages, …): files of JSON, CSV, Parquet or
    Arrow, also in gzip or zstd; directories and quoted patterns (data/**/*.jsonl) of them; data
    sets of the hub: owner/name[:config][/split][slice], as openai/gsm8k:main/train[:500]. Several
    as a list, or with commas between them."""
    eval_files: list[str] | str = dataclasses.field(default_factory=list)
    """Held-out rows, for the held-out loss; the first are asked for answers. May be empty."""
    start: int = 0
    """Number of the first training row to use, counted from 0 over all files."""
    stop: int | None = None
    """Number of the first training row not to use; by default all rows to the end are used."""
    max_length: int = 2048
    """Tokens in a row of the batch. A longer sample does not fit: see overlong."""
    packing: bool = False
    """Put several samples into one row; they do not see each other. By default a row has one."""
    overlong: Literal["shorten", "drop", "raise"] = "shorten"
    """For samples over max_length: "shorten" cuts the reasoning (never the answer), "drop" leaves
    the sample out, "raise" stops."""
    columns: dict[str, str] | None = None
    """The columns that hold the parts of a row, for example {prompt: task, response: text}. Parts:
    prompt, response, reasoning, system, input, messages. Other columns are not used then. By
    default they are found by their names (jaxsft/data/README.md)."""
    without_thought: Literal["drop_system", "keep_plain", "reject"] = "drop_system"
    """For rows with an answer that has no thought: "drop_system" trains them without system_prompt,
    which asks for one; "keep_plain" with it, which teaches to ignore it; "reject" leaves them
    out."""
    earlier_reasoning: Literal["keep", "strip"] = "keep"
    """The reasoning of earlier turns of a chat: "keep" trains every turn and shows it to later
    ones; "strip" removes it from earlier turns, as servers do, and trains the last turn only."""
    answer_template: str = ANSWER_TEMPLATE
    """The form of an answer that is taught. {reasoning} and {answer} are its parts."""
    system_prompt: str | None = SYSTEM_PROMPT
    """Text before the first user turn of rows that have no system text of their own; null for
    none. It must ask for the tags of answer_template."""
    loss_on_prompt: bool = False
    """Train on the tokens of the prompt too."""
    weights: list[float] | None = None
    """How often an epoch uses the samples of each file: 2 is twice, 0.5 is one half of them, the
    same half each time. By default once."""
    min_completion_tokens: int = 8
    """Leave out samples whose trained answers, tags included, have fewer tokens together."""
    drop_degenerate: bool = True
    """Leave out answers that end in a loop, and those such as "I hope this helps!" alone."""
    drop_duplicates: bool = True
    """Leave out conversations with the same text as an earlier one."""
    drop_contaminated: bool = True
    """Leave out training rows whose prompt has at least half of a held-out prompt in it."""
    max_drop: float = 0.25
    """Stop when a larger share of the rows is left out, whatever the reasons."""
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
class TrainConfig:
    """One training run. Batch sizes are global: over all devices and micro-batches."""

    name: str = "run"
    """Name of the run; its results go to output_dir/name."""
    output_dir: str = "runs"
    """Directory of all runs."""
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    lora: LoraOptions = dataclasses.field(default_factory=LoraOptions)
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    eval: EvalOptions = dataclasses.field(default_factory=EvalOptions)
    global_batch_size: int = 32
    """Rows of an optimizer step, on all devices together."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step. More of them take less memory."""
    num_train_epochs: float = 1.0
    """Passes over the training rows."""
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
    num_workers: int = 2
    """Threads that read rows ahead."""
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


def validate(config: TrainConfig) -> None:
    """Raises ValueError that names every option with a wrong value and every contradiction."""
    problems = _out_of_range(config)
    if config.global_batch_size % max(config.gradient_accumulation_steps, 1):
        problems.append(
            f"global_batch_size {config.global_batch_size} is not a multiple of "
            f"gradient_accumulation_steps {config.gradient_accumulation_steps}"
        )
    if config.min_learning_rate > config.learning_rate:
        problems.append(
            f"min_learning_rate {config.min_learning_rate} is above "
            f"learning_rate {config.learning_rate}"
        )
    if config.data.stop is not None and config.data.stop <= config.data.start:
        problems.append(f"data.stop {config.data.stop} is not above data.start {config.data.start}")
    if not named_files(config.data.train_files):
        problems.append("data.train_files is empty: name at least one file of rows")
    for name, advice in (("train_files", "give it a weight"), ("eval_files", "name it once")):
        counts = Counter(map(os.path.abspath, named_files(getattr(config.data, name))))
        twice = [file for file, count in counts.items() if count > 1]
        problems += [f"data.{name} names {file} twice; {advice}" for file in twice]
    problems += _sampling_conflicts(config.eval)
    if config.eval_steps and not config.data.eval_files:
        problems.append("eval_steps needs data.eval_files")
    if config.deadline is not None and config.max_seconds is not None:
        problems.append("deadline and max_seconds say the same, leave one of them out")
    if config.max_steps is not None and config.warmup_steps >= config.max_steps:
        problems.append(
            f"warmup_steps {config.warmup_steps} is not below max_steps {config.max_steps}"
        )
    if problems:
        raise ValueError("; ".join(problems))


def validate_eval(options: EvalOptions) -> None:
    """As `validate`, for these options alone."""
    problems = _out_of_range(options, "eval.") + _sampling_conflicts(options)
    if problems:
        raise ValueError("; ".join(problems))


def _out_of_range(options: Any, prefix: str = "") -> list[str]:
    """Every option whose value `_CHECKS` does not allow; `prefix` stands before their names."""
    problems = []
    for name, is_right, rule in _CHECKS:
        if not name.startswith(prefix):
            continue
        value = operator.attrgetter(name.removeprefix(prefix))(options)
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name} is {value}, but must be a finite number")
        elif not is_right(value):
            problems.append(f"{name} is {value!r}, but must be {rule}")
    return problems


def _sampling_conflicts(options: EvalOptions) -> list[str]:
    problems = []
    if options.temperature == 0 and (options.top_k > 1 or options.top_p < 1):
        problems.append(
            "eval.top_k and eval.top_p do nothing at eval.temperature 0, set it above 0"
        )
    if options.temperature > 0 and options.top_k == 1:
        problems.append("eval.top_k 1 makes eval.temperature useless, set one of them to 0")
    return problems


def check_devices(config: TrainConfig, num_devices: int) -> None:
    """Raises ValueError, with the nearest valid sizes, when the batch does not fit the devices."""
    if config.fsdp > num_devices or num_devices % config.fsdp:
        divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        raise ValueError(
            f"fsdp {config.fsdp} does not divide {num_devices} devices; valid: {divisors}"
        )
    size, num_parts = config.global_batch_size, config.gradient_accumulation_steps
    multiple = num_devices * num_parts
    if size % multiple:
        lower = size // multiple * multiple
        nearest = ", ".join(str(n) for n in (lower, lower + multiple) if n)
        over = f"{num_devices} devices" + (f" x {num_parts} micro-batches" * (num_parts > 1))
        raise ValueError(
            f"global_batch_size {size} does not split evenly over {over}; nearest valid: {nearest}"
        )


_MEANT_AS_NULL = ("None", "none", "no", "No", "false", "False", "off")
_POSITIVE = (lambda x: x > 0, "above 0")
_NOT_NEGATIVE = (lambda x: x >= 0, "0 or above")
_POSITIVE_OR_NULL = (lambda x: x is None or x > 0, "above 0, or null")
_SHARE = (lambda x: 0 <= x < 1, "at least 0 and below 1")
_SEED = (lambda x: 0 <= x < 2**32, "at least 0 and below 2^32")
_CHECKS = (
    ("name", lambda x: bool(x) and "/" not in x and x not in (".", ".."), "a plain directory name"),
    ("learning_rate", *_POSITIVE),
    ("min_learning_rate", *_NOT_NEGATIVE),
    ("warmup_steps", *_NOT_NEGATIVE),
    ("weight_decay", *_NOT_NEGATIVE),
    ("max_grad_norm", *_NOT_NEGATIVE),
    ("adam_beta1", *_SHARE),
    ("adam_beta2", *_SHARE),
    ("adam_epsilon", *_POSITIVE),
    ("global_batch_size", *_POSITIVE),
    ("gradient_accumulation_steps", *_POSITIVE),
    ("num_train_epochs", *_POSITIVE),
    ("max_steps", *_POSITIVE_OR_NULL),
    ("fsdp", *_POSITIVE),
    ("loss_chunk_tokens", *_POSITIVE),
    ("logging_steps", *_POSITIVE),
    ("eval_steps", *_POSITIVE_OR_NULL),
    ("save_steps", *_POSITIVE),
    ("save_total_limit", *_POSITIVE),
    ("max_nonfinite_steps", *_POSITIVE),
    ("skip_spikes_sigmas", *_POSITIVE_OR_NULL),
    ("max_seconds", *_POSITIVE_OR_NULL),
    ("hang_seconds", lambda x: x is None or 0 < x <= 1e6, "above 0 and at most 1e6, or null"),
    ("num_workers", *_NOT_NEGATIVE),
    ("budget_hours", *_POSITIVE_OR_NULL),
    ("seed", *_SEED),
    ("eval.seed", *_SEED),
    ("lora.r", *_POSITIVE),
    ("lora.alpha", *_POSITIVE),
    ("lora.dropout", *_SHARE),
    ("data.max_length", lambda x: x >= MIN_LENGTH, f"at least {MIN_LENGTH}"),
    ("data.start", *_NOT_NEGATIVE),
    ("data.min_completion_tokens", *_NOT_NEGATIVE),
    ("data.max_drop", lambda x: 0 <= x <= 1, "a share from 0 to 1"),
    (
        "data.weights",
        lambda x: x is None or all(0 < w <= 1000 for w in x),
        "above 0 for each, and at most 1,000",
    ),
    ("data.system_prompt", lambda x: x not in _MEANT_AS_NULL, "a text; write null for none"),
    ("eval.num_prompts", *_NOT_NEGATIVE),
    ("eval.batch_size", *_POSITIVE),
    ("eval.max_new_tokens", *_POSITIVE),
    # Of float32's logits, divided by it, none must be infinite, and not all be 0.
    ("eval.temperature", lambda x: x == 0 or 1e-6 <= x <= 1e6, "0, or from 1e-6 to 1e6"),
    ("eval.top_k", *_NOT_NEGATIVE),
    ("eval.top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
)
