"""The generated stand-in for the Glaive data: its lengths, its defects, its sameness."""

from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks.glaive_like import DEFECTS, QUANTILES, main, rows, write_glaive_like
from jaxsft.data.rows import Conversation, Rejected, convert_row
from jaxsft.data.sources import read_rows
from jaxsft.data.tokenizer import Tokenizer

PUBLISHED = [0.01, 0.05, 0.10, 0.50, 0.90, 0.95, 0.98, 0.99]


@pytest.fixture(scope="module")
def many() -> list[tuple[str, str]]:
    return [(row["prompt"], row["response"]) for row in rows(20_000, seed=0)]


def test_lengths_are_the_published_ones(many: list[tuple[str, str]]) -> None:
    lengths = [len(response) for _, response in many]
    found = np.quantile(lengths, PUBLISHED)
    np.testing.assert_allclose(found, [QUANTILES[q] for q in PUBLISHED], rtol=0.02)
    assert np.mean([len(prompt) for prompt, _ in many]) == pytest.approx(336, rel=0.02)


def test_every_row_is_well_formed_and_its_own(many: list[tuple[str, str]]) -> None:
    assert len(set(many)) == len({prompt for prompt, _ in many}) == len(many)
    for prompt, response in many[:2000]:
        conversation = convert_row({"prompt": prompt, "response": response})
        assert isinstance(conversation, Conversation) and not conversation.notes
        assert "." * 6 not in response  # padding, where there was too little text


def test_tokens(many: list[tuple[str, str]], tokenizer: Tokenizer) -> None:
    responses = [response for _, response in many[:1000]]
    num_tokens = sum(map(len, tokenizer.encode_many(responses)))
    assert num_tokens / len(responses) == pytest.approx(1600, rel=0.05)
    assert 4.2 < sum(map(len, responses)) / num_tokens < 4.65  # as natural text


def test_a_row_depends_on_seed_and_index_alone(many: list[tuple[str, str]]) -> None:
    again = [(row["prompt"], row["response"]) for row in rows(1500, seed=0)]
    assert again == many[:1500]
    other = [(row["prompt"], row["response"]) for row in rows(50, seed=1)]
    assert not set(other) & set(many)


def test_defects_are_what_the_converter_counts(many: list[tuple[str, str]]) -> None:
    num_rows, rate = 7000, 0.1
    outcomes: Counter[str] = Counter()
    for (prompt, response), row in zip(
        many, rows(num_rows, seed=0, defect_rate=rate), strict=False
    ):
        assert row["prompt"] == prompt
        result = convert_row(row)
        if isinstance(result, Rejected):
            outcomes[result.reason] += 1
        else:
            outcomes.update(result.notes)
        is_defect = isinstance(result, Rejected) or bool(result.notes)
        assert is_defect == (row["response"] != response)
    assert outcomes.keys() == DEFECTS.keys()
    # 700 and 100 on average; five standard deviations.
    assert outcomes.total() == pytest.approx(rate * num_rows, abs=125)
    assert all(count == pytest.approx(rate * num_rows / 7, abs=50) for count in outcomes.values())


def test_shards_hold_the_rows_in_order(tmp_path: Path) -> None:
    paths = write_glaive_like(tmp_path, 25, seed=3, rows_per_shard=10, defect_rate=0.5)
    assert [path.name for path in paths] == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    found = [row for path in paths for _, row in read_rows(path)]
    assert found == list(islice(rows(1000, seed=3, defect_rate=0.5), 25))
    again = write_glaive_like(tmp_path / "again", 25, seed=3, rows_per_shard=10, defect_rate=0.5)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in paths]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "set"), "--rows", "5"]) == 0
    assert capsys.readouterr().out.startswith("5 rows in 1 files")
    assert main([str(tmp_path / "none"), "--rows", "5", "--defect-rate", "2"]) == 2
    assert capsys.readouterr().err == "error: a defect rate of 2.0: must be 0 to 1\n"
    assert not (tmp_path / "none").exists()
