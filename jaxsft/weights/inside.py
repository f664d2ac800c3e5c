"""What a directory that is no model itself has inside, and what to give instead of it.

Trainers write a directory with checkpoints (checkpoint-500/ …) and may leave its top without
weights; a run has its adapter one level deeper; other programs have formats of their own.
"""

import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from jaxsft.common.listed import shortened
from jaxsft.common.option_values import MAX_CHARS
from jaxsft.common.text import visible_line
from jaxsft.formats.safetensors import holds_model, other_weights_hint
from jaxsft.weights.adapter_config import CONFIG_NAME, WEIGHTS_NAME
from jaxsft.weights.flax import is_flax_checkpoint

RUN_CONFIG = "config.yaml"
# Other programs write a config.yaml too; a run's has these options, and one of its own kind's.
_RUN_OPTIONS = {"lora:", "data:"}
_OF_A_KIND = {"global_batch_size:", "rollout:"}  # train's, grpo's
_CHECKPOINTS = "checkpoints"  # of a run
_MOST_ENTRIES = 10_000  # of a directory that are looked at


def is_run(path: Path) -> bool:
    """Does the directory hold a run's config.yaml?"""
    file = path / RUN_CONFIG
    is_one = file.is_file() and file.stat().st_size <= MAX_CHARS
    text = file.read_text(encoding="utf-8", errors="replace") if is_one else ""
    options = {line.partition(" ")[0] for line in text.splitlines()}
    return options >= _RUN_OPTIONS and not options.isdisjoint(_OF_A_KIND)


def check_is_whole(path: Path) -> None:
    """ValueError for a directory with a config and no weights that has checkpoints inside."""
    has_weights = holds_model(path) or (path / WEIGHTS_NAME).is_file() or is_flax_checkpoint(path)
    if not has_weights and (found := _models_inside(path)):
        raise ValueError(f"{path}: has no weights of its own; {_give(found)}")


def what_is_there(path: Path) -> str:
    """What to give instead of `path`, as the end of an error; "" where nothing of it is known."""
    if path.name.isdigit() or path.name == _CHECKPOINTS:
        for parent in filter(is_run, (path.parent, path.parent.parent)):
            return f"; it belongs to a run: give {parent}"
    if (path / WEIGHTS_NAME).is_file():
        return f"; it holds {WEIGHTS_NAME} alone: copy {CONFIG_NAME} to it"
    if not path.is_dir():
        return ""
    if found := _models_inside(path):
        return f"; {_give(found)}"
    names = [each.name for each in islice(path.iterdir(), _MOST_ENTRIES)]
    if any(list(path.glob(pattern)) for pattern in ("model_params", "[0-9]*/model_params")):
        return (
            "; it is a checkpoint of Tunix: save the model that it belongs to as safetensors there "
            "(save_lora_merged_model_as_safetensors), and give that"
        )
    if any(list(path.glob(pattern)) for pattern in ("_METADATA", "*/_METADATA", "*/*/_METADATA")):
        return "; it is an Orbax checkpoint of another program: save the model as safetensors there"
    return other_weights_hint(names)


def _models_inside(path: Path) -> list[Path]:
    """Adapters, models and runs in the directory, or one deeper; the newest checkpoint last."""

    def is_model(each: Path) -> bool:
        has_weights = holds_model(each) or (each / WEIGHTS_NAME).is_file()
        return has_weights or is_run(each) or is_flax_checkpoint(each)

    def directories(parent: Path) -> list[Path]:
        return [each for each in islice(parent.iterdir(), _MOST_ENTRIES) if each.is_dir()]

    def age(each: Path) -> tuple[bool, list[int], str]:
        numbers = [int(digits) for digits in re.findall(r"\d{1,12}", each.name)]
        return each.name.startswith(("final", "last", "merged")), numbers, each.name

    try:
        inside = directories(path)
        found = [each for each in inside if is_model(each)]
        found = found or [
            each for parent in inside for each in directories(parent) if is_model(each)
        ]
    except OSError:
        return []
    return sorted(found, key=age)


def _give(found: Sequence[Path]) -> str:
    """The line that names the last of them."""
    names = [shortened(visible_line(each.name), 60) for each in found[-3:]]
    rest = f"{len(found)} of them, " if len(found) > 3 else ""
    there = "" if len(found) == 1 else f"there are {rest}{' and '.join(names)}: "
    return f"{there}give {found[-1]}"
