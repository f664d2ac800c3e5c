"""Schedules, AdamW and spikes against values computed by hand or by NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsft.step.optimizer import (
    MIN_SPIKE_STEPS,
    SPIKE_WINDOW,
    empty_history,
    is_spike,
    make_schedule,
    make_transform,
    record,
)


def test_schedule_of_the_recipe() -> None:
    schedule = make_schedule("cosine", peak=2e-5, end=1e-6, warmup_steps=200, num_steps=22_500)
    by_hand = {
        0: 0.0,
        1: 1e-7,
        100: 1e-5,
        200: 2e-5,
        200 + 22_300 // 2: (2e-5 + 1e-6) / 2,  # half way: cos is 0
        22_500: 1e-6,
        30_000: 1e-6,
    }
    for step, expected in by_hand.items():
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-4, abs=1e-12), step
    rates = [float(schedule(step)) for step in range(200, 22_500, 1000)]
    assert rates == sorted(rates, reverse=True)


def test_other_schedules() -> None:
    linear = make_schedule("linear", peak=1e-3, end=1e-4, warmup_steps=10, num_steps=110)
    for step, expected in {0: 0.0, 5: 5e-4, 10: 1e-3, 60: 5.5e-4, 110: 1e-4, 200: 1e-4}.items():
        assert float(linear(step)) == pytest.approx(expected, rel=1e-4, abs=1e-12), step
    flat = make_schedule("constant", peak=1e-3, end=0.0, warmup_steps=2, num_steps=10)
    assert [float(flat(step)) for step in (0, 1, 2, 9, 99)] == pytest.approx(
        [0.0, 5e-4, 1e-3, 1e-3, 1e-3]
    )
    for kind in ("cosine", "linear", "constant"):
        assert float(
            make_schedule(kind, peak=1e-3, end=0.0, warmup_steps=0, num_steps=5)(0)
        ) == pytest.approx(1e-3)
        assert float(make_schedule(kind, peak=0.0, end=0.0, warmup_steps=0, num_steps=5)(3)) == 0.0


def test_decay_is_for_matrices_only() -> None:
    params = {"matrix": jnp.full((2, 2), 3.0), "vector": jnp.full((2,), 3.0)}
    transform = make_transform(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, max_grad_norm=1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transform.update(zeros, transform.init(params), params)
    np.testing.assert_allclose(updates["matrix"], 0.3, rtol=1e-6)
    np.testing.assert_array_equal(updates["vector"], 0.0)


@pytest.mark.parametrize(("max_grad_norm", "expected"), [(0.0, 40.0), (5.0, 4.0)])
def test_clipping(max_grad_norm: float, expected: float) -> None:
    """The gradient (30, 40) has norm 50; Adam's first moment after one step is a tenth of it."""
    transform = make_transform(
        beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=max_grad_norm
    )
    params = {"w": jnp.zeros((1, 2))}
    _, moments = transform.update(
        {"w": jnp.asarray([[30.0, 40.0]])}, transform.init(params), params
    )
    adam = next(m for m in moments if isinstance(m, optax.ScaleByAdamState))
    np.testing.assert_allclose(adam.mu["w"], [[0.075 * expected, 0.1 * expected]], rtol=1e-6)


# ---- spikes ----


def expected_spikes(values: np.ndarray, sigmas: float) -> list[bool]:
    """For each step of [steps, 2]: is one of the two over mean + sigmas * std of the last 128?"""
    found = []
    for step, now in enumerate(values):
        last = values[max(step - SPIKE_WINDOW, 0) : step].astype(np.float64)
        limit = last.mean(0) + sigmas * last.std(0, ddof=1) if step >= MIN_SPIKE_STEPS else np.inf
        found.append(bool((now > limit).any()))
    return found


def run(values: np.ndarray, sigmas: float, finite: np.ndarray) -> list[bool]:
    @jax.jit
    def step(history, now, finite):
        spike = is_spike(history, now[0], now[1], sigmas)
        return record(history, now[0], now[1], finite), spike

    history, found = empty_history(), []
    for now, is_finite in zip(values, finite, strict=True):
        history, spike = step(history, jnp.asarray(now), jnp.asarray(is_finite))
        found.append(bool(spike))
    return found


def test_spikes_are_those_of_the_plain_rule() -> None:
    rng = np.random.default_rng(0)
    steps = 2 * SPIKE_WINDOW + 40  # the ring goes round twice
    values = rng.normal([2.0, 1.0], [0.1, 0.3], (steps, 2)).astype(np.float32)
    values[[20, 100, 250], 0] += 3.0  # loss
    values[[30, 180], 1] += 9.0  # gradient norm
    expected = expected_spikes(values, 6.0)
    assert run(values, 6.0, np.ones(steps, bool)) == expected
    # The two before step 64 are not judged, the others are.
    assert [step for step, is_spike in enumerate(expected) if is_spike] == [100, 180, 250]


def test_steps_that_are_not_finite_are_not_remembered() -> None:
    rng = np.random.default_rng(1)
    good = rng.normal(2.0, 0.1, (MIN_SPIKE_STEPS + 10, 2)).astype(np.float32)
    good[-1] = 5.0
    at = [3, 40, MIN_SPIKE_STEPS]
    values = np.insert(good, at, np.nan, axis=0)
    finite = np.isfinite(values).all(1)
    found = np.array(run(values, 6.0, finite))
    assert found[finite].tolist() == expected_spikes(good, 6.0)
    assert found[-1] and not found[~finite].any()


def test_a_lasting_change_is_accepted() -> None:
    values = np.full((3 * SPIKE_WINDOW, 2), 2.0, np.float32)
    values += np.random.default_rng(2).normal(0, 0.05, values.shape).astype(np.float32)
    values[SPIKE_WINDOW:] += 1.0
    found = run(values, 6.0, np.ones(len(values), bool))
    assert found[SPIKE_WINDOW]
    assert sum(found) < 10  # it is normal once a few such steps are among the last 128
