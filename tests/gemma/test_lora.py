"""LoRA: zero at the start, its scale, merge, target names."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxsft.gemma import lora
from jaxsft.gemma.architecture import GLOBAL, LOCAL, GemmaConfig
from jaxsft.gemma.layers import Linear, LoRA, low_rank
from jaxsft.gemma.model import Gemma
from jaxsft.weights.merged import merge_in_memory

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = GemmaConfig(
    name="tiny",
    vocab_size=64,
    d_model=16,
    d_ff=24,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    layer_types=(LOCAL, GLOBAL, LOCAL),  # a scanned pair and a tail
    max_positions=64,
    query_scale=0.35,
    sliding_window=4,
    post_norms=True,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, 12)), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(12), (2, 12))


def copy_of(model: Gemma) -> Gemma:
    """An independent model: new Variables and arrays, which may be changed and deleted."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.copy(), state))


@pytest.fixture(scope="module")
def make_base() -> Callable[..., Gemma]:
    built = {}

    def make(param_dtype: Any = jnp.float32) -> Gemma:
        if param_dtype not in built:
            graphdef, state = nnx.split(
                Gemma(CONFIG, param_dtype=param_dtype, rngs=nnx.Rngs(0)), ...
            )
            built[param_dtype] = graphdef, state
        graphdef, state = built[param_dtype]
        return copy_of(nnx.merge(graphdef, state))

    return make


def logits(model: Gemma) -> np.ndarray:
    with jax.disable_jit():  # tiny, and compiled for every structure otherwise
        return np.asarray(model.logits(model(TOKENS, POSITIONS, jnp.ones_like(TOKENS))))


def adapters(model: Gemma) -> list[LoRA]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, LoRA)]


def inject_random(model: Gemma, **options: Any) -> Gemma:
    """Injects with rank 3 and alpha 7, and fills B."""
    lora.inject(model, **{"rank": 3, "alpha": 7.0, "rngs": nnx.Rngs(1), **options})
    rng = np.random.default_rng(2)
    for adapter in adapters(model):
        adapter.b[...] = jnp.asarray(rng.normal(0, 0.2, adapter.b[...].shape), jnp.float32)
    return model


def flat(model: Gemma) -> dict[tuple, np.ndarray]:
    return {path: np.asarray(v.get_raw_value()) for path, v in nnx.to_flat_state(nnx.state(model))}


# ---- at the start ----


def test_inject_changes_nothing_yet(make_base: Callable[..., Gemma]) -> None:
    model = make_base()
    before = logits(model)
    count = lora.inject(model, rank=3, alpha=7.0, rngs=nnx.Rngs(1))
    assert count == len(adapters(model)) == 7 * 3  # two stacked blocks and one in the tail
    np.testing.assert_array_equal(logits(model), before)
    for path, module in nnx.iter_modules(model):
        if isinstance(module, LoRA):
            a, b = np.asarray(module.a[...]), np.asarray(module.b[...])
            in_dim, out_dim = CONFIG.linear_shapes[path[-2]]
            assert a.shape[-2:] == (in_dim, 3) and b.shape[-2:] == (3, out_dim)
            assert a.dtype == b.dtype == np.float32
            assert not b.any()
            # PEFT's kaiming-uniform(sqrt 5): U(-1/sqrt(in), 1/sqrt(in)).
            assert 0.5 / in_dim**0.5 < np.abs(a).max() <= 1 / in_dim**0.5
    leaves = [np.asarray(adapter.a[...]).ravel()[:4].tolist() for adapter in adapters(model)]
    assert len({tuple(values) for values in leaves}) == len(leaves)  # no key used twice


def test_adapter_is_float32_over_bfloat16_weights(make_base: Callable[..., Gemma]) -> None:
    model = inject_random(make_base(jnp.bfloat16))
    _, adapter, frozen = lora.split(model)
    assert {x.dtype for x in jax.tree.leaves(adapter)} == {jnp.dtype(jnp.float32)}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype(jnp.bfloat16)}


