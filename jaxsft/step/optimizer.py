"""The learning-rate schedule, AdamW (train_step.py applies the rate), and the detection of spikes.

A step is a spike when its loss or its gradient norm is more than `sigmas` standard deviations above
the mean of the last 128 finite steps (the rule of OLMo-core's SkipStepOptimizer). The history that
a step is compared with is part of the train state, so a resumed run decides like an uninterrupted
one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

SPIKE_WINDOW = 128
MIN_SPIKE_STEPS = 64  # with fewer steps in the history, no step is a spike


def make_schedule(
    kind: str, *, peak: float, end: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0 to `peak`, then a decay of this `kind`.

    `kind` is cosine or linear, which reach `end` at `num_steps`, or constant, which ignores `end`.
    The decay counts its updates from the end of the warm-up.
    """
    decay_steps = max(num_steps - warmup_steps, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=end / peak if peak else 0),
        "linear": optax.linear_schedule(peak, end, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_transform(
    *, beta1: float, beta2: float, eps: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """Clipping, Adam and weight decay; the step multiplies the result by the learning rate.

    Weight decay (arXiv:1711.05101) applies to matrices only; `max_grad_norm` 0 turns clipping off.
    """

    def is_matrix(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
    )


class SpikeHistory(NamedTuple):
    """Loss and gradient norm of the last finite steps.

    Spikes are recorded too, so that a lasting change is accepted after some steps.
    """

    values: jax.Array  # float32 [2, SPIKE_WINDOW], a ring: step n is at column n % SPIKE_WINDOW
    num_seen: jax.Array  # int32 scalar, all steps ever recorded


def empty_history() -> SpikeHistory:
    """The history before the first step."""
    return SpikeHistory(jnp.zeros((2, SPIKE_WINDOW), jnp.float32), jnp.zeros((), jnp.int32))


def is_spike(
    history: SpikeHistory, loss: jax.Array, grad_norm: jax.Array, sigmas: float
) -> jax.Array:
    """Whether one of the two scalars is above its mean + `sigmas` standard deviations (n - 1)."""
    num = jnp.minimum(history.num_seen, SPIKE_WINDOW)
    known = jnp.arange(SPIKE_WINDOW) < num
    denominator = jnp.maximum(num, 2).astype(jnp.float32)
    mean = jnp.sum(jnp.where(known, history.values, 0.0), axis=1) / denominator
    centered = jnp.where(known, history.values - mean[:, None], 0.0)
    deviation = jnp.sqrt(jnp.sum(centered**2, axis=1) / (denominator - 1))
    limit = mean + sigmas * deviation
    return (num >= MIN_SPIKE_STEPS) & jnp.any(jnp.stack([loss, grad_norm]) > limit)


def record(
    history: SpikeHistory, loss: jax.Array, grad_norm: jax.Array, finite: jax.Array
) -> SpikeHistory:
    """The history with this step added; unchanged where the step is not `finite`."""
    column = history.num_seen % SPIKE_WINDOW
    values = history.values.at[:, column].set(jnp.stack([loss, grad_norm]))
    return SpikeHistory(
        jnp.where(finite, values, history.values), history.num_seen + finite.astype(jnp.int32)
    )
