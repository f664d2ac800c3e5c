"""Completions in rows: which positions bear loss, and what is read back from where."""

import numpy as np
import pytest

from jaxsft.common.batch import Batch
from jaxsft.grpo.batches import CompletionRows, split_rows

STOP = 9


def test_a_batch_by_hand() -> None:
    prompts, completions = [[1, 2], [1, 2], [3]], [[4, STOP], [5, 6, 7], [8, STOP]]
    rows = CompletionRows(prompts, completions, row_length=8, num_rows=3)
    o = 0
    expected = [  # 5 and 3 tokens fill a row; the cut off completion bears loss at all its tokens
        [[1, 2, 5, 6, 7, 3, 8, 9], [1, 2, 4, 9, o, o, o, o], [o] * 8],  # tokens
        [[2, 5, 6, 7, o, 8, 9, o], [2, 4, 9, o, o, o, o, o], [o] * 8],  # targets
        [[0, 1, 1, 1, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0], [0] * 8],  # loss weights
        [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0, 0, 0], [0] * 8],  # segments
        [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 0, 0, 0], [0] * 8],  # positions
    ]
    for array, want in zip(rows.batch, expected, strict=True):
        np.testing.assert_array_equal(array, want)
    assert rows.lengths == [2, 3, 2]

    old = [[0.1, 0.2], [0.3, 0.4, 0.5], [0.6, 0.7]]
    batch = rows.rollout_batch(
        weights=[0.5, 1, 2], advantages=[-1, 2, 3], old=old, reference=[4] * 3
    )
    one = np.float32
    np.testing.assert_array_equal(batch.old_BT[0], one([0, 0.3, 0.4, 0.5, 0, 0.6, 0.7, 0]))
    np.testing.assert_array_equal(batch.old_BT[1:], one([[0, 0.1, 0.2, *[0] * 5], [0] * 8]))
    np.testing.assert_array_equal(batch.advantages_BT[0], one([0, 2, 2, 2, 0, 3, 3, 0]))
    np.testing.assert_array_equal(batch.loss_weights_BT[0], one([0, 1, 1, 1, 0, 2, 2, 0]))
    np.testing.assert_array_equal(batch.reference_BT[1], one([0, 4, 4, 0, 0, 0, 0, 0]))
    assert {array.dtype for array in batch[5:]} == {np.dtype(np.float32)}
    parts = split_rows(batch, 3)
    np.testing.assert_array_equal(parts.tokens_BT[:, 0], batch.tokens_BT)


def test_what_is_written_is_read() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 40):
        prompts = [rng.integers(2, 99, rng.integers(1, 9)).tolist() for _ in range(count)]
        completions = [rng.integers(2, 99, rng.integers(1, 25)).tolist() for _ in range(count)]
        rows = CompletionRows(prompts, completions, row_length=64, num_rows=count)
        for read, ids in zip(rows.read(rows.batch.targets_BT), completions, strict=True):
            np.testing.assert_array_equal(read, ids)
        values = [rng.normal(size=len(ids)).astype(np.float32) for ids in completions]
        assert all(map(np.array_equal, rows.read(rows.write(values)), values))
        again = CompletionRows(prompts, completions, row_length=64, num_rows=count)
        assert all(map(np.array_equal, again.batch, rows.batch))


def test_nothing_to_learn_is_a_batch_of_padding() -> None:
    rows = CompletionRows([], [], row_length=4, num_rows=2)
    batch = rows.rollout_batch(weights=[], advantages=[], old=[], reference=[])
    assert all(array.shape == (2, 4) and not array.any() for array in batch)
    assert rows.read(batch.old_BT) == []
    assert [array.dtype for array in rows.batch] == [
        array.dtype for array in CompletionRows([[1]], [[2]], row_length=4, num_rows=1).batch
    ]
    assert isinstance(rows.batch, Batch)


def test_what_does_not_fit_is_an_error() -> None:
    with pytest.raises(ValueError, match="sample 0 has 5 tokens, more than a row of 4"):
        CompletionRows([[1, 2]], [[3, 4, 5]], row_length=4, num_rows=1)
