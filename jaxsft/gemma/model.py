"""Gemma 1, 2 and 3 text models, read top-down: one config-driven implementation.

Layers are stored by their repeating pattern (Gemma 3: five local, one global): `blocks[p]` holds
the p-th layer of every repetition, stacked for one `lax.scan`. The remaining layers (Gemma 3 1B:
two local ones) are unstacked in `tail`. The model returns hidden states; the loss and the sampler
apply the head, so that no [B, T, V] array ever exists.

Axes: see layers.py.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from jaxsft.gemma.architecture import GLOBAL, LOCAL, GemmaConfig
from jaxsft.gemma.attention import Tokens, attend, attention_mask, soft_cap
from jaxsft.gemma.layers import Linear, RMSNorm, apply_rotary, rotary_table
from jaxsft.gemma.sharding import constrain

# What is saved of each layer for the backward pass; everything else is recomputed.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,  # keep everything: fastest, most memory
    "projections": jax.checkpoint_policies.save_only_these_names("qkv", "attention", "mlp"),
    "full": jax.checkpoint_policies.nothing_saveable,  # keep the layer inputs only
}


class KVCache(NamedTuple):
    """Keys and values of every layer. All rows fill the same slots, in order."""

    kv_L2BSKH: jax.Array
    tokens: Tokens  # int32 [B, S]: each slot's position and segment; segment 0 is an empty slot
    num_filled: jax.Array  # int32 scalar


# (layer kind, layer index, q, k, v, cache) -> (attention output [B, T, N, H], cache)
AttendFn = Callable[..., tuple[jax.Array, KVCache | None]]


def empty_cache(
    config: GemmaConfig, dtype: Any, batch: int, num_slots: int, *, mesh: Mesh | None = None
) -> KVCache:
    """A cache for `batch` rows of up to `num_slots` tokens, padding included."""
    shape = (config.num_layers, 2, batch, num_slots, config.num_kv_heads, config.head_dim)
    kv = constrain(jnp.zeros(shape, dtype), mesh, None, None, "batch", None, None, None)
    empty = jnp.zeros((batch, num_slots), jnp.int32)
    return KVCache(kv, Tokens(empty, empty), jnp.int32(0))


def repeat_rows(cache: KVCache, times: int, *, mesh: Mesh | None = None) -> KVCache:
    """The cache with each row `times` times, side by side; on devices that split the rows evenly
    each repeats its own."""
    if times == 1:
        return cache
    kv = jnp.repeat(cache.kv_L2BSKH, times, axis=2)
    kv = constrain(kv, mesh, None, None, "batch", None, None, None)
    return KVCache(
        kv, Tokens(*(jnp.repeat(x, times, axis=0) for x in cache.tokens)), cache.num_filled
    )


def cached_attention(
    config: GemmaConfig, where: Tokens, cache: KVCache
) -> tuple[AttendFn, Callable[[KVCache], KVCache]]:
    """Attention of the next T tokens to those in the cache and to each other.

    Returns the function for each layer, which writes the layer's keys and values into the cache
    that it is given, and what completes the cache after the last layer. Rows are padded on their
    left, by tokens of segment 0: a window's tokens are neighbours.
    """
    start, length, num_slots = cache.num_filled, where.positions.shape[1], cache.kv_L2BSKH.shape[3]
    put = partial(lax.dynamic_update_slice, start_indices=(0, start))
    tokens, seen, masks = jax.tree.map(put, cache.tokens, where), {}, {}
    for kind in (LOCAL, GLOBAL):
        window = config.sliding_window if kind == LOCAL else None
        size = num_slots if window is None else min(num_slots, length + window - 1)
        seen[kind] = jnp.maximum(start + length - size, 0), size
        key = Tokens(*(lax.dynamic_slice_in_dim(x, *seen[kind], axis=1) for x in tokens))
        masks[kind] = attention_mask(where, key, window)

    def attend_fn(kind, layer, q_BTNH, k_BTKH, v_BTKH, cache):
        new = jnp.stack([k_BTKH, v_BTKH])[None]
        kv = lax.dynamic_update_slice(cache.kv_L2BSKH, new, (layer, 0, 0, start, 0, 0))
        first, size = seen[kind]
        shape = (1, 2, len(new[0, 0]), size, *kv.shape[4:])
        k_BSKH, v_BSKH = lax.dynamic_slice(kv, (layer, 0, 0, first, 0, 0), shape)[0]
        heads = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            masks[kind],
            scale=config.query_scale,
            logit_cap=config.attn_softcap,
        )
        return heads, cache._replace(kv_L2BSKH=kv)

    def complete(cache: KVCache) -> KVCache:
        return cache._replace(tokens=tokens, num_filled=start + length)

    return attend_fn, complete


def embed_tokens(tokens_BT: jax.Array, table_VD: jax.Array, d_model: int, dtype: Any) -> jax.Array:
    """[..., D] in `dtype`: the table's rows · sqrt(D).

    The factor is rounded to the activation dtype as in the reference: bfloat16 48 for 2304.
    """
    factor = jnp.asarray(math.sqrt(d_model), dtype)
    with jax.named_scope("embedding"):
        return table_VD[tokens_BT].astype(dtype) * factor


def head_logits(x: jax.Array, table_VD: jax.Array, logit_cap: float | None) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D], soft cap included."""
    table_VD = table_VD.astype(x.dtype)
    logits = jnp.einsum("VD,...D->V...", table_VD, x, preferred_element_type=jnp.float32)
    # Without the barrier XLA would swap the factors: on a CPU, 16 rows then take twice as long.
    logits = jnp.moveaxis(lax.optimization_barrier(logits), 0, -1)
    return soft_cap(logits, logit_cap)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions and, for Gemma 3, normalised q and k heads."""

    def __init__(
        self, config: GemmaConfig, linear: Callable[..., Linear], norm: Callable[[int], RMSNorm]
    ):
        self.q_proj = linear("q_proj", axes=("embed", "heads"))
        self.k_proj = linear("k_proj", axes=("embed", "heads"))
        self.v_proj = linear("v_proj", axes=("embed", "heads"))
        self.o_proj = linear("o_proj", axes=("heads", "embed"))
        self.q_norm = norm(config.head_dim) if config.qk_norm else None
        self.k_norm = norm(config.head_dim) if config.qk_norm else None
        self.head_dim = config.head_dim

    def __call__(
        self, x_BTD: jax.Array, rotary: jax.Array, attend_fn: Callable, keys: list
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B, T, D] -> ([B, T, D], cache); `attend_fn` maps (q, k, v) to the heads' outputs."""

        def heads(projection: Linear, key: jax.Array | None) -> jax.Array:
            y = checkpoint_name(projection(x_BTD, key), "qkv")
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        q_BTNH, k_BTKH = heads(self.q_proj, keys[0]), heads(self.k_proj, keys[1])
        v_BTKH = heads(self.v_proj, keys[2])
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = apply_rotary(q_BTNH, rotary), apply_rotary(k_BTKH, rotary)
        out_BTNH, cache = attend_fn(q_BTNH, k_BTKH, v_BTKH)
        out = checkpoint_name(out_BTNH.reshape(*x_BTD.shape[:2], -1), "attention")
        return self.o_proj(out, keys[3]), cache


