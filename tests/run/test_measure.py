"""Which measurements before training a run that goes on may keep."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxsft.config import EvalOptions, TrainConfig
from jaxsft.run.measure import before_key, load_before, write_before

SETUP: Any = SimpleNamespace(
    fingerprint={"model": "m", "model.dtype": "float32", "tokenizer": "t"},
    state=SimpleNamespace(step=5),
)


def with_eval(**options: Any) -> TrainConfig:
    return TrainConfig(eval=dataclasses.replace(EvalOptions(), **options))


def test_a_smaller_batch_keeps_the_measurement_before(tmp_path: Path) -> None:
    """It is what to lower where memory runs out, and changes no answer."""
    of = before_key(with_eval(batch_size=8), SETUP, "none")
    write_before(tmp_path, {"eval/loss": 2.0}, of)
    here = before_key(with_eval(batch_size=4), SETUP, "none")
    assert load_before(here, SETUP, tmp_path) == {"eval/loss": 2.0}


def test_other_decoding_does_not(tmp_path: Path) -> None:
    write_before(tmp_path, {}, before_key(with_eval(temperature=0.0), SETUP, "none"))
    here = before_key(with_eval(temperature=0.7), SETUP, "none")
    with pytest.raises(ValueError, match=r"eval\.temperature \(0\.0 there, 0\.7 here\)"):
        load_before(here, SETUP, tmp_path)
    fresh: Any = SimpleNamespace(**vars(SETUP) | {"state": SimpleNamespace(step=0)})
    assert load_before(here, fresh, tmp_path) is None  # it is measured anew
