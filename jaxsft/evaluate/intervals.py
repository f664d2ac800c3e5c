"""Confidence intervals of means over rows, and tests whether two models differ on the same rows.

Chance drew the rows, so rows are resampled, never tokens. All intervals are of 95%:

    means, ratios, differences   the percentile bootstrap (Efron & Tibshirani 1993, chapter 13)
    shares                       Wilson's score interval (Wilson 1927; Brown, Cai & DasGupta 2001)

A bootstrap knows only the values it is given: of 0 right answers in 20 every resample has 0, and
its interval [0, 0] claims certainty, where Wilson's is [0, 16%]. For the same reason one value, or
values that are all equal, have no bootstrap interval: NaN, not one of width 0.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# scipy.stats takes 0.6 s to import: the functions import it, so that no command waits for it.

NUM_RESAMPLES = 10_000
_CHUNK = 1 << 20  # values drawn at once: 8 MiB
_DIGITS = 12  # of float64 sums; further ones depend on the order of the terms


class Estimate(NamedTuple):
    """A value over `num` rows and its 95% interval; NaN where the rows cannot tell."""

    value: float
    low: float
    high: float
    num: int


class PairedDifference(NamedTuple):
    """Right minus left over `num` rows, its interval, and the p value of no difference."""

    value: float
    low: float
    high: float
    num: int
    p_value: float


def share(hits: Sequence[bool]) -> Estimate:
    """The share of hits and Wilson's interval for it."""
    from scipy import stats

    num = len(hits)
    if not num:
        return Estimate(math.nan, math.nan, math.nan, 0)
    interval = stats.binomtest(sum(hits), num).proportion_ci(method="wilson")
    return Estimate(sum(hits) / num, float(interval.low), float(interval.high), num)


def mean(values: npt.ArrayLike) -> Estimate:
    """The mean of the values and its bootstrap interval."""
    return ratio(values, np.ones_like(values))


def ratio(sums: npt.ArrayLike, counts: npt.ArrayLike) -> Estimate:
    """Sum of `sums` by sum of `counts`, such as loss per token over rows of many lengths.

    Args:
      sums: [N], one for each row.
      counts: [N], the number of terms in each sum, above 0.
    """
    from scipy import stats

    sums_N, counts_N = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    assert sums_N.shape == counts_N.shape and np.all(counts_N > 0)
    num = len(sums_N)
    if not num:
        return Estimate(math.nan, math.nan, math.nan, 0)
    with np.errstate(invalid="ignore"):  # of losses that are not finite
        value, rates_N = float(sums_N.sum() / counts_N.sum()), sums_N / counts_N
        is_equal = np.ptp(rates_N) <= 10.0**-_DIGITS * np.abs(rates_N).max()
    if is_equal or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, num)
    interval = stats.bootstrap(
        (sums_N, counts_N),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, _CHUNK // num),
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), num)


def difference(
    left: npt.ArrayLike, right: npt.ArrayLike, counts: npt.ArrayLike | None = None
) -> PairedDifference:
    """The difference of two models on the same N rows, right minus left.

    Args:
      left, right: [N], a value for each row, or with `counts` a sum.
      counts: [N], the number of terms in both models' sums (`ratio`); None for plain means.
    """
    left_N, right_N = np.asarray(left, np.float64), np.asarray(right, np.float64)
    assert left_N.shape == right_N.shape
    with np.errstate(invalid="ignore"):
        gains_N = right_N - left_N
    estimate = ratio(gains_N, np.ones_like(gains_N) if counts is None else counts)
    return PairedDifference(*estimate, p_value=sign_flip_p_value(gains_N))


def sign_flip_p_value(gains: npt.ArrayLike) -> float:
    """Two-sided p value of the paired permutation test that Fisher proposed (1935, section 21).

    If the two models were alike, each row's gain would have had either sign with equal chance. The
    p value is the share of sign patterns whose sum is at least as far from 0 as the one observed.
    The test assumes no distribution, so it serves shares, lengths and losses alike; for right and
    wrong answers it is the exact McNemar test. It is exact for gains of one size and for 13 gains
    or fewer; else the share among NUM_RESAMPLES random patterns and the one observed (Phipson &
    Smyth 2010). 1.0 without any gain, NaN where a gain is not finite.
    """
    from scipy import stats

    gains_N = np.asarray(gains, np.float64)
    gains_N = gains_N[gains_N != 0]
    if not np.isfinite(gains_N).all():
        return math.nan
    sizes_N, num = np.abs(gains_N), len(gains_N)
    if not num:
        return 1.0
    if np.ptp(sizes_N) == 0:
        return float(stats.binomtest(int((gains_N > 0).sum()), num).pvalue)
    return float(
        stats.permutation_test(
            (gains_N,),
            lambda gains, axis: np.round(np.abs(gains.sum(axis)) / sizes_N.sum(), _DIGITS),
            permutation_type="samples",
            alternative="greater",
            vectorized=True,
            n_resamples=NUM_RESAMPLES,
            batch=max(1, _CHUNK // num),
            rng=np.random.default_rng(0),
        ).pvalue
    )
