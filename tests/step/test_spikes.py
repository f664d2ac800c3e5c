"""Spikes against a plain NumPy form of the same rule, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.step.spikes import MIN_STEPS, WINDOW, empty_history, is_spike, remember


def expected_spikes(values: np.ndarray, sigmas: float) -> list[bool]:
    """For each step of [steps, 2]: is one of the two over mean + sigmas * std of the last 128?"""
    found = []
    for step, now in enumerate(values):
        last = values[max(step - WINDOW, 0) : step].astype(np.float64)
        limit = last.mean(0) + sigmas * last.std(0, ddof=1) if step >= MIN_STEPS else np.inf
        found.append(bool((now > limit).any()))
    return found


def run(values: np.ndarray, sigmas: float, finite: np.ndarray) -> list[bool]:
    @jax.jit
    def step(history, now, finite):
        spike = is_spike(history, now[0], now[1], sigmas)
        return remember(history, now[0], now[1], finite), spike

    history, found = empty_history(), []
    for now, is_finite in zip(values, finite, strict=True):
        history, spike = step(history, jnp.asarray(now), jnp.asarray(is_finite))
        found.append(bool(spike))
    return found


def test_spikes_are_those_of_the_plain_rule() -> None:
    rng = np.random.default_rng(0)
    steps = 2 * WINDOW + 40  # the ring goes round twice
    values = rng.normal([2.0, 1.0], [0.1, 0.3], (steps, 2)).astype(np.float32)
    values[[20, 100, 250], 0] += 3.0  # loss
    values[[30, 180], 1] += 9.0  # gradient norm
    expected = expected_spikes(values, 6.0)
    assert run(values, 6.0, np.ones(steps, bool)) == expected
    # The two before step 64 are not judged, the others are.
    assert [step for step, is_spike in enumerate(expected) if is_spike] == [100, 180, 250]


def test_steps_that_are_not_finite_are_not_remembered() -> None:
    rng = np.random.default_rng(1)
    good = rng.normal(2.0, 0.1, (MIN_STEPS + 10, 2)).astype(np.float32)
    good[-1] = 5.0
    at = [3, 40, MIN_STEPS]
    values = np.insert(good, at, np.nan, axis=0)
    finite = np.isfinite(values).all(1)
    found = np.array(run(values, 6.0, finite))
    assert found[finite].tolist() == expected_spikes(good, 6.0)
    assert found[-1] and not found[~finite].any()


def test_a_lasting_change_is_accepted() -> None:
    values = np.full((3 * WINDOW, 2), 2.0, np.float32)
    values += np.random.default_rng(2).normal(0, 0.05, values.shape).astype(np.float32)
    values[WINDOW:] += 1.0
    found = run(values, 6.0, np.ones(len(values), bool))
    assert found[WINDOW]
    assert sum(found) < 10  # it is normal once a few such steps are among the last 128
