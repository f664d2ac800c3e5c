"""Tokens a second that reach the train step on one core: from prepared rows, and the naive way."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxsft.common.batch import Batch
from jaxsft.config import SYSTEM_PROMPT
from jaxsft.data.chat import encode_chats
from jaxsft.data.packing import PackedRows, Sample, StepBatches
from jaxsft.data.rows import Conversation, Turn, convert_row
from jaxsft.data.samples import batches
from jaxsft.data.sources import read_rows
from jaxsft.data.tokenizer import Tokenizer


class Feed(NamedTuple):
    """How fast batches come. `positions_per_s` counts padding, as a step's size does."""

    positions_per_s: float
    tokens_per_s: float
    num_steps: int


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Binds this thread, and those it starts, to the first core that it may run on."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def feed_prepared(rows: PackedRows, batch_size: int, seconds: float) -> Feed:
    """Batches as `train` makes them, without reading ahead, for some seconds."""
    source = StepBatches(rows, batch_size, seed=0, num_steps=1 << 30)
    with one_core():
        steps = batches(source, num_threads=0)
        _, batch = next(steps)  # Grain starts
        del batch
        return _time(
            (batch for _, batch in steps), round(rows.fill * batch_size * rows.row_length), seconds
        )


def feed_naive(
    files: Sequence[Path], tokenizer: Tokenizer, row_length: int, batch_size: int, seconds: float
) -> Feed:
    """Reads, converts, tokenises, cuts and pads the next rows in every step, for some seconds."""
    with one_core():
        steps = naive_batches(files, tokenizer, row_length, batch_size)
        next(steps)
        return _time(steps, None, seconds)


def naive_batches(
    files: Sequence[Path], tokenizer: Tokenizer, row_length: int, batch_size: int
) -> Iterator[Batch]:
    """One sample a row, epoch after epoch, in the order of the files."""
    rows = itertools.chain.from_iterable(read_rows(file) for file in itertools.cycle(files))
    found = (convert_row(row) for _, row in rows)
    chats = (training_turns(each) for each in found if isinstance(each, Conversation))
    while chunk := list(itertools.islice(chats, batch_size)):
        samples = [
            Sample(sample.ids[:row_length], sample.loss_mask[:row_length])
            for sample in encode_chats(tokenizer, chunk)
        ]
        alone = [[index] for index in range(len(samples))]
        yield PackedRows.from_samples(samples, alone, row_length).batch(range(len(samples)))


def training_turns(conversation: Conversation) -> tuple[Turn, ...]:
    """The turns with the recipe's system text in front."""
    assert conversation.turns[0].role != "system"
    return (Turn("system", SYSTEM_PROMPT), *conversation.turns)


def _time(steps: Iterator[Batch], tokens_per_step: int | None, seconds: float) -> Feed:
    """Takes batches for at least `seconds`; tokens are counted where they are not given."""
    num_steps = num_positions = num_tokens = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        batch = next(steps)
        num_steps += 1
        num_positions += batch.tokens_BT.size
        if tokens_per_step is None:
            num_tokens += int((batch.segment_ids_BT > 0).sum())
    if tokens_per_step is not None:
        num_tokens = num_steps * tokens_per_step
    return Feed(num_positions / elapsed, num_tokens / elapsed, num_steps)
