"""How the fused step stores a Gemma: projections grouped and padded so that LoRA is nearly free.

Computed directly, `x W + (x A)(s B)` reads and writes the output twice. Instead W has extra input
rows ("pads") that hold s·B, and one matmul of `[x | x A]` gives both terms. For the MLP's output
projection, whose input is the wide side, W has extra columns that hold A. A group's pads are its
ranks rounded up to a lane tile of 128. Every train step writes them first; nothing else reads them.

Query, key and value are one matrix, ordered by KV head (see flash_attention.py); gate and up share
their LoRA input. Layers that behave alike are stacked for one `lax.scan`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxsft.gemma.architecture import GLOBAL, GemmaConfig

# One layer's or one stack of layers' arrays, by name.
Layer = dict[str, Any]

LANES = 128

# LoRA inputs: the projections that read the same activations share one A.
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "mlp": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_NORMS = ("pre_attn_norm", "post_attn_norm", "pre_mlp_norm", "post_mlp_norm")


@dataclasses.dataclass(frozen=True)
class FusedLayout:
    """Static shape of the fused weights; hashable.

    `segments`: (layer kind of each stack, layers per stack). A segment's layers run one of each
    stack, then the next of each: (("local", "global"), 13) is Gemma 2's 26 layers.
    """

    config: GemmaConfig
    rank: int
    scale: float
    targets: tuple[str, ...]
    segments: tuple[tuple[tuple[str, ...], int], ...]
    is_uniform: bool  # one stack of all layers, whatever the model's pattern is

    def num_pads(self, group: str) -> int:
        """Extra rows (columns for "down") of a group's matrix."""
        num_ranks = self.rank * sum(target in self.targets for target in GROUPS[group])
        return -(-num_ranks // LANES) * LANES


def make_layout(
    config: GemmaConfig, *, row_length: int, rank: int, scale: float, targets: tuple[str, ...]
) -> FusedLayout:
    """The layout for rows of `row_length` tokens.

    Where no window is shorter than a row and the rotary periods agree, local layers are global
    ones, and one stack of all layers compiles in half the time.
    """
    pattern, num_layers = config.layer_pattern, config.num_layers
    is_wide = config.sliding_window is None or config.sliding_window >= row_length
    is_uniform = set(pattern) == {GLOBAL} or (
        is_wide and config.rope_theta_local == config.rope_theta_global
    )
    segments: list[tuple[tuple[str, ...], int]]
    if is_uniform:
        segments = [((GLOBAL,), num_layers)]
    else:
        num_groups, num_tail = divmod(num_layers, len(pattern))
        segments = [(pattern, num_groups), (pattern[:num_tail], 1)]
    kept = tuple(segment for segment in segments if segment[0] and segment[1])
    return FusedLayout(config, rank, scale, targets, kept, is_uniform)


def fuse(frozen: Any, layout: FusedLayout) -> dict[str, Any]:
    """The model's frozen weights in the fused layout, pads zero; `unfuse` is the inverse."""

    def fuse_block(block: Any) -> Layer:
        attn, mlp = block["attn"], block["mlp"]
        q, k, v = (attn[name]["kernel"][...] for name in GROUPS["qkv"])
        layer = {name: block[name]["scale"][...] for name in _NORMS if name in block}
        layer |= {
            "qkv": _pad_rows(join_heads(q, k, v, layout.config), layout.num_pads("qkv")),
            "o": _pad_rows(attn["o_proj"]["kernel"][...], layout.num_pads("o")),
            "gate": _pad_rows(mlp["gate_proj"]["kernel"][...], layout.num_pads("mlp")),
            "up": _pad_rows(mlp["up_proj"]["kernel"][...], layout.num_pads("mlp")),
            "down": _pad_columns(mlp["down_proj"]["kernel"][...], layout.num_pads("down")),
        }
        # q_norm and k_norm as one array; zeros, never read, for a model without them.
        zeros = jnp.zeros((*q.shape[:-2], layout.config.head_dim), q.dtype)
        head_norms = [attn[n]["scale"][...] if n in attn else zeros for n in ("q_norm", "k_norm")]
        return layer | {"head_norms": jnp.stack(head_norms, axis=-2)}

    return {
        "embedding": frozen["embedding"][...],
        "final_norm": frozen["final_norm"]["scale"][...],
        "stacks": _by_stack(frozen, fuse_block, layout),
    }


def unfuse(weights: dict[str, Any], frozen: Any, layout: FusedLayout) -> nnx.State:
    """The model's own frozen weights, shaped like the abstract tree `frozen`."""
    config = layout.config
    taken = jax.tree.map(lambda x: x, frozen)  # new Variables: the abstract tree stays abstract

    def put(module: Any, name: str, value: jax.Array) -> None:
        module[name] = module[name].replace(value)

    put(taken, "embedding", weights["embedding"])
    put(taken["final_norm"], "scale", weights["final_norm"])
    blocks = [block for part in ("blocks", "tail") for block in _blocks(taken, part)]
    for block, layer in zip(blocks, _by_block(weights["stacks"], layout), strict=True):
        attn, mlp = block["attn"], block["mlp"]
        for name in _NORMS:
            if name in block:
                put(block[name], "scale", layer[name])
        for i, name in enumerate(("q_norm", "k_norm")):
            if name in attn:
                put(attn[name], "scale", layer["head_norms"][..., i, :])
        qkv = split_heads(layer["qkv"][..., : config.d_model, :], config)
        for name, kernel in zip(GROUPS["qkv"], qkv, strict=True):
            put(attn[name], "kernel", kernel)
        q_dim, _ = config.linear_shapes["o_proj"]
        put(attn["o_proj"], "kernel", layer["o"][..., :q_dim, :])
        put(mlp["gate_proj"], "kernel", layer["gate"][..., : config.d_model, :])
        put(mlp["up_proj"], "kernel", layer["up"][..., : config.d_model, :])
        put(mlp["down_proj"], "kernel", layer["down"][..., : config.d_model])
    return taken


def group_adapter(adapter: Any, layout: FusedLayout) -> list[list[Layer]]:
    """The adapter in the fused layout, by segment and stack; a linear map that keeps the dtype.

    For each group A [.., in, pads] and s·B [.., pads, out], each projection in its own rank rows,
    zeros elsewhere. The transpose of this map converts gradients back.
    """
    config = layout.config

    def group_block(block: Any) -> Layer:
        def of(name: str) -> tuple[jax.Array, jax.Array] | None:
            if name not in layout.targets:
                return None
            lora = block["mlp" if name in ("gate_proj", "up_proj", "down_proj") else "attn"][name]
            lora = lora["lora"]
            return lora["a"][...], layout.scale * lora["b"][...]

        layer: Layer = {}
        for group, names in GROUPS.items():
            factors = {name: factor for name in names if (factor := of(name)) is not None}
            if not factors:
                continue
            pads = layout.num_pads(group)
            layer[f"{group}_a"] = _pad_columns(
                jnp.concatenate([a for a, _ in factors.values()], axis=-1), pads, total=True
            )
            for part, members in _outputs(group):
                rows = [_place(b, name, members, config) for name, (_, b) in factors.items()]
                layer[f"{part}_b"] = _pad_rows(jnp.concatenate(rows, axis=-2), pads, total=True)
        return layer

    return _by_stack(adapter, group_block, layout)


def _outputs(group: str) -> list[tuple[str, tuple[str, ...]]]:
    """(matrix, the projections in its columns) for each matrix of a group."""
    if group == "mlp":
        return [("gate", ("gate_proj",)), ("up", ("up_proj",))]
    return [(group, GROUPS[group])]


def _place(b: jax.Array, name: str, members: tuple[str, ...], config: GemmaConfig) -> jax.Array:
    """One projection's B in its columns of the matrix, zeros in the other columns."""
    parts = [
        b
        if name == member
        else jnp.zeros((*b.shape[:-1], config.linear_shapes[member][1]), b.dtype)
        for member in members
    ]
    if len(parts) == 1:
        return parts[0]
    q, k, v = parts
    return join_heads(q, k, v, config)


def write_adapter(stack: Layer, grouped: Layer) -> Layer:
    """The stack of layers with the grouped adapter in its extra rows and columns."""
    written = dict(stack)
    for name in ("qkv", "o", "gate", "up"):
        if f"{name}_b" in grouped:
            b = grouped[f"{name}_b"]
            written[name] = stack[name].at[..., stack[name].shape[-2] - b.shape[-2] :, :].set(b)
    if "down_a" in grouped:
        a = grouped["down_a"]
        written["down"] = stack["down"].at[..., stack["down"].shape[-1] - a.shape[-1] :].set(a)
    return written


def join_heads(q: jax.Array, k: jax.Array, v: jax.Array, config: GemmaConfig) -> jax.Array:
    """[.., N·H], [.., K·H], [.., K·H] -> [.., K·(G+2)·H]: each KV head's G queries, key, value."""
    parts = (x.reshape(*x.shape[:-1], config.num_kv_heads, -1) for x in (q, k, v))
    joined = jnp.concatenate(list(parts), axis=-1)
    return joined.reshape(*joined.shape[:-2], -1)


def split_heads(qkv: jax.Array, config: GemmaConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The inverse of `join_heads`."""
    num_kv_heads, head_dim = config.num_kv_heads, config.head_dim
    by_head = qkv.reshape(*qkv.shape[:-1], num_kv_heads, -1)
    query_dim = config.num_heads // num_kv_heads * head_dim
    q, k, v = jnp.split(by_head, (query_dim, query_dim + head_dim), axis=-1)
    return tuple(x.reshape(*qkv.shape[:-1], -1) for x in (q, k, v))  # type: ignore[return-value]


def _pad_rows(x: jax.Array, pads: int, *, total: bool = False) -> jax.Array:
    num_pads = pads - x.shape[-2] if total else pads
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, num_pads), (0, 0)])


def _pad_columns(x: jax.Array, pads: int, *, total: bool = False) -> jax.Array:
    num_pads = pads - x.shape[-1] if total else pads
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, num_pads)])


def _by_stack(
    state: Any, convert: Callable[[Any], Layer], layout: FusedLayout
) -> list[list[Layer]]:
    """The converted blocks as the layout's stacks, by segment."""
    stacked = [convert(block) for block in _blocks(state, "blocks")]
    tail = [convert(block) for block in _blocks(state, "tail")]
    if not layout.is_uniform:
        single = [jax.tree.map(lambda x: x[None], layer) for layer in tail]
        return [stacks for stacks in (stacked, single) if stacks]

    def weave(*leaves: jax.Array) -> jax.Array:
        """Layer order from the stacks of the pattern's positions and the leftover layers."""
        stacks, rest = leaves[: len(stacked)], leaves[len(stacked) :]
        woven = jnp.stack(stacks, axis=1) if stacks else None
        parts = [] if woven is None else [woven.reshape(-1, *woven.shape[2:])]
        return jnp.concatenate([*parts, *(leaf[None] for leaf in rest)])

    return [[jax.tree.map(weave, *stacked, *tail)]]


def _by_block(stacks: list[list[Layer]], layout: FusedLayout) -> list[Layer]:
    """The inverse of `_by_stack`: one Layer for each of the model's blocks, then the tail's."""
    if not layout.is_uniform:
        main, *tails = stacks
        return main + [jax.tree.map(lambda x: x[0], layer) for tail in tails for layer in tail]
    (stack,) = stacks[0]
    period = len(layout.config.layer_pattern)
    num_woven = layout.config.num_layers // period * period
    blocks = [jax.tree.map(lambda x, p=p: x[:num_woven][p::period], stack) for p in range(period)]
    rest = range(num_woven, layout.config.num_layers)
    return blocks + [jax.tree.map(lambda x, i=i: x[i], stack) for i in rest]


def _blocks(state: Any, part: str) -> list[Any]:
    return [state[part][i] for i in sorted(state[part])] if part in state else []
