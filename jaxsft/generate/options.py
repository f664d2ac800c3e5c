"""The options of `python -m jaxsft.generate`."""

import dataclasses
import re
import sys
from pathlib import Path

from jaxsft.cli import check_output
from jaxsft.config import Dtype, EvalOptions
from jaxsft.config_check import validate_eval


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """The options of this command."""

    model: str
    """What to ask: a run, an adapter, a model directory, a .gguf file, owner/name, or demo."""
    prompt: str | None = None
    """One prompt to answer."""
    prompts: str | None = None
    """A file of prompts: .txt, one a line, or JSONL or Parquet with prompt, question, instruction
    or messages, of which what follows the last user turn is left out. A run's data.columns are
    looked for first."""
    output: str | None = None
    """Where the answers to --prompts go as JSONL, a new file; by default to the terminal."""
    base: bool = False
    """Ask the base model without the adapter as well."""
    base_model: str | None = None
    """The base model of an adapter or a run, in place of the one that it names."""
    tokenizer: str | None = None
    """tokenizer.json, tokenizer.model or .gguf file; by default the tokenizer of the model."""
    system: str | None = None
    """System text, '' for none; by default the one that the run or the export was trained with, or
    else the recipe's."""
    max_new_tokens: int = EvalOptions.max_new_tokens
    """Longest answer."""
    temperature: float = EvalOptions.temperature
    """0 is greedy."""
    top_k: int = EvalOptions.top_k
    """Sample from the k likeliest tokens; 0 for all."""
    top_p: float = EvalOptions.top_p
    """Sample from the smallest set of tokens whose probability reaches this."""
    seed: int = EvalOptions.seed
    """Seed of the sampler."""
    batch_size: int = EvalOptions.batch_size
    """Prompts of a file that are answered at once."""
    dtype: Dtype | None = None
    """Weights and matmuls; by default the run's, or else float32."""

    @property
    def decoding(self) -> EvalOptions:
        """As the sampler takes them."""
        names = [field.name for field in dataclasses.fields(EvalOptions)]
        return EvalOptions(**{name: getattr(self, name) for name in names if hasattr(self, name)})


def check_options(options: GenerateOptions) -> None:
    """ValueError for options that are wrong or do not go together."""
    if options.prompt is not None and options.prompts is not None:
        raise ValueError("--prompt and --prompts: give one of them")
    for name, text in (("--prompt", options.prompt), ("--system", options.system)):
        if re.search("[\ud800-\udfff]", text or ""):  # as Python has other bytes
            raise ValueError(f"{name} is not UTF-8 text")
    if options.prompt is not None and not options.prompt.strip():
        raise ValueError("--prompt is empty; without the option a chat begins")
    if (options.prompt, options.prompts, sys.stdin) == (None, None, None):
        raise ValueError("there is no stdin to chat over; give --prompt or --prompts")
    if options.output is not None:
        if options.prompts is None:
            raise ValueError("--output is for the answers to --prompts FILE")
        check_output("--output", options.output)
        if Path(options.output).exists():
            raise ValueError(f"--output {options.output}: is there already; name a new file")
    try:
        validate_eval(options.decoding)
    except ValueError as error:
        raise ValueError(str(error).replace("eval.", "--")) from None
