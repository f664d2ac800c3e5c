"""Compares two ways to compute the train step on this machine, on the run's own data.

Pallas kernels against XLA where the step has kernels, else the plain step against the fused one.
"""

import dataclasses
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxsft.common.batch import Batch
from jaxsft.config import TrainConfig
from jaxsft.gemma.sharding import named, partition_spec, state_shardings
from jaxsft.run.program import make_fused_spec
from jaxsft.run.setup import Setup
from jaxsft.step.fused import FusedSpec, loss_and_gradients
from jaxsft.step.fused_weights import FusedLayout, Layer, fuse, group_adapter, unfuse, write_adapter
from jaxsft.step.train_step import StepSpec, init_state, train_step

# Largest relative differences of (loss, gradient) by dtype, some twice what rounding makes of the
# real Gemma 3 270M: in bfloat16 4e-4 and 5e-2 with the kernels, whose scores 5% off give 3e-3 and
# 1.2e-1; between whole steps, 18 layers deep, 1e-3 and 1.2e-1.
KERNEL_BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (2e-3, 1e-1)}
STEP_BOUNDS = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 3e-1)}


class StepDifference(NamedTuple):
    """The difference of two ways to compute a step on one batch, relative to the second.

    `ways` names them; `gradient` is the largest ‖g - r‖ / ‖r‖ over the matrices, `where` names that
    matrix.
    """

    ways: str
    loss: float
    gradient: float
    where: str
    loss_bound: float
    gradient_bound: float

    @property
    def is_small(self) -> bool:
        """Within the bounds; NaN is not."""
        return self.loss <= self.loss_bound and self.gradient <= self.gradient_bound


def compare_ways(
    config: TrainConfig, setup: Setup, adapter: nnx.State, batch: Batch
) -> tuple[Setup, StepDifference | None, str]:
    """Returns the new setup, the difference or None, and why there is none.

    Args:
        setup: its frozen weights may be donated.
        adapter: not donated. Where its B is zero, so are the gradients of A, and they tell nothing.
        batch: a global batch [B, T] on the mesh.
    """
    spec, dtype = setup.spec, config.model.dtype
    if spec.model.fused is not None and spec.model.fused.use_kernel:
        kernels, xla = (
            _first_layers(adapter, setup.frozen, batch, spec=other)
            for other in (spec, _without_kernels(spec))
        )
        return (
            setup,
            _difference_of("Pallas kernels and XLA", kernels, xla, KERNEL_BOUNDS[dtype]),
            "",
        )
    try:
        ways, other_spec, weights = _other_formulation(config, setup)
    except ValueError as error:
        return setup, None, str(error)
    reference, _ = _step_gradient(adapter, weights, batch, other_spec)
    ours, frozen = _step_gradient(adapter, setup.frozen, batch, spec)
    difference = _difference_of(ways, ours, reference, STEP_BOUNDS[dtype])
    return dataclasses.replace(setup, frozen=frozen), difference, ""


def _with_fused(spec: StepSpec, fused: FusedSpec | None) -> StepSpec:
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, fused=fused))


def _without_kernels(spec: StepSpec) -> StepSpec:
    assert spec.model.fused is not None
    return _with_fused(spec, spec.model.fused._replace(use_kernel=False))


@partial(jax.jit, static_argnames="spec")
def _first_layers(
    adapter: nnx.State, weights: dict[str, Any], batch: Batch, *, spec: StepSpec
) -> dict[str, jax.Array]:
    """Loss and gradients, by name, of a model that has only the first layer of each kind.

    All layers would tell less, because rounding differences grow with every layer, and would take
    minutes to compile. Every device takes at most two rows: XLA's attention keeps all scores.
    """
    settings = spec.model.fused
    assert settings is not None

    def local(adapter, weights, batch):
        num_rows = batch.tokens_BT.shape[0] // spec.update.accumulation_steps
        rows = jax.tree.map(lambda x: x[: min(num_rows, 2)], batch)
        whole = jax.tree.map(lambda x: x.astype(settings.dtype), adapter)
        grouped = _first_of_each_kind(group_adapter(whole, settings.layout), settings.layout)
        layers = _first_of_each_kind(weights["stacks"], settings.layout)
        stacks = [[write_adapter(layers[kind], grouped[kind])] for kind in layers]
        segments = tuple(((kind,), 1) for kind in layers)
        loss_sum, grads, d_embedded = loss_and_gradients(
            weights | {"stacks": stacks},
            [[grouped[kind]] for kind in layers],
            rows,
            [[jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), grouped[k])] for k in layers],
            settings._replace(layout=dataclasses.replace(settings.layout, segments=segments)),
        )
        by_kind = dict(zip(layers, (stack for (stack,) in grads), strict=True))
        return jax.lax.psum((loss_sum, by_kind), "data"), d_embedded

    whole_spec, rows_spec = partition_spec(), partition_spec("batch")
    (loss_sum, by_kind), d_embedded = jax.shard_map(
        local,
        mesh=spec.model.mesh,
        in_specs=(whole_spec, whole_spec, rows_spec),
        out_specs=(whole_spec, rows_spec),
        check_vma=False,
    )(adapter, weights, batch)
    named_grads = {
        f"{kind} {name}": gradient
        for kind, layer in by_kind.items()
        for name, gradient in layer.items()
    }
    return {"loss": loss_sum, "the embedded tokens": d_embedded} | named_grads


