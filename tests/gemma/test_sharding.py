"""The axis table, partition specs and the mesh."""

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxsft.gemma import lora, sharding
from jaxsft.gemma.architecture import GLOBAL, LOCAL, GemmaConfig
from jaxsft.gemma.model import Gemma

TINY = GemmaConfig(
    name="tiny",
    vocab_size=32,
    d_model=8,
    d_ff=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    layer_types=(LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL),
    max_positions=64,
    query_scale=0.5,
    sliding_window=4,
    post_norms=True,
    qk_norm=True,
)


def tiny_state() -> nnx.State:
    """The parameters of TINY with an adapter, without memory."""

    def build() -> Gemma:
        model = Gemma(TINY, rngs=nnx.Rngs(0))
        lora.inject(model, rank=2, alpha=2.0, rngs=nnx.Rngs(1))
        return model

    return nnx.split(nnx.eval_shape(build))[1]


def one_device_mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(1, 1, devices=jax.devices()[:1])


def test_make_mesh() -> None:
    mesh = one_device_mesh()
    assert mesh.axis_names == ("data", "fsdp") and mesh.shape == {"data": 1, "fsdp": 1}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_mesh_of_the_wrong_size_says_what_fits() -> None:
    with pytest.raises(ValueError, match=r"needs 8 devices, 1 are present; set fsdp to a"):
        sharding.make_mesh(4, 2, devices=jax.devices()[:1])


def test_partition_spec() -> None:
    assert sharding.partition_spec() == PartitionSpec()
    assert sharding.partition_spec("batch", None) == PartitionSpec(("data", "fsdp"), None)
    assert sharding.partition_spec("layers", "embed", "mlp") == PartitionSpec(None, ("fsdp",), None)


def test_unknown_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'embedding' is not in the table .*'embed'"):
        sharding.partition_spec("embedding")


def test_collision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"two dimensions on mesh axis .*fsdp"):
        sharding.partition_spec("embed", "embed")
    with pytest.raises(ValueError, match=r"two dimensions on mesh axis .*fsdp"):
        sharding.partition_spec("batch", "embed")


def test_table_names_only_mesh_axes() -> None:
    for mesh_axes in sharding.AXIS_TABLE.values():
        assert set(mesh_axes) <= set(sharding.MESH_AXES)
    assert sharding.AXIS_TABLE["batch"] == sharding.MESH_AXES  # both split the batch


def test_constrain() -> None:
    x = jax.numpy.ones((2, 3))
    assert sharding.constrain(x, None, "batch", None) is x
    mesh = one_device_mesh()
    constrained = jax.jit(lambda x: sharding.constrain(x, mesh, "batch", None))(x)
    assert constrained.sharding.is_equivalent_to(sharding.named(mesh, "batch", None), 2)


def test_every_parameter_declares_an_axis_for_every_dimension() -> None:
    flat = nnx.to_flat_state(tiny_state())
    assert len(list(flat)) > 40
    for path, variable in flat:
        axes = variable.get_metadata("axes")
        assert len(axes) == len(variable.get_raw_value().shape), path
        assert set(axes) <= set(sharding.AXIS_TABLE), path


def test_state_shardings() -> None:
    state = tiny_state()
    mesh = AbstractMesh((1, 2), sharding.MESH_AXES)
    shardings = sharding.state_shardings(state, mesh)  # type: ignore[arg-type]
    specs = {}
    for path, variable in nnx.to_flat_state(shardings):
        value = variable.get_raw_value()
        assert isinstance(value, NamedSharding)
        specs[".".join(map(str, path))] = value.spec
    assert len(specs) == len(jax.tree.leaves(state))
    assert specs["embedding"] == PartitionSpec(None, "fsdp")
    assert specs["final_norm.scale"] == PartitionSpec()
    # Stacked under the scan, and unstacked in the tail.
    for place, stack in (("blocks.0", (None,)), ("tail.0", ())):
        for name in ("attn.q_proj", "attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            assert specs[f"{place}.{name}.kernel"] == PartitionSpec(*stack, "fsdp")
        for name in ("attn.o_proj", "mlp.down_proj"):
            assert specs[f"{place}.{name}.kernel"] == PartitionSpec(*stack, None, "fsdp")
        for name in ("attn.q_proj.lora.a", "mlp.down_proj.lora.b"):
            assert specs[f"{place}.{name}"] == PartitionSpec()
        assert specs[f"{place}.attn.q_norm.scale"] == PartitionSpec()
    # A mesh axis of one device is none.
    alone = sharding.state_shardings(state, one_device_mesh())
    assert {v.get_raw_value().spec for _, v in nnx.to_flat_state(alone)} == {PartitionSpec()}
