"""Writes adapters for Tunix: a checkpoint of the LoRA parameters that its CheckpointManager reads.

Tunix has k and v in one array, so qwix gives them one A and one B (qwix/_src/providers/lora.py).
`rank` and `alpha` are the same for the whole model. The A of k and the A of v, of rank r each,
therefore become one A of rank 2r, and B is zero where the rows of one meet the columns of the
other. The update is exactly the same. Axes: see gemma/layers.py.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jaxsft.common.hosts import on_host
from jaxsft.gemma import lora
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.gemma.model import Gemma, layer_location
from jaxsft.weights.adapter_config import AdapterConfig
from jaxsft.weights.names import LINEAR_TENSORS


class _Matrix(NamedTuple):
    """A weight of Tunix's block and our layers in it. Several layers are B's first axis after R.

    A is [*in_shape, R]; B is [R, *out_shape].
    """

    module: tuple[str, str]
    leaf: str
    targets: tuple[str, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]


def write_tunix_lora(directory: Path | str, model: Gemma, config: AdapterConfig) -> dict[str, Any]:
    """Writes the adapter of `model`, injected with `config`, as float32 to a new `directory`.

    Returns the arguments of `qwix.LoraProvider`, {"module_path", "rank", "alpha"}, which gives
    Tunix's model its LoRA layers. Tunix then restores the checkpoint with
    `CheckpointManager(directory).maybe_restore(model, restore_only_lora_params=True)`, which
    returns the same arguments. The rank is that of `config`, or twice it if k and v both have an
    adapter; alpha / rank is our scale, rank-stabilised or not. Dropout is not stored.

    Raises ValueError if the directory exists, OSError if it cannot be written.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise ValueError(f"{directory} exists already; name another directory")
    matrices = [m for m in _matrices(model.config) if set(m.targets) & set(config.targets)]
    rank = config.rank * max(len(set(m.targets) & set(config.targets)) for m in matrices)
    scale = lora.lora_scale(config.rank, config.alpha, config.use_rslora)
    settings = {
        "module_path": "|".join(f".*{m.module[1]}" for m in matrices),
        "rank": rank,
        "alpha": scale * rank,
    }
    leaves = {
        path: on_host(variable.get_value())
        for path, variable in nnx.to_flat_state(lora.split(model)[1])
    }
    layers: dict[str, Any] = {}
    for layer in range(model.config.num_layers):
        adapters = _adapters(leaves, model.config, layer)
        block: dict[str, dict[str, Any]] = {"attn": {}, "mlp": {}}
        for matrix in matrices:
            a, b = _combine(matrix, adapters, rank)
            parent, module = matrix.module
            # An nnx.State's leaves are Variables, in which Orbax finds the key "value".
            block[parent][module] = {
                f"{matrix.leaf}_lora_a": {"value": a},
                f"{matrix.leaf}_lora_b": {"value": b},
            }
        layers[str(layer)] = {parent: modules for parent, modules in block.items() if modules}
    _save(directory, {"layers": layers}, settings)
    return settings


def _matrices(config: GemmaConfig) -> list[_Matrix]:
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    d, f = config.d_model, config.d_ff
    if n == k:
        qkv = [
            _Matrix(("attn", "qkv_einsum"), "w", ("q_proj", "k_proj", "v_proj"), (d,), (3, n, h))
        ]
    else:
        qkv = [
            _Matrix(("attn", "q_einsum"), "w", ("q_proj",), (d,), (n, h)),
            _Matrix(("attn", "kv_einsum"), "w", ("k_proj", "v_proj"), (d,), (2, k, h)),
        ]
    return [
        *qkv,
        _Matrix(("attn", "attn_vec_einsum"), "w", ("o_proj",), (n, h), (d,)),
        _Matrix(("mlp", "gate_proj"), "kernel", ("gate_proj",), (d,), (f,)),
        _Matrix(("mlp", "up_proj"), "kernel", ("up_proj",), (d,), (f,)),
        _Matrix(("mlp", "down_proj"), "kernel", ("down_proj",), (f,), (d,)),
    ]


def _adapters(
    leaves: dict[tuple, np.ndarray], config: GemmaConfig, layer: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Target -> (a [in, R], b [R, out]) of one layer, for targets with an adapter."""
    group, index, row = layer_location(config, layer)
    adapters = {}
    for tensor in LINEAR_TENSORS:
        path = (group, index, *tensor.tree[:-1], "lora")
        if (*path, "a") in leaves:
            a, b = (leaves[*path, name] for name in ("a", "b"))
            adapters[tensor.tree[1]] = (a, b) if row is None else (a[row], b[row])
    return adapters


def _combine(
    matrix: _Matrix, adapters: dict[str, tuple[np.ndarray, np.ndarray]], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """One A and B of `rank` with the same product as each target's own a and b."""
    in_dim = int(np.prod(matrix.in_shape))
    whole_a = np.zeros((in_dim, rank), np.float32)
    whole_b = np.zeros((rank, *matrix.out_shape), np.float32)
    rows_b = whole_b.reshape(rank, len(matrix.targets), -1)
    start = 0
    for place, target in enumerate(matrix.targets):
        if target in adapters:
            a, b = adapters[target]
            end = start + len(b)
            whole_a[:, start:end] = a
            rows_b[start:end, place] = b
            start = end
    return whole_a.reshape(*matrix.in_shape, rank), whole_b


def _save(directory: Path, tree: dict[str, Any], settings: dict[str, Any]) -> None:
    """Saves the tree as Tunix's CheckpointManager saves step 0."""
    handlers = {"model_params": ocp.PyTreeCheckpointHandler()}
    try:
        with ocp.CheckpointManager(directory, item_handlers=handlers) as manager:
            arguments = ocp.args.Composite(model_params=ocp.args.PyTreeSave(tree))
            manager.save(0, args=arguments, custom_metadata=settings)
    except (OSError, ValueError) as error:  # TensorStore's is a ValueError
        raise OSError(f"{directory}: can't be written: {error}") from error
