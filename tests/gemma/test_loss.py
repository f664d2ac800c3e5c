"""The chunked loss head equals the plain one, which equals its definition in float64."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.plain_loss import OBJECTIVE, plain_log_probs, plain_objective

from jaxsft.common.batch import Batch
from jaxsft.gemma.loss import chunked_log_probs, chunked_loss, cross_entropy
from jaxsft.gemma.sharding import make_mesh
from jaxsft.grpo.objective import RolloutBatch

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, T, D, V = 3, 9, 16, 101
CAP = 4.0  # the largest logits of `problem` are far beyond it

RNG = np.random.default_rng(1)
SOME = RNG.random((B, T)) < 0.4
WEIGHTS = {
    "some": SOME,
    "fractions": SOME * RNG.uniform(0.1, 3.0, (B, T)),
    "none": np.zeros((B, T)),
    "all": np.ones((B, T)),
    "last": np.arange(B * T).reshape(B, T) == B * T - 1,
    "one row": np.arange(B)[:, None] + np.zeros((B, T)) == 1,
}
WEIGHTS = {name: weights.astype(np.float32) for name, weights in WEIGHTS.items()}


def problem(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(hidden, table, targets); logits have a standard deviation of 4."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    table = jnp.asarray(rng.normal(size=(V, D)), dtype)
    return hidden, table, jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)


def batch_of(targets: Any, weights: Any) -> Batch:
    """What the head reads of a batch."""
    zeros: Any = jnp.zeros(targets.shape, jnp.int32)
    return Batch(zeros, targets, weights, zeros, zeros)


def oracle(
    hidden: Any, table: Any, targets: Any, weights: np.ndarray, cap: float | None
) -> tuple[float, np.ndarray]:
    """The loss sum and its gradient with respect to the hidden states, in float64."""
    hidden, table = np.asarray(hidden, np.float64), np.asarray(table, np.float64)
    raw = hidden @ table.T
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    is_target = np.asarray(targets)[..., None] == np.arange(len(table))
    loss = -np.sum(log_probs[is_target] * weights.reshape(-1))
    d_logits = (np.exp(log_probs) - is_target) * weights[..., None]
    d_raw = d_logits if cap is None else d_logits * (1 - np.tanh(raw / cap) ** 2)
    return float(loss), d_raw @ table


@partial(jax.jit, static_argnames=("cap", "chunk", "token_loss", "mesh"))
def chunked(hidden, table, batch, cap, chunk, token_loss=cross_entropy, mesh=None):
    """(loss sum, its gradient)."""
    return jax.value_and_grad(chunked_loss)(
        hidden, table, batch, token_loss=token_loss, logit_cap=cap, chunk_tokens=chunk, mesh=mesh
    )


@partial(jax.jit, static_argnames="cap")
def plain(hidden, table, targets, weights, cap):
    def loss(hidden):
        return -jnp.sum(plain_log_probs(hidden, table, targets, logit_cap=cap) * weights)

    return jax.value_and_grad(loss)(hidden)


def relative(x: Any, reference: Any) -> float:
    """norm(x - reference) / norm(reference); 0 / 0 is 0."""
    x, reference = np.asarray(x, np.float64), np.asarray(reference, np.float64)
    difference = float(np.linalg.norm(x - reference))
    return difference / float(np.linalg.norm(reference)) if difference else 0.0


def test_cap_matters_here() -> None:
    hidden, table, _ = problem()
    assert float(jnp.abs(jnp.einsum("BTD,VD->BTV", hidden, table)).max()) > 3 * CAP


@pytest.mark.parametrize("cap", [None, CAP])
def test_plain_equals_the_definition(cap: float | None) -> None:
    args = problem()
    for weights in WEIGHTS.values():
        loss, gradient = plain(*args, weights, cap)
        expected_loss, expected_gradient = oracle(*args, weights, cap)
        assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
        assert relative(gradient, expected_gradient) <= 1e-5


# 1, a divisor of nothing, all positions exactly, and more than there are.
@pytest.mark.parametrize("chunk", [1, 4, B * T, 1000])
@pytest.mark.parametrize("cap", [None, CAP])
def test_chunked_equals_plain(chunk: int, cap: float | None) -> None:
    hidden, table, targets = problem()
    expected = np.asarray(plain_log_probs(hidden, table, targets, logit_cap=cap))
    for name, weights in WEIGHTS.items():
        batch = batch_of(targets, weights)
        loss, gradient = chunked(hidden, table, batch, cap, chunk)
        plain_loss, plain_gradient = plain(hidden, table, targets, weights, cap)
        assert loss.dtype == jnp.float32 and gradient.shape == hidden.shape
        assert float(loss) == pytest.approx(float(plain_loss), rel=1e-6), name
        assert relative(gradient, plain_gradient) <= 1e-5, name
        # Positions without loss get exactly nothing, whatever stood in their slots.
        assert not np.asarray(gradient)[weights == 0].any(), name
        log_probs = chunked_log_probs(hidden, table, batch, logit_cap=cap, chunk_tokens=chunk)
        np.testing.assert_allclose(log_probs, expected * (weights != 0), rtol=1e-5, atol=1e-6)


def test_chunked_scales_with_the_cotangent_and_without_gradient() -> None:
    hidden, table, targets = problem()
    weights = WEIGHTS["some"]

    def mean(hidden: jax.Array) -> jax.Array:
        loss = chunked_loss(
            hidden,
            table,
            batch_of(targets, weights),
            token_loss=cross_entropy,
            logit_cap=CAP,
            chunk_tokens=4,
        )
        return 3.0 * loss / weights.sum()

    loss, gradient = jax.value_and_grad(mean)(hidden)
    expected_loss, expected_gradient = oracle(hidden, table, targets, weights, CAP)
    assert float(loss) == pytest.approx(3 * expected_loss / weights.sum(), rel=1e-5)
    assert float(mean(hidden)) == pytest.approx(float(loss), rel=1e-6)
    assert relative(gradient, 3 * expected_gradient / weights.sum()) <= 1e-5


# ---- another objective: GRPO's, clipped, with k3 towards a reference ----


@pytest.mark.parametrize("cap", [None, CAP])
def test_the_head_takes_another_objective(cap: float | None) -> None:
    hidden, table, targets = problem()
    now = plain_log_probs(hidden, table, targets, logit_cap=cap)
    old, reference, advantages = np.random.default_rng(5).normal(0, 0.3, (3, B, T))
    advantages = 3 * advantages.astype(np.float32)
    batch = RolloutBatch(
        *batch_of(targets, WEIGHTS["fractions"]),
        (now + old).astype(jnp.float32),
        (now + reference).astype(jnp.float32),
        advantages,
    )
    above = old < -np.log1p(OBJECTIVE.epsilon_high)
    below = old > -np.log1p(-OBJECTIVE.epsilon)
    outside = above & (advantages > 0) | below & (advantages < 0)
    assert 0 < (outside & SOME).sum() < SOME.sum()  # some are clipped, others not

    def objective(hidden: jax.Array) -> jax.Array:
        log_probs = plain_log_probs(hidden, table, targets, logit_cap=cap)
        return jnp.sum(plain_objective(log_probs, batch, OBJECTIVE))

    expected_loss, expected_gradient = jax.value_and_grad(objective)(hidden)
    for chunk in (4, 1000):
        loss, gradient = chunked(hidden, table, batch, cap, chunk, OBJECTIVE)
        assert float(loss) == pytest.approx(float(expected_loss), rel=1e-5)
        assert relative(gradient, expected_gradient) <= 1e-5
        assert not np.asarray(gradient)[~SOME].any()


# ---- numbers at the edge, and what a mesh changes ----


def test_extreme_logits_stay_finite() -> None:
    hidden, table, targets = problem()
    weights = WEIGHTS["all"]
    for cap in (None, CAP):
        loss, gradient = chunked(100 * hidden, table, batch_of(targets, weights), cap, 4)
        expected_loss, _ = oracle(100 * np.asarray(hidden), table, targets, weights, cap)
        assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
        assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.parametrize("cap", [None, CAP])
def test_bfloat16(cap: float | None) -> None:
    """bfloat16 inputs: the sum is as exact as in float32, the gradient rounded to bfloat16.

    It is rounded three times, by 2^-9 at most: logit gradients, product, times the cotangent.
    """
    hidden, table, targets = problem(jnp.bfloat16)
    weights = WEIGHTS["fractions"]
    loss, gradient = chunked(hidden, table, batch_of(targets, weights), cap, 4)
    expected_loss, expected_gradient = oracle(
        hidden.astype(jnp.float32), table.astype(jnp.float32), targets, weights, cap
    )
    assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    assert float(loss) == pytest.approx(expected_loss, rel=1e-5)
    assert relative(gradient.astype(jnp.float32), expected_gradient) <= 3 * 2**-9


def test_table_is_cast_to_the_hidden_dtype() -> None:
    hidden, table, targets = problem()
    hidden, weights = hidden.astype(jnp.bfloat16), WEIGHTS["all"]
    rounded = table.astype(jnp.bfloat16)
    assert float(chunked(hidden, table, batch_of(targets, weights), CAP, 4)[0]) == pytest.approx(
        oracle(hidden.astype(jnp.float32), rounded.astype(jnp.float32), targets, weights, CAP)[0],
        rel=1e-5,
    )


def test_one_device_mesh_changes_nothing() -> None:
    hidden, table, targets = problem()
    mesh, batch = make_mesh(1, devices=jax.devices()[:1]), batch_of(targets, WEIGHTS["some"])
    loss, gradient = chunked(hidden, table, batch, CAP, 4, mesh=mesh)
    expected_loss, expected_gradient = chunked(hidden, table, batch, CAP, 4)
    assert float(loss) == float(expected_loss)
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
    targets, weights = jnp.zeros((batch, length), jnp.int32), jnp.ones((batch, length))

    def jaxpr_of(function: Callable[..., Any], *args: Any) -> Any:
        return jax.make_jaxpr(function)(*args).jaxpr

    run = partial(chunked, cap=30.0, chunk=chunk, mesh=mesh)
    jaxpr = jaxpr_of(run, hidden, table, batch_of(targets, weights))
    # The walk reaches the loop's body: it sees one chunk's logits.
    assert (chunk, vocab_size) in set(intermediates(jaxpr))
    assert tokens_by_vocabulary(jaxpr, batch * length, vocab_size) == []

    jaxpr = jaxpr_of(partial(plain, cap=30.0), hidden, table, targets, weights)
    assert (batch, length, vocab_size) in tokens_by_vocabulary(jaxpr, batch * length, vocab_size)
