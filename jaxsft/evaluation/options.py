"""The options of `python -m jaxsft.evaluate`, and what a run gives for defaults."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from jaxsft.config import SYSTEM_PROMPT, Dtype, EvalOptions
from jaxsft.data import as_list
from jaxsft.models import Origin, run_config

BASE = "base"


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """The options of this command."""

    model: str
    """A run's directory, a PEFT adapter, or a model as train's model.path takes it."""
    compare: str | None = None
    """A second model on the same rows, or "base": this one without its adapter."""
    base_model: str | None = None
    """The model that an adapter belongs to, where it isn't the one that it names."""
    tokenizer: str | None = None
    """tokenizer.model or .gguf file; by default the one that comes with the model."""
    files: list[str] | str = dataclasses.field(default_factory=list)
    """Rows to measure on, JSONL or Parquet, as train's data.eval_files."""
    few_shot: int = 0
    """Solved examples in front of each prompt, as turns before it; the loss is without them."""
    few_shot_files: list[str] | str = dataclasses.field(default_factory=list)
    """Where the examples come from, the first rows; for a run, its training rows."""
    system_prompt: str | None = SYSTEM_PROMPT
    """Put in front of the first user turn of rows that have no system turn; null for none."""
    max_length: int = 2048
    """Tokens of a row; longer samples are shortened for the loss as train does."""
    dtype: Dtype = "float32"
    """Activations, matmuls and weights."""
    eval: EvalOptions = dataclasses.field(default_factory=EvalOptions)
    output: str | None = None
    """Directory for evaluation.json, answers.jsonl and page.html; by default evaluation/ in the
    run's directory, elsewhere evaluation-NAME here."""


def run_defaults(run_dir: Path) -> dict[str, Any]:
    """What a run was measured with, as defaults by option."""
    config = run_config(run_dir)
    return {
        "files": config.data.eval_files,
        "few_shot_files": config.data.train_files,
        "system_prompt": config.data.system_prompt,
        "max_length": config.data.max_length,
        "dtype": config.model.dtype,
    } | {f"eval.{name}": value for name, value in dataclasses.asdict(config.eval).items()}


def check(options: EvaluateOptions, origin: Origin) -> None:
    """ValueError for options that can't be, together or alone."""
    if not options.files:
        raise ValueError("no rows to measure on: give --files ROWS (JSONL or Parquet)")
    if options.few_shot < 0 or options.eval.num_prompts < 0:
        raise ValueError("few_shot and eval.num_prompts must be 0 or more")
    if options.few_shot and not options.few_shot_files:
        raise ValueError("few_shot needs --few_shot_files, other rows than those measured on")
    shared = {*map(os.path.abspath, as_list(options.few_shot_files))}
    shared &= {*map(os.path.abspath, as_list(options.files))}
    if options.few_shot and shared:
        raise ValueError(f"few_shot_files: {shared.pop()} is among the rows measured on")
    if options.compare == BASE and origin.adapter is None:
        raise ValueError(f"compare: {options.model} has no adapter, it is the base itself")
    for name in ("max_length", "eval.batch_size", "eval.max_new_tokens"):
        value: Any = options
        for part in name.split("."):
            value = getattr(value, part)
        if value < 1:
            raise ValueError(f"{name} is {value}, but must be 1 or more")
