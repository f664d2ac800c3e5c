"""The device mesh and the one table from logical axes to mesh axes.

Mesh axes: `data` replicates the frozen weights, `fsdp` shards them; both split the batch.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp")
# What Cloud TPU calls the chips, by JAX's device_kind.
CHIP_NAMES = {"TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}

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
    """The NamedSharding of every parameter, from the `axes` that it declares.

    Written as XLA returns them, without mesh axes of size 1 and trailing None: otherwise a step's
    output, as the next step's input, would compile the step again.
    """

    def one(variable: nnx.Variable) -> Any:
        axes = partition_spec(*variable.get_metadata("axes"))
        dims = [None if axis is None or mesh.shape[axis] == 1 else axis for axis in axes]
        while dims and dims[-1] is None:
            dims.pop()
        return variable.replace(NamedSharding(mesh, PartitionSpec(*dims)))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def shard_dim(shape: Sequence[int], num_shards: int) -> int | None:
    """The dimension to split optimizer state along: the largest, if `num_shards` divides it."""
    if num_shards == 1 or not shape:
        return None
    dim = max(range(len(shape)), key=lambda d: shape[d])
    return None if shape[dim] % num_shards else dim


def shard_spec(shape: Sequence[int], num_shards: int) -> PartitionSpec:
    """PartitionSpec over `data` along `shard_dim`; replicated where that is None."""
    dim = shard_dim(shape, num_shards)
    return PartitionSpec() if dim is None else PartitionSpec(*[None] * dim, "data")


def gather_shards(shards: Sequence[jax.Array], dims: Sequence[int | None]) -> list[jax.Array]:
    """Whole arrays from every device's shards, split over `data` along `dims`.

    For use inside `shard_map`. Arrays whose dim is None are whole already. One gather an array:
    packing them into one costs two changes of layout, ten times the transfer.
    """
    return [
        x if dim is None else jax.lax.all_gather(x, "data", axis=dim, tiled=True)
        for x, dim in zip(shards, dims, strict=True)
    ]


def reduce_to_shards(whole: Sequence[jax.Array], dims: Sequence[int | None]) -> list[jax.Array]:
    """Every device's shards of the sums over `data`: the transpose of `gather_shards`.

    Arrays whose dim is None are summed whole.
    """
    return [
        jax.lax.psum(x, "data")
        if dim is None
        else jax.lax.psum_scatter(x, "data", scatter_dimension=dim, tiled=True)
        for x, dim in zip(whole, dims, strict=True)
    ]
