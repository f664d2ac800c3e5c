"""Building blocks: Linear with a LoRA slot, RMSNorm, rotary position embedding.

Axes (legend for the model's files): B batch, T query position, S key position, N query heads,
K KV heads, G = N / K, H head dim, D model, F MLP, V vocabulary, R LoRA rank, L layers.
Parameters may carry a leading stack dimension: the layers that one `lax.scan` runs over.
"""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """scale · (x a) b in x's dtype: x [..., in], a [in, R] and b [R, out] float32 -> [..., out].

    The backward pass is written by hand because autodiff forms dB as (dyᵀ · xa)ᵀ, for which XLA
    writes a transposed copy of dy: on a CPU that copy cost as much as the rest of the backward
    pass. The gradients with respect to a and b are accumulated in float32.
    """
    return _low_rank_forward(x, a, b, scale)[0]


def _low_rank_forward(
    x: jax.Array, a: jax.Array, b: jax.Array, scale: float
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    xa = (scale * (x @ a.astype(x.dtype))).astype(x.dtype)
    return xa @ b.astype(x.dtype), (x, a, b, xa)


def _low_rank_backward(
    scale: float, saved: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, a, b, xa = saved
    dxa = (scale * (dy @ b.astype(dy.dtype).T)).astype(dy.dtype)
    x_NI, dy_NO, xa_NR, dxa_NR = (z.reshape(-1, z.shape[-1]) for z in (x, dy, xa, dxa))
    da = jnp.einsum("NI,NR->IR", x_NI, dxa_NR, preferred_element_type=jnp.float32)
    db = jnp.einsum("NR,NO->RO", xa_NR, dy_NO, preferred_element_type=jnp.float32)
    return dxa @ a.astype(dy.dtype).T, da, db


low_rank.defvjp(_low_rank_forward, _low_rank_backward)


class LoRA(nnx.Module):
    """Low-rank update scale · (x A) B (Hu et al. 2021, arXiv:2106.09685).

    a [..., in, R] starts as PEFT's kaiming-uniform(sqrt 5), which is U(-1/sqrt(in), 1/sqrt(in));
    b [..., R, out] starts at zero. Both are float32 and cast to x's dtype for the matmuls: in
    bfloat16, rounding would drop Adam's updates at 2e-5.
    """

    def __init__(
        self,
        kernel_shape: Sequence[int],
        *,
        rank: int,
        scale: float,
        dropout: float,
        rngs: nnx.Rngs,
    ):
        *stack, in_dim, out_dim = kernel_shape
        stack_axes = ("layers",) * len(stack)
        bound = 1.0 / math.sqrt(in_dim)
        self.a = nnx.LoRAParam(
            jax.random.uniform(rngs.lora(), (*stack, in_dim, rank), jnp.float32, -bound, bound),
            axes=(*stack_axes, "lora_in", "lora_rank"),
        )
        self.b = nnx.LoRAParam(
            jnp.zeros((*stack, rank, out_dim), jnp.float32),
            axes=(*stack_axes, "lora_rank", "lora_out"),
        )
        self.scale = scale
        self.dropout = dropout

    @jax.named_scope("lora")
    def __call__(self, x: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """x [..., in] -> [..., out]; inverted dropout on x when a key is given, as in PEFT."""
        if dropout_key is not None and self.dropout > 0:
            keep = jax.random.bernoulli(dropout_key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0).astype(x.dtype)
        return low_rank(x, self.a[...], self.b[...], self.scale)


class Linear(nnx.Module):
    """y = x W, kernel [..., in, out], no bias, with an optional LoRA update added."""

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        axes: tuple[str, str],
        stack: tuple[int, ...],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        shape = (*stack, in_dim, out_dim)
        kernel = jax.random.normal(rngs.params(), shape, dtype) / math.sqrt(in_dim)
        self.kernel = nnx.Param(kernel.astype(dtype), axes=("layers",) * len(stack) + axes)
        # nnx.data: with a plain None the slot is static and injection raises.
        self.lora: LoRA | None = nnx.data(None)

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """x [..., in] -> [..., out] in x's dtype."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.lora is None else y + self.lora(x, dropout_key)


class RMSNorm(nnx.Module):
    """x / rms(x) · (1 + scale) over the last axis, in float32, cast last (Gemma's form)."""

    def __init__(self, dim: int, *, eps: float, stack: tuple[int, ...], dtype: jnp.dtype):
        axes = ("layers",) * len(stack) + ("norm",)
        self.scale = nnx.Param(jnp.zeros((*stack, dim), dtype), axes=axes)
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., dim] -> same shape and dtype."""
        return rms_norm(x, self.scale[...], self.eps)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) · (1 + scale) over the last axis, in float32, returned in x's dtype."""
    x_f32 = x.astype(jnp.float32)
    inverse_rms = jax.lax.rsqrt(jnp.mean(x_f32**2, axis=-1, keepdims=True) + eps)
    return (x_f32 * inverse_rms * (1.0 + scale.astype(jnp.float32))).astype(x.dtype)


def rotary_table(positions_BT: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """float32 table [2, B, T, 1, H/2] of cos and sin of position / theta^(2i/H).

    float32 because bfloat16 rounds position 257 to 256. The periods are rounded to float32 before
    they are inverted, as in transformers: the other order differs in the last bit, which moves the
    logits of a repetitive 1,200-token prompt by 1e-2.
    """
    period = (theta ** (np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    angle = positions_BT[..., None, None].astype(jnp.float32) * (np.float32(1) / period)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)])


def apply_rotary(x_BTNH: jax.Array, table: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + H/2) of every head; computed in float32, returned in x's dtype."""
    cos, sin = table
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x_BTNH.dtype)
