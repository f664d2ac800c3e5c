"""Samples -> fixed rows -> the `Batch` of each step, offline and in pure NumPy.

Every sample is known before training starts, so rows are decided once (bins.py) and stored for
random access. Step -> rows is then arithmetic on (seed, step) alone: resuming needs no
state but the step, and another number of processes or threads changes nothing.

Samples are never split. Each is one segment of its row: attention stays inside a segment, positions
restart at 0, and no target crosses from one segment to the next.

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
    """One tokenised example: `ids` int32 [n], `loss_mask` bool [n] (true: token i is a label)."""

    ids: Int32Array
    loss_mask: BoolArray

    @property
    def completion_start(self) -> int:
        """Index of the first token of the last completion, behind everything that isn't a label."""
        return int(np.flatnonzero(~self.loss_mask)[-1]) + 1


class PackedRows:
    """All rows of a data set, for random access.

    Tokens and masks lie in one flat array each, and samples and rows are offsets into them: five
    plain arrays, in memory or mapped from files (prepared.py). A sample may be in several rows.

    Attributes:
      row_length: T, tokens in a row.
      tokens_N: int32, the tokens of all samples, one after the other.
      loss_mask_N: bool, where that token is a label.
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
        loss_mask = np.zeros(shape, bool)
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
                loss_mask[b, start : stop - 1] = self.loss_mask_N[low + 1 : high]
                segments[b, start:stop] = segment
                positions[b, start:stop] = np.arange(high - low)
                start = stop
        return Batch(tokens, targets, loss_mask, segments, positions)

    def sample(self, index: int) -> Sample:
        """Sample `index`, copied."""
        low, high = self.sample_offsets[index], self.sample_offsets[index + 1]
        return Sample(np.array(self.tokens_N[low:high]), np.array(self.loss_mask_N[low:high]))

    @property
    def num_samples(self) -> int:
        """Samples, each counted once."""
        return len(self.sample_offsets) - 1

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens of all rows, padding not counted."""
        return int(np.diff(self.sample_offsets)[self.row_samples].sum())

    @functools.cached_property
    def num_loss_tokens(self) -> int:
        """Targets of all rows that carry loss: a sample's first token is nobody's target."""
        starts = self.sample_offsets[:-1]
        of_sample = np.add.reduceat(self.loss_mask_N, starts, dtype=np.int64)
        return int((of_sample - self.loss_mask_N[starts])[self.row_samples].sum())

    @property
    def fill(self) -> float:
        """Share of all row positions that hold a token, 0 to 1."""
        return self.num_tokens / (len(self) * self.row_length)

    def digest(self) -> str:
        """`rows_digest` of the rows' contents."""
        arrays: list[npt.NDArray[Any]] = [self.tokens_N, self.loss_mask_N, self.sample_offsets]
        arrays += [self.row_samples, self.row_offsets]
        return rows_digest(self.row_length, [array_sha256(array) for array in arrays])


def rows_digest(row_length: int, parts: Sequence[bytes]) -> str:
    """SHA-256 (hex): equal if and only if every row is. `parts` are those of PackedRows' arrays,
    in the order of its constructor."""
    return hashlib.sha256(np.int64(row_length).tobytes() + b"".join(parts)).hexdigest()


def offsets(sizes: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where each of several things of these sizes begins, laid end to end, and where all end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def num_steps(num_rows: int, epochs: float, global_batch_size: int) -> int:
    """Steps that see every row `epochs` times; the last one may be filled up with padding rows."""
    return -(-_num_stream_rows(num_rows, epochs) // global_batch_size)


def _num_stream_rows(num_rows: int, epochs: float) -> int:
    return max(1, round(num_rows * epochs))


@functools.lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, num_rows: int) -> npt.NDArray[np.int64]:
    """Order of the rows in one epoch, int64 [num_rows], from the Philox stream of (seed, epoch).

    Sorting raw 64-bit words keeps the order the same under every NumPy version, which promises that
    for bit generators, not for `Generator.permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(num_rows)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


class StepBatches:
    """Step -> batch, as a pure function of (seed, step): a random access source for Grain.

    The stream of rows is epoch after epoch, each a permutation of all rows; step s takes the rows
    s * B to (s + 1) * B of the stream, and a process its contiguous share of these.

    Args:
      rows: packed rows.
      global_batch_size: B, rows of a step over all processes.
      seed: of the order; not negative.
      num_steps: steps of the run; they may reach over any number of epochs.
      process_index: this process.
      process_count: all processes; must divide B.
      epochs: the stream's end, after which rows are padding; None: it goes on for ever.
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
        """Row index of every place in the step's global batch, int64 [B]; -1 is a padding row."""
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
