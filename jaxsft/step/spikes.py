"""Loss spikes: steps far above the steps before them, told from the state alone.

A step is a spike when its loss or its gradient norm is more than so many standard deviations above
the mean of the last 128 finite steps: the rule of OLMo-core's SkipStepOptimizer. What it compares
with is part of the train state, so that a resumed run judges as an uninterrupted one does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128
MIN_STEPS = 64  # before so many are known, nothing is a spike


class History(NamedTuple):
    """Loss and gradient norm of the last finite steps, spikes among them: a lasting change is thus
    accepted after some steps."""

    values: jax.Array  # float32 [2, WINDOW], a ring: step n's at place n % WINDOW
    num_seen: jax.Array  # int32 scalar, steps ever remembered


def empty_history() -> History:
    """Before the first step."""
    return History(jnp.zeros((2, WINDOW), jnp.float32), jnp.zeros((), jnp.int32))


def is_spike(history: History, loss: jax.Array, grad_norm: jax.Array, sigmas: float) -> jax.Array:
    """Is either of the scalars over its mean + `sigmas` standard deviations (n - 1)?"""
    num = jnp.minimum(history.num_seen, WINDOW)
    known = jnp.arange(WINDOW) < num
    denominator = jnp.maximum(num, 2).astype(jnp.float32)
    mean = jnp.sum(jnp.where(known, history.values, 0.0), axis=1) / denominator
    apart = jnp.where(known, history.values - mean[:, None], 0.0)
    deviation = jnp.sqrt(jnp.sum(apart**2, axis=1) / (denominator - 1))
    limit = mean + sigmas * deviation
    return (num >= MIN_STEPS) & jnp.any(jnp.stack([loss, grad_norm]) > limit)


def remember(history: History, loss: jax.Array, grad_norm: jax.Array, finite: jax.Array) -> History:
    """The history with this step in it, if it is `finite`."""
    place = history.num_seen % WINDOW
    values = history.values.at[:, place].set(jnp.stack([loss, grad_norm]))
    return History(
        jnp.where(finite, values, history.values), history.num_seen + finite.astype(jnp.int32)
    )
