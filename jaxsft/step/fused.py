"""The loss of a Gemma with LoRA and its gradient with respect to the adapter, layer by layer.

One `lax.scan` over the layers forward, which saves what fused_layer.py says, then one backward. The
loss head forms the gradient with respect to the hidden states in its forward pass.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.common.batch import Batch
from jaxsft.gemma.loss import (
    TokenLoss,
    cross_entropy,
    flat_batch,
    loss_and_hidden_gradient,
    target_log_probs,
)
from jaxsft.step.fused_layer import LayerSettings, layer_backward, layer_forward, make_attend
from jaxsft.step.fused_weights import FusedLayout, Layer, write_adapter
from jaxsft.step.row_kernels import Stacked, enter, enter_backward


class FusedSpec(NamedTuple):
    """Static settings of the fused loss; hashable."""

    layout: FusedLayout
    dtype: Any  # of activations and of the frozen weights
    chunk_tokens: int
    recompute_layers: bool  # save only the layers' inputs
    use_kernel: bool  # Pallas attention; False: the XLA reference


def loss_and_gradients(
    weights: dict[str, Any],
    grouped: list[list[Layer]],
    batch: Batch,
    so_far: list[list[Layer]],
    spec: FusedSpec,
    token_loss: TokenLoss = cross_entropy,
) -> tuple[jax.Array, list[list[Layer]], jax.Array]:
    """The summed loss of rows [B, T] and its gradients.

    Args:
      weights: fused weights with `grouped` in their pads already (`write_adapter`).
      grouped: the adapter as `group_adapter` returns it.
      so_far: float32 gradients to add to, shaped like `grouped`.

    Returns:
      The loss sum, `so_far` plus the gradient with respect to `grouped`, and the gradient with
      respect to the embedded tokens [N, D].
    """
    settings = _settings(batch, spec)
    x, saved_by_segment = _embed(weights, batch, spec), []
    segments = list(zip(weights["stacks"], grouped, spec.layout.segments, strict=True))
    for stacks, loras, (kinds, _) in segments:

        def forward(x, layers, kinds=kinds):
            saved = []
            for (layer, lora), kind in zip(zip(*layers, strict=True), kinds, strict=True):
                x, kept = layer_forward(x, layer, lora, settings[kind])
                saved.append({"x": kept["x"]} if spec.recompute_layers else kept)
            return x, saved

        x, saved = jax.lax.scan(forward, x, (stacks, loras))
        saved_by_segment.append(saved)
    loss_sum, dx = _head(x, weights, batch, spec, token_loss)

    grads_by_segment: list[list[Layer]] = []
    for (stacks, loras, (kinds, count)), saved, sums in zip(
        reversed(segments), reversed(saved_by_segment), reversed(so_far), strict=True
    ):

        def backward(carry, indexed, kinds=kinds, saved=saved):
            (dx, sums), (index, layers) = carry, indexed
            sums = list(sums)
            for p in reversed(range(len(kinds))):
                layer, lora, of_kind = layers[0][p], layers[1][p], settings[kinds[p]]
                saved_here = _reader(saved[p], index)
                if spec.recompute_layers:
                    with jax.named_scope("rematted_computation"):  # as jax.checkpoint calls it
                        again = layer_forward(saved_here("x").read(), layer, lora, of_kind)
                    saved_here = again[1].__getitem__
                dx, of_layer = layer_backward(dx, layer, lora, saved_here, of_kind)
                # Added in place by the matmul that forms the gradient, not in a pass afterwards.
                sums[p] = jax.tree.map(lambda s, g: s.at[index].add(g), sums[p], of_layer)
            return (dx, sums), None

        indexed = jnp.arange(count), (stacks, loras)
        (dx, sums), _ = jax.lax.scan(backward, (dx, sums), indexed, reverse=True)
        grads_by_segment.insert(0, sums)
    return loss_sum, grads_by_segment, dx


def fused_log_probs(
    weights: dict[str, Any], grouped: list[list[Layer]], batch: Batch, spec: FusedSpec
) -> jax.Array:
    """float32 [B, T]: log-probability of every target in nats, 0 where the loss weight is 0.

    `grouped` is written into each layer's pads here; what `weights` has there is not read.
    """
    settings, x = _settings(batch, spec), _embed(weights, batch, spec)
    segments = zip(weights["stacks"], grouped, spec.layout.segments, strict=True)
    for stacks, loras, (kinds, _) in segments:

        def forward(x, layers, kinds=kinds):
            for (layer, lora), kind in zip(zip(*layers, strict=True), kinds, strict=True):
                x, _ = layer_forward(x, write_adapter(layer, lora), lora, settings[kind])
            return x, None

        x, _ = jax.lax.scan(forward, x, (stacks, loras))
    hidden, table, flat = _head_inputs(x, weights, batch, spec)
    log_probs_N = target_log_probs(hidden, table, flat, *_head_settings(batch, spec))
    return log_probs_N.reshape(batch.tokens_BT.shape)


def _settings(batch: Batch, spec: FusedSpec) -> dict[str, LayerSettings]:
    """By layer kind."""
    config, use_kernel = spec.layout.config, spec.use_kernel
    kinds = {kind for kinds, _ in spec.layout.segments for kind in kinds}
    return {
        kind: LayerSettings(
            attend=make_attend(config, kind, batch, use_kernel=use_kernel),
            batch_shape=batch.tokens_BT.shape,
            eps=config.rms_norm_eps,
            use_kernel=use_kernel,
        )
        for kind in kinds
    }


@jax.named_scope("embedding")
def _embed(weights: dict[str, Any], batch: Batch, spec: FusedSpec) -> jax.Array:
    # The factor is rounded to the activation dtype as in the reference: bfloat16 48 for 2304.
    factor = jnp.asarray(math.sqrt(spec.layout.config.d_model), spec.dtype)
    return weights["embedding"][batch.tokens_BT.reshape(-1)].astype(spec.dtype) * factor


def _head(
    x_ND: jax.Array,
    weights: dict[str, Any],
    batch: Batch,
    spec: FusedSpec,
    token_loss: TokenLoss,
) -> tuple[jax.Array, jax.Array]:
    """(loss sum, its gradient with respect to the last layer's output, before the final norm)."""
    config, scale = spec.layout.config, weights["final_norm"]
    inputs = _head_inputs(x_ND, weights, batch, spec)
    with jax.named_scope("loss_head"):
        loss_sum, d_hidden = loss_and_hidden_gradient(
            *inputs, token_loss, *_head_settings(batch, spec)
        )
    zeros = jnp.zeros_like(d_hidden)
    return loss_sum, enter_backward(zeros, d_hidden, x_ND, scale, eps=config.rms_norm_eps)[0]


def _head_inputs(
    x_ND: jax.Array, weights: dict[str, Any], batch: Batch, spec: FusedSpec
) -> tuple[jax.Array, jax.Array, Batch]:
    """(hidden states after the final norm, table, flat batch), from the last layer's output."""
    (hidden,) = enter(x_ND, weights["final_norm"], eps=spec.layout.config.rms_norm_eps)
    return hidden, weights["embedding"], flat_batch(batch)


def _head_settings(batch: Batch, spec: FusedSpec) -> tuple[float | None, int]:
    return spec.layout.config.final_softcap, min(spec.chunk_tokens, batch.tokens_BT.size)


def _reader(stack: Layer, index: jax.Array) -> Callable[[str], Stacked]:
    """One layer's saved arrays, by name.

    Every use has an index of its own: otherwise XLA shares one slice between the consumers and
    copies it out of the stack for them (0.9 ms for one MLP).
    """

    def saved(name: str) -> Stacked:
        nonlocal index
        index = jax.lax.optimization_barrier(index)
        return Stacked(stack[name], index)

    return saved
