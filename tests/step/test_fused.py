"""The fused step is the plain one: losses, gradients, updates, on every architecture and subset."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.both_steps import MESH, ROW_LENGTH, both_steps, layout_of, with_fused
from support.lora_twins import make_peft, random_samples, twin, with_adapter

from jaxsft.common.batch import Batch
from jaxsft.data.bins import best_fit_decreasing
from jaxsft.data.packing import PackedRows
from jaxsft.gemma import lora
from jaxsft.step.fused import FusedSpec, loss_and_gradients
from jaxsft.step.fused_weights import (
    FusedLayout,
    fuse,
    group_adapter,
    unfuse,
    write_adapter,
)
from jaxsft.step.score import token_log_probs
from jaxsft.step.train_step import put_batch, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")


def batch_of(num_rows: int) -> Batch:
    samples = random_samples([40, 17, 22, 31, 12, 9, 25, 14], seed=3)
    rows = PackedRows.from_samples(
        samples, best_fit_decreasing([len(s.ids) for s in samples], ROW_LENGTH), ROW_LENGTH
    )
    return put_batch(rows.batch([i % len(rows) for i in range(num_rows)]), MESH)


def assert_gradients_equal(ours: nnx.State, reference: nnx.State) -> None:
    for (path, x), y in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(reference), strict=True
    ):
        difference = np.linalg.norm(np.asarray(x) - np.asarray(y))
        assert difference <= 1e-4 * np.linalg.norm(y), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gemma1", {"num_hidden_layers": 3}),
        ("gemma2", {"num_hidden_layers": 3}),  # windows of 8, a tail
        ("gemma2", {"num_hidden_layers": 5, "sliding_window": 64}),  # uniform, an odd layer
        ("gemma3-1b", {"sliding_window_pattern": 2, "num_hidden_layers": 3}),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_the_plain_step(name: str, overrides: dict[str, int], recompute: bool) -> None:
    hf_model, model = twin(name, **overrides)
    model = with_adapter(model, make_peft(hf_model, random_b=True))
    plain, fused = both_steps(model, layout_of(model), accumulation_steps=2)
    if recompute:
        settings = fused[2].model.fused._replace(recompute_layers=True)
        fused = (*fused[:2], with_fused(fused[2], settings))
    batch, results = batch_of(6), []
    for state, frozen, spec in (plain, fused):
        losses_BT = -np.asarray(token_log_probs(state.adapter, frozen, batch, spec=spec.model))
        state, frozen, metrics = train_step(state, frozen, batch, spec=spec)
        assert abs(losses_BT.sum() / batch.loss_weights_BT.sum() - float(metrics["loss"])) < 1e-5
        results.append((metrics, state, losses_BT))
    (expected, state, expected_losses_BT), (metrics, fused_state, losses_BT) = results
    np.testing.assert_allclose(losses_BT, expected_losses_BT, atol=1e-4)
    assert abs(float(metrics["loss"]) - float(expected["loss"])) < 1e-5
    assert int(metrics["num_loss_tokens"]) == int(expected["num_loss_tokens"])
    assert_gradients_equal(fused_state.moments.trace, state.moments.trace)


def test_bfloat16_is_near_float32() -> None:
    """Loss and every gradient of one layer on the same weights, within 3.5% (2.6% was seen, of
    q/k/v); with the adapter's scale 5% off they are not. Scores: see test_flash_attention."""
    hf_model, model = twin("gemma2", num_hidden_layers=1)
    model = with_adapter(model, make_peft(hf_model, random_b=True))
    layout = layout_of(model)
    _, adapter, frozen = lora.split(model)
    # Numbers that bfloat16 has.
    adapter, weights = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), (adapter, fuse(frozen, layout))
    )
    batch = batch_of(6)

    @partial(jax.jit, static_argnames=("dtype", "layout"))
    def run(dtype: str, layout: FusedLayout) -> tuple[jax.Array, list[jax.Array]]:
        cast, rounded = jax.tree.map(lambda x: x.astype(dtype), (adapter, weights))
        grouped = group_adapter(cast, layout)
        pairs = zip(rounded["stacks"], grouped, strict=True)
        rounded |= {"stacks": [list(map(write_adapter, *pair)) for pair in pairs]}
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), grouped)
        spec = FusedSpec(layout, jnp.dtype(dtype), 16, False, use_kernel=False)
        loss_sum, grads, _ = loss_and_gradients(rounded, grouped, batch, zeros, spec)
        return loss_sum / jnp.sum(batch.loss_weights_BT), jax.tree.leaves(grads)

    def worst(grads: list[jax.Array]) -> float:
        pairs = zip(grads, exact, strict=True)
        return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs)

    loss, exact = run("float32", layout)
    rounded_loss, rounded = run("bfloat16", layout)
    _, wrong = run("float32", dataclasses.replace(layout, scale=1.05 * layout.scale))
    assert abs(float(rounded_loss - loss)) <= 1e-3
    assert worst(rounded) <= 0.035 < worst(wrong)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("up_proj",), ("down_proj", "o_proj")])
def test_subsets_of_the_projections(targets: tuple[str, ...]) -> None:
    _, model = twin("gemma2", num_hidden_layers=3)
    model = nnx.merge(*nnx.split(model))
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x, state))
    lora.inject(model, rank=3, alpha=7.0, targets=targets, rngs=nnx.Rngs(lora=1))
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, lora.LoRA):
            module.b[...] = jax.random.normal(jax.random.key(2), module.b[...].shape) * 0.1
    states = []
    for state, frozen, spec in both_steps(model, layout_of(model, targets)):
        state, _, metrics = train_step(state, frozen, batch_of(2), spec=spec)
        states.append((state, float(metrics["loss"])))
    assert abs(states[0][1] - states[1][1]) < 1e-5
    assert_gradients_equal(states[1][0].moments.trace, states[0][0].moments.trace)


@pytest.mark.parametrize("overrides", [{}, {"sliding_window": 64}])
def test_unfuse_is_the_inverse(overrides: dict[str, int]) -> None:
    hf_model, model = twin("gemma2", num_hidden_layers=3, **overrides)
    model = with_adapter(model, make_peft(hf_model, random_b=True))
    (_, frozen, _), (state, weights, spec) = both_steps(model, layout_of(model))
    assert spec.model.fused is not None
    _, weights, _ = train_step(state, weights, batch_of(2), spec=spec)  # the pads are written
    abstract = jax.eval_shape(lambda: frozen)
    back = unfuse(weights, abstract, spec.model.fused.layout)
    for (path, x), y in zip(jax.tree.leaves_with_path(back), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))
