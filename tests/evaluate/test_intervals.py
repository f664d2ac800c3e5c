"""Intervals and tests: by hand, against NumPy, and by their coverage."""

import math

import numpy as np
import pytest

from jaxsft.evaluate.intervals import difference, mean, ratio, share, sign_flip_p_value


def test_share_is_wilsons_formula() -> None:
    z = 1.959964
    # Without a success, or with nothing else, the interval still has a width: 16.1% of 20.
    for hits, num in ((1, 1319), (430, 1319), (1318, 1319), (0, 20), (20, 20)):
        p = hits / num
        centre, scale = p + z * z / (2 * num), 1 + z * z / num
        half = z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
        found = share([True] * hits + [False] * (num - hits))
        expected = (p, (centre - half) / scale, (centre + half) / scale, num)
        assert found == pytest.approx(expected, abs=1e-7)
    assert share([]).num == 0 and math.isnan(share([]).value)


@pytest.mark.parametrize("values", [[], [3.0], [2.5] * 40, [0.1 + 0.2, 0.3]])
def test_equal_values_have_no_interval(values: list[float]) -> None:
    found = mean(values)
    assert found.num == len(values)
    assert found.value == pytest.approx(values[0]) if values else math.isnan(found.value)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_ratio_weighs_rows_by_their_counts() -> None:
    # Of the four resamples, one has the mean 1 and one the mean 3: beyond 2.5% both.
    assert ratio([10.0, 30.0], [10, 10])[:3] == (2.0, 1.0, 3.0)
    # A row of 90 tokens at 1 nat and one of 10 at 2: not the mean 1.5 of the two rows.
    assert ratio([90.0, 20.0], [90, 10]).value == pytest.approx(1.1)
    sums, counts = np.random.default_rng(3).lognormal(3, 1, 200), np.arange(200.0, 0, -1)
    rows = np.random.default_rng(0).integers(200, size=(10_000, 200))
    resampled = sums[rows].sum(1) / counts[rows].sum(1)
    expected = np.quantile(resampled, [0.025, 0.975])
    assert ratio(sums, counts)[1:3] == pytest.approx(tuple(expected), rel=1e-12)


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(4)
    covered = [
        low <= 1.0 <= high
        for _, low, high, _ in (mean(rng.exponential(size=60).tolist()) for _ in range(200))
    ]
    # 95% in the limit; the percentile bootstrap of 60 skewed values is known to be a little short.
    assert 0.89 <= np.mean(covered) <= 0.98


def test_mcnemar_by_hand() -> None:
    # 8 prompts only the one gets right, 2 only the other: 2 * (1 + 10 + 45) / 2^10.
    assert sign_flip_p_value([1.0] * 8 + [-1.0] * 2 + [0.0] * 90) == pytest.approx(112 / 1024)
    # 5 wins of 5: 2 / 2^5, the least that 5 prompts can give.
    assert sign_flip_p_value([1.0] * 5) == 2 / 32
    assert sign_flip_p_value([1.0, -1.0]) == 1
    assert sign_flip_p_value([2.0] * 2000) == pytest.approx(0, abs=1e-300)
    assert sign_flip_p_value([0.0] * 9) == sign_flip_p_value([]) == 1


def test_unequal_gains_by_hand() -> None:
    # Signs of 1, 2, 4 with a sum of at least 5 in size: (+++) 7, (-++) 5, and their opposites.
    assert sign_flip_p_value([-1.0, 2.0, 4.0]) == 4 / 8
    assert sign_flip_p_value([0.1, 0.2, 0.4, 0.8]) == 2 / 16  # the sums in another order are equal
    assert sign_flip_p_value([0.1, 0.2, -0.3]) == 1  # 0, which floats miss by 3e-17


def test_many_gains_are_sampled() -> None:
    gains = np.random.default_rng(5).normal(size=30)
    gains += 0.35 - gains.mean()
    signs = np.random.default_rng(6).choice([-1, 1], size=(100_000, 30))
    expected = np.mean(np.abs(signs @ gains) >= abs(gains.sum()))
    assert 0.01 < expected < 0.2
    found = sign_flip_p_value(gains.tolist())
    assert found == pytest.approx(expected, abs=0.01)  # a standard error of 0.003 or less
    assert sign_flip_p_value([1.0 + k / 100 for k in range(30)]) == 1 / 10_001  # never 0


def test_difference_is_of_pairs() -> None:
    left = np.random.default_rng(7).normal(0, 10, 80)
    gains = np.random.default_rng(8).normal(1, 0.5, 80)
    found = difference(left.tolist(), (left + gains).tolist())
    # The spread of the rows, ten times that of the gains, is not in it.
    assert found.value == pytest.approx(gains.mean())
    half = 1.96 * gains.std(ddof=1) / math.sqrt(80)
    assert found.low == pytest.approx(gains.mean() - half, abs=0.15 * half)
    assert found.high == pytest.approx(gains.mean() + half, abs=0.15 * half)
    assert found.p_value == 1 / 10_001
    per_token = difference([10.0, 40.0], [20.0, 20.0], [10, 20])
    assert per_token[:3] == (pytest.approx(-10 / 30), -1.0, 1.0)
    assert per_token.p_value == 1  # of ±10 ± 20 all are at least as far from 0 as -10


def test_a_loss_that_is_not_finite_proves_nothing() -> None:
    for bad in (math.nan, math.inf):
        found = difference([1.0, bad] * 10, [bad] * 20)
        assert all(map(math.isnan, (found.value, found.low, found.high, found.p_value)))
        assert math.isnan(mean([1.0, bad]).high) and not math.isfinite(mean([1.0, bad]).value)
