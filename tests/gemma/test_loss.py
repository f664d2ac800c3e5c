"""Chunked cross-entropy equals the plain one, which equals its definition in float64."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.plain_loss import plain_cross_entropy

from jaxsft.gemma.loss import chunked_cross_entropy
from jaxsft.gemma.sharding import make_mesh

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, D, V = 3, 9, 16, 101
CAP = 4.0  # the largest logits of `problem` are far beyond it

MASKS = {
    "some": np.random.default_rng(1).random((B, T)) < 0.4,
    "none": np.zeros((B, T), bool),
    "all": np.ones((B, T), bool),
    "one": np.arange(B * T).reshape(B, T) == 13,
    "last": np.arange(B * T).reshape(B, T) == B * T - 1,
    "one row": np.arange(B)[:, None] + np.zeros((B, T)) == 1,
}


def problem(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(hidden, table, targets); logits have a standard deviation of 4."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    table = jnp.asarray(rng.normal(size=(V, D)), dtype)
    return hidden, table, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def oracle(
    hidden: Any, table: Any, targets: Any, mask: np.ndarray, cap: float | None
) -> tuple[float, np.ndarray]:
    """The loss sum and its gradient by the hidden states, in float64."""
    hidden, table = np.asarray(hidden, np.float64), np.asarray(table, np.float64)
    raw = hidden @ table.T
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    is_target = np.asarray(targets)[..., None] == np.arange(len(table))
    loss = -np.sum(log_probs[is_target] * mask.reshape(-1))
    d_logits = (np.exp(log_probs) - is_target) * mask[..., None]
    d_raw = d_logits if cap is None else d_logits * (1 - np.tanh(raw / cap) ** 2)
    return float(loss), d_raw @ table


@partial(jax.jit, static_argnames=("cap", "chunk"))
def chunked(hidden, table, targets, mask, cap, chunk):
    def loss(hidden):
        return chunked_cross_entropy(
            hidden, table, targets, mask, logit_cap=cap, chunk_tokens=chunk
        )

    return jax.value_and_grad(loss, has_aux=True)(hidden)


@partial(jax.jit, static_argnames="cap")
def plain(hidden, table, targets, mask, cap):
    def loss(hidden):
        return plain_cross_entropy(hidden, table, targets, mask, logit_cap=cap)

    return jax.value_and_grad(loss, has_aux=True)(hidden)


def relative(x: Any, reference: Any) -> float:
    """norm(x - reference) / norm(reference); 0 / 0 is 0."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    difference = float(np.linalg.norm(x - reference))
    return difference / float(np.linalg.norm(reference)) if difference else 0.0


def test_cap_matters_here() -> None:
    hidden, table, _ = problem()
    assert float(jnp.abs(jnp.einsum("BTD,VD->BTV", hidden, table)).max()) > 3 * CAP


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("mask", MASKS)
def test_plain_equals_the_definition(mask: str, cap: float | None) -> None:
    args = problem()
    (loss, count), gradient = plain(*args, MASKS[mask], cap)
    expected_loss, expected_gradient = oracle(*args, MASKS[mask], cap)
    assert count.dtype == jnp.int32 and int(count) == MASKS[mask].sum()
    assert loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    assert relative(gradient, expected_gradient) <= 1e-5


# 1, a divisor of nothing, all positions exactly, and more than there are.
@pytest.mark.parametrize("chunk", [1, 4, B * T, 1000])
@pytest.mark.parametrize("cap", [None, CAP])
def test_chunked_equals_plain(chunk: int, cap: float | None) -> None:
    args = problem()
    for name, mask in MASKS.items():
        (loss, count), gradient = chunked(*args, mask, cap, chunk)
        (plain_loss, plain_count), plain_gradient = plain(*args, mask, cap)
        assert loss.dtype == jnp.float32 and gradient.shape == args[0].shape
        assert int(count) == int(plain_count) == mask.sum(), name
        assert float(loss) == pytest.approx(float(plain_loss), rel=1e-6), name
        assert relative(gradient, plain_gradient) <= 1e-5, name
        # Positions without loss get exactly nothing, whatever stood in their slots.
        assert not np.asarray(gradient)[~mask].any(), name


def test_chunked_scales_with_the_cotangent_and_without_gradient() -> None:
    hidden, table, targets = problem()
    mask = MASKS["some"]

    def mean(hidden: jax.Array) -> jax.Array:
        loss, count = chunked_cross_entropy(
            hidden, table, targets, mask, logit_cap=CAP, chunk_tokens=4
        )
        return 3.0 * loss / count

    loss, gradient = jax.value_and_grad(mean)(hidden)
    expected_loss, expected_gradient = oracle(hidden, table, targets, mask, CAP)
    assert float(loss) == pytest.approx(3 * expected_loss / mask.sum(), rel=1e-5)
    assert float(mean(hidden)) == pytest.approx(float(loss), rel=1e-6)
    assert relative(gradient, 3 * expected_gradient / mask.sum()) <= 1e-5


