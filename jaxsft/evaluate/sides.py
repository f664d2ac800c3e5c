"""The one or two models to evaluate, and the options of their runs as defaults."""

import dataclasses
import json
import os.path
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.config import MIN_LENGTH, validate_eval
from jaxsft.data.samples import as_list
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.evaluate.options import EvaluateOptions
from jaxsft.weights.find import (
    Origin,
    find_base,
    find_model,
    open_tokenizer,
    run_config,
    system_text,
)
from jaxsft.weights.peft import holds_adapter

BASE = "base"


class Side(NamedTuple):
    """A model to measure: its name, and where its files are."""

    name: str
    origin: Origin


def defaults_of(origin: Origin) -> dict[str, Any]:
    """Defaults by option: a run's own options, an export's system text, {} for other models."""
    if origin.run_dir is None:
        text = system_text(origin)
        return {} if text is None else {"system_prompt": text or None}
    config = run_config(origin.run_dir)
    dtype, param_dtype = config.model.dtype, config.model.param_dtype
    return {
        "files": config.data.eval_files,
        "few_shot_files": config.data.train_files,
        "system_prompt": config.data.system_prompt,
        "max_length": config.data.max_length,
        "overlong": config.data.overlong,
        "dtype": dtype,
        "param_dtype": None if param_dtype == dtype else param_dtype,  # --dtype is for both
    } | {f"eval.{name}": value for name, value in dataclasses.asdict(config.eval).items()}


def check_evaluate_options(options: EvaluateOptions) -> None:
    """ValueError for options that are wrong or do not go together."""
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
    except UnicodeEncodeError:  # now, and not when the results are written
        raise ValueError("a file name among the options is not UTF-8; rename the file") from None
    for name in ("files", "few_shot_files"):
        counts = Counter(map(os.path.abspath, as_list(getattr(options, name))))
        if twice := [file for file, count in counts.items() if count > 1]:
            raise ValueError(f"{name} names {twice[0]} twice; name it once")
    if options.max_length < MIN_LENGTH:
        raise ValueError(f"max_length is {options.max_length}, but must be at least {MIN_LENGTH}")
    validate_eval(options.eval)


def names_of(options: EvaluateOptions) -> list[str]:
    """The model, and the one it is compared with unless that is "base"."""
    other = options.compare
    return [options.model] if other in (None, BASE) else [options.model, other]


def find_side(name: str, options: EvaluateOptions) -> Origin:
    """The model of this name; an adapter is put on the base that the options give."""
    base = options.base_model
    with suppress(ValueError):  # for an adapter or a run, or what find_model refuses as well
        if base is not None and not holds_adapter(find_base(name, options.tokenizer).base):
            base = None
    return find_model(name, options.tokenizer, base)


def sides_of(options: EvaluateOptions, found: Mapping[str, Origin]) -> list[Side]:
    """The model and, if any, the one it is compared with; `found`, by name, are known already.

    Their names differ. Raises ValueError where both are the same model, and where no adapter needs
    the `base_model`.
    """
    sides = [Side(name, found.get(name) or find_side(name, options)) for name in names_of(options)]
    if options.base_model is not None and all(side.origin.adapter is None for side in sides):
        raise ValueError("base_model is for adapters and runs, and none is given")
    if options.compare == BASE:
        origin = sides[0].origin
        is_same = Path(origin.name) == Path(options.model)  # base and adapter in one directory
        name = f"{origin.name} (base)" if is_same else origin.name
        sides.append(Side(name, dataclasses.replace(origin, adapter=None)))
    parts = [(side.origin.base, side.origin.adapter) for side in sides]
    places = {(base.resolve(), adapter and adapter.resolve()) for base, adapter in parts}
    if len(places) < len(sides):
        if options.compare == BASE:
            raise ValueError(f"compare: {options.model} has no adapter, it is the base itself")
        raise ValueError(f"compare: {options.compare} is the model itself")
    return sides


def shared_tokenizer(sides: Sequence[Side]) -> Tokenizer:
    """The tokenizer of both models; ValueError where they have different ones."""
    places = [side.origin.tokenizer for side in sides]  # mostly the same file
    tokenizers = [open_tokenizer(place) for place in dict.fromkeys(places)]
    if len({tokenizer.digest for tokenizer in tokenizers}) > 1:
        raise ValueError(
            f"{sides[1].name}: has another tokenizer than {sides[0].name}: losses per token would "
            "not compare; evaluate each by itself"
        )
    return tokenizers[0]
