"""Packs samples into rows of a fixed length, and makes the `Batch` of each step from them.

All samples are known before training starts, so bins.py assigns them to rows once. The rows of a
step then follow from (seed, step) alone. So a resumed run needs only the step, and the number of
processes or threads changes nothing.

A sample is never split. It is one segment of its row: attention stays inside the segment, positions
start at 0, and the last token of a segment has no target.

Axes: B batch (rows), T position in a row, N all tokens of all samples in storage order.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxsft.common.batch import Batch, BoolArray, Int32Array
from jaxsft.common.files import array_sha256


class Sample(NamedTuple):
    """A tokenised example: `ids` int32 [n]; `loss_mask` bool [n], true where token i is a label."""

    ids: Int32Array
    loss_mask: BoolArray

    @property
    def completion_start(self) -> int:
        """Index of the first token of the last completion: the one after the last non-label."""
        return int(np.flatnonzero(~self.loss_mask)[-1]) + 1


class PackedRows:
    """All rows of a data set, with random access.

    They are five flat arrays, in memory or mapped from files (prepared.py). A sample may be in
    several rows.

    Attributes:
      row_length: T, tokens in a row.
      tokens_N: int32, the tokens of all samples, one after the other.
      loss_mask_N: bool, true where that token is a label.
      sample_offsets: int64 [samples + 1]; sample i is `tokens_N[offsets[i]:offsets[i + 1]]`.
      row_samples: int64 [uses], the sample indices of row 0, of row 1, and so on.
      row_offsets: int64 [rows + 1]; row r holds `row_samples[offsets[r]:offsets[r + 1]]`.
    """

    def __init__(
        self,
        row_length: int,
        tokens_N: Int32Array,
        loss_mask_N: BoolArray,
        sample_offsets: npt.NDArray[np.int64],
        row_samples: npt.NDArray[np.int64],
        row_offsets: npt.NDArray[np.int64],
    ):
        self.row_length = row_length
        self.tokens_N = tokens_N
        self.loss_mask_N = loss_mask_N
        self.sample_offsets = sample_offsets
        self.row_samples = row_samples
        self.row_offsets = row_offsets
        assert tokens_N.shape == loss_mask_N.shape == (sample_offsets[-1],)
        assert row_offsets[-1] == len(row_samples)
        row_tokens = np.add.reduceat(np.diff(sample_offsets)[row_samples], row_offsets[:-1])
        assert row_tokens.max() <= row_length, "a row is too full"

    @classmethod
    def from_samples(
        cls, samples: Sequence[Sample], bins: Sequence[Sequence[int]], row_length: int
    ) -> "PackedRows":
        """Rows in memory: row r holds the samples `bins[r]`."""
        if not samples or not bins:
            raise ValueError("no samples to pack")
        return cls(
            row_length,
            np.concatenate([sample.ids for sample in samples]).astype(np.int32),
            np.concatenate([sample.loss_mask for sample in samples]).astype(bool),
            offsets([len(sample.ids) for sample in samples]),
            np.array([index for row in bins for index in row], np.int64),
            offsets([len(row) for row in bins]),
        )

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> Batch:
        """Row `index` as five arrays of shape [T]; index -1 is a row of padding."""
        batch = self.batch([index])
        return Batch(*(array[0] for array in batch))

    def batch(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        """Rows `indices` as five arrays of shape [B, T]; index -1 gives a row of padding.

        Raises:
          IndexError: an index is below -1 or not below the number of rows.
        """
        shape = (len(indices), self.row_length)
        tokens, targets, segments, positions = (np.zeros(shape, np.int32) for _ in range(4))
        loss_weights = np.zeros(shape, np.float32)
        for b, row in enumerate(indices):
            if not -1 <= row < len(self):
                raise IndexError(f"row {row} of {len(self)}")
            if row == -1:
                continue
            start = 0
            row_samples = self.row_samples[self.row_offsets[row] : self.row_offsets[row + 1]]
            for segment, sample in enumerate(row_samples, 1):
                low, high = self.sample_offsets[sample], self.sample_offsets[sample + 1]
                stop = start + (high - low)
                tokens[b, start:stop] = self.tokens_N[low:high]
                targets[b, start : stop - 1] = self.tokens_N[low + 1 : high]
                loss_weights[b, start : stop - 1] = self.loss_mask_N[low + 1 : high]
                segments[b, start:stop] = segment
                positions[b, start:stop] = np.arange(high - low)
                start = stop
        return Batch(tokens, targets, loss_weights, segments, positions)

    def sample(self, index: int) -> Sample:
        """Sample `index`, copied."""
        low, high = self.sample_offsets[index], self.sample_offsets[index + 1]
        return Sample(np.array(self.tokens_N[low:high]), np.array(self.loss_mask_N[low:high]))

    @property
    def num_samples(self) -> int:
        """Number of samples, each counted once."""
        return len(self.sample_offsets) - 1

    @functools.cached_property
    def num_tokens(self) -> int:
        """Number of tokens in all rows, without padding."""
        return int(np.diff(self.sample_offsets)[self.row_samples].sum())

    @functools.cached_property
    def num_loss_tokens(self) -> int:
        """Number of targets with loss in all rows. The first token of a sample is no target."""
        starts = self.sample_offsets[:-1]
        of_sample = np.add.reduceat(self.loss_mask_N, starts, dtype=np.int64)
        return int((of_sample - self.loss_mask_N[starts])[self.row_samples].sum())

    @property
    def fill(self) -> float:
        """Share of the positions in all rows that hold a token, 0 to 1."""
        return self.num_tokens / (len(self) * self.row_length)

    def digest(self) -> str:
        """`rows_digest` of the contents."""
        arrays: list[npt.NDArray[Any]] = [self.tokens_N, self.loss_mask_N, self.sample_offsets]
        arrays += [self.row_samples, self.row_offsets]
        return rows_digest(self.row_length, [array_sha256(array) for array in arrays])


def rows_digest(row_length: int, parts: Sequence[bytes]) -> str:
    """SHA-256 (hex) that is equal if and only if all rows are equal.

    `parts` are the digests of the arrays of PackedRows, in the order of its constructor.
    """
    return hashlib.sha256(np.int64(row_length).tobytes() + b"".join(parts)).hexdigest()


def offsets(sizes: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0 and the running sums of `sizes`: where each part of a flat array starts, and the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def num_steps(num_rows: int, epochs: float, global_batch_size: int) -> int:
    """Steps in which every row is seen `epochs` times; the last may contain padding rows."""
    return -(-_num_stream_rows(num_rows, epochs) // global_batch_size)


def _num_stream_rows(num_rows: int, epochs: float) -> int:
    return max(1, round(num_rows * epochs))


@functools.lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, num_rows: int) -> npt.NDArray[np.int64]:
    """Order of the rows in one epoch, int64 [num_rows], from the Philox stream of (seed, epoch).

    It sorts raw 64-bit words, because NumPy keeps the output of bit generators the same in every
    version, but not that of `Generator.permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


def samples_of_epoch(
    sample_sources: npt.NDArray[np.int64], weights: Sequence[float] | None
) -> npt.NDArray[np.int64]:
    """The samples of an epoch, int64: of a source with weight w all floor(w) times, and of one more
    time the share that is left, drawn by a fixed seed; in the order of the files."""
    if weights is None:
        return np.arange(len(sample_sources))
    parts = []
    for source, weight in enumerate(weights):
        samples = np.flatnonzero(sample_sources == source)
        order = epoch_order(0, source, len(samples))
        some = np.sort(samples[order[: round(weight % 1 * len(samples))]])
        parts += [*[samples] * int(weight), some]
    return np.sort(np.concatenate(parts)).astype(np.int64)


class StepBatches:
    """The batch of each step, a function of (seed, step): a random access source for Grain.

    The stream of rows is one epoch after the other, each a permutation of all rows. Step s takes
    rows s * B to (s + 1) * B of the stream, and each process a contiguous share of them.

    Args:
      rows: packed rows.
      global_batch_size: B, rows of a step in all processes together.
      seed: of the order; not negative.
      num_steps: steps of the run, over any number of epochs.
      process_index: index of this process.
      process_count: number of processes; must divide B.
      epochs: length of the stream, after which come padding rows; None: it has no end.
    """

    def __init__(
        self,
        rows: PackedRows,
        global_batch_size: int,
        seed: int,
        num_steps: int,
        process_index: int = 0,
        process_count: int = 1,
        epochs: float | None = None,
    ):
        if seed < 0:
            raise ValueError(f"seed {seed}: must not be negative")
        if global_batch_size < 1 or global_batch_size % process_count:
            below = global_batch_size // process_count * process_count
            valid = " or ".join(str(b) for b in (below, below + process_count) if b > 0)
            raise ValueError(
                f"global batch size {global_batch_size} cannot be split over {process_count} "
                f"processes; use {valid}"
            )
        assert 0 <= process_index < process_count
        self.rows = rows
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.num_steps = num_steps
        self.process_index = process_index
        self.process_count = process_count
        self.num_stream_rows = None if epochs is None else _num_stream_rows(len(rows), epochs)

    def __len__(self) -> int:
        return self.num_steps

    def row_indices(self, step: int) -> npt.NDArray[np.int64]:
        """Row index of every row in the global batch of a step, int64 [B]; -1 is a padding row."""
        places = step * self.global_batch_size + np.arange(self.global_batch_size)
        epochs, offsets = np.divmod(places, len(self.rows))
        indices = np.full(self.global_batch_size, -1, np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = epoch_order(self.seed, epoch, len(self.rows))[offsets[here]]
        if self.num_stream_rows is not None:
            indices[places >= self.num_stream_rows] = -1
        return indices

    def __getitem__(self, step: int) -> Batch:
        """This process's share of a step's batch: [B / process_count, T] each."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} of {self.num_steps}")
        share = self.global_batch_size // self.process_count
        first = self.process_index * share
        return self.rows.batch(self.row_indices(step)[first : first + share])