def test_extreme_logits_stay_finite() -> None:
    hidden, table, targets = problem()
    mask = MASKS["all"]
    for cap in (None, CAP):
        (loss, _), gradient = chunked(100 * hidden, table, targets, mask, cap, 4)
        expected_loss, _ = oracle(100 * np.asarray(hidden), table, targets, mask, cap)
        assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
        assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("cap", [None, CAP])
def test_bfloat16(cap: float | None) -> None:
    """bfloat16 inputs: the sum is as exact as in float32, the gradient rounded to bfloat16.

    It is rounded three times, by 2^-9 at most: logit gradients, product, times the cotangent.
    """
    hidden, table, targets = problem(jnp.bfloat16)
    (loss, _), gradient = chunked(hidden, table, targets, MASKS["some"], cap, 4)
    expected_loss, expected_gradient = oracle(
        hidden.astype(jnp.float32), table.astype(jnp.float32), targets, MASKS["some"], cap
    )
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    assert relative(gradient.astype(jnp.float32), expected_gradient) <= 3 * 2**-9


def test_table_is_cast_to_the_hidden_dtype() -> None:
    hidden, table, targets = problem()
    hidden, mask = hidden.astype(jnp.bfloat16), MASKS["all"]
    rounded = table.astype(jnp.bfloat16)
    assert float(chunked(hidden, table, targets, mask, CAP, 4)[0][0]) == pytest.approx(
        oracle(hidden.astype(jnp.float32), rounded.astype(jnp.float32), targets, mask, CAP)[0],
        rel=1e-5,
    )


def test_one_device_mesh_changes_nothing() -> None:
    hidden, table, targets = problem()
    mask, mesh = MASKS["some"], make_mesh(1, devices=jax.devices()[:1])

    @jax.jit
    def on_mesh(hidden: jax.Array) -> Any:
        return jax.value_and_grad(
            lambda hidden: chunked_cross_entropy(
                hidden, table, targets, mask, logit_cap=CAP, chunk_tokens=4, mesh=mesh
            ),
            has_aux=True,
        )(hidden)

    (loss, count), gradient = on_mesh(hidden)
    (expected_loss, expected_count), expected_gradient = chunked(
        hidden, table, targets, mask, CAP, 4
    )
    assert (float(loss), int(count)) == (float(expected_loss), int(expected_count))
    np.testing.assert_array_equal(gradient, expected_gradient)


# ---- no [tokens, vocabulary] array exists ----


def intermediates(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """Shapes of everything that a jaxpr computes, inner jaxprs included."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield getattr(variable.aval, "shape", ())
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)  # of a ClosedJaxpr
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)


def tokens_by_vocabulary(jaxpr: Any, num_tokens: int, vocab_size: int) -> list[tuple[int, ...]]:
    """Shapes of the intermediates that have room for all tokens' logits, in any layout."""

    def holds_logits(shape: tuple[int, ...]) -> bool:
        largest, second, *_ = [*sorted(shape, reverse=True), 0, 0]
        both = largest >= vocab_size and second >= num_tokens
        return both or math.prod(shape) >= num_tokens * vocab_size

    return [shape for shape in intermediates(jaxpr) if holds_logits(shape)]


@pytest.mark.parametrize("with_mesh", [False, True])
def test_no_tokens_by_vocabulary_array_exists(with_mesh: bool) -> None:
    mesh = make_mesh(1, devices=jax.devices()[:1]) if with_mesh else None
    chunk, vocab_size, batch, length = 8, 300, 4, 16
    hidden, table = jnp.zeros((batch, length, 12)), jnp.zeros((vocab_size, 12))
    targets, mask = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length), bool)

    def chunked_loss(hidden, table, targets, mask):
        return chunked_cross_entropy(
            hidden, table, targets, mask, logit_cap=30.0, chunk_tokens=chunk, mesh=mesh
        )[0]

    def plain_loss(hidden, table, targets, mask):
        return plain_cross_entropy(hidden, table, targets, mask, logit_cap=30.0)[0]

    args = hidden, table, targets, mask
    jaxpr = jax.make_jaxpr(jax.value_and_grad(chunked_loss))(*args).jaxpr
    # The walk reaches the loop's body: it sees one chunk's logits.
    assert (chunk, vocab_size) in set(intermediates(jaxpr))
    assert tokens_by_vocabulary(jaxpr, batch * length, vocab_size) == []

    jaxpr = jax.make_jaxpr(jax.value_and_grad(plain_loss))(*args).jaxpr
    assert (batch, length, vocab_size) in tokens_by_vocabulary(jaxpr, batch * length, vocab_size)
