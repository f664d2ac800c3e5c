"""The device mesh and the one table from logical axes to mesh axes.

Mesh axes: `data` replicates the frozen weights, `fsdp` shards them; both split the batch.
"""

from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes. Each parameter declares its logical axes where it is created.
AXIS_TABLE: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "embed": ("fsdp",),
    "layers": (),
    "vocab": (),
    "heads": (),
    "mlp": (),
    "norm": (),
    "lora_in": (),
    "lora_rank": (),
    "lora_out": (),
}


def make_mesh(data: int, fsdp: int = 1, devices: Any = None) -> Mesh:
    """Mesh of data x fsdp devices; ValueError when their number does not match."""
    devices = jax.devices() if devices is None else devices
    if data * fsdp != len(devices):
        raise ValueError(
            f"mesh {data} (data) x {fsdp} (fsdp) needs {data * fsdp} devices, "
            f"{len(devices)} are present; set fsdp to a divisor of {len(devices)}"
        )
    # Auto: jax.make_mesh defaults to Explicit axis types, which would type every array by sharding.
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh((data, fsdp), MESH_AXES, axis_types=axis_types, devices=devices)


def partition_spec(*logical_axes: str | None) -> PartitionSpec:
    """PartitionSpec for an array with these logical axes (None: replicated dimension).

    Raises ValueError for an axis missing from the table and when two dimensions of one array would
    be split over the same mesh axis.
    """
    dims: list[tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis in logical_axes:
        if axis is not None and axis not in AXIS_TABLE:
            raise ValueError(f"logical axis {axis!r} is not in the table {sorted(AXIS_TABLE)}")
        mesh_axes = () if axis is None else AXIS_TABLE[axis]
        collision = used.intersection(mesh_axes)
        if collision:
            raise ValueError(f"axes {logical_axes} put two dimensions on mesh axis {collision}")
        used.update(mesh_axes)
        dims.append(mesh_axes or None)
    return PartitionSpec(*dims)


def named(mesh: Mesh, *logical_axes: str | None) -> NamedSharding:
    """NamedSharding on `mesh` for an array with these logical axes."""
    return NamedSharding(mesh, partition_spec(*logical_axes))


def constrain(x: jax.Array, mesh: Mesh | None, *logical_axes: str | None) -> jax.Array:
    """Pins an activation's sharding; a `None` mesh leaves the array alone."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, named(mesh, *logical_axes))


def state_shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The tree of NamedShardings for parameters, from the `axes` that each one declares."""

    def one(variable: nnx.Variable) -> Any:
        return variable.replace(named(mesh, *variable.get_metadata("axes")))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
