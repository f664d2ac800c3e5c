"""One layer of a Gemma with LoRA, forward and backward written out by hand.

The same function as model.py's Block with autodiff, for training only. LoRA is part of the frozen
matmuls (fused_weights.py). The forward pass saves what is costly to compute again, and the backward
pass reads each saved array where it needs it. Only the adapter gets a gradient.

Axes: N = B·T tokens, D model, F MLP; `pads` are the extra rows and columns that hold the adapter.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.common.batch import Batch
from jaxsft.gemma.architecture import LOCAL, GemmaConfig
from jaxsft.gemma.attention import Tokens, attend, attention_mask
from jaxsft.gemma.layers import apply_rotary, rms_norm, rotary_table
from jaxsft.step.flash_attention import HeadLayout, attention_backward, attention_forward
from jaxsft.step.fused_weights import Layer, split_heads
from jaxsft.step.row_kernels import (
    Stacked,
    enter,
    enter_backward,
    leave,
    leave_and_enter,
    leave_and_enter_backward,
    leave_backward,
    read,
    rowwise,
)


class Attend(NamedTuple):
    """Attention on the projection's columns.

    `forward`: (qkv [B, T, C], head norms) -> [B, T, N·H]. `backward`: (qkv [N, C], head norms,
    gradient of the output) -> gradient with respect to qkv.
    """

    forward: Callable[[jax.Array, jax.Array], jax.Array]
    backward: Callable[[jax.Array | Stacked, jax.Array, jax.Array], jax.Array]


def make_attend(
    config: GemmaConfig, kind: str, batch: Batch, *, use_kernel: bool, interpret: bool = False
) -> Attend:
    """Pallas kernels (`interpret` runs them on a CPU), or the XLA reference with autodiff."""
    positions, segments = map(jnp.asarray, (batch.positions_BT, batch.segment_ids_BT))
    window = config.sliding_window if kind == LOCAL else None
    theta = config.rope_theta_local if kind == LOCAL else config.rope_theta_global
    table = rotary_table(positions, config.head_dim, theta)
    if use_kernel:
        layout = HeadLayout(
            num_kv_heads=config.num_kv_heads,
            group_size=config.num_heads // config.num_kv_heads,
            head_dim=config.head_dim,
            scale=config.query_scale,
            logit_cap=config.attn_softcap,
            # A window as long as the row hides nothing.
            window=None if window is None or window >= batch.tokens_BT.shape[1] else window,
            norm_eps=config.rms_norm_eps if config.qk_norm else None,
        )
        rotary = table[..., 0, :]
        forward_kernel = partial(attention_forward, layout=layout, interpret=interpret)
        backward_kernel = partial(attention_backward, layout=layout, interpret=interpret)

        def from_stack(qkv: jax.Array | Stacked, norms: jax.Array, d_out: jax.Array) -> jax.Array:
            if not isinstance(qkv, Stacked):
                qkv = Stacked(qkv[None], jnp.int32(0))
            stack = qkv.stack.reshape(-1, *segments.shape, qkv.stack.shape[-1])
            return backward_kernel(Stacked(stack, qkv.layer), d_out, rotary, norms, segments)

        return Attend(lambda qkv, norms: forward_kernel(qkv, rotary, norms, segments), from_stack)
    where = Tokens(positions, segments)
    mask = attention_mask(where, where, window)

    def forward(qkv: jax.Array, norms: jax.Array) -> jax.Array:
        heads = (x.reshape(*x.shape[:2], -1, config.head_dim) for x in split_heads(qkv, config))
        q, k, v = heads
        if config.qk_norm:
            q = rms_norm(q, norms[0], config.rms_norm_eps)
            k = rms_norm(k, norms[1], config.rms_norm_eps)
        q, k = apply_rotary(q, table), apply_rotary(k, table)
        out = attend(q, k, v, mask, scale=config.query_scale, logit_cap=config.attn_softcap)
        return out.reshape(*qkv.shape[:2], -1)

    def backward(qkv: jax.Array | Stacked, norms: jax.Array, d_out: jax.Array) -> jax.Array:
        qkv_BTC = read(qkv).reshape(*d_out.shape[:2], -1)
        return jax.vjp(lambda qkv: forward(qkv, norms), qkv_BTC)[1](d_out)[0]

    return Attend(forward, backward)


def _matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int], dtype: Any = None) -> jax.Array:
    """Product over one axis of each operand, accumulated in float32, in a's dtype by default."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype or a.dtype)


