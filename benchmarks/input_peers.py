"""The same rows for TRL, and its preparation of them, started from here."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

from benchmarks.input_feeding import training_turns
from benchmarks.process_tree import ROOT, CommandError, run_measured
from jaxsft.config import SYSTEM_PROMPT
from jaxsft.data.chat import encode_chat
from jaxsft.data.rows import Conversation, convert_row
from jaxsft.data.sources import read_rows
from jaxsft.data.tokenizer import Tokenizer

_TURNS = arrow.list_(arrow.struct([("role", arrow.string()), ("content", arrow.string())]))
_SCHEMA = arrow.schema([("prompt", _TURNS), ("completion", _TURNS)])
_GROUP_ROWS = 1000
NUM_COMPARED = 16  # samples whose ids must be equal


def write_trl_rows(
    files: Sequence[Path], num_rows: int, tokenizer: Tokenizer, directory: Path
) -> tuple[Path, list[list[int]]]:
    """The first rows of the files, converted, in TRL's conversational form.

    Returns:
      The Parquet file, beside which `tokenizer.model` is written, and the ids of the first samples.
    """
    found = _conversations(files, num_rows)
    first = list(itertools.islice(found, NUM_COMPARED))
    path = directory / "trl_rows.parquet"
    with parquet.ParquetWriter(path, _SCHEMA) as writer:
        rows = (_trl_row(each) for each in itertools.chain(first, found))
        while group := list(itertools.islice(rows, _GROUP_ROWS)):
            writer.write_table(arrow.Table.from_pylist(group, _SCHEMA))
    (directory / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return path, [encode_chat(tokenizer, training_turns(each)).ids.tolist() for each in first]


def _conversations(files: Sequence[Path], num_rows: int) -> Iterator[Conversation]:
    rows = itertools.chain.from_iterable(read_rows(file) for file in files)
    for _, row in itertools.islice(rows, num_rows):
        conversation = convert_row(row)
        # TRL's tokenizer takes `<end_of_turn>` in text for the control token: not the same ids.
        if isinstance(conversation, Conversation) and not conversation.notes:
            yield conversation


def _trl_row(conversation: Conversation) -> dict[str, Any]:
    user, assistant = conversation.turns
    question = f"{SYSTEM_PROMPT}\n\n{user.content}"
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": assistant.content}],
    }


def prepare_with_trl(
    python: Path,
    rows_file: Path,
    directory: Path,
    row_length: int,
    num_cores: int,
    first_ids: Sequence[list[int]],
) -> dict[str, Any]:
    """TRL's preparation: seconds of it alone, packed rows, fill, peak memory.

    Raises CommandError when it fails, or tokenises the first samples in another way.
    """
    command = [python, "-m", "benchmarks.peer_trl", rows_file, directory, row_length, num_cores]
    usage = run_measured(
        [str(part) for part in command],
        num_cores=num_cores,
        environment={
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",  # its processes are as many as the cores
        },
        log=directory / "trl.log",
    )
    reply = json.loads(usage.output.splitlines()[-1])
    if reply["first_ids"] != list(first_ids):
        raise CommandError("TRL makes other token ids of the same samples")
    return {
        "seconds": reply["prepare_s"],
        "samples": reply["samples"],
        "tokens": reply["num_tokens"],
        "fill": reply["num_tokens"] / (reply["rows"] * row_length),
        "peak_rss_bytes": usage.peak_rss_bytes,
        "peak_anonymous_bytes": usage.peak_anonymous_bytes,
    }
