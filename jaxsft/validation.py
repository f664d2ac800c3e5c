"""The checks of every option, alone and together; needs no files and no devices."""

import math
import os.path
from collections import Counter
from typing import Any

from jaxsft.config import TrainConfig


def validate(config: TrainConfig) -> None:
    """Raises ValueError that names every option out of range or in contradiction."""
    problems = []
    for name, is_right, rule in _CHECKS:
        value = _get(config, name)
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name} is {value}, but must be a finite number")
        elif not is_right(value):
            problems.append(f"{name} is {value!r}, but must be {rule}")
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
    if not config.data.train_files:
        problems.append("data.train_files is empty: name at least one JSONL or Parquet file")
    for name, advice in (("train_files", "give it a weight"), ("eval_files", "name it once")):
        files = getattr(config.data, name)
        counts = Counter(map(os.path.abspath, [] if isinstance(files, str) else files))
        twice = [file for file, count in counts.items() if count > 1]
        problems += [f"data.{name} names {file} twice; {advice}" for file in twice]
    if config.eval.temperature == 0 and (config.eval.top_k > 1 or config.eval.top_p < 1):
        problems.append(
            "eval.top_k and eval.top_p do nothing at eval.temperature 0, set it above 0"
        )
    if config.eval.temperature > 0 and config.eval.top_k == 1:
        problems.append("eval.top_k 1 makes eval.temperature useless, set one of them to 0")
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


def _get(config: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


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
    ("data.max_length", lambda x: x >= 16, "at least 16"),
    ("data.start", *_NOT_NEGATIVE),
    ("data.min_completion_tokens", *_NOT_NEGATIVE),
    ("data.max_drop", lambda x: 0 <= x <= 1, "a share from 0 to 1"),
    ("data.weights", lambda x: x is None or all(0 < w < math.inf for w in x), "above 0 for each"),
    ("eval.num_prompts", *_NOT_NEGATIVE),
    ("eval.batch_size", *_POSITIVE),
    ("eval.max_new_tokens", *_POSITIVE),
    # Of float32's logits, divided by it, none must be infinite, and not all be 0.
    ("eval.temperature", lambda x: x == 0 or 1e-6 <= x <= 1e6, "0, or from 1e-6 to 1e6"),
    ("eval.top_k", *_NOT_NEGATIVE),
    ("eval.top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
)
