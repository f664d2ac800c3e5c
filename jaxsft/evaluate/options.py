"""The options of `python -m jaxsft.evaluate`."""

import dataclasses
from typing import Literal

from jaxsft.config import ANSWER_TEMPLATE, SYSTEM_PROMPT, Dtype, EvalOptions, RewardOptions


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
    """tokenizer.json, tokenizer.model or .gguf file; by default the tokenizer of the model."""
    files: list[str] | str = dataclasses.field(default_factory=list)
    """Rows to measure on, files or data sets of the hub, as train's data.eval_files. Answers to
    rows with tests (MBPP's; {"prompt", "tests"}) are run in a sandbox."""
    few_shot: int = 0
    """Solved examples in front of each prompt; the loss is without them."""
    few_shot_style: Literal["turns", "text"] = "turns"
    """As turns, or as "Question: … Answer: …" in plain text, which a pretrained model can continue:
    it has never ended a turn."""
    few_shot_files: list[str] | str = dataclasses.field(default_factory=list)
    """Where the examples come from, the first rows; for a run, its training rows."""
    system_prompt: str | None = SYSTEM_PROMPT
    """Put in front of the first user turn of rows that have no system turn; null for none. By
    default the one that the run or the export was trained with, or else the recipe's."""
    answer_template: str = ANSWER_TEMPLATE
    """The form of an answer, as train's data.answer_template; the default as for system_prompt."""
    earlier_reasoning: Literal["keep", "strip"] = "keep"
    """As train's data.earlier_reasoning; the default as for system_prompt."""
    columns: dict[str, str] | None = None
    """As train's data.columns; by default the run's."""
    max_length: int = 2048
    """The most tokens of a row that the loss is measured on."""
    overlong: Literal["shorten", "drop", "raise"] = "shorten"
    """Rows over max_length: cut the reasoning (never the answer), leave them out of the loss, or
    stop."""
    dtype: Dtype = "float32"
    """Activations and matmuls."""
    param_dtype: Dtype | None = None
    """How weights are kept in memory; by default as dtype."""
    rewards: dict[str, float] | list[str] | str | None = None
    """What answers earn, as grpo's rewards: {format: 0.2, answer: 1.0, my_rewards.py:brevity: 0.1}.
    By default the built-in ones of a grpo run, or else, if there are rows with tests, {format: 0.2,
    answer: 1.0, tests: 1.0}. Code is taken only from files that are named here, never from another
    run's config."""
    reward: RewardOptions = dataclasses.field(default_factory=RewardOptions)
    eval: EvalOptions = dataclasses.field(default_factory=EvalOptions)
    output: str | None = None
    """Directory for evaluation.json, answers.jsonl and page.html, those of an earlier evaluation
    are replaced; by default evaluation/ in the model's directory if it is a run, elsewhere
    evaluation-NAME here."""