def test_split_separates_adapter_from_frozen(make_base: Callable[..., Gemma]) -> None:
    model = inject_random(make_base())
    graphdef, adapter, frozen = lora.split(model)
    adapter_paths = {path for path, _ in nnx.to_flat_state(adapter)}
    frozen_paths = {path for path, _ in nnx.to_flat_state(frozen)}
    assert adapter_paths == {path for path in flat(model) if "lora" in path}
    assert adapter_paths.isdisjoint(frozen_paths)
    assert adapter_paths | frozen_paths == set(flat(model))
    num_adapter = sum(x.size for x in jax.tree.leaves(adapter))
    assert num_adapter == CONFIG.lora_params(3, lora.TARGETS)
    assert sum(x.size for x in jax.tree.leaves(frozen)) == CONFIG.num_params
    np.testing.assert_array_equal(logits(nnx.merge(graphdef, adapter, frozen)), logits(model))


# ---- scale ----


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 7 / 4), (True, 7 / 2)])
def test_scale(use_rslora: bool, scale: float) -> None:
    assert lora.lora_scale(4, 7.0, use_rslora) == pytest.approx(scale)
    linear = Linear(6, 5, axes=("embed", "mlp"), stack=(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    holder = nnx.Dict(q_proj=linear)
    lora.inject(holder, rank=4, alpha=7.0, use_rslora=use_rslora, rngs=nnx.Rngs(1))
    assert linear.lora is not None
    linear.lora.b[...] = jax.random.normal(jax.random.key(2), (4, 5))
    x = jax.random.normal(jax.random.key(3), (3, 6))
    w, a, b = (
        np.asarray(v[...], np.float64) for v in (linear.kernel, linear.lora.a, linear.lora.b)
    )
    expected = np.asarray(x, np.float64) @ (w + scale * a @ b)
    np.testing.assert_allclose(linear(x), expected, rtol=1e-5, atol=1e-5)


# ---- gradients, written out by hand in layers.py ----


@pytest.mark.parametrize("shape", [(6,), (2, 5, 6)])
def test_gradients_equal_autodiff(shape: tuple[int, ...]) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    x, a, b = (jax.random.normal(k, s) for k, s in zip(keys, (shape, (6, 3), (3, 4)), strict=False))
    weight = jax.random.normal(keys[3], (*shape[:-1], 4))

    def by_hand(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(weight * low_rank(x, a, b, 1.7))

    def plain(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(weight * 1.7 * (x @ a @ b))

    gradients = jax.value_and_grad(by_hand, argnums=(0, 1, 2))(x, a, b)
    expected = jax.value_and_grad(plain, argnums=(0, 1, 2))(x, a, b)
    for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_of_bfloat16_activations_are_float32() -> None:
    """Within four roundings to bfloat16 (2^-9 each) of the float32 gradients, as one norm."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (64, 16), (16, 3), (3, 8), (64, 8)
    x, a, b, weight = (
        jax.random.normal(k, s).astype(jnp.bfloat16).astype(jnp.float32)
        for k, s in zip(keys, shapes, strict=True)
    )

    def loss(a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
        return jnp.sum(weight.astype(dtype) * low_rank(x.astype(dtype), a, b, 1.7))

    for index in (0, 1):
        low = jax.grad(loss, index)(a, b, jnp.bfloat16)
        high = jax.grad(loss, index)(a, b, jnp.float32)
        assert low.dtype == jnp.float32
        assert jnp.linalg.norm(low - high) <= 4 * 2**-9 * jnp.linalg.norm(high)


# ---- dropout ----


def test_dropout_is_inverted_and_only_with_a_key() -> None:
    module = LoRA((64, 8), rank=2, scale=1.5, dropout=0.25, rngs=nnx.Rngs(0))
    module.a[...] = jnp.eye(64, 2)
    module.b[...] = jnp.ones((2, 8))
    x = jnp.ones((4000, 64))
    np.testing.assert_array_equal(module(x, None), 3.0)
    y = np.asarray(module(x, jax.random.key(0)))
    # Each of the two inputs that A reads is 0, or 1 / 0.75, and counts 1.5 times.
    values, counts = np.unique(y[:, 0].round(4), return_counts=True)
    assert values.tolist() == [0.0, 2.0, 4.0]
    # Binomial(2, 0.75); five standard deviations of 4000 draws are below 0.04.
    np.testing.assert_allclose(counts / 4000, [0.0625, 0.375, 0.5625], atol=0.04)
    np.testing.assert_array_equal(y, module(x, jax.random.key(0)))
    assert (y != np.asarray(module(x, jax.random.key(1)))).any()
    module.dropout = 0.0
    np.testing.assert_array_equal(module(x, jax.random.key(0)), 3.0)


def test_every_layer_and_projection_drops_differently(make_base: Callable[..., Gemma]) -> None:
    model = inject_random(make_base(), dropout=0.5)
    seen: list[tuple[tuple[int, ...], bytes]] = []
    call = LoRA.__call__

    def recording(self: LoRA, x: jax.Array, key: jax.Array | None) -> jax.Array:
        assert key is not None
        seen.append((x.shape, np.asarray(jax.random.key_data(key)).tobytes()))
        return call(self, x, key)

    with pytest.MonkeyPatch.context() as patch, jax.disable_jit():
        patch.setattr(LoRA, "__call__", recording)
        model(TOKENS, POSITIONS, jnp.ones_like(TOKENS), dropout_key=jax.random.key(0))
    assert len(seen) == 7 * CONFIG.num_layers
    assert len({key for _, key in seen}) == len(seen)


# ---- merge ----


@pytest.mark.parametrize("use_rslora", [False, True])
def test_merged_weights_give_the_adapters_logits(
    make_base: Callable[..., Gemma], use_rslora: bool
) -> None:
    model = inject_random(make_base(), use_rslora=use_rslora)
    base_logits = logits(make_base())
    adapter_logits = logits(model)
    assert np.abs(adapter_logits - base_logits).max() > 0.1
    merge_in_memory(model, "float32")
    assert not adapters(model)
    np.testing.assert_allclose(logits(model), adapter_logits, rtol=0, atol=2e-5)


def test_merge_rounds_once_to_bfloat16_and_touches_only_the_targets(
    make_base: Callable[..., Gemma],
) -> None:
    model = inject_random(make_base(), targets=["q_proj", "down_proj"])
    before = flat(model)
    scale = adapters(model)[0].scale
    merge_in_memory(model, "bfloat16")
    changed = set()
    for path, value in flat(model).items():
        exact = before[path].astype(np.float64)
        if (*path[:-1], "lora", "a") in before:
            changed.add(path[-2])
            a, b = (before[*path[:-1], "lora", name].astype(np.float64) for name in "ab")
            exact += scale * a @ b
        np.testing.assert_array_equal(value, exact.astype(jnp.bfloat16), err_msg=str(path))
    assert changed == {"q_proj", "down_proj"}


def test_without_adapter(make_base: Callable[..., Gemma]) -> None:
    model = inject_random(make_base())
    adapter_logits = logits(model)
    bare = lora.without_adapter(model)
    assert not adapters(bare) and len(adapters(model)) == 21
    np.testing.assert_array_equal(logits(bare), logits(make_base()))
    np.testing.assert_array_equal(logits(model), adapter_logits)
    base_flat, model_flat = flat(bare), flat(model)
    assert set(base_flat) == {path for path in model_flat if "lora" not in path}


# ---- target names ----


def test_targets() -> None:
    assert lora.resolve_targets("all-linear") == lora.TARGETS
    assert lora.resolve_targets("v_proj,q_proj") == ("q_proj", "v_proj")
    assert lora.resolve_targets(["down_proj", "o_proj"]) == ("o_proj", "down_proj")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("q_porj", "q_proj"), ("gate", "gate_proj"), ("all_linear", "all-linear")],
)
def test_unknown_target_names_the_nearest(name: str, nearest: str) -> None:
    message = f"{name!r} is not a linear layer of Gemma; did you mean {nearest!r}?"
    with pytest.raises(ValueError, match=re.escape(message)):
        lora.resolve_targets(["v_proj", name])


def test_no_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lora.target_modules is empty"):
        lora.resolve_targets([])
