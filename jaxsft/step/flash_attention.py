"""Attention as Pallas TPU kernels on the projection's own output: RoPE, scores, softmax, values.

One grid step holds the keys and values of one row and one KV head in on-chip memory (VMEM), with
the query heads that share them. So KV heads are never repeated, nothing is transposed, and the
softmax is over whole rows of scores. The backward pass recomputes it from the inputs.

Axes: B batch, T position, K KV heads, G query heads per KV head, H head dim. The columns of `qkv`
[B, T, K·(G+2)·H] are ordered by KV head: its G query heads, its key, its value.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxsft.gemma.attention import MASKED_LOGIT
from jaxsft.gemma.layers import rms_norm
from jaxsft.step.row_kernels import VMEM_LIMIT_BYTES, Stacked

# Query rows per block: 512 keeps four float32 score blocks of 512 x 2048 within 16 MiB. Blocks
# that the causal mask hides are skipped: at 2048 tokens 10 of 16 remain.
BLOCK_Q = 512
# Up to this cap the row maximum is not needed: no sum of exp(score) · value overflows float32 for
# values up to 3e4, as exp(70) · 4096 keys · 3e4 < 3.4e38.
MAX_CAP_WITHOUT_SHIFT = 70.0
MAX_ROW_LENGTH = 4096  # the backward kernel's blocks and scratch would pass VMEM_LIMIT_BYTES beyond
HEAD_DIM = 256  # the kernels cut heads at multiples of it


class HeadLayout(NamedTuple):
    """How `qkv` is divided into heads, and how scores are computed. `window` is in tokens."""

    num_kv_heads: int
    group_size: int
    head_dim: int
    scale: float
    logit_cap: float | None
    window: int | None
    norm_eps: float | None = None  # RMSNorm on query and key heads (Gemma 3); None: no norm

    @property
    def group_dim(self) -> int:
        """Columns of `qkv` of one KV head: (G + 2) · H."""
        return (self.group_size + 2) * self.head_dim

    @property
    def query_dim(self) -> int:
        """Columns of the output of one KV head: G · H."""
        return self.group_size * self.head_dim


def supports_row_length(row_length: int) -> bool:
    """Whether the kernels take rows of this many tokens: 128, 256, 384 and multiples of 512."""
    block = min(BLOCK_Q, row_length)
    return row_length % block == 0 and block % 128 == 0 and row_length <= MAX_ROW_LENGTH


def attention_forward(
    qkv: jax.Array,
    rotary: jax.Array,
    norms: jax.Array,
    segment_ids_BT: jax.Array,
    layout: HeadLayout,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Heads' outputs [B, T, K·G·H] in qkv's dtype.

    `rotary` float32 [2, B, T, H/2]: cos and sin by position. `norms` [2, H]: the scales of q_norm
    and k_norm, not read without `norm_eps`. Tokens see their own segment, whose tokens must be
    neighbours in the row, as packing makes them.
    """
    batch, length, _ = qkv.shape
    stacked = Stacked(qkv[None], jnp.int32(0))
    return _call(_forward_kernel, layout, interpret, stacked, (), rotary, norms, segment_ids_BT)(
        out_shape=jax.ShapeDtypeStruct(
            (batch, length, layout.num_kv_heads * layout.query_dim), qkv.dtype
        ),
        out_specs=_columns(length, layout.query_dim),
        scratch_shapes=[pltpu.VMEM((length, layout.head_dim), qkv.dtype)],
        name="attention_forward",
    )


