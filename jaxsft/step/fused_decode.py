"""Decoding from the fused step's weights, so that generation during training needs no second copy.

Each layer reads its own slice of the stacks, without the pads, inside the loop over the layers: the
adapter in the pads is that of the step before. The LoRA term is added as it stands, (x A)(s·B):
with a few tokens at a time that costs nothing.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from jaxsft.gemma.architecture import GLOBAL, LOCAL, GemmaConfig
from jaxsft.gemma.attention import Tokens
from jaxsft.gemma.layers import apply_rotary, rms_norm, rotary_table
from jaxsft.gemma.model import (
    AttendFn,
    KVCache,
    cached_attention,
    embed_tokens,
    empty_cache,
    head_logits,
)
from jaxsft.gemma.sharding import constrain
from jaxsft.step.fused_weights import FusedLayout, Layer, group_adapter, split_heads


class FusedModelBuilder(NamedTuple):
    """The `ModelBuilder` of fused weights."""

    layout: FusedLayout
    dtype: Any

    @property
    def config(self) -> GemmaConfig:
        """The model's architecture."""
        return self.layout.config

    def __call__(self, adapter: nnx.State, frozen: dict[str, Any]) -> "FusedModel":
        """The model with these arrays; `frozen` are fused weights."""
        cast = jax.tree.map(lambda x: x.astype(self.dtype), adapter)
        return FusedModel(self, frozen, group_adapter(cast, self.layout))


class FusedModel(NamedTuple):
    """What decoding needs of a model, on fused weights."""

    builder: FusedModelBuilder
    weights: dict[str, Any]
    grouped: list[list[Layer]]

    def init_cache(self, batch: int, num_slots: int, *, mesh: Mesh | None = None) -> KVCache:
        """As `empty_cache`."""
        return empty_cache(self.builder.config, self.builder.dtype, batch, num_slots, mesh=mesh)

    def logits(self, x: jax.Array) -> jax.Array:
        """As `head_logits`."""
        return head_logits(x, self.weights["embedding"], self.builder.config.final_softcap)

    def with_cache(
        self, tokens_BT: jax.Array, where: Tokens, cache: KVCache, *, mesh: Mesh | None = None
    ) -> tuple[jax.Array, KVCache]:
        """As `Gemma.with_cache`."""
        config = self.builder.config
        attend_fn, complete = cached_attention(config, where, cache)
        x = embed_tokens(tokens_BT, self.weights["embedding"], config.d_model, self.builder.dtype)
        theta = {LOCAL: config.rope_theta_local, GLOBAL: config.rope_theta_global}
        rotary = {
            kind: rotary_table(where.positions, config.head_dim, theta[kind]) for kind in theta
        }
        pattern = config.layer_pattern
        num_groups, num_tail = divmod(config.num_layers, len(pattern))

        def run(x: jax.Array, cache: KVCache, group: Any, place: int) -> tuple[jax.Array, KVCache]:
            kind, index = pattern[place], group * len(pattern) + place
            x = constrain(x, mesh, "batch", None, None)
            layer = self._read(group, place)
            return _run_layer(x, cache, layer, kind, index, rotary[kind], attend_fn, config)

        def run_group(carry: Any, group: jax.Array) -> tuple[Any, None]:
            x, cache = carry
            for place in range(len(pattern)):
                x, cache = run(x, cache, group, place)
            return (x, cache), None

        (x, cache), _ = lax.scan(run_group, (x, cache), jnp.arange(num_groups))
        for place in range(num_tail):
            x, cache = run(x, cache, num_groups, place)
        return rms_norm(x, self.weights["final_norm"], config.rms_norm_eps), complete(cache)

    def _read(self, group: Any, place: int) -> Layer:
        """The arrays of the pattern's layer `place` in repetition `group`, without pads."""
        layout, config = self.builder.layout, self.builder.config
        pattern, num_groups = config.layer_pattern, config.num_layers // len(config.layer_pattern)
        if layout.is_uniform:
            segment, stack, row = 0, 0, group * len(pattern) + place
        elif isinstance(group, int) and group == num_groups:  # the tail, the last segment
            segment, stack, row = len(layout.segments) - 1, place, 0
        else:
            segment, stack, row = 0, place, group
        q_dim, d_model = config.linear_shapes["o_proj"]
        num_rows = {"qkv": d_model, "o": q_dim, "gate": d_model, "up": d_model}

        def read(name: str, array: jax.Array) -> jax.Array:
            size = [1, *array.shape[1:]]
            if name in num_rows:
                size[1] = num_rows[name]
            elif name == "down":
                size[2] = d_model
            start = (row, *[0] * (array.ndim - 1))
            return lax.dynamic_slice(array, start, size)[0]

        stacks = self.weights["stacks"][segment][stack] | self.grouped[segment][stack]
        return {name: read(name, array) for name, array in stacks.items()}


def _run_layer(
    x: jax.Array,
    cache: KVCache,
    layer: Layer,
    kind: str,
    index: Any,
    rotary: jax.Array,
    attend_fn: AttendFn,
    config: GemmaConfig,
) -> tuple[jax.Array, KVCache]:
    """model.py's Block on the fused arrays of one layer: x [B, T, D] -> ([B, T, D], cache)."""

    def project(x: jax.Array, name: str, group: str) -> jax.Array:
        y = x @ layer[name]
        if f"{name}_b" in layer:
            with jax.named_scope("lora"):
                y += (x @ layer[f"{group}_a"]) @ layer[f"{name}_b"]
        return y

    def norm(x: jax.Array, name: str) -> jax.Array:
        """Gemma 1 has no norm on what a layer's halves add."""
        return rms_norm(x, layer[name], config.rms_norm_eps) if name in layer else x

    with jax.named_scope("attention"):
        qkv = project(norm(x, "pre_attn_norm"), "qkv", "qkv")
        q, k, v = (y.reshape(*y.shape[:2], -1, config.head_dim) for y in split_heads(qkv, config))
        if config.qk_norm:
            q = rms_norm(q, layer["head_norms"][0], config.rms_norm_eps)
            k = rms_norm(k, layer["head_norms"][1], config.rms_norm_eps)
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        heads, updated = attend_fn(kind, index, q, k, v, cache)
        assert updated is not None
        y = project(heads.reshape(*x.shape[:2], -1), "o", "o")
        x = x + norm(y, "post_attn_norm")
    with jax.named_scope("mlp"):
        h = norm(x, "pre_mlp_norm")
        gate = jax.nn.gelu(project(h, "gate", "mlp"), approximate=True)
        y = project(gate * project(h, "up", "mlp"), "down", "down")
        return x + norm(y, "post_mlp_norm"), updated
