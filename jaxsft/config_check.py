"""Whether the values of options are possible, each alone and together."""

import math
import operator
import os.path
from collections import Counter
from typing import Any

from jaxsft.config import (
    EvalOptions,
    GrpoConfig,
    RewardOptions,
    RunConfig,
    TrainConfig,
    named_files,
)

MIN_LENGTH = 16  # tokens of a row


def validate(config: RunConfig) -> None:
    """Raises ValueError that names every option with a wrong value and every contradiction."""
    problems = _out_of_range(config)
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
    if isinstance(config, TrainConfig):
        problems += _train_conflicts(config)
    if isinstance(config, GrpoConfig):
        problems += _grpo_conflicts(config)
    _refuse(problems)


def _train_conflicts(config: TrainConfig) -> list[str]:
    if config.global_batch_size % max(config.gradient_accumulation_steps, 1) == 0:
        return []
    return [
        f"global_batch_size {config.global_batch_size} is not a multiple of "
        f"gradient_accumulation_steps {config.gradient_accumulation_steps}"
    ]


def _grpo_conflicts(config: GrpoConfig) -> list[str]:
    rollout, objective, problems = config.rollout, config.objective, []
    problems += [
        f"rollout.{name} {getattr(rollout, name)} changes the distribution that is drawn from, "
        f"which makes every ratio of the objective wrong; it must be {value}"
        for name, value in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0))
        if getattr(rollout, name) != value
    ]
    if config.lora.dropout:
        problems.append("lora.dropout makes trainer and sampler two models; it must be 0 in grpo")
    if config.max_steps is None:
        problems.append("max_steps is missing: the number of updates")
    if rollout.max_new_tokens >= config.data.max_length:
        problems.append(
            f"rollout.max_new_tokens {rollout.max_new_tokens} leaves no room for a prompt in "
            f"data.max_length {config.data.max_length}"
        )
    for name in ("max_steps", "save_steps", "eval_steps"):
        if (getattr(config, name) or 0) % max(objective.num_iterations, 1):
            problems.append(
                f"{name} {getattr(config, name)} is not a multiple of objective.num_iterations "
                f"{objective.num_iterations}: a rollout's updates are not interrupted"
            )
    if config.multihost:
        problems.append(
            "multihost: grpo runs on one host, with all its devices; leave it out, and take a "
            "slice that is one host, such as v5e-8"
        )
    if config.budget_hours is not None:
        problems.append(
            "budget_hours: grpo knows no hours before its first rollouts; leave it out and set "
            "max_seconds, which saves and stops in time (with fit_deadline the schedule ends then)"
        )
    return problems


def validate_eval(options: EvalOptions) -> None:
    """As `validate`, for these options alone."""
    _refuse(_out_of_range(options, "eval.") + _sampling_conflicts(options))


def validate_reward(options: RewardOptions) -> None:
    """As `validate`, for these options alone."""
    _refuse(_out_of_range(options, "reward."))


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("; ".join(problems))


def _out_of_range(options: Any, prefix: str = "") -> list[str]:
    """Every option whose value `_CHECKS` does not allow; `prefix` stands before their names."""
    problems = []
    for name, is_right, rule in _CHECKS:
        if not name.startswith(prefix) or not _has(options, name.removeprefix(prefix)):
            continue
        value = operator.attrgetter(name.removeprefix(prefix))(options)
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name} is {value}, but must be a finite number")
        elif not is_right(value):
            problems.append(f"{name} is {value!r}, but must be {rule}")
    return problems


def _has(options: Any, name: str) -> bool:
    """Not every kind of run has every option."""
    for part in name.split("."):
        if not hasattr(options, part):
            return False
        options = getattr(options, part)
    return True


def _sampling_conflicts(options: EvalOptions) -> list[str]:
    problems = []
    if options.temperature == 0 and (options.top_k > 1 or options.top_p < 1):
        problems.append(
            "eval.top_k and eval.top_p do nothing at eval.temperature 0, set it above 0"
        )
    if options.temperature > 0 and options.top_k == 1:
        problems.append("eval.top_k 1 makes eval.temperature useless, set one of them to 0")
    return problems


def check_devices(config: RunConfig, num_devices: int) -> None:
    """Raises ValueError, with the nearest valid sizes, when the batch does not fit the devices."""
    if config.fsdp > num_devices or num_devices % config.fsdp:
        divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
        raise ValueError(
            f"fsdp {config.fsdp} does not divide {num_devices} devices; valid: {divisors}"
        )
    if not isinstance(config, TrainConfig):
        return  # its batches are padded to fit
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
    ("rollout.num_prompts", *_POSITIVE),
    ("rollout.num_generations", lambda x: x >= 2, "2 or above: rewards are compared in a group"),
    ("rollout.max_new_tokens", *_POSITIVE),
    ("rollout.batch_size", *_POSITIVE),
    ("objective.epsilon", *_SHARE),
    ("objective.epsilon_high", *_NOT_NEGATIVE),
    ("objective.beta", *_NOT_NEGATIVE),
    ("objective.num_iterations", *_POSITIVE),
    ("reward.min_reasoning_words", *_NOT_NEGATIVE),
    ("reward.code_seconds", *_POSITIVE),
    ("reward.function_seconds", *_POSITIVE),
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
