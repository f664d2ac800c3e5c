"""The samples of files of rows, in memory; the product streams them."""

from collections.abc import Sequence
from pathlib import Path

from jaxsft.config import DataOptions
from jaxsft.data.packing import Sample
from jaxsft.data.samples import DataReport, as_list, check_any_left, read_samples
from jaxsft.data.tokenizer import Tokenizer


def load_samples(
    files: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    options: DataOptions,
    *,
    heldout_files: Sequence[Path] = (),
) -> tuple[list[Sample], DataReport]:
    """All samples of the files at once; ValueError also where none is left."""
    files, report = as_list(files), DataReport()
    found = read_samples(files, tokenizer, options, report, heldout_files=heldout_files)
    samples = [each.sample for each in found]
    check_any_left(files, options, report)
    return samples, report
