"""Files are there whole or not at all; a file is not hashed twice; a full disk is named early."""

import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jaxsft.common.files import (
    array_sha256,
    check_free_space,
    file_sha256,
    read_json,
    whole_file,
    write_json,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "values.json"
    write_json(path, {"loss": math.nan, "text": "ä", "steps": (1, math.inf)})
    assert read_json(path) == {"loss": None, "text": "ä", "steps": [1, None]}
    with pytest.raises(KeyError), whole_file(path) as partial:
        partial.write_text("half")
        raise KeyError
    assert read_json(path)["text"] == "ä"
    assert [each.name for each in tmp_path.iterdir()] == ["values.json"]


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert file_sha256(path) == empty
    path.write_bytes(b"1")
    assert file_sha256(path) != empty


def test_the_digest_of_an_array_is_that_of_its_elements() -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    assert array_sha256(array) == array_sha256(np.asfortranarray(array)) != array_sha256(array.T)
    halves = np.array([0.5, 0.25], ml_dtypes.bfloat16)
    assert array_sha256(halves) == array_sha256(halves.view(np.uint16))


def test_room_for_what_does_not_exist_yet(tmp_path: Path) -> None:
    check_free_space(tmp_path / "new" / "out", 1000, "the export", "take another place")
    with pytest.raises(ValueError, match=r"out: .* but 1,048,640 MiB are needed for it; free some"):
        check_free_space(tmp_path / "new" / "out", 2**40, "it", "free some")
