import numpy as np
import pytest

from jaxsft.data.bins import one_per_row
from jaxsft.data.packing import PackedRows, Sample, StepBatches, epoch_order, num_steps
from jaxsft.data.samples import batches


def make_sample(ids: list[int], loss_mask: list[int]) -> Sample:
    return Sample(np.array(ids, np.int32), np.array(loss_mask, bool))


def numbered_rows(num_rows: int, row_length: int = 2) -> PackedRows:
    """Row i holds one sample, whose first token is i + 1."""
    samples = [make_sample([i + 1, 9], [0, 1]) for i in range(num_rows)]
    return PackedRows.from_samples(samples, one_per_row([2] * num_rows, row_length), row_length)


def test_batch_by_hand():
    samples = [
        make_sample([10, 11, 12], [0, 1, 1]),  # prompt of 1, completion of 2
        make_sample([20, 21, 22, 23], [0, 0, 0, 1]),
        make_sample([30, 31], [1, 1]),  # a label in front has no position that predicts it
    ]
    rows = PackedRows.from_samples(samples, [[1, 0], [2]], row_length=8)
    tokens, targets, loss_mask, segment_ids, positions = rows.batch([0, 1, -1])
    o = 0
    np.testing.assert_array_equal(
        tokens,
        [[20, 21, 22, 23, 10, 11, 12, o], [30, 31, o, o, o, o, o, o], [o] * 8],
    )
    np.testing.assert_array_equal(
        targets,
        [[21, 22, 23, o, 11, 12, o, o], [31, o, o, o, o, o, o, o], [o] * 8],
    )
    np.testing.assert_array_equal(
        loss_mask,
        [[0, 0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [0] * 8],
    )
    np.testing.assert_array_equal(
        segment_ids,
        [[1, 1, 1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0, 0, 0], [0] * 8],
    )
    np.testing.assert_array_equal(
        positions,
        [[0, 1, 2, 3, 0, 1, 2, 0], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8],
    )
    assert [array.dtype for array in rows.batch([0])] == [np.int32, np.int32, bool] + [np.int32] * 2
    assert loss_mask.sum() == rows.num_loss_tokens == 4
    assert rows.num_tokens == 9
    assert rows.fill == 9 / 16
    assert len(rows) == 2


def test_row_is_a_row_of_the_batch():
    rows = PackedRows.from_samples(
        [make_sample([1, 2], [0, 1]), make_sample([3, 4], [0, 1])], [[1, 0]], 5
    )
    for one, many in zip(rows.row(0), rows.batch([0, -1]), strict=True):
        assert one.shape == (5,)
        np.testing.assert_array_equal(one, many[0])
    assert not any(array.any() for array in rows.row(-1))


def test_rows_out_of_range():
    for index in (-2, 1):
        with pytest.raises(IndexError):
            numbered_rows(1).batch([index])


def test_packed_rows_refuse_bad_input():
    sample = make_sample([1, 2], [0, 1])
    with pytest.raises(ValueError, match="no samples"):
        PackedRows.from_samples([], [], 4)
    with pytest.raises(IndexError):
        PackedRows.from_samples([sample, sample], [[0, 1], [2]], 8)
    with pytest.raises(AssertionError, match="too full"):
        PackedRows.from_samples([sample, sample], [[0, 1]], 3)


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


def test_num_steps():
    assert num_steps(180_000, 4, 32) == 22_500
    assert num_steps(100_000, 2, 32) == 6_250
    assert num_steps(5, 1, 2) == 3
    assert num_steps(5, 2, 2) == 5
    assert num_steps(30, 0.1, 1) == 3  # 30 * 0.1 is 3.0000000000000004
    assert num_steps(10, 0.01, 4) == 1


def test_epoch_order_is_fixed_for_ever():
    # Golden: a change here would break the resume of every run that was started before.
    assert epoch_order(42, 0, 8).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]
    assert epoch_order(42, 1, 8).tolist() == [4, 5, 3, 0, 2, 7, 1, 6]
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(42, 0, 8)[0] = 1


@pytest.mark.parametrize(("num_rows", "batch_size"), [(7, 2), (6, 3), (3, 8), (1, 4)])
def test_every_epoch_is_a_permutation(num_rows, batch_size):
    steps = StepBatches(numbered_rows(num_rows), batch_size, seed=1, num_steps=12)
    stream = np.concatenate([steps.row_indices(step) for step in range(12)])
    assert len(stream) == 12 * batch_size
    epochs = [stream[i : i + num_rows] for i in range(0, len(stream) - num_rows + 1, num_rows)]
    assert len(epochs) >= 3
    for epoch, order in enumerate(epochs):
        assert sorted(order) == list(range(num_rows))
        np.testing.assert_array_equal(order, epoch_order(1, epoch, num_rows))


