"""The row kernels, interpreted, equal the functions that they run, and those equal autodiff."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.gemma.layers import rms_norm
from jaxsft.step import row_kernels
from jaxsft.step.row_kernels import Stacked, rowwise

EPS = 1e-6
N, D = 32, 128


def arrays(count: int, *shape: int) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(count), count)
    return [jax.random.normal(key, shape) for key in keys]


# (function, its rows, outputs and scales): with and without a norm on the sublayer's output.
FUNCTIONS = [
    (row_kernels.enter, 1, 1, 1),
    (row_kernels.enter_backward, 3, 2, 1),
    (row_kernels.leave, 2, 1, 0),
    (row_kernels.leave, 2, 1, 1),
    (row_kernels.leave_and_enter, 2, 2, 1),
    (row_kernels.leave_and_enter, 2, 2, 2),
    (row_kernels.leave_backward, 2, 1, 0),
    (row_kernels.leave_backward, 2, 1, 1),
    (row_kernels.leave_and_enter_backward, 4, 3, 1),
    (row_kernels.leave_and_enter_backward, 4, 3, 2),
]


@pytest.mark.parametrize(("function", "num_rows", "num_outputs", "num_scales"), FUNCTIONS)
def test_kernel_equals_the_function(
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[..., tuple[jax.Array, ...]],
    num_rows: int,
    num_outputs: int,
    num_scales: int,
) -> None:
    monkeypatch.setattr(row_kernels, "BLOCK_ROWS", 8)  # four blocks
    inputs = arrays(num_rows, N, D)
    scales = arrays(num_scales, D) if num_scales else []
    bound = partial(function, eps=EPS)
    expected = bound(*inputs, *scales)
    # Every other input from a stack of three layers, the rest of which is NaN.
    stacked = [
        Stacked(jnp.full((3, N, D), jnp.nan).at[i % 3].set(x), jnp.int32(i % 3)) if i % 2 else x
        for i, x in enumerate(inputs)
    ]
    for use_kernel in (False, True):
        outputs = rowwise(
            bound,
            stacked,
            scales,
            name="rows",
            num_outputs=num_outputs,
            use_kernel=use_kernel,
            interpret=True,
        )
        for ours, theirs in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("function", "num_rows", "num_outputs", "num_scales"), FUNCTIONS)
def test_bfloat16_kernel_is_float32_rounded(
    function: Callable[..., tuple[jax.Array, ...]],
    num_rows: int,
    num_outputs: int,
    num_scales: int,
) -> None:
    """Within 0.5%: 2^-9 of the results' rounding and as much of what is rounded on the way."""
    inputs = [x.astype(jnp.bfloat16) for x in arrays(num_rows, N, D)]
    scales = [x.astype(jnp.bfloat16) for x in arrays(num_scales, D)] if num_scales else []
    bound = partial(function, eps=EPS)
    options = {"name": "rows", "num_outputs": num_outputs, "use_kernel": True, "interpret": True}
    outputs = rowwise(bound, inputs, scales, **options)
    exact = bound(*(x.astype(jnp.float32) for x in (*inputs, *scales)))
    for ours, theirs in zip(outputs, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        difference = jnp.linalg.norm(ours.astype(jnp.float32) - theirs)
        assert float(difference) <= 0.005 * float(jnp.linalg.norm(theirs))


@pytest.mark.parametrize(("num_rows", "num_blocks"), [(128, 1), (384, 3), (768, 3), (2048, 8)])
def test_blocks_divide_any_rows(num_rows: int, num_blocks: int) -> None:
    """128 at least, for whatever number of rows the attention kernels take."""
    (x,), (scale,) = arrays(1, num_rows, 8), arrays(1, 8)

    def run(x: jax.Array) -> tuple[jax.Array, ...]:
        options = {"name": "rows", "num_outputs": 1, "use_kernel": True, "interpret": True}
        return rowwise(partial(row_kernels.enter, eps=EPS), [x], [scale], **options)

    (call,) = (e for e in jax.make_jaxpr(run)(x).eqns if e.primitive.name == "pallas_call")
    assert call.params["grid_mapping"].grid == (num_blocks,)
    np.testing.assert_allclose(run(x)[0], rms_norm(x, scale, EPS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("has_post", [False, True])
def test_backward_is_the_gradient(has_post: bool) -> None:
    x, y, d_out, d_h = arrays(4, N, D)
    pre, post = arrays(2, D)
    scales = [post] if has_post else []

    def forward(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = x + (rms_norm(y, post, EPS) if has_post else y)
        return x, rms_norm(x, pre, EPS)

    (expected_x, expected_h), vjp = jax.vjp(forward, x, y)
    expected_dx, expected_dy = vjp((d_out, d_h))
    out, h = row_kernels.leave_and_enter(x, y, pre, *scales, eps=EPS)
    dx, dy, again = row_kernels.leave_and_enter_backward(d_out, d_h, x, y, pre, *scales, eps=EPS)
    pairs = [(out, expected_x), (h, expected_h), (again, h), (dx, expected_dx), (dy, expected_dy)]
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
