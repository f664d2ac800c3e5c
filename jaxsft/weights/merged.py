"""Merges an adapter into its base model: tensor by tensor from files, or in memory.

W + scale · B A is computed in float64, so that the order of summation does not change how the
result rounds to bfloat16.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from jaxsft.gemma.layers import Linear
from jaxsft.gemma.lora import lora_scale
from jaxsft.gemma.model import Gemma
from jaxsft.weights.adapter_config import AdapterConfig
from jaxsft.weights.load import TensorSource, WeightsInfo, check_tensors
from jaxsft.weights.names import file_tensors
from jaxsft.weights.peft import open_adapter

DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


class MergedWeights:
    """A base model with an optional adapter merged in: a `TensorSource` with Hugging Face names.

    Tensors without an adapter are the base's, bit for bit (GGUF: dequantised, and norms without the
    added 1).
    """

    def __init__(
        self,
        source: TensorSource,
        info: WeightsInfo,
        adapter: Path | None,
        adapter_config: AdapterConfig | None = None,
    ):
        """`source` and `info` describe the base, `adapter_config` the directory `adapter`.

        Raises ValueError if the adapter does not fit the base.
        """
        self.path, self.config = source.path, info.config
        self._source = source
        tensors = file_tensors(info.config, is_gguf=info.format == "gguf")
        self._names = {name: stored for name, (stored, _) in tensors.items()}
        self.shapes = {name: shape for name, (_, shape) in tensors.items()}
        check_tensors(source, dict(tensors.values()), is_gguf=info.format == "gguf")
        # GGUF stores 1 + weight for the norms.
        self._shift = np.float32(-1.0 if info.format == "gguf" else 0.0)
        self._updates: dict[str, dict[str, np.ndarray]] = {}
        if adapter is not None:
            assert adapter_config is not None
            self._add(adapter, adapter_config)

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, [rows, in]) of a tensor in order; [n] counts as one row.

        Raises ValueError for NaN and infinity.
        """
        is_norm = len(self.shapes[name]) == 1
        update = self._updates.get(name)
        for start, block in self._source.blocks(self._names[name]):
            if is_norm and self._shift:
                block = block + self._shift
            if update is not None:
                b_rows = update["B"][start : start + len(block)]
                block = _add_product(block, self._scale, b_rows, update["A"])
            if not np.isfinite(block).all():
                raise ValueError(f"{self.path}: tensor {name} holds NaN or infinity: damaged")
            yield start, block

    def tensors(self, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (name, whole array in `dtype`) of every tensor."""
        for name, shape in self.shapes.items():
            array = np.empty(shape, DTYPES[dtype])
            rows = array[None] if array.ndim == 1 else array
            for start, block in self.blocks(name):
                rows[start : start + len(block)] = block
            yield name, array

    def _add(self, adapter: Path, settings: AdapterConfig) -> None:
        """Reads B [out, r] and A [r, in] of every adapted matrix."""
        self._scale = lora_scale(settings.rank, settings.alpha, settings.use_rslora)
        source, parts = open_adapter(adapter, settings, self.config)
        for part in parts:
            name, _, ab = part.key.removeprefix("base_model.model.").partition(".lora_")
            matrix = np.concatenate([block for _, block in source.blocks(part.key)])
            self._updates.setdefault(f"{name}.weight", {})[ab[0]] = matrix


def merge_in_memory(model: Gemma, dtype: str) -> None:
    """Merges the adapter of `model` into its weights and rounds all weights to `dtype`, in place.

    Each replaced array is deleted at once: waiting for garbage collection took the memory of a
    second model.
    """
    for _, linear in list(nnx.iter_modules(model)):
        if isinstance(linear, Linear) and linear.lora is not None:
            a, b = (np.asarray(leaf[...]) for leaf in (linear.lora.a, linear.lora.b))
            kernel = np.asarray(linear.kernel[...])
            merged = np.empty(kernel.shape, DTYPES[dtype])
            for layer in np.ndindex(kernel.shape[:-2]):  # float64 is twice as large: one at a time
                merged[layer] = _add_product(kernel[layer], linear.lora.scale, a[layer], b[layer])
            linear.kernel[...].delete()
            linear.kernel.set_value(jnp.asarray(merged))  # `[...] =` would keep float32
            linear.lora = nnx.data(None)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        exact = variable[...]
        if exact.dtype != dtype:
            variable.set_value(exact.astype(dtype).block_until_ready())
            exact.delete()


def _add_product(
    weight: np.ndarray, scale: float, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """weight + scale · left @ right, in float64."""
    product = scale * left.astype(np.float64) @ right.astype(np.float64)
    return weight.astype(np.float64) + product
