"""The options of `python -m jaxsft.evaluate`, and what a run gives for defaults."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from jaxsft.config import SYSTEM_PROMPT, DataOptions, Dtype, EvalOptions, TrainConfig
from jaxsft.fork import ADAPTER
from jaxsft.models import run_config
from jaxsft.peft_io import CONFIG_NAME
from jaxsft.validation import validate

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
    """Solved examples in front of each prompt; the loss is without them."""
    few_shot_style: Literal["turns", "text"] = "turns"
    """As turns, or as "Question: … Answer: …" in plain text, which a pretrained model can continue:
    it has never ended a turn."""
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
    """Directory for evaluation.json, answers.jsonl and page.html, those of an earlier evaluation
    are replaced; by default evaluation/ in the run's directory, elsewhere evaluation-NAME here."""


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


def check(options: EvaluateOptions) -> None:
    """ValueError for options that can't be, together or alone."""
    if not options.files:
        raise ValueError("no rows to measure on: give --files ROWS (JSONL or Parquet)")
    if options.few_shot < 0:
        raise ValueError(f"few_shot is {options.few_shot}, but must be 0 or more")
    if options.few_shot_style == "text" and not options.few_shot:
        raise ValueError("few_shot_style needs few_shot, the number of examples")
    if options.few_shot and not options.few_shot_files:
        raise ValueError("few_shot needs --few_shot_files, other rows than those measured on")
    try:
        json.dumps(dataclasses.asdict(options), ensure_ascii=False).encode()
    except UnicodeEncodeError:  # found now, not when the results are written
        raise ValueError("a file name among the options is not UTF-8; rename the file") from None
    sides = [options.model, options.compare]
    if options.base_model and not any(side and is_adapter(side) for side in sides):
        raise ValueError("base_model is for adapters and runs, and none is given")
    if options.compare == BASE and not is_adapter(options.model):
        raise ValueError(f"compare: {options.model} has no adapter, it is the base itself")
    data = DataOptions(train_files=["none"], max_length=options.max_length)
    validate(TrainConfig(eval=options.eval, data=data))


def is_adapter(name: str) -> bool:
    """Does a base model go with it: is it an adapter's or a run's directory?"""
    path = Path(name)
    return any((path / part / CONFIG_NAME).is_file() for part in ("", ADAPTER))
