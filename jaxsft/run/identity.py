"""The fingerprint of a run: a checkpoint is continued only by a run with the same fingerprint."""

import dataclasses

from jaxsft.config import RunConfig, TrainConfig
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.prepare.rows import Data
from jaxsft.weights.load import WeightsInfo

# Options that change no number of the run, or only through a digest that is compared too.
_NOT_IN_FINGERPRINT = (
    *("name", "output_dir", "model", "lora", "data", "eval", "fsdp", "num_workers"),
    *("logging_steps", "eval_steps", "save_steps", "save_total_limit", "max_nonfinite_steps"),
    *("budget_hours", "deadline", "max_seconds", "fit_deadline", "hang_seconds", "multihost"),
    # Depends on the number of devices, and changes only rounding (and dropout's masks).
    "gradient_accumulation_steps",
    "fork_from",  # its adapter is kept in the run's directory
)
# Where the rows come from, not what they are.
_NOT_IN_DATA_FINGERPRINT = ("train_files", "eval_files", "prepared_dir", "max_drop")


def fingerprint(config: TrainConfig, data: Data, info: WeightsInfo, steps: int) -> dict[str, str]:
    """What two runs must have in common for one to continue the other, by option name."""
    found = {"data": data.train.rows.digest()}
    if config.eval_steps:  # the losses that decide which step is best
        assert data.heldout is not None
        found["data.eval_files"] = data.heldout.rows.digest()
    if config.lora.dropout:
        found["gradient_accumulation_steps"] = str(config.gradient_accumulation_steps)
    return run_fingerprint(config, data.tokenizer, info, steps) | found


def run_fingerprint(
    config: RunConfig, tokenizer: Tokenizer, info: WeightsInfo, steps: int
) -> dict[str, str]:
    """The part of the fingerprint that does not depend on the rows."""
    same = dataclasses.asdict(config)
    rows = {
        f"data.{name}": value
        for name, value in same["data"].items()
        if name not in _NOT_IN_DATA_FINGERPRINT
    }
    for name in _NOT_IN_FINGERPRINT:
        same.pop(name, None)  # not every kind of run has all of them
    found = {
        "model": model_identity(info),
        "model.dtype": config.model.dtype,
        "model.param_dtype": config.model.param_dtype,
        "tokenizer": tokenizer.digest,
        "num_steps": steps,
        "forked": config.fork_from is not None,
    }
    values = same | rows | found
    return {name: str(value) for name, value in values.items()} | adapter_fingerprint(config)


def adapter_fingerprint(config: RunConfig) -> dict[str, str]:
    """The part of the fingerprint that an adapter depends on."""
    return {f"lora.{name}": str(x) for name, x in dataclasses.asdict(config.lora).items()}


def model_identity(info: WeightsInfo) -> str:
    """The architecture's name, for people, and the digest of the weights."""
    return f"{info.name} {info.digest}"
