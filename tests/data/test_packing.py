import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsft.data.bins import exact_fit, one_per_row, pack
from jaxsft.data.packing import PackedRows, Sample, StepBatches, epoch_order, num_steps
from jaxsft.data.samples import batches


def make_sample(ids: list[int], loss_mask: list[int]) -> Sample:
    return Sample(np.array(ids, np.int32), np.array(loss_mask, bool))


def numbered_rows(num_rows: int) -> PackedRows:
    """Row i holds one sample, whose first token is i + 1."""
    samples = [make_sample([i + 1, 9], [0, 1]) for i in range(num_rows)]
    return PackedRows.from_samples(samples, one_per_row([2] * num_rows, 2), 2)


def test_batch_by_hand():
    samples = [
        make_sample([10, 11, 12], [0, 1, 1]),  # prompt of 1, completion of 2
        make_sample([20, 21, 22, 23], [0, 0, 0, 1]),
        make_sample([30, 31], [1, 1]),  # a label in front has no position that predicts it
    ]
    rows = PackedRows.from_samples(samples, [[1, 0], [2]], row_length=8)
    o = 0
    expected = [
        [[20, 21, 22, 23, 10, 11, 12, o], [30, 31, o, o, o, o, o, o], [o] * 8],  # tokens
        [[21, 22, 23, o, 11, 12, o, o], [31, o, o, o, o, o, o, o], [o] * 8],  # targets
        [[0, 0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8],  # loss weights
        [[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8],  # segments
        [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8],  # positions
    ]
    batch = rows.batch([0, 1, -1])
    for array, one, want in zip(batch, rows.row(0), expected, strict=True):
        np.testing.assert_array_equal(array, want)
        np.testing.assert_array_equal(one, want[0])
    assert [array.dtype for array in batch] == [np.int32, np.int32, np.float32] + [np.int32] * 2
    assert (rows.num_loss_tokens, rows.num_tokens, rows.fill, len(rows)) == (4, 9, 9 / 16, 2)


def test_packed_rows_refuse_bad_input():
    sample = make_sample([1, 2], [0, 1])
    with pytest.raises(ValueError, match="no samples"):
        PackedRows.from_samples([], [], 4)
    with pytest.raises(AssertionError, match="too full"):
        PackedRows.from_samples([sample, sample], [[0, 1]], 3)
    for index in (-2, 1):
        with pytest.raises(IndexError):
            numbered_rows(1).batch([index])


def test_digest_sees_every_change():
    a, b = make_sample([1, 2, 3], [0, 1, 1]), make_sample([4, 5], [0, 1])
    variants = [
        PackedRows.from_samples([a, b], [[0, 1]], 6),
        PackedRows.from_samples([a, b], [[1, 0]], 6),
        PackedRows.from_samples([a, b], [[0], [1]], 6),
        PackedRows.from_samples([a, b], [[0, 1]], 7),
        PackedRows.from_samples([a, b._replace(ids=np.array([4, 6], np.int32))], [[0, 1]], 6),
        PackedRows.from_samples([a, b._replace(loss_mask=np.array([1, 1], bool))], [[0, 1]], 6),
    ]
    assert len({rows.digest() for rows in variants}) == len(variants)
    assert PackedRows.from_samples([a, b], [[0, 1]], 6).digest() == variants[0].digest()


@st.composite
def packings(draw):
    """Samples of distinct tokens, and their packed rows."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=40))
    row_length = draw(st.integers(max(lengths), 24))
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    samples = []
    for part in np.split(ids, np.cumsum(lengths)[:-1]):
        prompt_length = draw(st.integers(0, len(part)))
        samples.append(Sample(part, np.arange(len(part)) >= prompt_length))
    packer = draw(st.sampled_from([pack, exact_fit, one_per_row]))
    return samples, PackedRows.from_samples(samples, packer(lengths, row_length), row_length)


@settings(deadline=None)
@given(packings())
def test_packing_loses_and_duplicates_nothing(packing):
    samples, rows = packing
    batch = rows.batch(range(len(rows)))
    found = {}  # first token -> ids, mask of labels
    for b in range(len(rows)):
        segments = batch.segment_ids_BT[b]
        last = segments.max()
        used = np.repeat(np.arange(1, last + 1), np.bincount(segments, minlength=last + 1)[1:])
        np.testing.assert_array_equal(segments[: len(used)], used)  # numbered 1, 2, … in order
        for array in batch:
            assert not array[b, len(used) :].any()  # padding is zero everywhere
        for segment in range(1, last + 1):
            here = np.flatnonzero(segments == segment)
            ids = batch.tokens_BT[b, here]
            np.testing.assert_array_equal(batch.positions_BT[b, here], np.arange(len(here)))
            # Targets are the segment's own tokens shifted by one; the last position has none.
            np.testing.assert_array_equal(batch.targets_BT[b, here[:-1]], ids[1:])
            assert batch.targets_BT[b, here[-1]] == 0 and not batch.loss_weights_BT[b, here[-1]]
            found[int(ids[0])] = (ids, batch.loss_weights_BT[b, here[:-1]])
    assert len(found) == len(samples)
    for sample in samples:
        ids, loss_mask = found[int(sample.ids[0])]
        np.testing.assert_array_equal(ids, sample.ids)
        np.testing.assert_array_equal(loss_mask, sample.loss_mask[1:])
    assert rows.num_tokens == (batch.segment_ids_BT > 0).sum()
    assert rows.num_loss_tokens == batch.loss_weights_BT.sum()
    assert rows.fill == (batch.segment_ids_BT > 0).mean()


# The batches of the steps


def test_num_steps():
    assert num_steps(180_000, 4, 32) == 22_500
    assert num_steps(5, 1, 2) == 3
    assert num_steps(30, 0.1, 1) == 3  # 30 * 0.1 is 3.0000000000000004
    assert num_steps(10, 0.01, 4) == 1


def test_epoch_order_is_fixed_for_ever():
    # Golden: a change here would break the resume of every run that was started before.
    assert epoch_order(42, 0, 8).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]
    assert epoch_order(42, 1, 8).tolist() == [4, 5, 3, 0, 2, 7, 1, 6]
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(42, 0, 8)[0] = 1
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


@settings(deadline=None)
@given(
    num_rows=st.integers(1, 9),
    share=st.integers(1, 4),
    process_count=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
)
def test_steps_cover_every_epoch_whatever_the_processes(
    num_rows, share, process_count, epochs, seed
):
    rows, size = numbered_rows(num_rows), share * process_count
    steps = num_steps(num_rows, epochs, size)
    sources = [
        StepBatches(rows, size, seed, steps, index, process_count, epochs)
        for index in range(process_count)
    ]
    stream = np.concatenate([s[step].tokens_BT[:, 0] for step in range(steps) for s in sources])
    assert (steps - 1) * size < num_rows * epochs <= steps * size == len(stream)
    for epoch in range(epochs):
        part = stream[epoch * num_rows : (epoch + 1) * num_rows]
        np.testing.assert_array_equal(part, epoch_order(seed, epoch, num_rows) + 1)
        assert sorted(part) == list(range(1, num_rows + 1))
    assert not stream[num_rows * epochs :].any()


def test_steps_are_the_stream_cut_into_batches():
    rows = numbered_rows(5)
    steps = StepBatches(rows, 2, seed=3, num_steps=5)  # without epochs: it has no end
    order = [*epoch_order(3, 0, 5), *epoch_order(3, 1, 5)]
    assert len(steps) == 5
    for step in (4, 0, 2, 1, 3):  # any order of asking
        expected = rows.batch(order[2 * step : 2 * step + 2])
        for got, want in zip(steps[step], expected, strict=True):
            np.testing.assert_array_equal(got, want)
    for step in (-1, 5):
        with pytest.raises(IndexError):
            steps[step]
    half = StepBatches(numbered_rows(3), 2, seed=0, num_steps=num_steps(3, 1.5, 2), epochs=1.5)
    assert (half.row_indices(0) >= 0).all() and (half.row_indices(1) >= 0).all()
    assert half.row_indices(2).tolist() == [-1, -1] and len(half) == 2


def test_step_batches_refuse_bad_sizes():
    rows = numbered_rows(4)
    with pytest.raises(ValueError, match="batch size 6 cannot be split over 4 processes; use 4 or"):
        StepBatches(rows, 6, 0, 1, process_count=4)
    with pytest.raises(ValueError, match=r"use 4$"):
        StepBatches(rows, 2, 0, 1, process_count=4)
    with pytest.raises(ValueError, match="seed -1"):
        StepBatches(rows, 2, -1, 1)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("start", [0, 5, 9])
def test_grain_serves_the_tail_from_any_step(num_threads, start):
    steps = StepBatches(numbered_rows(7), 3, seed=7, num_steps=9)
    found = list(batches(steps, start, num_threads))
    assert [step for step, _ in found] == list(range(start, 9))
    for step, batch in found:
        for got, want in zip(batch, steps[step], strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
    for outside in (-1, 10):
        with pytest.raises(ValueError, match=f"step {outside} is not in a run of 9 steps"):
            list(batches(steps, outside))
