"""Reads GGUF files: metadata, tensors (dequantised in blocks of rows) and the model's config.

The header is parsed here because `gguf.GGUFReader` builds three NumPy objects for every vocabulary
entry: 15 s for the 262,144 of Gemma 3, against 0.2 s. The `gguf` package does the dequantisation.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LFS_POINTER = b"version https://git-lfs"
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 4  # ggml's
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
# Blocks of this size fit into the cache: twice as fast as a whole embedding table.
_BLOCK_ELEMENTS = 1 << 16
_ARCHITECTURES = {"gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
# The 27B models scale queries by (d_model / heads)^-0.5; only their depth identifies them.
_DEPTH_OF_27B = {"gemma2": 46, "gemma3": 62}
_PATTERN = "attention.sliding_window_pattern"
_NOT_ONE_NUMBER = (_PATTERN, "rope.scaling.type")


class GGUFTensor(NamedTuple):
    """The place of a tensor. `shape` is row-major, [out, in] for linear weights; `offset` is in
    the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    num_bytes: int


class _DamagedError(Exception):
    """The file contradicts itself or ends too early; the message says where."""


class GGUFFile:
    """A GGUF file, memory-mapped.

    `metadata` maps every key to a str, int, float or bool, to a list of str, or to a 1-D array of
    numbers. `tensors` maps every tensor's name to its place, `shapes` to its shape. Raises
    ValueError unless the file is a complete little-endian GGUF of version 2 or 3.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                start = file.read(len(_LFS_POINTER))
            if start == _LFS_POINTER:
                raise ValueError(f"{path}: a Git LFS pointer, not the file; run 'git lfs pull'")
            if not start:
                raise ValueError(f"{path}: the file is empty; get it again")
            if not start.startswith(_MAGIC):
                raise ValueError(f"{path}: not a GGUF file (it does not start with 'GGUF')")
            self._data = np.memmap(self.path, mode="r")
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            self.metadata, self.tensors = _parse(_Cursor(self._data.data, len(_MAGIC)))
        except (_DamagedError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: the GGUF file is truncated or damaged ({error}); download it again"
            ) from error
        self.shapes = {name: tensor.shape for name, tensor in self.tensors.items()}

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, float32 [rows, in]) of a tensor in order; [n] counts as one row.

        Raises ValueError for a type that `gguf` cannot dequantise.
        """
        tensor = self.tensors[name]
        num_columns = tensor.shape[-1]
        num_rows = math.prod(tensor.shape[:-1])
        raw = self._data[tensor.offset : tensor.offset + tensor.num_bytes]
        rows = np.asarray(raw).reshape(num_rows, -1)
        step = max(1, _BLOCK_ELEMENTS // num_columns)
        for start in range(0, num_rows, step):
            try:
                block = dequantize(rows[start : start + step], tensor.type)
            except NotImplementedError as error:
                raise ValueError(
                    f"{self.path}: tensor {name} has type {tensor.type.name}, which the gguf "
                    "package cannot dequantise; use another quantisation"
                ) from error
            yield start, block


class _Cursor:
    """Reads little-endian values in order, never past the end."""

    def __init__(self, buffer: memoryview, at: int):
        self.buffer, self.at = buffer, at

    def numbers(self, dtype: str, count: int) -> np.ndarray:
        """1-D array of `count` values."""
        end = self.at + count * np.dtype(dtype).itemsize
        if end > len(self.buffer):
            raise _DamagedError(f"it ends at byte {len(self.buffer)}, inside its header")
        values = np.frombuffer(self.buffer, dtype, count, self.at)
        self.at = end
        return values

    def number(self, dtype: str) -> Any:
        """One int, float or bool."""
        return self.numbers(dtype, 1)[0].item()

    def string(self) -> str:
        """A length and that many bytes of UTF-8."""
        start = self.at + 8
        # Not `number`: this runs once for each of 262,144 vocabulary entries.
        length = _U64.unpack_from(self.buffer, self.at)[0] if start <= len(self.buffer) else 0
        self.at = start + length
        if self.at > len(self.buffer):
            raise _DamagedError(f"it ends at byte {len(self.buffer)}, inside its header")
        return str(self.buffer[start : self.at], "utf-8")

    def value(self) -> Any:
        """A type and a metadata value of this type."""
        kind = self.number("<u4")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_scalar_dtype(kind))
        element, count = self.number("<u4"), self.number("<u8")
        if element == _STRING:
            return [self.string() for _ in range(count)]
        return self.numbers(_scalar_dtype(element), count).copy()


