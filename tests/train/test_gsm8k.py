"""The whole path of the data on real rows: GSM8K's training split, where it is at hand."""

import os
from pathlib import Path

import numpy as np
import pytest

import jaxsft.inspect.__main__
import jaxsft.prepare.__main__
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.prepared import open_prepared
from jaxsft.data.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
# As the download leaves it, or a file of its rows.
GSM8K = Path(os.environ.get("GSM8K_TRAIN", ROOT / "data" / "gsm8k" / "train"))
NUM_ROWS = 7473

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows() -> Path:
    if not GSM8K.exists():
        pytest.skip("no GSM8K: python data/download_sft_datasets.py --dataset gsm8k")
    return GSM8K


def test_gsm8k_is_prepared_whole(
    rows: Path, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("--data.train_files", str(rows), "--data.eval_files", "data/sample/heldout.jsonl")
    options = ("--data.max_length", "1024", "--data.prepared_dir", str(tmp_path))
    assert jaxsft.prepare.__main__.main([*files, *options]) == 0
    printed = capsys.readouterr().out
    assert f"train: {NUM_ROWS:,} rows read" in printed
    (found,) = (
        prepared
        for prepared in map(open_prepared, (p for p in tmp_path.iterdir() if p.is_dir()))
        if prepared.report.rows_read == NUM_ROWS
    )
    report = found.report
    assert report.samples + report.num_rejected == NUM_ROWS and report.samples > 7400
    assert found.rows.fill > 0.98 and len(found.rows) <= 1.01 * found.manifest["fewest_rows"]
    ids = np.array(found.rows.tokens_N)
    template = [tokenizer.bos_id, tokenizer.start_of_turn_id, tokenizer.end_of_turn_id]
    counts = [(ids == token).sum() for token in template]
    assert counts == [report.samples, 2 * report.samples, 2 * report.samples]
    assert not np.isin(ids, list(tokenizer.control_ids - set(template))).any()
    for sample in map(found.rows.sample, range(0, report.samples, 10)):
        completion = tokenizer.decode(sample.ids[sample.loss_mask][:-1])
        parts = AnswerTemplate().split(completion)
        assert parts is not None and "<<" not in parts[0] and "####" not in parts[0]
    assert jaxsft.inspect.__main__.main([*files, *options, "--rows", "2"]) == 0
    assert "FAILED" not in capsys.readouterr().out
