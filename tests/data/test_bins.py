import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsft.data.bins import best_fit_decreasing, exact_fit, min_rows, one_per_row, pack


@pytest.mark.parametrize(
    ("lengths", "row_length", "rows"),
    [
        # Longest first: 6, 5 and 4 open rows; 3 fits the rest of 5 exactly, 2 the rest of 6.
        ([5, 3, 4, 2, 6], 8, [[4, 3], [0, 1], [2]]),
        ([7, 8, 9, 1], 10, [[2, 3], [1], [0]]),  # 1 goes to the row with 1 free, not 2 or 3
        ([2, 2, 2, 2, 2], 4, [[0, 1], [2, 3], [4]]),  # equal lengths keep their order
        ([4, 4], 4, [[0], [1]]),
        ([], 4, []),
    ],
)
def test_best_fit_decreasing_by_hand(lengths, row_length, rows):
    assert best_fit_decreasing(lengths, row_length) == rows


@pytest.mark.parametrize("pack", [pack, exact_fit, one_per_row])
def test_packers_refuse(pack):
    with pytest.raises(ValueError, match="sample 1 has 9 tokens, more than a row of 8"):
        pack([3, 9], 8)
    with pytest.raises(ValueError, match="sample 1 has no tokens"):
        pack([3, 0], 8)
    with pytest.raises(ValueError, match="row length 0"):
        pack([1], 0)


def test_exact_fit_ends_rows_exactly():
    # Only 5 + 3 and 6 + 2 fill a row; 7 stands alone.
    assert sorted(map(sorted, exact_fit([5, 6, 7, 2, 3], 8))) == [[0, 4], [1, 3], [2]]
    assert exact_fit([], 8) == []


def test_fewest_rows_by_hand():
    assert min_rows([], 8) == 0
    assert min_rows([8, 8], 8) == 2
    assert min_rows([4, 4, 4], 8) == 2  # 12 tokens
    assert min_rows([5, 5, 5], 8) == 3  # 15 tokens would go into two, but no two share a row
    assert min_rows([6, 6, 3, 3], 8) == 3  # neither 3 fits beside a 6, and they share a row
    assert min_rows([6, 6, 2, 2], 8) == 2


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), max_size=80), st.integers(60, 100))
def test_any_lengths(lengths, row_length):
    for packer in (best_fit_decreasing, exact_fit, pack):
        rows = packer(lengths, row_length)
        assert rows == packer(lengths, row_length)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        used = sorted(sum(lengths[index] for index in row) for row in rows)
        assert all(size <= row_length for size in used)
        assert len(rows) >= min_rows(lengths, row_length)
        if packer is best_fit_decreasing:  # no two rows would fit into one: fill > 1/2 - 1/rows
            assert len(used) < 2 or used[0] + used[1] > row_length


def glaive_lengths(num_samples: int) -> list[int]:
    """Tokens a row at the published quantiles of glaiveai/reasoning-v1-20m: 4.4 characters each."""
    shares = [0, 0.01, 0.05, 0.10, 0.50, 0.90, 0.95, 0.98, 0.99, 1]
    characters = [2000, 4020, 4880, 5343, 7078, 9398, 10362, 12181, 15731, 30000]
    drawn = np.interp(np.random.default_rng(0).random(num_samples), shares, characters)
    return [int(length / 4.4) + 59 for length in drawn]


@pytest.mark.parametrize(("row_length", "fill"), [(2048, 0.77), (4096, 0.93), (8192, 0.99)])
def test_rows_of_long_traces_are_nearly_as_full_as_can_be(row_length, fill):
    lengths = np.minimum(glaive_lengths(20_000), row_length).tolist()
    rows, fewest = pack(lengths, row_length), min_rows(lengths, row_length)
    assert sum(lengths) / (len(rows) * row_length) > fill
    if row_length != 4096:  # there the bound is 6% off: two middling samples leave a third idle
        assert len(rows) <= 1.01 * fewest