def test_the_order_depends_on_seed_and_epoch():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4


def test_steps_are_the_stream_cut_into_batches():
    rows = numbered_rows(5)
    steps = StepBatches(rows, 2, seed=3, num_steps=5)
    order = [*epoch_order(3, 0, 5), *epoch_order(3, 1, 5)]
    assert len(steps) == 5
    for step in (4, 0, 2, 1, 3):  # any order of asking
        expected = rows.batch(order[2 * step : 2 * step + 2])
        for got, want in zip(steps[step], expected, strict=True):
            np.testing.assert_array_equal(got, want)
    for step in (-1, 5):
        with pytest.raises(IndexError):
            steps[step]


def test_rows_after_the_last_epoch_are_padding():
    rows = numbered_rows(3)
    steps = StepBatches(rows, 4, seed=0, num_steps=num_steps(3, 2, 4), epochs=2)
    stream = np.concatenate([steps.row_indices(step) for step in range(len(steps))])
    assert sorted(stream[:6]) == [0, 0, 1, 1, 2, 2]
    assert stream[6:].tolist() == [-1, -1]
    assert not steps[1].segment_ids_BT[2:].any()
    assert not steps[1].loss_weights_BT[2:].any()
    half = StepBatches(rows, 2, seed=0, num_steps=num_steps(3, 1.5, 2), epochs=1.5)
    assert (half.row_indices(0) >= 0).all() and (half.row_indices(1) >= 0).all()
    assert half.row_indices(2).tolist() == [-1, -1] and len(half) == 2
    endless = StepBatches(rows, 4, seed=0, num_steps=2)
    assert (np.concatenate([endless.row_indices(step) for step in range(2)]) >= 0).all()


@pytest.mark.parametrize("process_count", [2, 3, 6])
def test_processes_take_contiguous_shares(process_count):
    rows = numbered_rows(10)
    whole = StepBatches(rows, 6, seed=5, num_steps=6, epochs=3)
    shares = [
        StepBatches(rows, 6, 5, 6, process_index=i, process_count=process_count, epochs=3)
        for i in range(process_count)
    ]
    for step in range(6):
        parts = [share[step] for share in shares]
        for name, want in whole[step]._asdict().items():
            got = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(got, want)


def test_step_batches_refuse_bad_sizes():
    rows = numbered_rows(4)
    with pytest.raises(ValueError, match="batch size 6 cannot be split over 4 processes; use 4 or"):
        StepBatches(rows, 6, 0, 1, process_count=4)
    with pytest.raises(ValueError, match=r"use 4$"):
        StepBatches(rows, 2, 0, 1, process_count=4)
    with pytest.raises(ValueError, match="seed -1"):
        StepBatches(rows, 2, -1, 1)


# Batches through Grain


def make_steps(num_rows=7, batch_size=3, steps=9, **options) -> StepBatches:
    loss_mask = np.array([False, True, True])
    samples = [
        Sample(np.array([i + 1, i + 100, i + 200], np.int32), loss_mask) for i in range(num_rows)
    ]
    rows = PackedRows.from_samples(samples, one_per_row([3] * num_rows, 4), 4)
    return StepBatches(rows, batch_size, seed=7, num_steps=steps, **options)


def assert_same(got, want):
    assert [step for step, _ in got] == [step for step, _ in want]
    for (_, one), (_, other) in zip(got, want, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("num_threads", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 5, 8, 9])
def test_grain_serves_the_tail_from_any_step(num_threads, start):
    steps = make_steps()
    want = [(step, steps[step]) for step in range(start, 9)]
    assert_same(list(batches(steps, start, num_threads)), want)


def test_grain_serves_each_process_its_share():
    whole = list(batches(make_steps(batch_size=4, steps=5)))
    options = {"batch_size": 4, "steps": 5, "process_count": 2}
    first, second = (list(batches(make_steps(process_index=i, **options), 0, 0)) for i in (0, 1))
    for (_, want), (_, a), (_, b) in zip(whole, first, second, strict=True):
        np.testing.assert_array_equal(np.concatenate([a.tokens_BT, b.tokens_BT]), want.tokens_BT)


def test_a_run_in_epochs_sees_every_row_so_often():
    steps = make_steps(num_rows=7, batch_size=4, steps=num_steps(7, 3, 4), epochs=3)
    first_tokens = np.concatenate([batch.tokens_BT[:, 0] for _, batch in batches(steps)])
    assert len(first_tokens) == 24
    assert np.bincount(first_tokens).tolist() == [3] + [3] * 7  # 3 rows of padding


def test_start_outside_the_run():
    for start in (-1, 10):
        with pytest.raises(ValueError, match=f"start step {start} is not in a run of 9 steps"):
            list(batches(make_steps(), start))
