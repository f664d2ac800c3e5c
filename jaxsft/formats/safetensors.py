"""Reads safetensors directories, with or without shards, in blocks of rows."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (gives NumPy the bfloat16 that safetensors asks it for)
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxsft.common.listed import error_line, shortened

MODEL_NAME = "model.safetensors"
INDEX_NAME = f"{MODEL_NAME}.index.json"

_DTYPES = ("F32", "F16", "BF16")
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32", "F8_E4M3", "F8_E5M2")
_PICKLE = (
    "is a pickle, which could run any code: save it as safetensors, with save_pretrained of "
    "transformers or PEFT"
)
# What else may lie where weights are expected, and what to do. Trainers leave other .bin files too.
_OTHER_WEIGHTS = {
    r"(pytorch|adapter)_model.*\.bin": _PICKLE,
    r"adapters\.(safetensors|npz)": (
        "is an MLX adapter: mlx_lm.fuse (--dequantize for a quantised base) makes a model to give "
        "here"
    ),
    r".*\.distcp|pytorch_model_fsdp.*": (
        "is a checkpoint in shards (FSDP): 'accelerate merge-weights' makes safetensors of it"
    ),
    r"global_step\d+|zero_to_fp32\.py": (
        "is DeepSpeed's: 'python zero_to_fp32.py . . --safe_serialization' makes safetensors of it"
    ),
    r".*\.gguf": "is a model of its own: give that file",
    r".*\.(pt|pth|ckpt)": _PICKLE,
}
_SHARD_NAME = r"[\w.-]+\.safetensors"
_LFS_POINTER = b"version https://git-lfs"
_BLOCK_ELEMENTS = 1 << 20


class SafetensorsDirectory:
    """All tensors of the file `name`, or of the shards in its index, memory-mapped.

    `shapes` maps every tensor's name to its shape. Raises ValueError for missing, truncated and
    foreign files, for a tensor that is in two shards or in another shard than the index says, and
    for dtypes other than float32, float16 and bfloat16.
    """

    def __init__(self, directory: Path | str, name: str = MODEL_NAME):
        self.path = Path(directory)
        self.files, index = self._files(name)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._slices: dict[str, Any] = {}
        dtypes: dict[str, str] = {}
        twice: dict[str, str] = {}
        moved: dict[str, str] = {}
        for path in self.files:
            for tensor_name, tensor in _open(path).items():
                if tensor_name in self.shapes:
                    twice[tensor_name] = f"(in {path.name} and in another shard)"
                if tensor.get_dtype() not in _DTYPES:
                    dtypes[tensor_name] = f"({tensor.get_dtype()})"
                if index.pop(tensor_name, path.name) != path.name:
                    moved[tensor_name] = f"(in {path.name}, not where the index says)"
                self.shapes[tensor_name] = tuple(tensor.get_shape())
                self._slices[tensor_name] = tensor
        kinds = {
            "of another dtype": dtypes,
            "twice": twice,
            "elsewhere": moved,
            "missing": {name: f"(not in {shard})" for name, shard in sorted(index.items())},
        }
        if any(kinds.values()):
            advice = f"each must be in one file, as one of {', '.join(_DTYPES)}"
            if any(remark.strip("()") in _INTEGERS for remark in dtypes.values()):
                advice += "; quantised weights are not read: give the model that they were made of"
            raise ValueError(error_line(f"{self.path}: unusable tensors", kinds, advice))

    def rename(self, names: Mapping[str, str]) -> None:
        """Gives tensors other names: name in the file -> new name."""
        self.shapes = {names[name]: shape for name, shape in self.shapes.items()}
        self._slices = {names[name]: tensor for name, tensor in self._slices.items()}

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, [rows, in]) of a tensor in order, in its own dtype; [n] is one row."""
        shape, tensor = self.shapes[name], self._slices[name]
        if 0 in shape:  # the library slices no empty tensor
            return
        if len(shape) < 2:
            yield 0, tensor[...].reshape(1, -1)
            return
        step = max(1, _BLOCK_ELEMENTS // max(1, shape[-1]))
        for start in range(0, shape[0], step):
            yield start, tensor[start : min(start + step, shape[0])]

    def _files(self, name: str) -> tuple[list[Path], dict[str, str]]:
        """(files to read, {tensor: file name} of the index)."""
        if (self.path / name).exists():
            return [self.path / name], {}
        path = self.path / f"{name}.index.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted(set(index.values()))
            # A name from a file must not lead out of the directory.
            foreign = [shard for shard in shards if not re.fullmatch(_SHARD_NAME, shard)]
        except FileNotFoundError as error:
            line = f"{self.path} has neither {name} nor {path.name}"
            raise ValueError(
                line + other_weights_hint([p.name for p in self.path.iterdir()])
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}: not a readable index: {shortened(repr(error), 200)}"
            ) from error
        if foreign:
            raise ValueError(
                f"{path}: {shortened(foreign[0], 100)!r} is not the plain name of a .safetensors "
                "file"
            )
        missing = [shard for shard in shards if not (self.path / shard).is_file()]
        if missing:
            lacking = {"missing": {shard: "" for shard in missing}}
            raise ValueError(error_line(f"{self.path}: lacks shards of {path.name}", lacking))
        return [self.path / shard for shard in shards], dict(index)


def holds_model(directory: Path) -> bool:
    """Does `directory` hold a model's weights, in one file or in shards?"""
    return any((directory / name).is_file() for name in (MODEL_NAME, INDEX_NAME))


def other_weights_hint(names: Iterable[str]) -> str:
    """The end of an error about missing safetensors files: what to do with what `names` has."""
    for pattern, advice in _OTHER_WEIGHTS.items():
        found = sorted(name for name in names if re.fullmatch(pattern, name))
        if found:
            return f"; {shortened(found[0], 80)} {advice}"
    return ""


def _open(path: Path) -> dict[str, Any]:
    """The tensors of one file as lazy slices, by name."""
    try:
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ValueError(f"{path}: a Git LFS pointer, not the file; run 'git lfs pull'")
        tensors = safe_open(path, framework="numpy")
        return {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: the safetensors file is truncated or damaged "
            f"({shortened(str(error), 200)}); download it again"
        ) from error
