"""The train step equals torch + PEFT, is indifferent to packing and accumulation, and is safe."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from support.lora_twins import (
    AdapterTensors,
    make_peft,
    max_relative_difference,
    our_tensors,
    peft_tensors,
    random_samples,
    short_twin,
    torch_loss_sum,
    twin,
    with_adapter,
)
from support.twins import WINDOW

from jaxsft.common.batch import Batch
from jaxsft.data.bins import best_fit_decreasing, one_per_row
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.gemma import lora
from jaxsft.gemma.model import Gemma
from jaxsft.gemma.sharding import make_mesh, state_shardings
from jaxsft.step.optimizer import make_schedule, make_transform
from jaxsft.step.score import ModelSpec, token_log_probs
from jaxsft.step.train_step import (
    StepSpec,
    TrainState,
    UpdateSpec,
    init_state,
    put_batch,
    train_step,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROW_LENGTH = 40
ADAMW = make_transform(beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, max_grad_norm=1.0)
# Keeps the gradient of the last step as its state.
RECORD = optax.trace(decay=0.0)
MESH = make_mesh(1, devices=jax.devices()[:1])


def constant(learning_rate: float) -> optax.Schedule:
    return make_schedule("constant", peak=learning_rate, end=0.0, warmup_steps=0, num_steps=5)


AT_ZERO = constant(0.0)


def prepare(model: Gemma, **settings: Any) -> tuple[TrainState, nnx.State, StepSpec]:
    """(state at step 0, frozen weights, spec)."""
    graphdef, adapter, frozen = lora.split(model)
    of_model = ModelSpec(graphdef, MESH, model.config.final_softcap, chunk_tokens=16)
    spec = StepSpec(of_model, UpdateSpec(**settings))
    # A copy, on the mesh: the step donates the weights, and the twins' own are for all tests.
    copied = jax.tree.map(jnp.copy, frozen)
    return init_state(adapter, spec), jax.device_put(copied, state_shardings(frozen, MESH)), spec


def pack(samples: list[Sample], row_length: int = ROW_LENGTH, num_rows: int | None = None) -> Batch:
    """All samples in as few rows as they need, or in `num_rows`."""
    lengths = [len(sample.ids) for sample in samples]
    rows = PackedRows.from_samples(samples, best_fit_decreasing(lengths, row_length), row_length)
    indices = [*range(len(rows)), *[-1] * ((num_rows or 0) - len(rows))]
    return put_batch(rows.batch(indices), MESH)


def snapshot(tree: Any) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(tree)]


def assert_identical(tree: Any, saved: list[np.ndarray]) -> None:
    for x, expected in zip(snapshot(tree), saved, strict=True):
        np.testing.assert_array_equal(x, expected)


# ---- against torch ----

LENGTHS = [[40, 17, 22], [12, 9, 31, 8], [39, 40, 38], [10, 11], [25, 14, 14, 26]]
STEPS = [random_samples(lengths, seed=step) for step, lengths in enumerate(LENGTHS)]


def torch_steps(peft_model: Any) -> tuple[list[float], list[float]]:
    """(losses, gradient norms before clipping) of one AdamW step on each of STEPS."""
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01
    )
    losses, norms = [], []
    for samples in STEPS:
        pairs = [torch_loss_sum(peft_model, sample) for sample in samples]
        loss = sum(loss for loss, _ in pairs) / sum(count for _, count in pairs)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


# Three layers each; Gemma 3 as local, global, local, which compiles sooner than 5 : 1.
@pytest.mark.parametrize(
    ("name", "overrides"),
    [("gemma1", {}), ("gemma2", {}), ("gemma3-1b", {"sliding_window_pattern": 2})],
)
def test_five_steps_equal_torch(name: str, overrides: dict[str, int]) -> None:
    hf_model, model = twin(name, num_hidden_layers=3, **overrides)
    assert model.config.num_layers == 3
    peft_model = make_peft(hf_model, random_b=False)
    initial = peft_tensors(peft_model)
    model = with_adapter(model, peft_model)
    expected_losses, expected_norms = torch_steps(peft_model)
    assert max(expected_norms) > 1.0  # clipping acts

    state, frozen, spec = prepare(model, transform=ADAMW, schedule=constant(1e-3))
    frozen_before = snapshot(frozen)
    losses, norms = [], []
    cache_size = 0
    for step, samples in enumerate(STEPS):
        old_leaves = jax.tree.leaves(state)
        state, frozen, metrics = train_step(state, frozen, pack(samples, num_rows=3), spec=spec)
        assert all(leaf.is_deleted() for leaf in old_leaves)  # donated
        if step == 0:
            cache_size = train_step._cache_size()
        num_labels = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
        assert int(metrics["num_loss_tokens"]) == num_labels
        assert bool(metrics["applied"])
        assert float(metrics["learning_rate"]) == pytest.approx(1e-3)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    assert train_step._cache_size() == cache_size  # compiled once
    assert int(state.step) == int(state.num_updates) == len(STEPS)
    assert_identical(frozen, frozen_before)
    # init_state copies: the adapter that it was given is not donated.
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(lora.split(model)[1]))

    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert norms == pytest.approx(expected_norms, rel=1e-5)

    def change(final: AdapterTensors) -> AdapterTensors:
        return {key: final[key] - initial[key] for key in initial}

    ours = our_tensors(spec.model.graphdef, state.adapter, frozen)
    # Without weight decay, or with another beta2, this is 3e-3 or more; without clipping 0.2.
    assert max_relative_difference(change(ours), change(peft_tensors(peft_model))) <= 1e-3


# ---- packing and accumulation ----


@cache
def loss_and_gradients(how: str) -> tuple[float, AdapterTensors]:
    """Loss and gradients of the same eight samples, packed or one per row."""
    rng = np.random.default_rng(0)
    samples = random_samples(rng.integers(WINDOW + 2, 31, 8).tolist(), seed=10)
    # From one label to all of them: sums, not averages of averages.
    for i, num_labels in enumerate([1, 30, 2, 9, 1, 30, 3, 1]):
        length = len(samples[i].ids)
        samples[i] = samples[i]._replace(loss_mask=np.arange(length) >= length - num_labels)
    if how == "packed":
        batch = pack(samples, row_length=64)
        assert batch.tokens_BT.shape[0] <= 4
    else:
        rows = PackedRows.from_samples(samples, one_per_row([len(s.ids) for s in samples], 32), 32)
        batch = put_batch(rows.batch(range(8)), MESH)
    accumulation = 4 if how == "accumulated" else 1
    _, model = short_twin()
    state, frozen, spec = prepare(
        model, transform=RECORD, schedule=AT_ZERO, accumulation_steps=accumulation
    )
    state, frozen, metrics = train_step(state, frozen, batch, spec=spec)
    num_labels = sum(int(sample.loss_mask[1:].sum()) for sample in samples)
    assert int(metrics["num_loss_tokens"]) == num_labels
    return float(metrics["loss"]), our_tensors(spec.model.graphdef, state.moments.trace, frozen)


@pytest.mark.parametrize("how", ["packed", "accumulated"])
def test_the_same_samples_give_the_same_gradients(how: str) -> None:
    loss, gradients = loss_and_gradients("one per row")
    other_loss, other_gradients = loss_and_gradients(how)
    assert all(np.linalg.norm(gradient) > 0 for gradient in gradients.values())
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert max_relative_difference(other_gradients, gradients) <= 1e-4


# ---- the gate, the learning rate, evaluation ----


@cache
def warming_up() -> tuple[nnx.State, nnx.State, StepSpec]:
    """(adapter, frozen, spec) with a learning rate of 0, 1e-3, 2e-3, 3e-3, 4e-3 and so on."""
    _, model = short_twin()
    schedule = make_schedule("constant", peak=4e-3, end=0.0, warmup_steps=4, num_steps=9)
    _, frozen, spec = prepare(model, transform=ADAMW, schedule=schedule)
    return lora.split(model)[1], frozen, spec


def run(batches: list[tuple[nnx.State, Batch]]) -> tuple[TrainState, list[dict[str, Any]]]:
    adapter, _, spec = warming_up()
    state, history = init_state(adapter, spec), []
    with jax.transfer_guard("disallow"):
        for frozen, batch in batches:
            frozen = jax.tree.map(jnp.copy, frozen)  # donated
            state, _, metrics = train_step(state, frozen, batch, spec=spec)
            history.append(metrics)
    return state, history


def with_nan(frozen: nnx.State) -> nnx.State:
    """A copy with one NaN in one weight of a down projection."""

    def poison(path: Any, x: jax.Array) -> jax.Array:
        is_target = "'tail'" in (name := jax.tree_util.keystr(path)) and "'down_proj'" in name
        array = np.array(x)
        if is_target:
            array[3, 5] = np.nan
        return jnp.asarray(array)

    poisoned = jax.tree_util.tree_map_with_path(poison, frozen)
    assert sum(int(np.isnan(x).sum()) for x in snapshot(poisoned)) == 1
    return poisoned


@pytest.mark.parametrize("bad", ["NaN weight", "no loss tokens"])
def test_a_bad_step_is_consumed_but_not_applied(bad: str) -> None:
    _, frozen, _ = warming_up()
    good = [(frozen, pack(samples, num_rows=3)) for samples in STEPS[:3]]
    if bad == "NaN weight":
        bad_step = with_nan(frozen), good[2][1]
    else:
        no_loss = jnp.zeros_like(good[2][1].loss_weights_BT)
        bad_step = frozen, good[2][1]._replace(loss_weights_BT=no_loss)

    before, _ = run(good[:2])
    state, history = run([*good[:2], bad_step])
    if bad == "NaN weight":
        assert not np.isfinite(float(history[-1]["loss"]))
    else:
        assert float(history[-1]["loss"]) == 0.0 and float(history[-1]["grad_norm"]) == 0.0
        assert int(history[-1]["num_loss_tokens"]) == 0
    assert [bool(m["applied"]) for m in history] == [True, True, False]
    assert_identical((state.adapter, state.moments), snapshot((before.adapter, before.moments)))
    assert (int(state.step), int(state.num_updates)) == (3, 2)

    # The run goes on as if the bad batch had never been: the same bits, the same learning rates.
    after, history = run([*good[:2], bad_step, good[2]])
    expected, expected_history = run(good)
    assert_identical((after.adapter, after.moments), snapshot((expected.adapter, expected.moments)))
    rates = [float(m["learning_rate"]) for m in history]
    assert rates == pytest.approx([0.0, 1e-3, 2e-3, 2e-3])
    assert [float(m["learning_rate"]) for m in expected_history] == pytest.approx([0.0, 1e-3, 2e-3])
    assert (int(after.step), int(after.num_updates)) == (4, 3)


def test_log_probs_give_the_train_loss() -> None:
    adapter, frozen, spec = warming_up()
    batch = pack(STEPS[0], num_rows=3)
    losses_BT = -np.asarray(token_log_probs(adapter, frozen, batch, spec=spec.model))
    _, (metrics,) = run([(frozen, batch)])
    assert (np.flatnonzero(losses_BT) == np.flatnonzero(batch.loss_weights_BT)).all()
    assert losses_BT.sum() / batch.loss_weights_BT.sum() == pytest.approx(
        float(metrics["loss"]), rel=1e-6
    )


def test_spec_is_hashable_and_its_changes_are_seen() -> None:
    _, _, spec = warming_up()
    assert hash(spec) == hash(dataclasses.replace(spec))
    assert dataclasses.replace(spec) == spec
    other = dataclasses.replace(spec.update, seed=1)
    assert dataclasses.replace(spec, update=other) != spec


# ---- dropout ----


def dropout_losses(rate: float, use_dropout: bool, num_steps: int = 3) -> list[float]:
    """Losses of the same batch at learning rate 0."""
    hf_model, bare = twin("gemma1", num_hidden_layers=1)
    model = with_adapter(bare, make_peft(hf_model, random_b=True), dropout=rate)
    state, frozen, spec = prepare(
        model, transform=RECORD, schedule=AT_ZERO, use_dropout=use_dropout
    )
    batch, losses = pack(STEPS[0], num_rows=3), []
    for _ in range(num_steps):
        state, frozen, metrics = train_step(state, frozen, batch, spec=spec)
        losses.append(float(metrics["loss"]))
    return losses


def test_dropout() -> None:
    without = dropout_losses(0.5, use_dropout=False)
    assert without[0] == without[1] == without[2]
    assert dropout_losses(0.0, use_dropout=True) == pytest.approx(without, rel=1e-6)
    dropped = dropout_losses(0.5, use_dropout=True)
    assert len({*dropped, *without}) == 4  # every step draws anew
    assert dropout_losses(0.5, use_dropout=True) == dropped  # from the seed and the step alone