def _scalar_dtype(kind: int) -> str:
    if kind not in _SCALARS:
        raise _DamagedError(f"metadata type {kind} is unknown")
    return _SCALARS[kind]


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """(metadata, tensors) of a header; `cursor` is behind the magic bytes."""
    version = cursor.number("<u4")
    if version not in _VERSIONS:
        raise _DamagedError(f"version {version}; only little-endian 2 and 3 are supported")
    num_tensors, num_keys = cursor.number("<u8"), cursor.number("<u8")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string()
        if key in metadata:
            raise _DamagedError(f"metadata key {key} appears twice")
        metadata[key] = cursor.value()
    places = [_tensor_info(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise _DamagedError(f"general.alignment is {alignment!r}")
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, tensor in places:
        if name in tensors:
            raise _DamagedError(f"tensor {name} appears twice")
        offset = data_start + tensor.offset
        if offset + tensor.num_bytes > len(cursor.buffer):
            raise _DamagedError(f"it ends at byte {len(cursor.buffer)}, inside tensor {name}")
        tensors[name] = tensor._replace(offset=offset)
    end = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise _DamagedError(f"tensor {name} begins inside another")
        end = tensor.offset + tensor.num_bytes
    return metadata, tensors


def _tensor_info(cursor: _Cursor) -> tuple[str, GGUFTensor]:
    """(name, place relative to the start of the data)."""
    name = cursor.string()
    # GGUF puts the innermost dimension first.
    num_dims = cursor.number("<u4")
    if num_dims > _MAX_DIMS:
        raise _DamagedError(f"tensor {name} has {num_dims} dimensions")
    shape = tuple(cursor.numbers("<u8", num_dims).tolist()[::-1])
    kind, offset = cursor.number("<u4"), cursor.number("<u8")
    if kind not in (known.value for known in GGMLQuantizationType):
        raise _DamagedError(f"tensor {name} has the unknown type {kind}")
    quantization = GGMLQuantizationType(kind)
    block_size, block_bytes = GGML_QUANT_SIZES[quantization]
    if not shape or min(shape) == 0 or shape[-1] % block_size:
        raise _DamagedError(f"tensor {name} of type {quantization.name} has shape {shape}")
    num_bytes = math.prod(shape) // block_size * block_bytes
    return name, GGUFTensor(shape, quantization, offset, num_bytes)


def _architecture(file: GGUFFile) -> str:
    """gemma, gemma2 or gemma3; ValueError for others and for incomplete models."""
    metadata = file.metadata
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ValueError(f"{file.path}: holds no whole model, its general.type is {kind!r}")
    if (num_parts := metadata.get("split.count", 1)) != 1:
        raise ValueError(
            f"{file.path}: one of {num_parts} parts of a model; join them with llama.cpp's "
            "llama-gguf-split --merge"
        )
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        raise ValueError(
            f"{file.path}: architecture {architecture!r} is not supported; supported are "
            f"{', '.join(_ARCHITECTURES)} (Gemma 1, 2 and 3 text models)"
        )
    return architecture


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The Hugging Face `config.json`, as a dict, of the Gemma in a GGUF file.

    Settings that the file lacks have the values in llama.cpp's code: query scale, layer pattern,
    base of local rotary positions. Raises ValueError for other architectures and missing keys.
    """
    metadata, architecture = file.metadata, _architecture(file)

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if not isinstance(value, int | float | None) and key not in _NOT_ONE_NUMBER:
            raise ValueError(f"{file.path}: {key} is not one number for all layers: not supported")
        return value

    required = (
        "block_count", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.key_length", "context_length", "attention.layer_norm_rms_epsilon",
        *(["attention.sliding_window"] if architecture == "gemma3" else []),
    )  # fmt: skip
    missing = [f"{architecture}.{key}" for key in required if get(key) is None]
    missing += ["token_embd.weight"] if "token_embd.weight" not in file.tensors else []
    if missing:
        raise ValueError(f"{file.path} lacks {', '.join(missing)}")
    head_dim, num_layers = get("attention.key_length"), get("block_count")
    num_heads, d_model = get("attention.head_count"), get("embedding_length")
    problems = []
    if type(num_layers) is not int or not 0 < num_layers <= len(file.tensors):
        problems.append(f"{num_layers} blocks in {len(file.tensors)} tensors")
    if get("attention.value_length", head_dim) != head_dim:
        problems.append(f"attention.value_length {get('attention.value_length')} != {head_dim}")
    if str(get("rope.scaling.type", "none")) != "none" or get("rope.scaling.factor", 1.0) != 1.0:
        problems.append("rope.scaling (Gemma 3 4B and larger)")
    if problems:
        raise ValueError(f"{file.path}: not supported: {'; '.join(problems)}")
    is_27b = num_layers == _DEPTH_OF_27B.get(architecture) and num_heads
    with np.errstate(over="ignore"):  # the config's reader refuses infinity
        norm_eps = np.float32(get("attention.layer_norm_rms_epsilon"))
    theta = get("rope.freq_base", 1e6 if architecture == "gemma3" else 1e4)
    config = {
        "model_type": _ARCHITECTURES[architecture],
        "_name_or_path": str(metadata.get("general.name", file.path.stem)),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": d_model,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length"),
        # The file has float32: 9.999999974752427e-07 means 1e-6.
        "rms_norm_eps": float(str(norm_eps)),
        "rope_theta": theta,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    }
    if architecture == "gemma":
        return config
    config["query_pre_attn_scalar"] = d_model // num_heads if is_27b else head_dim
    config["sliding_window"] = get("attention.sliding_window", 4096)
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        if (value := get(cap)) is not None:
            config[cap] = value
    period = get(_PATTERN, 2 if architecture == "gemma2" else 6)
    # One flag for each layer, or a period whose last layer is global (0: no layer is).
    local = period
    if not isinstance(period, int | np.ndarray):
        raise ValueError(f"{file.path}: {_PATTERN} is neither a number nor numbers: not supported")
    if isinstance(period, int):
        local = [period == 0 or (i + 1) % period != 0 for i in range(num_layers)]
    config["layer_types"] = [
        "sliding_attention" if is_local else "full_attention" for is_local in local
    ]
    if architecture == "gemma3":
        config["rope_local_base_freq"] = get("rope.freq_base_swa", 1e4)
    return config