def _first_of_each_kind(stacks: list[list[Layer]], layout: FusedLayout) -> dict[str, Layer]:
    """Layer kind -> a stack of one."""
    first: dict[str, Layer] = {}
    for segment, (kinds, _) in zip(stacks, layout.segments, strict=True):
        for kind, stack in zip(kinds, segment, strict=True):
            first.setdefault(kind, jax.tree.map(lambda x: x[:1], stack))
    return first


def _other_formulation(config: TrainConfig, setup: Setup) -> tuple[str, StepSpec, Any]:
    """The other formulation of the step: names of both, its spec and its own frozen weights.

    Raises ValueError where there is no other.
    """
    spec, mesh = setup.spec, setup.spec.model.mesh
    if spec.model.fused is not None:
        plain = _with_fused(spec, None)
        return "fused and plain step", plain, _plain_weights(setup, spec.model.fused.layout)
    if mesh.devices.flat[0].platform == "tpu":
        raise ValueError("a plain step has no kernels")
    fused = make_fused_spec(
        dataclasses.replace(config, step="fused"), setup.model_info.config, mesh
    )
    assert fused is not None
    weights = jax.jit(fuse, static_argnames="layout", out_shardings=named(mesh))(
        setup.frozen, layout=fused.layout
    )
    return "plain and fused step", _with_fused(spec, fused), weights


def _plain_weights(setup: Setup, layout: FusedLayout) -> nnx.State:
    """The model's own frozen state, a second copy beside the fused weights."""
    restore = jax.jit(
        lambda weights: unfuse(weights, setup.model_weights, layout),
        out_shardings=state_shardings(setup.model_weights, setup.spec.model.mesh),
    )
    return restore(setup.frozen)


def _step_gradient(
    adapter: nnx.State, frozen: Any, batch: Batch, spec: StepSpec
) -> tuple[dict[str, jax.Array], Any]:
    """Loss and gradients, by name, of one train step; and the frozen weights it returns.

    The gradient g is read from Adam's first moment after one step from zero, which is (1 - β1) g:
    so it is the run's own program. Clipping has scaled g, so the norm before clipping counts too.
    """
    state = init_state(_copy(adapter), spec)
    state, frozen, scalars = train_step(state, frozen, batch, spec=spec)
    by_name = {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf
        for path, leaf in jax.tree.leaves_with_path(optax.tree.get(state.moments, "mu"))
    }
    found = {"loss": scalars["loss"], "all together": scalars["grad_norm"]} | by_name
    return found, frozen


def _difference_of(
    ways: str,
    ours: dict[str, jax.Array],
    theirs: dict[str, jax.Array],
    bounds: tuple[float, float],
) -> StepDifference:
    apart = {name: float(x) for name, x in _relative_differences(ours, theirs).items()}
    loss = apart.pop("loss")
    where = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
    return StepDifference(ways, loss, apart[where], where, *bounds)


@jax.jit
def _relative_differences(
    ours: dict[str, jax.Array], reference: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """‖x - y‖ / ‖y‖ of each matrix, the largest of a stack; 0 where both are zero."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = x.astype(jnp.float32), y.astype(jnp.float32)
        norm = partial(jnp.linalg.norm, axis=(-2, -1)) if x.ndim >= 2 else jnp.abs
        return jnp.max(jnp.where(norm(x - y) == 0, 0.0, norm(x - y) / norm(y)))

    return {name: one(x, reference[name]) for name, x in ours.items()}


def _copy(tree: Any) -> Any:
    """For a step to donate."""
    return jax.tree.map(jnp.copy, tree)
