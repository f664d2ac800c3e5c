"""Intervals and tests: by hand, against SciPy, and by their coverage."""

import math

import numpy as np
import pytest
import scipy.stats

from jaxsft.evaluate.intervals import difference, mean, ratio, share, sign_flip_p_value


@pytest.mark.parametrize(
    ("hits", "num"), [(0, 20), (1, 20), (7, 20), (20, 20), (1, 1), (430, 1319)]
)
def test_share_is_wilsons(hits: int, num: int) -> None:
    found = share([True] * hits + [False] * (num - hits))
    wanted = scipy.stats.binomtest(hits, num).proportion_ci(method="wilson")
    assert (found.value, found.num) == (hits / num, num)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_no_success_is_no_certainty() -> None:
    z = 1.959964
    assert share([False] * 20).low == pytest.approx(0, abs=1e-15)
    assert share([False] * 20).high == pytest.approx(z * z / (20 + z * z), abs=1e-6)  # 16.1%
    assert share([True] * 20).high == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("values", [[], [3.0], [2.5] * 40, [0.1 + 0.2, 0.3]])
def test_equal_values_have_no_interval(values: list[float]) -> None:
    found = mean(values)
    assert found.num == len(values)
    assert found.value == pytest.approx(values[0]) if values else math.isnan(found.value)
    assert math.isnan(found.low) and math.isnan(found.high)


def test_no_answers_have_no_share() -> None:
    assert share([]).num == 0 and math.isnan(share([]).value)


def test_two_values_by_hand() -> None:
    # Of the four resamples of {0, 1}, one has the mean 0 and one the mean 1: beyond 2.5% both.
    assert mean([0.0, 1.0])[:3] == (0.5, 0.0, 1.0)


def test_mean_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(1).lognormal(3, 1, 200)
    found = mean(values.tolist())
    wanted = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    # Both are random: 10,000 resamples place a 2.5% quantile within about 1% of the width.
    width = wanted.high - wanted.low
    assert found.low == pytest.approx(wanted.low, abs=0.05 * width)
    assert found.high == pytest.approx(wanted.high, abs=0.05 * width)


def test_seed_decides() -> None:
    values = np.random.default_rng(0).normal(size=50).tolist()
    assert mean(values) == mean(values) != ratio(values, np.ones_like(values), seed=1)
    gains = [*values, *values]
    assert sign_flip_p_value(gains) == sign_flip_p_value(gains) != sign_flip_p_value(gains, seed=1)


def test_ratio_weighs_rows_by_their_counts() -> None:
    found = ratio([10.0, 30.0], [10, 10])
    assert found[:3] == (2.0, 1.0, 3.0)
    # A row of 90 tokens at 1 nat and one of 10 at 2: not the mean 1.5 of the two rows.
    assert ratio([90.0, 20.0], [90, 10]).value == pytest.approx(1.1)
    sums, counts = np.arange(1.0, 101), np.arange(100.0, 0, -1)
    wanted = scipy.stats.bootstrap(
        (sums, counts),
        lambda s, c, axis: s.sum(axis) / c.sum(axis),
        *(), paired=True, method="percentile", rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    found = ratio(sums.tolist(), counts)
    width = wanted.high - wanted.low
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.05 * width)


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(4)
    covered = [
        low <= 1.0 <= high
        for _, low, high, _ in (mean(rng.exponential(size=60).tolist()) for _ in range(200))
    ]
    # 95% in the limit; the percentile bootstrap of 60 skewed values is known to be a little short.
    assert 0.89 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("num", [6, 40, 3000])
def test_binary_gains_are_the_exact_mcnemar_test(num: int) -> None:
    lost = num // 3
    gains = [1.0] * (num - lost) + [-1.0] * lost + [0.0] * 25
    wanted = scipy.stats.binomtest(lost, num, 0.5).pvalue
    assert sign_flip_p_value(gains) == pytest.approx(wanted, rel=1e-9, abs=1e-300)


def test_mcnemar_by_hand() -> None:
    # 8 prompts only the one gets right, 2 only the other: 2 * (1 + 10 + 45) / 2^10.
    assert sign_flip_p_value([1.0] * 8 + [-1.0] * 2 + [0.0] * 90) == pytest.approx(112 / 1024)
    # 5 wins of 5: 2 / 2^5, the least that 5 prompts can give.
    assert sign_flip_p_value([1.0] * 5) == 2 / 32
    assert sign_flip_p_value([1.0, -1.0]) == 1
    assert sign_flip_p_value([0.0] * 9) == sign_flip_p_value([]) == 1


def test_unequal_gains_by_hand() -> None:
    # Signs of 1, 2, 4 with a sum of at least 5 in size: (+++) 7, (-++) 5, and their opposites.
    assert sign_flip_p_value([-1.0, 2.0, 4.0]) == 4 / 8
    assert sign_flip_p_value([0.1, 0.2, 0.4, 0.8]) == 2 / 16  # the sums in another order are equal
    assert sign_flip_p_value([0.1, 0.2, -0.3]) == 1  # 0, which floats miss by 3e-17


def test_many_gains_are_sampled_as_in_scipy() -> None:
    gains = np.random.default_rng(5).normal(size=30)
    gains += 0.35 - gains.mean()
    wanted = scipy.stats.permutation_test(
        (gains, np.zeros(30)), lambda a, b: np.mean(a - b), permutation_type="samples",
        vectorized=False, n_resamples=9_999, rng=np.random.default_rng(6),
    ).pvalue  # fmt: skip
    found = sign_flip_p_value(gains.tolist())
    assert 0.01 < wanted < 0.2
    assert found == pytest.approx(wanted, abs=0.015)  # each has a standard error of 0.003 or less
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
