"""How sure a mean over evaluation rows is, and whether two models differ on the same rows.

The rows are what was drawn by chance, so rows are resampled, never tokens. Intervals are of 95%:

    means, ratios and differences: the percentile bootstrap (Efron & Tibshirani 1993, chapter 13)
    shares: Wilson's score interval (Wilson 1927; Brown, Cai & DasGupta 2001, section 3.1.1)

A bootstrap sees only the values that are there: of 0 right answers in 20 every resample has 0, and
its interval [0, 0] claims certainty, where Wilson's is [0, 16%]. Likewise one value, or values that
are all equal, say nothing about their spread: their bootstrap interval is NaN, not one of width 0.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 10_000
_TAIL = 0.025
_CHUNK = 1 << 20  # values drawn at once: 8 MiB
_ROUNDING = 1e-12  # of sums in float64, relative
_MAX_ENUMERATED = 13  # 2^13 sign patterns: fewer than NUM_RESAMPLES

Floats = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A value over `num` rows and its 95% interval; NaN where the rows cannot tell."""

    value: float
    low: float
    high: float
    num: int


class Difference(NamedTuple):
    """Right minus left over `num` rows, as in `Estimate`, and the p value of no difference."""

    value: float
    low: float
    high: float
    num: int
    p_value: float


def share(hits: Sequence[bool]) -> Estimate:
    """The share of the hits and Wilson's interval for it."""
    num = len(hits)
    if not num:
        return Estimate(math.nan, math.nan, math.nan, 0)
    z, p = NormalDist().inv_cdf(1 - _TAIL), sum(hits) / num
    centre = p + z * z / (2 * num)
    half = z * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    scale = 1 + z * z / num
    return Estimate(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale), num)


def mean(values: npt.ArrayLike) -> Estimate:
    """The mean of the values and its bootstrap interval."""
    return ratio(values, np.ones_like(values))


def ratio(sums: npt.ArrayLike, counts: npt.ArrayLike, *, seed: int = 0) -> Estimate:
    """Sum of `sums` by sum of `counts`, such as loss per token over rows of many lengths.

    Args:
      sums: [N], one for each row.
      counts: [N], what each sum is over, above 0.
      seed: of the resampling.
    """
    sums_N, counts_N = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    assert sums_N.shape == counts_N.shape and np.all(counts_N > 0)
    num = len(sums_N)
    if not num:
        return Estimate(math.nan, math.nan, math.nan, 0)
    with np.errstate(invalid="ignore"):  # of losses that are not finite
        value, rates_N = float(sums_N.sum() / counts_N.sum()), sums_N / counts_N
        is_equal = np.ptp(rates_N) <= _ROUNDING * np.abs(rates_N).max()
    if is_equal or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, num)
    rng = np.random.default_rng(seed)
    resampled = [
        sums_N[rows].sum(1) / counts_N[rows].sum(1)
        for rows in (rng.integers(num, size=(some, num)) for some in _chunks(num))
    ]
    low, high = np.quantile(np.concatenate(resampled), [_TAIL, 1 - _TAIL])
    return Estimate(value, float(low), float(high), num)


def difference(
    left: npt.ArrayLike,
    right: npt.ArrayLike,
    counts: npt.ArrayLike | None = None,
    *,
    seed: int = 0,
) -> Difference:
    """The difference of two models on the same N rows, right minus left.

    Args:
      left, right: [N], a value for each row, or with `counts` a sum.
      counts: [N], what both models' sums are over (`ratio`); None for plain means.
      seed: of the resampling.
    """
    left_N, right_N = np.asarray(left, np.float64), np.asarray(right, np.float64)
    assert left_N.shape == right_N.shape
    with np.errstate(invalid="ignore"):
        gains_N = right_N - left_N
    estimate = ratio(gains_N, np.ones_like(gains_N) if counts is None else counts, seed=seed)
    return Difference(*estimate, p_value=sign_flip_p_value(gains_N, seed=seed))


def sign_flip_p_value(gains: npt.ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p value of the paired permutation test that Fisher proposed (1935, section 21).

    If the two models were alike, each row's gain would have had either sign with equal chance: the
    share of sign patterns whose sum is at least as far from 0 as the one seen. It asks nothing of
    the distribution, so one test serves shares, lengths and losses; for right and wrong answers it
    is the exact McNemar test. Exact where gains are few, or all of one size; else the share among
    NUM_RESAMPLES random patterns and the one seen (Phipson & Smyth 2010). 1.0 without any gain,
    NaN where one is not finite.
    """
    gains_N = np.asarray(gains, np.float64)
    gains_N = gains_N[gains_N != 0]
    if not np.isfinite(gains_N).all():  # NaN is above nothing: every pattern would count as near
        return math.nan
    num = len(gains_N)
    if num and num > _MAX_ENUMERATED and np.ptp(np.abs(gains_N)) == 0:
        fewer = min(int((gains_N > 0).sum()), int((gains_N < 0).sum()))
        # Python's integers: 2^num leaves float64 at 1,024 rows.
        return min(1.0, 2 * sum(math.comb(num, k) for k in range(fewer + 1)) / 2**num)
    # Sums that differ by the order of their terms are equal.
    seen = abs(gains_N.sum()) - _ROUNDING * np.abs(gains_N).sum()
    if num <= _MAX_ENUMERATED:
        bits = np.arange(1 << num)[:, None] >> np.arange(num) & 1
        return float(np.mean(np.abs((2 * bits - 1) @ gains_N) >= seen))
    rng = np.random.default_rng(seed)
    num_far = sum(
        int(np.sum(np.abs((2 * rng.integers(2, size=(some, num)) - 1) @ gains_N) >= seen))
        for some in _chunks(num)
    )
    return (1 + num_far) / (1 + NUM_RESAMPLES)


def _chunks(num_rows: int) -> Iterator[int]:
    """How many resamples of so many rows to draw at a time, NUM_RESAMPLES in all."""
    size = max(1, _CHUNK // num_rows)
    for begin in range(0, NUM_RESAMPLES, size):
        yield min(size, NUM_RESAMPLES - begin)