class MLP(nnx.Module):
    """Gated MLP: down(gelu(gate x) · up x), tanh-approximated GELU."""

    def __init__(self, linear: Callable[..., Linear]):
        self.gate_proj = linear("gate_proj", axes=("embed", "mlp"))
        self.up_proj = linear("up_proj", axes=("embed", "mlp"))
        self.down_proj = linear("down_proj", axes=("mlp", "embed"))

    def __call__(self, x_BTD: jax.Array, keys: list) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        gate = checkpoint_name(self.gate_proj(x_BTD, keys[0]), "mlp")
        up = checkpoint_name(self.up_proj(x_BTD, keys[1]), "mlp")
        return self.down_proj(jax.nn.gelu(gate, approximate=True) * up, keys[2])


class Block(nnx.Module):
    """One layer: x + attention(norm x), then x + mlp(norm x); Gemma 2 and 3 norm outputs too."""

    def __init__(
        self, config: GemmaConfig, *, stack: tuple[int, ...], dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        def linear(name: str, axes: tuple[str, str]) -> Linear:
            in_dim, out_dim = config.linear_shapes[name]
            return Linear(in_dim, out_dim, axes=axes, stack=stack, dtype=dtype, rngs=rngs)

        norm = partial(RMSNorm, eps=config.rms_norm_eps, stack=stack, dtype=dtype)
        self.pre_attn_norm = norm(config.d_model)
        self.attn = Attention(config, linear, norm)
        self.post_attn_norm = norm(config.d_model) if config.post_norms else None
        self.pre_mlp_norm = norm(config.d_model)
        self.mlp = MLP(linear)
        self.post_mlp_norm = norm(config.d_model) if config.post_norms else None

    def __call__(
        self,
        x_BTD: jax.Array,
        rotary: jax.Array,
        attend_fn: Callable,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        """x [B, T, D] -> ([B, T, D], cache)."""
        keys = [None] * 7 if dropout_key is None else list(jax.random.split(dropout_key, 7))
        with jax.named_scope("attention"):  # a plan reports time by these scopes
            y, cache = self.attn(self.pre_attn_norm(x_BTD), rotary, attend_fn, keys[:4])
            x_BTD = x_BTD + (y if self.post_attn_norm is None else self.post_attn_norm(y))
        with jax.named_scope("mlp"):
            y = self.mlp(self.pre_mlp_norm(x_BTD), keys[4:])
            x_BTD = x_BTD + (y if self.post_mlp_norm is None else self.post_mlp_norm(y))
        return x_BTD, cache


class Gemma(nnx.Module):
    """The text model. Build it inside `nnx.eval_shape` to get its tree without memory.

    `param_dtype` is the dtype of the frozen weights, `dtype` that of the activations.
    """

    def __init__(
        self,
        config: GemmaConfig,
        *,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: str = "none",
        rngs: nnx.Rngs,
    ):
        if remat not in REMAT_POLICIES:
            raise ValueError(f"remat {remat!r} is not one of {', '.join(REMAT_POLICIES)}")
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.remat = remat
        period = len(config.layer_pattern)
        self.num_groups, num_tail = divmod(config.num_layers, period)
        shape = (config.vocab_size, config.d_model)
        table = jax.random.normal(rngs.params(), shape, param_dtype) / math.sqrt(config.d_model)
        self.embedding = nnx.Param(table.astype(param_dtype), axes=("vocab", "embed"))

        def block(*stack: int) -> Block:
            return Block(config, stack=stack, dtype=param_dtype, rngs=rngs)

        self.blocks = nnx.List([block(self.num_groups) for _ in range(period)])
        self.tail = nnx.List([block() for _ in range(num_tail)])
        self.final_norm = RMSNorm(
            config.d_model, eps=config.rms_norm_eps, stack=(), dtype=param_dtype
        )

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array,
        *,
        mesh: Mesh | None = None,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [B, T, D] after the final norm, for packed rows (segment 0 is padding)."""
        where = Tokens(positions_BT, segment_ids_BT)
        config = self.config
        masks = {
            LOCAL: attention_mask(where, where, config.sliding_window),
            GLOBAL: attention_mask(where, where, None),
        }

        def attend_fn(kind, layer, q_BTNH, k_BTKH, v_BTKH, cache):
            heads = attend(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                masks[kind],
                scale=config.query_scale,
                logit_cap=config.attn_softcap,
            )
            return heads, cache

        x, _ = self._run(tokens_BT, positions_BT, attend_fn, None, mesh, dropout_key)
        return x

    def with_cache(
        self, tokens_BT: jax.Array, where: Tokens, cache: KVCache, *, mesh: Mesh | None = None
    ) -> tuple[jax.Array, KVCache]:
        """Hidden states [B, T, D] of the next T tokens (decoding: one), and the cache with them."""
        attend_fn, complete = cached_attention(self.config, where, cache)
        x, updated = self._run(tokens_BT, where.positions, attend_fn, cache, mesh, None)
        assert updated is not None
        return x, complete(updated)

    def init_cache(self, batch: int, num_slots: int, *, mesh: Mesh | None = None) -> KVCache:
        """As `empty_cache`."""
        return empty_cache(self.config, self.dtype, batch, num_slots, mesh=mesh)

    def logits(self, x: jax.Array) -> jax.Array:
        """As `head_logits`."""
        return head_logits(x, self.embedding[...], self.config.final_softcap)

    def _run(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        attend_fn: AttendFn,
        cache: KVCache | None,
        mesh: Mesh | None,
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, KVCache | None]:
        config, pattern = self.config, self.config.layer_pattern
        x = embed_tokens(tokens_BT, self.embedding[...], config.d_model, self.dtype)
        theta = {LOCAL: config.rope_theta_local, GLOBAL: config.rope_theta_global}
        rotary = {kind: rotary_table(positions_BT, config.head_dim, theta[kind]) for kind in theta}

        def run_block(state, graphdef, kind, layer, x, cache):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer)
            x = constrain(x, mesh, "batch", None, None)

            def attend_here(q, k, v):
                return attend_fn(kind, layer, q, k, v, cache)

            return nnx.merge(graphdef, state)(x, rotary[kind], attend_here, key)

        def step(graphdef, kind):
            def apply(state, layer, x, cache):
                return run_block(state, graphdef, kind, layer, x, cache)

            if self.remat == "none" or cache is not None:
                return apply
            return jax.checkpoint(apply, policy=REMAT_POLICIES[self.remat])

        graphdefs, states = zip(*(nnx.split(block) for block in self.blocks), strict=True)

        def group(carry, states):
            x, cache, layer = carry
            for graphdef, state, kind in zip(graphdefs, states, pattern, strict=True):
                x, cache = step(graphdef, kind)(state, layer, x, cache)
                layer = layer + 1
            return (x, cache, layer), None

        (x, cache, layer), _ = lax.scan(group, (x, cache, jnp.int32(0)), states)
        for block, kind in zip(self.tail, pattern, strict=False):
            graphdef, state = nnx.split(block)
            x, cache = step(graphdef, kind)(state, layer, x, cache)
            layer = layer + 1
        return self.final_norm(x), cache


def layer_location(config: GemmaConfig, layer: int) -> tuple[str, int, int | None]:
    """Where layer `layer` is in the tree: ("blocks", p, row of the stack) or ("tail", i, None).

    The parameters of a block in "blocks" have a leading dimension of one row per repetition.
    """
    period = len(config.layer_pattern)
    num_groups = config.num_layers // period
    if layer < num_groups * period:
        return "blocks", layer % period, layer // period
    return "tail", layer - num_groups * period, None