def attention_backward(
    qkv: Stacked,
    d_out: jax.Array,
    rotary: jax.Array,
    norms: jax.Array,
    segment_ids_BT: jax.Array,
    layout: HeadLayout,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Gradient with respect to `qkv`, from the gradient of the output [B, T, K·G·H].

    `qkv` is one layer of the stack [L, B, T, K·(G+2)·H] that the forward pass saved it in.
    """
    shape, dtype = qkv.stack.shape[1:], qkv.stack.dtype
    length, head_dim = shape[1], layout.head_dim
    return _call(_backward_kernel, layout, interpret, qkv, (d_out,), rotary, norms, segment_ids_BT)(
        out_shape=jax.ShapeDtypeStruct(shape, dtype),
        out_specs=_columns(length, layout.group_dim),
        scratch_shapes=[
            pltpu.VMEM((length, head_dim), dtype),
            pltpu.VMEM((length, head_dim), jnp.float32),
            pltpu.VMEM((length, head_dim), jnp.float32),
        ],
        name="attention_backward",
    )


def _columns(length: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, length, width), lambda b, k, _: (b, 0, k))


def _call(
    kernel: Callable[..., None],
    layout: HeadLayout,
    interpret: bool,
    qkv: Stacked,
    others: tuple[jax.Array, ...],
    rotary: jax.Array,
    norms: jax.Array,
    segment_ids_BT: jax.Array,
) -> Callable[..., jax.Array]:
    """The pallas_call over (row, KV head) with the inputs that both kernels share."""
    batch, length = segment_ids_BT.shape
    half = layout.head_dim // 2
    in_specs = [
        pl.BlockSpec(
            (None, None, length, layout.group_dim), lambda b, k, layer: (layer[0], b, 0, k)
        ),
        *(_columns(length, layout.query_dim) for _ in others),
        pl.BlockSpec((2, None, length, half), lambda b, k, _: (0, b, 0, 0)),
        pl.BlockSpec((2, layout.head_dim), lambda b, k, _: (0, 0)),
        # Segment ids as a column for the queries and as a row for the keys.
        pl.BlockSpec((None, length, 1), lambda b, k, _: (b, 0, 0)),
        pl.BlockSpec((None, 1, length), lambda b, k, _: (b, 0, 0)),
    ]

    def run(_: Any, *refs: Any) -> None:  # the layer's number only decides the blocks' addresses
        kernel(*refs, layout=layout)

    def call(out_specs: Any, scratch_shapes: Any, **kwargs: Any) -> jax.Array:
        return pl.pallas_call(
            run,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, layout.num_kv_heads),
                in_specs=in_specs,
                out_specs=out_specs,
                scratch_shapes=scratch_shapes,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=VMEM_LIMIT_BYTES
            ),
            interpret=interpret,
            **kwargs,
        )(
            qkv.layer[None].astype(jnp.int32),
            qkv.stack,
            *others,
            rotary,
            norms,
            segment_ids_BT[:, :, None],
            segment_ids_BT[:, None, :],
        )

    return call


def _prepare(x: jax.Array, rotary: jax.Array, scale: jax.Array, layout: HeadLayout) -> jax.Array:
    """A head [rows, H] with its norm (where the model has one) and rotary position applied."""
    if layout.norm_eps is not None:
        x = rms_norm(x, scale, layout.norm_eps)
    half = layout.head_dim // 2
    cos, sin = rotary[0], rotary[1]
    first, second = x[:, :half].astype(jnp.float32), x[:, half:].astype(jnp.float32)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _blocks(length: int, window: int | None) -> list[tuple[slice, slice]]:
    """(query rows, the key rows that they can see) for every block of queries."""
    size = min(BLOCK_Q, length)
    starts = range(0, length, size)
    lowest = [0 if window is None else max(0, i - window + 1) // size * size for i in starts]
    return [
        (slice(i, i + size), slice(low, i + size)) for i, low in zip(starts, lowest, strict=True)
    ]


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """float32 product over one axis of each operand."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    # bfloat16 operands are exact at any precision; float32 operands need the highest.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _weights(
    q: jax.Array,
    k: jax.Array,
    rows: slice,
    keys: slice,
    query_segments: jax.Array,
    key_segments: jax.Array,
    layout: HeadLayout,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(exp of the scores, their row sums, tanh of the soft cap) of one block, float32."""
    scores, tanh = _dot(q, k, (1, 1)) * layout.scale, None
    cap = layout.logit_cap
    if cap is not None:
        tanh = jnp.tanh(scores / cap)
        scores = tanh * cap
    row = rows.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    key = keys.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    mask = (query_segments == key_segments) & (key <= row)
    if layout.window is not None and layout.window < rows.stop:
        mask &= row - key < layout.window
    scores = jnp.where(mask, scores, MASKED_LOGIT)
    if cap is None or cap > MAX_CAP_WITHOUT_SHIFT:
        scores -= jnp.max(scores, axis=-1, keepdims=True)
    exp = jnp.exp(scores)
    return exp, jnp.sum(exp, axis=-1, keepdims=True), tanh


def _forward_kernel(qkv, rotary, norms, query_segments, key_segments, out, k_scratch, *, layout):
    dim = layout.head_dim
    key_at = pl.ds(layout.query_dim, dim)
    value_at = pl.ds(layout.query_dim + dim, dim)
    k_scratch[...] = _prepare(qkv[:, key_at], rotary[...], norms[1], layout)

    def head(g, carry):
        at = pl.ds(pl.multiple_of(g * dim, dim), dim)
        for rows, keys in _blocks(qkv.shape[0], layout.window):
            q = _prepare(qkv[rows, at], rotary[:, rows], norms[0], layout)
            segments = query_segments[rows], key_segments[:, keys]
            exp, total, _ = _weights(q, k_scratch[keys], rows, keys, *segments, layout)
            values = _dot(exp.astype(q.dtype), qkv[keys, value_at], (1, 0))
            out[rows, at] = (values / total).astype(out.dtype)
        return carry

    jax.lax.fori_loop(0, layout.group_size, head, 0)


def _backward_kernel(
    qkv,
    d_out,
    rotary,
    norms,
    query_segments,
    key_segments,
    d_qkv,
    k_scratch,
    dk_scratch,
    dv_scratch,
    *,
    layout,
):
    dim = layout.head_dim
    key_at = pl.ds(layout.query_dim, dim)
    value_at = pl.ds(layout.query_dim + dim, dim)
    k_scratch[...] = _prepare(qkv[:, key_at], rotary[...], norms[1], layout)
    dk_scratch[...] = jnp.zeros_like(dk_scratch)
    dv_scratch[...] = jnp.zeros_like(dv_scratch)

    def prepare_gradient(x, d_prepared, rotary, scale):
        _, vjp = jax.vjp(lambda x: _prepare(x, rotary, scale, layout), x.astype(jnp.float32))
        return vjp(d_prepared)[0].astype(d_qkv.dtype)

    def head(g, carry):
        at = pl.ds(pl.multiple_of(g * dim, dim), dim)
        for rows, keys in _blocks(qkv.shape[0], layout.window):
            q = _prepare(qkv[rows, at], rotary[:, rows], norms[0], layout)
            k, dy = k_scratch[keys], d_out[rows, at]
            segments = query_segments[rows], key_segments[:, keys]
            exp, total, tanh = _weights(q, k, rows, keys, *segments, layout)
            p = exp / total
            p_dp = p * _dot(dy, qkv[keys, value_at], (1, 1))
            # The row sum of p · dp equals dy · out, so the output is not needed.
            d_scores = p_dp - p * jnp.sum(p_dp, axis=-1, keepdims=True)
            if tanh is not None:
                d_scores *= 1.0 - tanh * tanh
            d_scores = (d_scores * layout.scale).astype(q.dtype)
            dv_scratch[keys] += _dot(p.astype(q.dtype), dy, (0, 0))
            dk_scratch[keys] += _dot(d_scores, q, (0, 0))
            dq = _dot(d_scores, k, (1, 0))
            d_qkv[rows, at] = prepare_gradient(qkv[rows, at], dq, rotary[:, rows], norms[0])
        return carry

    jax.lax.fori_loop(0, layout.group_size, head, 0)
    d_qkv[:, key_at] = prepare_gradient(qkv[:, key_at], dk_scratch[...], rotary[...], norms[1])
    d_qkv[:, value_at] = dv_scratch[...].astype(d_qkv.dtype)
