"""The learning rate by update, and AdamW without it."""

from typing import Any

import jax
import optax

from jaxsft.config import TrainConfig


def make_schedule(
    kind: str, *, peak: float, end: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0 to `peak`, then `kind` down to `end`.

    `kind` is cosine, linear or constant (which ignores `end`).
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


def run_schedule(config: TrainConfig, steps: int) -> optax.Schedule:
    """Learning rate by update, of a run of so many steps."""
    return make_schedule(
        config.lr_scheduler_type,
        peak=config.learning_rate,
        end=config.min_learning_rate,
        warmup_steps=config.warmup_steps,
        num_steps=steps,
    )


def make_transform(
    *, beta1: float, beta2: float, eps: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """AdamW without the learning rate, which the step multiplies in: clip, Adam, decay.

    Decay (arXiv:1711.05101) applies to matrices only; `max_grad_norm` 0 turns clipping off.
    """

    def is_matrix(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
    )
