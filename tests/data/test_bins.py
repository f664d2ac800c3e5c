import numpy as np
import pytest

from jaxsft.data.bins import best_fit_decreasing, exact_fit, min_rows, one_per_row, pack


def test_best_fit_decreasing_by_hand():
    # Longest first: 6, 5 and 4 open rows; 3 fits the rest of 5 exactly, 2 the rest of 6.
    assert best_fit_decreasing([5, 3, 4, 2, 6], 8) == [[4, 3], [0, 1], [2]]


def test_best_fit_takes_the_fullest_row_that_has_room():
    # The 1 goes to the row with 1 free, not to those with 2 or 3 free.
    assert best_fit_decreasing([7, 8, 9, 1], 10) == [[2, 3], [1], [0]]


def test_equal_lengths_keep_their_order():
    assert best_fit_decreasing([2, 2, 2, 2, 2], 4) == [[0, 1], [2, 3], [4]]


def test_full_rows_take_nothing_more():
    assert best_fit_decreasing([4, 4], 4) == [[0], [1]]
    assert best_fit_decreasing([], 4) == []


def test_one_per_row():
    assert one_per_row([3, 1, 2], 3) == [[0], [1], [2]]


@pytest.mark.parametrize("pack", [pack, best_fit_decreasing, exact_fit, one_per_row])
@pytest.mark.parametrize(
    ("lengths", "row_length", "message"),
    [
        ([3, 9], 8, "sample 1 has 9 tokens, more than a row of 8"),
        ([3, 0], 8, "sample 1 has no tokens"),
        ([1], 0, "row length 0"),
    ],
)
def test_packers_refuse(pack, lengths, row_length, message):
    with pytest.raises(ValueError, match=message):
        pack(lengths, row_length)


def test_exact_fit_ends_rows_exactly():
    # Only 5 + 3 and 6 + 2 fill a row; longest first would do as well, 7 stands alone.
    rows = exact_fit([5, 6, 7, 2, 3], 8)
    assert sorted(map(sorted, rows)) == [[0, 4], [1, 3], [2]]
    assert exact_fit([], 8) == []


def test_fewest_rows_by_hand():
    assert min_rows([], 8) == 0
    assert min_rows([8, 8], 8) == 2
    assert min_rows([4, 4, 4], 8) == 2  # 12 tokens
    assert min_rows([5, 5, 5], 8) == 3  # 15 tokens would go into two, but no two share a row
    assert min_rows([6, 6, 3, 3], 8) == 3  # neither 3 fits beside a 6, and they share a row
    assert min_rows([6, 6, 2, 2], 8) == 2


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
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert max(sum(lengths[i] for i in row) for row in rows) <= row_length
    assert sum(lengths) / (len(rows) * row_length) > fill
    if row_length != 4096:  # there the bound is 6% off: two middling samples leave a third idle
        assert len(rows) <= 1.01 * fewest
