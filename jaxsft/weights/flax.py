"""Reads and writes Flax checkpoints of Gemma: Orbax's format, in the layout of Kaggle's.

Names, shapes and layouts follow google-deepmind/gemma (gm/nn/_modules.py, gm/ckpts/_compat.py); for
the axes see gemma/layers.py. TensorStore reads and writes arrays one by one; Orbax would hold the
whole model. Only zarr arrays inside the directory are opened: no pickle, no msgpack, and no path
that leads out of it.
Format: https://orbax.readthedocs.io/en/latest/guides/checkpoint/checkpoint_format.html
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from jaxsft.common.files import write_json
from jaxsft.common.listed import error_line
from jaxsft.common.locks import scratch_beside
from jaxsft.common.text import visible_line
from jaxsft.gemma.architecture import PRESETS, GemmaConfig
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.names import check_shapes

_EMBEDDING = "embedder/input_embedding"
_PADDING_ROWS = 128  # below the embedding of Gemma 1 and 2: 256,000 + 128
_OCDBT_FILE, _TREE_FILE = "manifest.ocdbt", "_METADATA"
_DRIVERS = {"/.zarray": "zarr", "/zarr.json": "zarr3"}  # by the end of an array's metadata key
_DTYPES = ("float32", "bfloat16", "float16")
# Missing chunks read as zeros, so a few bytes can declare terabytes. Weights compress to a half.
_MAX_EXPANSION, _MAX_UNBACKED_BYTES = 64, 1 << 26
_CHUNK_BYTES = 1 << 24
_COMMIT_BYTES = 1 << 26  # each commit makes files and waits for the disk
_BLOCK_ELEMENTS = 1 << 22


def is_flax_checkpoint(path: Path | str) -> bool:
    """Does `path` hold an Orbax checkpoint, or one in a directory beside its tokenizer?

    False if `path` is a model in safetensors.
    """
    path = Path(path)
    is_hf = (path / "config.json").is_file() and any(path.glob("*.safetensors"))
    return not is_hf and _find(path) is not None


class FlaxTensor(NamedTuple):
    """One array of a checkpoint and the Hugging Face tensors that it holds.

    Several tensors (k and v, gate and up) are stacked along a first axis. `layout` is that of one
    tensor: "DF" is [in, out]; "FD" is [out, in] as in Hugging Face (norms and the embedding too);
    "NDH" and "NHD" split the output or input features into heads.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    layout: str

    @property
    def tree_path(self) -> tuple[str, str]:
        """Kaggle's trees have two levels: {"transformer/layer_0/attn/q_einsum": {"w": …}}."""
        module, _, leaf = f"transformer/{self.name}".rpartition("/")
        return module, leaf

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of one part in the checkpoint."""
        return self.shape[1:] if len(self.parts) > 1 else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one part in Hugging Face."""
        if self.layout == "NDH":
            num_heads, d_model, head_dim = self.part_shape
            return num_heads * head_dim, d_model
        if self.layout == "NHD":
            num_heads, head_dim, d_model = self.part_shape
            return d_model, num_heads * head_dim
        return self.part_shape[::-1] if self.layout == "DF" else self.part_shape

    def to_hf(self, part: np.ndarray) -> np.ndarray:
        """A part in Hugging Face's layout."""
        if self.layout == "NDH":
            return part.transpose(0, 2, 1).reshape(self.hf_shape)
        if self.layout == "NHD":
            return part.reshape(self.hf_shape[::-1]).T
        return part.T if self.layout == "DF" else part

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_hf`."""
        if self.layout == "NDH":
            num_heads, d_model, head_dim = self.part_shape
            return array.reshape(num_heads, head_dim, d_model).transpose(0, 2, 1)
        if self.layout == "NHD":
            return array.T.reshape(self.part_shape)
        return array.T if self.layout == "DF" else array


class _Place(NamedTuple):
    """The array that holds a Hugging Face tensor; `row` of its first axis if it holds several."""

    tensor: FlaxTensor
    row: int | None


class FlaxCheckpoint:
    """A Gemma as Kaggle distributes it, read block by block under Hugging Face names and shapes.

    Args:
      path: the checkpoint's directory, or the directory that holds it and tokenizer.model.

    Attributes:
      config: from a `config.json` in the checkpoint, otherwise the preset with its shapes.
      shapes: shape of every tensor, without the padding of the embedding.
      files: all files of the checkpoint.

    Raises ValueError, in one line, for no checkpoint, a damaged or truncated one, shapes of no
    preset, missing, extra or misshapen arrays (names them all), dtypes other than float32, bfloat16
    and float16, and arrays much larger than the files that should hold them.
    """

    def __init__(self, path: Path | str):
        found = _find(Path(path))
        if found is None:
            raise ValueError(f"{path}: holds no Orbax checkpoint ({_OCDBT_FILE} or {_TREE_FILE})")
        self.path = found.resolve()
        try:
            self.files = _files(self.path)
            self._arrays = _open_arrays(self.path)
        except Exception as error:  # a damaged file can raise anything
            raise _damaged(self.path, error) from error
        self._check_sizes()
        shapes = {name: tuple(array.shape) for name, array in self._arrays.items()}
        config_path = self.path / "config.json"
        has_config = config_path.exists()
        self.config = from_hf_config(config_path) if has_config else preset_of(self.path, shapes)
        self._places: dict[str, _Place] = {}
        tensors = like_found(self.config, shapes)
        check_shapes(self.path, shapes, {tensor.name: tensor.shape for tensor in tensors})
        self.shapes = {part: tensor.hf_shape for tensor in tensors for part in tensor.parts}
        (embedding,) = tensors[0].parts
        self.shapes[embedding] = (self.config.vocab_size, self.config.d_model)
        for tensor in tensors:
            for index, part in enumerate(tensor.parts):
                self._places[part] = _Place(tensor, index if len(tensor.parts) > 1 else None)

    def blocks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (first row, [rows, in]) of a tensor in order, in its own dtype; [n] is one row.

        Every tensor but the embedding is one block. Raises ValueError if the data is damaged.
        """
        tensor, row = self._places[name]
        array = self._arrays[tensor.name]
        if tensor.name != _EMBEDDING:
            block = tensor.to_hf(self._read(array if row is None else array[row], name))
            yield 0, block[None] if block.ndim == 1 else block
            return
        num_rows, d_model = self.shapes[name]
        step = max(1, _BLOCK_ELEMENTS // d_model)
        # A block is whole chunks: a chunk in two blocks would be decoded twice.
        chunk_rows = _chunk(array)[0]
        step = -(-step // chunk_rows) * chunk_rows
        for start in range(0, num_rows, step):
            yield start, self._read(array[start : min(start + step, num_rows)], name)

    def _read(self, array: ts.TensorStore, name: str) -> np.ndarray:
        try:
            return np.asarray(array.read().result())
        except MemoryError:
            raise  # not the file's fault
        except Exception as error:  # a damaged file can raise anything
            raise _damaged(self.path, error, f"tensor {name}: ") from error

    def _check_sizes(self) -> None:
        dtypes: dict[str, str] = {}
        chunks: dict[str, str] = {}
        for name, array in self._arrays.items():
            dtype, chunk = array.dtype.name, _chunk(array)
            if dtype not in _DTYPES:
                dtypes[name] = f"({dtype}, only {', '.join(_DTYPES)})"
            if any(side > max(1, dim) for side, dim in zip(chunk, array.shape, strict=True)):
                chunks[name] = f"({list(chunk)}, of {list(array.shape)})"
        if dtypes or chunks:
            kinds = {"of another dtype": dtypes, "in larger chunks": chunks}
            raise ValueError(error_line(f"{self.path}: unusable arrays", kinds))
        num_bytes = sum(file.stat().st_size for file in self.files)
        declared = sum(
            math.prod(array.shape) * array.dtype.numpy_dtype.itemsize
            for array in self._arrays.values()
        )
        if declared > _MAX_EXPANSION * num_bytes + _MAX_UNBACKED_BYTES:
            raise ValueError(
                f"{self.path}: {num_bytes} bytes of files cannot hold the {declared} bytes of "
                "arrays that they declare; download it again"
            )


def write_flax(
    directory: Path | str, tensors: Iterable[tuple[str, np.ndarray]], config: GemmaConfig
) -> None:
    """Writes (Hugging Face name, array) pairs as a checkpoint; `directory` appears when whole.

    The layout is Kaggle's, which `gm.ckpts.load_params` of the `gemma` package and the `params`
    modules of Tunix read. Dtypes do not change. The embedding of Gemma 1 and 2 gets 128 rows below
    the vocabulary: copies of the first row, so that their logits never exceed that of <pad>. Takes
    the memory of at most two copies of the largest array, besides `tensors`.

    Raises ValueError if the directory exists, OSError if it cannot be written.
    """
    directory = Path(directory).absolute()
    if directory.exists():
        raise ValueError(f"{directory} exists already; name another directory")
    is_gemma3 = config.qk_norm
    num_rows = config.vocab_size + (0 if is_gemma3 else _PADDING_ROWS)
    wanted = _flax_tensors(config, num_rows, "FD" if is_gemma3 else "DF")
    by_part = {part: tensor for tensor in wanted for part in tensor.parts}
    missing = {tensor.name for tensor in wanted}
    waiting: dict[str, np.ndarray] = {}
    with scratch_beside(directory) as partial:
        kvstore = _kvstore(partial, is_ocdbt=True)
        transaction, num_bytes = ts.Transaction(), 0
        for name, array in tensors:
            tensor = by_part[name]
            waiting[name] = array
            if any(part not in waiting for part in tensor.parts):
                continue
            parts = [tensor.from_hf(waiting.pop(part)) for part in tensor.parts]
            whole = np.stack(parts) if len(parts) > 1 else parts[0]
            missing.remove(tensor.name)
            num_bytes += whole.nbytes
            with _os_errors(directory):
                _write(kvstore, tensor, whole, transaction)
                if num_bytes > _COMMIT_BYTES:
                    transaction.commit_sync()
                    transaction, num_bytes = ts.Transaction(), 0
        assert not missing, missing
        with _os_errors(directory):
            transaction.commit_sync()
        _write_tree(partial, wanted)
        partial.rename(directory)


@contextmanager
def _os_errors(directory: Path) -> Iterator[None]:
    """Turns TensorStore's ValueError for a full disk into an OSError."""
    try:
        yield
    except ValueError as error:
        raise OSError(f"{directory}: can't be written: {_first_line(error)}") from error


def _find(path: Path) -> Path | None:
    """The checkpoint's own directory, None if there is none."""

    def is_checkpoint(directory: Path) -> bool:
        return any((directory / name).is_file() for name in (_OCDBT_FILE, _TREE_FILE))

    if path.is_dir() and is_checkpoint(path):
        return path
    if not (path / "tokenizer.model").is_file():
        return None
    found = [each for each in path.iterdir() if is_checkpoint(each)]
    return found[0] if len(found) == 1 else None


def _files(directory: Path) -> list[Path]:
    """All files in it; ValueError for pipes and for links to directories (may be circular)."""
    files = []
    for entry in sorted(directory.rglob("*")):
        if entry.is_file():
            files.append(entry)
        elif entry.is_symlink() or not entry.is_dir():
            raise ValueError(f"{entry.name} is neither a file nor a directory")
    return files


def _kvstore(directory: Path, *, is_ocdbt: bool) -> ts.KvStore:
    """The directory as a key-value store: TensorStore's database, or one file for each key."""
    files = {"driver": "file", "path": f"{directory}/"}
    return ts.KvStore.open({"driver": "ocdbt", "base": files} if is_ocdbt else files).result()


def _open_arrays(directory: Path) -> dict[str, ts.TensorStore]:
    """Every array by its name in Kaggle's layout; reads only metadata."""
    kvstore = _kvstore(directory, is_ocdbt=(directory / _OCDBT_FILE).exists())
    pending: dict[str, Any] = {}
    for key in kvstore.list().result():
        for end, driver in _DRIVERS.items():
            stored = key.decode().removesuffix(end)
            if stored == key.decode():
                continue
            name = _flax_name(stored)
            if name in pending:
                raise ValueError(f"{name} is there twice")
            spec = {"driver": driver}
            pending[name] = ts.open(spec, kvstore=kvstore / f"{stored}/", open=True, read=True)
    return {name: array.result() for name, array in pending.items()}


def _chunk(array: ts.TensorStore) -> tuple[int, ...]:
    """The shape of the array's chunks."""
    shape = array.chunk_layout.write_chunk.shape
    return tuple(side or 1 for side in shape or ())


def _write(
    kvstore: ts.KvStore, tensor: FlaxTensor, array: np.ndarray, transaction: ts.Transaction
) -> None:
    """Writes one zarr array in chunks."""
    chunk = list(tensor.shape)
    for axis in range(len(chunk)):
        rest = math.prod(chunk[axis + 1 :]) * array.dtype.itemsize
        chunk[axis] = min(chunk[axis], max(1, _CHUNK_BYTES // rest))
    store = ts.open(
        {"driver": "zarr", "metadata": {"chunks": chunk, "compressor": {"id": "zstd", "level": 1}}},
        kvstore=kvstore / f"{'.'.join(tensor.tree_path)}/",
        create=True,
        dtype=ts.dtype(array.dtype),
        shape=tensor.shape,
        transaction=transaction,
    ).result()
    num_rows = len(array)
    store[:num_rows] = array
    if num_rows < tensor.shape[0]:
        store[num_rows:] = array[:1]


def _write_tree(directory: Path, tensors: list[FlaxTensor]) -> None:
    """Writes the tree whose leaves are the arrays, which Orbax needs."""
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree = {}
    for tensor in tensors:
        # 2 is orbax.checkpoint's KeyType.DICT.
        keys = [{"key": key, "key_type": 2} for key in tensor.tree_path]
        tree[str(tensor.tree_path)] = {"key_metadata": keys, "value_metadata": value}
    write_json(
        directory / _TREE_FILE,
        {"tree_metadata": tree, "use_ocdbt": True, "use_zarr3": False, "custom_metadata": None},
    )


def _damaged(path: Path, error: Exception, where: str = "") -> ValueError:
    return ValueError(
        f"{path}: {where}the Flax checkpoint is damaged or not whole ({_first_line(error)}); "
        "download it again"
    )


def _first_line(error: Exception) -> str:
    """TensorStore's message without its list of source locations."""
    return visible_line(str(error).split(" [", 1)[0])[:300]


def _flax_tensors(config: GemmaConfig, num_rows: int, gating_layout: str) -> list[FlaxTensor]:
    """Every array of a checkpoint whose embedding has `num_rows` rows.

    `gating_layout` is "DF", as in Gemma 1 and Gemma 2 2B, or "FD", as in Gemma 3.
    """
    embedding = FlaxTensor(
        _EMBEDDING, (num_rows, config.d_model), ("model.embed_tokens.weight",), "FD"
    )
    tensors = [embedding, _norm("final_norm", config.d_model, "model.norm")]
    for layer in range(config.num_layers):
        tensors += _linears(config, layer, gating_layout) + _norms(config, layer)
    return tensors


def _flax_name(stored: str) -> str:
    """The name in Kaggle's layout of an array saved by Kaggle or by the `gemma` package."""
    name = stored.replace(".", "/").removeprefix("transformer/")
    return f"{name}/w" if name.endswith(("/mlp/gating_einsum", "/mlp/linear")) else name


def like_found(config: GemmaConfig, shapes: dict[str, tuple[int, ...]]) -> list[FlaxTensor]:
    """The arrays of `config`, with the padding and layout that a checkpoint's `shapes` show."""
    num_rows = config.vocab_size
    if shapes.get(_EMBEDDING, ())[:1] == (num_rows + _PADDING_ROWS,):
        num_rows += _PADDING_ROWS
    found = shapes.get("layer_0/mlp/gating_einsum/w")
    is_df = found == (2, config.d_model, config.d_ff)
    is_fd = found == (2, config.d_ff, config.d_model)
    # A square or missing array does not show its layout.
    layout = "FD" if config.qk_norm else "DF"
    if is_fd != is_df:
        layout = "FD" if is_fd else "DF"
    return _flax_tensors(config, num_rows, layout)


def preset_of(path: Path, shapes: dict[str, tuple[int, ...]]) -> GemmaConfig:
    """The preset of the same width; ValueError if there is none. Compares nothing else."""
    width = shapes.get(_EMBEDDING, (0,))[-1]
    for preset in PRESETS.values():
        if preset.d_model == width:
            return preset
    known = ", ".join(f"{name} (width {config.d_model})" for name, config in PRESETS.items())
    raise ValueError(
        f"{path}: no supported Gemma has an {_EMBEDDING} of width {width}: {known}; for any other, "
        "put its Hugging Face config.json into this directory"
    )


def _linears(config: GemmaConfig, layer: int, gating_layout: str) -> list[FlaxTensor]:
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    d, f = config.d_model, config.d_ff

    def linear(
        name: str, shape: tuple[int, ...], parts: tuple[str, ...], layout: str
    ) -> FlaxTensor:
        hf_names = tuple(f"model.layers.{layer}.{part}_proj.weight" for part in parts)
        return FlaxTensor(f"layer_{layer}/{name}/w", shape, hf_names, layout)

    q, kv = ("self_attn.q",), ("self_attn.k", "self_attn.v")
    if n == k:
        tensors = [linear("attn/qkv_einsum", (3, n, d, h), q + kv, "NDH")]
    else:
        tensors = [
            linear("attn/q_einsum", (n, d, h), q, "NDH"),
            linear("attn/kv_einsum", (2, k, d, h), kv, "NDH"),
        ]
    gating = (2, f, d) if gating_layout == "FD" else (2, d, f)
    return [
        *tensors,
        linear("attn/attn_vec_einsum", (n, h, d), ("self_attn.o",), "NHD"),
        linear("mlp/gating_einsum", gating, ("mlp.gate", "mlp.up"), gating_layout),
        linear("mlp/linear", (f, d), ("mlp.down",), "DF"),
    ]


def _norms(config: GemmaConfig, layer: int) -> list[FlaxTensor]:
    names = {
        "pre_attention_norm": "input_layernorm",
        # Gemma 1's norm before the MLP has this Hugging Face name: see names.py.
        "pre_ffw_norm": "post_attention_layernorm",
    }
    if config.post_norms:
        names |= {
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        names |= {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
    return [
        _norm(
            f"layer_{layer}/{flax}",
            config.head_dim if flax.startswith("attn/") else config.d_model,
            f"model.layers.{layer}.{hf}",
        )
        for flax, hf in names.items()
    ]


def _norm(name: str, dim: int, hf_name: str) -> FlaxTensor:
    return FlaxTensor(f"{name}/scale", (dim,), (f"{hf_name}.weight",), "FD")
