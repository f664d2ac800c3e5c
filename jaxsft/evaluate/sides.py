"""The one or two models to evaluate, and the options of their runs as defaults."""

import dataclasses
import json
import os.path
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.common.text import visible_line
from jaxsft.config import DataOptions, GrpoConfig, named_rewards
from jaxsft.config_check import MIN_LENGTH, validate_eval, validate_reward
from jaxsft.data.samples import as_list, row_options
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.evaluate.options import EvaluateOptions
from jaxsft.rewards.tasks import BUILT_IN
from jaxsft.weights.find import (
    Origin,
    find_base,
    find_model,
    open_tokenizer,
    run_config,
    taught_by,
)
from jaxsft.weights.peft import holds_adapter

BASE = "base"
_ALIKE = {
    "system_prompt": "system texts",
    "answer_template": "answer templates",
    "earlier_reasoning": "data.earlier_reasoning",
}


class Side(NamedTuple):
    """A model to measure: its name, and where its files are."""

    name: str
    origin: Origin


def defaults_of(origin: Origin) -> dict[str, Any]:
    """Defaults by option: a run's own options, what an export was taught, {} for other models."""
    taught = taught_by(origin)
    if taught is None:
        return {}
    same: dict[str, Any] = {
        "system_prompt": taught.system_prompt or None,
        "answer_template": taught.template.text,
        "earlier_reasoning": taught.earlier_reasoning,
    }
    if origin.run_dir is None:
        return same
    config = run_config(origin.run_dir)
    rows = config.data
    if isinstance(rows, DataOptions):
        same["overlong"] = rows.overlong
    if isinstance(config, GrpoConfig):
        weights = named_rewards(config.rewards)
        built_in = {name: weights[name] for name in BUILT_IN if weights.get(name)}
        same["rewards"] = built_in or None
        same |= {f"reward.{n}": x for n, x in dataclasses.asdict(config.reward).items()}
    dtype, param_dtype = config.model.dtype, config.model.param_dtype
    return (
        same
        | {
            "files": config.data.eval_files,
            "few_shot_files": config.data.train_files,
            "columns": rows.columns,
            "max_length": rows.max_length,
            "dtype": dtype,
            "param_dtype": None if param_dtype == dtype else param_dtype,  # --dtype is for both
        }
        | {f"eval.{name}": value for name, value in dataclasses.asdict(config.eval).items()}
    )


def code_left_out(origin: Origin) -> str | None:
    """A line on the rewards of a run that are code in a file; None without any."""
    config = None if origin.run_dir is None else run_config(origin.run_dir)
    if not isinstance(config, GrpoConfig):
        return None
    weights = named_rewards(config.rewards)
    own = [name for name in weights if name not in BUILT_IN]
    if not own:
        return None
    named = ", ".join(f"{name}: {weight:g}" for name, weight in weights.items())
    return visible_line(
        f"{origin.run_dir}: its reward {own[0]} is not measured: code is taken only from a file "
        f"that you name, as --rewards '{{{named}}}'"
    )


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
    try:
        row_options(row_data(options))
    except ValueError as error:
        raise ValueError(str(error).replace("data.", "")) from None
    validate_eval(options.eval)
    validate_reward(options.reward)


def row_data(options: EvaluateOptions) -> DataOptions:
    """How the rows to measure on are converted and encoded."""
    return DataOptions(
        system_prompt=options.system_prompt,
        answer_template=options.answer_template,
        earlier_reasoning=options.earlier_reasoning,
        columns=options.columns,
        max_length=options.max_length,
        overlong=options.overlong,
    )


def check_alike(sides: Sequence[EvaluateOptions]) -> None:
    """ValueError where two models were trained to answer differently and the options name no one
    way: losses of other texts, and answers to other prompts, do not compare.

    `sides` are the options with the defaults of either model.
    """
    for name, what in _ALIKE.items():
        values = [getattr(side, name) or None for side in sides]
        if len(set(values)) > 1:
            raise ValueError(
                f"compare: {sides[0].model} and {sides[0].compare} were trained with different "
                f"{what}; evaluate each by itself, or give --{name} VALUE"
                f"{' (null for none)' if name == 'system_prompt' else ''}, which both are then "
                "measured with"
            )


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
    if len({tokenizer.vocabulary_digest for tokenizer in tokenizers}) > 1:
        raise ValueError(
            f"{sides[1].name}: has another tokenizer than {sides[0].name}: losses per token would "
            "not compare; evaluate each by itself"
        )
    return tokenizers[0]