@jax.named_scope("lora")
def _with_xa(x_NI: jax.Array, a: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """([x | x A], x A), or (x, None) where the projection has no adapter."""
    if a is None:
        return x_NI, None
    xa = _matmul(x_NI, a, (1, 0))
    return jnp.concatenate([x_NI, xa], axis=-1), xa


@jax.named_scope("lora")
def _input_gradient(
    dx_padded: jax.Array, a: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """(dx, d(x A)) from dy [W; s·B]ᵀ, whose last columns are the gradient of x A."""
    if a is None:
        return dx_padded, None
    in_dim = dx_padded.shape[-1] - a.shape[-1]
    dxa = dx_padded[:, in_dim:]
    return dx_padded[:, :in_dim] + _matmul(dxa, a, (1, 1)), dxa


@jax.named_scope("lora")
def _factor_gradient(left: jax.Array, right: jax.Array) -> jax.Array:
    """leftᵀ right over the tokens, float32: dA = xᵀ d(xA), d(s·B) = (xA)ᵀ dy."""
    return _matmul(left, right, (0, 0), jnp.float32)


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


class LayerSettings(NamedTuple):
    """What one kind of layer needs besides its weights. `batch_shape` is (rows, tokens per row)."""

    attend: Attend
    batch_shape: tuple[int, int]
    eps: float
    use_kernel: bool

    def rowwise(self, function: Any, inputs: Any, scales: Any, num_outputs: int = 1) -> Any:
        """A function of row_kernels.py, as a kernel on a TPU."""
        with jax.named_scope("norm"):
            return rowwise(
                partial(function, eps=self.eps),
                inputs,
                scales,
                name=function.__name__,
                num_outputs=num_outputs,
                use_kernel=self.use_kernel,
            )


def layer_forward(
    x_ND: jax.Array, layer: Layer, lora: Layer, settings: LayerSettings
) -> tuple[jax.Array, Layer]:
    """One layer: (output [N, D], what its backward pass reads)."""
    saved: Layer = {"x": x_ND}
    post_attn, post_mlp = _post_norms(layer)
    with jax.named_scope("attention"):
        (h,) = settings.rowwise(enter, [x_ND], [layer["pre_attn_norm"]])
        h, saved["qkv_xa"] = _with_xa(h, lora.get("qkv_a"))
        saved["qkv"] = _matmul(h, layer["qkv"], (1, 0))
        qkv_BTC = saved["qkv"].reshape(*settings.batch_shape, -1)
        heads = settings.attend.forward(qkv_BTC, layer["head_norms"])
        saved["heads"] = heads.reshape(x_ND.shape[0], -1)
        h, saved["o_xa"] = _with_xa(saved["heads"], lora.get("o_a"))
        saved["attn"] = _matmul(h, layer["o"], (1, 0))
    with jax.named_scope("mlp"):
        scales = [layer["pre_mlp_norm"], *post_attn]
        x_ND, h = settings.rowwise(leave_and_enter, [x_ND, saved["attn"]], scales, 2)
        h, saved["mlp_xa"] = _with_xa(h, lora.get("mlp_a"))
        saved["gate"] = _matmul(h, layer["gate"], (1, 0))
        saved["up"] = _matmul(h, layer["up"], (1, 0))
        y = _matmul(_gelu(saved["gate"]) * saved["up"], layer["down"], (1, 0))
        if "down_b" in lora:
            # Here x A comes out as the last columns of x [W | A].
            y, saved["down_xa"] = y[:, : x_ND.shape[1]], y[:, x_ND.shape[1] :]
            with jax.named_scope("lora"):
                y = y + _matmul(saved["down_xa"], lora["down_b"], (1, 0))
        saved["mlp"] = y
        (x_ND,) = settings.rowwise(leave, [x_ND, y], post_mlp)
    return x_ND, {name: value for name, value in saved.items() if value is not None}


def layer_backward(
    dx_ND: jax.Array,
    layer: Layer,
    lora: Layer,
    saved: Callable[[str], Any],
    settings: LayerSettings,
) -> tuple[jax.Array, Layer]:
    """(gradient of the layer's input, float32 gradients of its grouped adapter).

    `saved(name)` is an array or a `Stacked`. It is called for every use: XLA copies a value with
    several consumers out of its stack first.
    """
    dtype = dx_ND.dtype
    grads: Layer = {}
    dxa: jax.Array | None
    post_attn, post_mlp = _post_norms(layer)

    def get(name: str) -> jax.Array:
        return read(saved(name))

    with jax.named_scope("mlp"):
        (dy,) = settings.rowwise(leave_backward, [dx_ND, saved("mlp")], post_mlp)
        dy_padded = dy
        if "down_b" in lora:
            with jax.named_scope("lora"):
                d_down_xa = _matmul(dy, lora["down_b"], (1, 1))
                dy_padded = jnp.concatenate([dy, d_down_xa], axis=-1)
                grads["down_a"] = _factor_gradient(_gelu(get("gate")) * get("up"), d_down_xa)
                grads["down_b"] = _factor_gradient(get("down_xa"), dy)
        d_hidden = _matmul(dy_padded, layer["down"], (1, 1)).astype(jnp.float32)
        gelu, gelu_vjp = jax.vjp(_gelu, get("gate").astype(jnp.float32))
        d_gate = gelu_vjp(d_hidden * get("up").astype(jnp.float32))[0].astype(dtype)
        d_up = (d_hidden * gelu).astype(dtype)
        for name, d_part in (("gate", d_gate), ("up", d_up)):
            if f"{name}_b" in lora:
                grads[f"{name}_b"] = _factor_gradient(get("mlp_xa"), d_part)
        dh = _matmul(d_gate, layer["gate"], (1, 1), jnp.float32)
        dh = (dh + _matmul(d_up, layer["up"], (1, 1), jnp.float32)).astype(dtype)
        dh, dxa = _input_gradient(dh, lora.get("mlp_a"))
        scales = [layer["pre_mlp_norm"], *post_attn]
        inputs = [dx_ND, dh, saved("x"), saved("attn")]
        dx_ND, dy, h = settings.rowwise(leave_and_enter_backward, inputs, scales, 3)
        if dxa is not None:
            grads["mlp_a"] = _factor_gradient(h, dxa)
    with jax.named_scope("attention"):
        d_heads, dxa = _input_gradient(_matmul(dy, layer["o"], (1, 1)), lora.get("o_a"))
        if dxa is not None:
            grads["o_a"] = _factor_gradient(get("heads"), dxa)
            grads["o_b"] = _factor_gradient(get("o_xa"), dy)
        d_qkv_BTC = settings.attend.backward(
            saved("qkv"),
            layer["head_norms"],
            d_heads.reshape(*settings.batch_shape, -1),
        )
        d_qkv = d_qkv_BTC.reshape(dx_ND.shape[0], -1)
        dh, dxa = _input_gradient(_matmul(d_qkv, layer["qkv"], (1, 1)), lora.get("qkv_a"))
        scales = [layer["pre_attn_norm"]]
        dx_ND, h = settings.rowwise(enter_backward, [dx_ND, dh, saved("x")], scales, 2)
        if dxa is not None:
            grads["qkv_a"] = _factor_gradient(h, dxa)
            grads["qkv_b"] = _factor_gradient(get("qkv_xa"), d_qkv)
    return dx_ND, grads


def _post_norms(layer: Layer) -> tuple[list[jax.Array], list[jax.Array]]:
    """The scales of the norms on attention's and MLP's output, where the model has them."""
    names = ("post_attn_norm", "post_mlp_norm")
    attn, mlp = ([layer[name]] if name in layer else [] for name in names)
    return attn, mlp
