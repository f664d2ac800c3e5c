"""Functions of rows as Pallas TPU kernels: one pass over memory where XLA makes several.

XLA reads and writes the whole activation for a norm's reduction, for the norm itself and for each
residual addition around it. One kernel over blocks of rows reads every input once, directly from
the stack that a scan saved it in.

Axes: N rows (tokens), D columns, L layers of a stack.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# 256 x 2304 float32 is 2.3 MiB: a dozen intermediates fit on the chip. Where 256 does not divide
# the number of rows, a block has their greatest common divisor (128 for 384 rows); Mosaic needs a
# multiple of 16.
BLOCK_ROWS = 256
VMEM_LIMIT_BYTES = 100 * 2**20  # of 128 MiB on TPU v5e and v6e

RowFunction = Callable[..., tuple[jax.Array, ...]]


class Stacked(NamedTuple):
    """Layer `layer` (int32 scalar) of `stack` [L, N, D], not yet read."""

    stack: jax.Array
    layer: jax.Array

    def read(self) -> jax.Array:
        """The layer [N, D]."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)


def read(x: "jax.Array | Stacked") -> jax.Array:
    """The array, or the layer read from its stack."""
    return x.read() if isinstance(x, Stacked) else x


def rowwise(
    function: RowFunction,
    rows: Sequence[jax.Array | Stacked],
    vectors: Sequence[jax.Array],
    *,
    name: str,
    num_outputs: int,
    use_kernel: bool,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """`function(*rows, *vectors)` with rows [N, D] and vectors [D] -> `num_outputs` of [N, D].

    `function` must compute each row independently of the others. `name` is the kernel's name;
    without `use_kernel` the function is called directly.
    """
    if not use_kernel:
        return function(*map(read, rows), *vectors)
    stacks = [x for x in rows if isinstance(x, Stacked)]
    shapes = [(x.stack if isinstance(x, Stacked) else x).shape[-2:] for x in rows]
    (num_rows, num_columns), dtype = shapes[0], _dtype(rows[0])
    block = math.gcd(BLOCK_ROWS, num_rows)
    assert all(shape == shapes[0] for shape in shapes)

    # Prefetched: the addresses of the blocks depend on the layer numbers.
    prefetched = jnp.stack([x.layer for x in stacks]) if stacks else jnp.zeros(1, jnp.int32)

    def kernel(_: Any, *refs: Any) -> None:
        inputs, outputs = refs[: len(rows) + len(vectors)], refs[len(rows) + len(vectors) :]
        results = function(
            *(ref[...] for ref in inputs[: len(rows)]), *(ref[0] for ref in inputs[len(rows) :])
        )
        for ref, result in zip(outputs, results, strict=True):
            ref[...] = result

    plain = pl.BlockSpec((block, num_columns), lambda i, _: (i, 0))
    specs, position = [], 0
    for x in rows:
        if isinstance(x, Stacked):
            specs.append(
                pl.BlockSpec(
                    (None, block, num_columns),
                    lambda i, layers, position=position: (layers[position], i, 0),
                )
            )
            position += 1
        else:
            specs.append(plain)
    vector = pl.BlockSpec((1, num_columns), lambda i, _: (0, 0))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(num_rows // block,),
            in_specs=[*specs, *[vector] * len(vectors)],
            out_specs=[plain] * num_outputs,
        ),
        out_shape=[jax.ShapeDtypeStruct((num_rows, num_columns), dtype)] * num_outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT_BYTES
        ),
        interpret=interpret,
        name=name,
    )(
        prefetched.astype(jnp.int32),
        *(x.stack if isinstance(x, Stacked) else x for x in rows),
        *(x[None] for x in vectors),
    )


# ---- the functions: RMSNorm and the residual stream of a layer ----
# x, y, h and their gradients are [N, D]: x is the residual stream, y what a sublayer adds to it
# (after a norm of its own where the model has one), h the next sublayer's input. All in float32.


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def _norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * _inverse_rms(x, eps) * (1.0 + scale.astype(jnp.float32))


def _norm_backward(dy: jax.Array, x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Gradient of x, float32: (g - x̂ mean(g x̂)) / rms with g = dy (1 + scale)."""
    x = x.astype(jnp.float32)
    inverse_rms = _inverse_rms(x, eps)
    g, x_hat = dy.astype(jnp.float32) * (1.0 + scale.astype(jnp.float32)), x * inverse_rms
    return inverse_rms * (g - x_hat * jnp.mean(g * x_hat, axis=-1, keepdims=True))


def _add(x: jax.Array, y: jax.Array, post: Sequence[jax.Array], eps: float) -> jax.Array:
    """x + y, or x + norm(y), rounded like the model does."""
    if post:
        y = _norm(y, post[0], eps).astype(x.dtype)
    return (x.astype(jnp.float32) + y.astype(jnp.float32)).astype(x.dtype)


def enter(x: jax.Array, pre: jax.Array, *, eps: float) -> tuple[jax.Array]:
    """(h,)"""
    return (_norm(x, pre, eps).astype(x.dtype),)


def leave(x: jax.Array, y: jax.Array, *post: jax.Array, eps: float) -> tuple[jax.Array]:
    """(x after y,)"""
    return (_add(x, y, post, eps),)


def leave_and_enter(
    x: jax.Array, y: jax.Array, pre: jax.Array, *post: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """(x after y, h)"""
    x = _add(x, y, post, eps)
    return x, *enter(x, pre, eps=eps)


def leave_backward(dx: jax.Array, y: jax.Array, *post: jax.Array, eps: float) -> tuple[jax.Array]:
    """(dy,)"""
    return (_norm_backward(dx, y, post[0], eps).astype(dx.dtype) if post else dx,)


def enter_backward(
    dx: jax.Array, dh: jax.Array, x: jax.Array, pre: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """(dx before, h)"""
    total = dx.astype(jnp.float32) + _norm_backward(dh, x, pre, eps)
    return total.astype(dx.dtype), *enter(x, pre, eps=eps)


def leave_and_enter_backward(
    dx: jax.Array,
    dh: jax.Array,
    x: jax.Array,
    y: jax.Array,
    pre: jax.Array,
    *post: jax.Array,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dx before, dy, h)"""
    dx, h = enter_backward(dx, dh, _add(x, y, post, eps), pre, eps=eps)
    return dx, *leave_backward(dx, y, *post, eps=eps), h


def _dtype(x: jax.Array | Stacked) -> Any:
    return (x.stack if isinstance(x, Stacked) else x).dtype
