"""The fingerprint of a run: a checkpoint is continued only by a run with the same fingerprint."""

import dataclasses

from jaxsft.config import TrainConfig
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
    same = dataclasses.asdict(config)
    rows = {
        f"data.{name}": value
        for name, value in same["data"].items()
        if name not in _NOT_IN_DATA_FINGERPRINT
    }
    for name in _NOT_IN_FINGERPRINT:
        del same[name]
    found = {
        "model": model_identity(info),
        "model.dtype": config.model.dtype,
        "model.param_dtype": config.model.param_dtype,
        "tokenizer": data.tokenizer.digest,
        "data": data.train.rows.digest(),
        "num_steps": steps,
    }
    found["forked"] = config.fork_from is not None
    if config.eval_steps:  # the losses that decide which step is best
        assert data.heldout is not None
        found["data.eval_files"] = data.heldout.rows.digest()
    if config.lora.dropout:
        found["gradient_accumulation_steps"] = config.gradient_accumulation_steps
    values = same | rows | found
    return {name: str(value) for name, value in values.items()} | adapter_fingerprint(config)


def adapter_fingerprint(config: TrainConfig) -> dict[str, str]:
    """The part of the fingerprint that an adapter depends on."""
    return {f"lora.{name}": str(x) for name, x in dataclasses.asdict(config.lora).items()}


def model_identity(info: WeightsInfo) -> str:
    """The architecture's name, for people, and the digest of the weights."""
    return f"{info.name} {info.digest}"
