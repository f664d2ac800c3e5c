"""Fuzzing the readers of files from elsewhere: weights, adapters, configs, vocabularies, rows.

Whatever a file holds, its reader gives a result, or one error that names it, in memory that is
bounded by the file's size; no name in it becomes a path.
"""

import json
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from support.fake_tokenizer import FakeTokenizer

from jaxsft.common.files import read_json
from jaxsft.common.text import visible_line
from jaxsft.config import DataOptions
from jaxsft.data.prepared import Prepared, open_prepared, prepare, sealed
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.data.vocabulary import BYTE, CONTROL, NORMAL, REQUIRED_PIECES, UNKNOWN
from jaxsft.download import files as hub_files
from jaxsft.formats.gguf import GGUFFile, hf_config
from jaxsft.formats.safetensors import SafetensorsDirectory
from jaxsft.gemma.architecture import PRESETS
from jaxsft.weights.adapter_config import read_adapter_config
from jaxsft.weights.hf_config import from_hf_config, to_hf_config
from jaxsft.weights.peft import load_adapter

fuzzed = settings(deadline=None, max_examples=300)

OPTIONS = DataOptions(max_length=256, system_prompt=None, min_completion_tokens=0)
MAX_BYTES = 4 << 20  # that reading a file of some kilobytes may take
NAMES = st.sampled_from(
    [
        *("../../x", "/etc/passwd", "..", "", "a/../../b", "a\x00b", "a\nb", "C:\\x", "\u202ex"),
        *("model.norm.weight", "__metadata__", "~/x", "$HOME", "a" * 300),
    ]
)
NUMBERS = st.sampled_from(
    [
        *(0, 1, 2, 7, 8, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 40),
        *((1 << 63) - 1, 1 << 63, (1 << 64) - 8, (1 << 64) - 1),
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.integers(-3, 100)
    | st.floats()
    | st.sampled_from([10**400, -(10**400), "", "8", "gelu", "true"])
    | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
JSON_TEXTS = [
    *("", "[]", "null", "3", "{", "\ufeff{}", '{"a": 1e999}', '{"a": ' + "9" * 5000 + "}"),
    *("[" * 100_000, '{"a":' * 5000, '{"r": ' + "[" * 800 + "]" * 800 + "}"),
]


def outcome(read: Callable[[], Any], named: Path | str) -> Any:
    """What `read` returns, or the line that it refuses with; in little memory either way."""
    found, peak = _measured(read, named)
    if peak >= MAX_BYTES:  # Python's table of interned names grew, by 8 MB beside torch: only once
        found, peak = _measured(read, named)
    assert peak < MAX_BYTES, f"{peak:,} bytes"
    return found


def _measured(read: Callable[[], Any], named: Path | str) -> tuple[Any, int]:
    tracemalloc.start()
    try:
        found = read()
    except (ValueError, OSError) as error:
        found = visible_line(str(error))
        assert str(named) in found, found
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return found, peak


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, header_size: int) -> bytes:
    """The bytes with numbers of 4 or 8 bytes, or a few bytes, put over some of the header."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, header_size - 1))
        patch = draw(
            NUMBERS.map(struct.Struct("<Q").pack)
            | NUMBERS.map(lambda number: struct.pack("<I", number & 0xFFFFFFFF))
            | st.binary(min_size=1, max_size=3)
        )
        data[at : at + len(patch)] = patch
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def safetensors(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + data


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """Headers whose entries contradict the file, each other and the format; names may recur."""
    offsets = st.lists(NUMBERS | st.integers(-8, 40), min_size=2, max_size=2) | VALUES
    entries = []
    for _ in range(draw(st.integers(0, 4))):
        entry = {
            "dtype": draw(
                st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "F4", "BOOL"]) | VALUES
            ),
            "shape": draw(st.lists(NUMBERS, max_size=3) | VALUES),
            "data_offsets": draw(offsets),
        }
        dropped = draw(st.sampled_from([None, *entry]))
        entries.append((draw(NAMES), {k: v for k, v in entry.items() if k != dropped}))
    fields = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries]
    header = ("{" + ", ".join(fields) + "}").encode()
    if draw(st.booleans()):
        header = draw(damaged(header, len(header)))
    size = draw(st.none() | NUMBERS | st.integers(0, 200))
    return safetensors(header, draw(st.binary(max_size=64)), size)


F32_PAIR = json.dumps(
    {
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [16, 28]},
    }
).encode()
WHOLE_SAFETENSORS = safetensors(F32_PAIR, bytes(28))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def read_safetensors(directory: Path) -> dict[str, tuple[int, ...]]:
    """Reads everything; the arrays are those that the header promises."""
    source = SafetensorsDirectory(directory)
    for name, shape in source.shapes.items():
        num_elements = sum(block.size for _, block in source.blocks(name))
        assert num_elements == np.prod(shape, dtype=object)
    return source.shapes


@fuzzed
@given(data=safetensors_files() | damaged(WHOLE_SAFETENSORS, len(WHOLE_SAFETENSORS)))
@example(data=safetensors(b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}', b""))
def test_safetensors(directory: Path, data: bytes) -> None:
    (directory / "model.safetensors").write_bytes(data)
    outcome(lambda: read_safetensors(directory), directory)


def test_safetensors_cut_anywhere(directory: Path) -> None:
    path = directory / "model.safetensors"
    for length in range(len(WHOLE_SAFETENSORS)):
        path.write_bytes(WHOLE_SAFETENSORS[:length])
        line = outcome(lambda: read_safetensors(directory), path)
        assert "truncated or damaged" in line
    path.write_bytes(WHOLE_SAFETENSORS)
    assert read_safetensors(directory) == {"a": (2, 2), "b": (3,)}


@pytest.mark.parametrize("offsets", [(0, 12), (16, 4), (4, 16), (16, 1 << 63), (40, 52), (16, 29)])
def test_safetensors_offsets(offsets: tuple[int, int], directory: Path) -> None:
    """Overlapping, reversed, behind the end, of another length than the shape's."""
    (start, stop), path = offsets, directory / "model.safetensors"
    header = F32_PAIR.replace(b"[16, 28]", f"[{start}, {stop}]".encode())
    path.write_bytes(safetensors(header, bytes(28)))
    assert "truncated or damaged" in outcome(lambda: read_safetensors(directory), path)


GGUF_TYPES = {"u32": "4I", "i32": "5i", "f32": "6f", "bool": "7?", "u64": "10Q", "f64": "12d"}


def gguf_value(value: Any) -> bytes:
    """A metadata value with its type: str, (kind, number), or a list of one of the two."""
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return struct.pack("<IQ", 8, len(text)) + text
    if isinstance(value, list):
        packed = [gguf_value(each) for each in value]
        kind = packed[0][:4] if packed else struct.pack("<I", 4)
        texts = b"".join(each[4:] for each in packed)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(packed)) + texts
    kind, number = value
    *code, letter = GGUF_TYPES[kind]
    return struct.pack(f"<I{letter}", int("".join(code)), number)


def gguf_file(
    metadata: list[tuple[str, Any]], tensors: list[tuple[str, list[int], int, int]], data: bytes
) -> bytes:
    """`tensors` are (name, shape innermost first, type, offset)."""

    def text(value: str) -> bytes:
        return gguf_value(value)[4:]

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    header += b"".join(text(key) + gguf_value(value) for key, value in metadata)
    for name, shape, kind, offset in tensors:
        header += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", kind, offset)
    return header + bytes(-len(header) % 32) + data


TOKENS = [*REQUIRED_PIECES, *(f"<0x{byte:02X}>" for byte in range(256)), "▁a"]
TOKEN_TYPES = [CONTROL] * 3 + [UNKNOWN] + [CONTROL] * 2 + [BYTE] * 256 + [NORMAL]
GEMMA = {
    "general.architecture": "gemma3",
    "general.name": "tiny",
    "gemma3.block_count": ("u32", 2),
    "gemma3.context_length": ("u32", 64),
    "gemma3.embedding_length": ("u32", 8),
    "gemma3.feed_forward_length": ("u32", 16),
    "gemma3.attention.head_count": ("u32", 2),
    "gemma3.attention.key_length": ("u32", 4),
    "gemma3.attention.layer_norm_rms_epsilon": ("f32", 1e-6),
    "gemma3.attention.sliding_window": ("u32", 8),
    "gemma3.attention.sliding_window_pattern": ("u32", 6),
    "gemma3.rope.scaling.type": "none",
    "gemma3.rope.freq_base": ("f32", 1e6),
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.scores": [("f32", 0.0)] * len(TOKENS),
    "tokenizer.ggml.token_type": [("i32", kind) for kind in TOKEN_TYPES],
}
TENSORS = [("token_embd.weight", [8, 4], 0, 0), ("output_norm.weight", [8], 0, 128)]
GGUF_BYTES = gguf_file(list(GEMMA.items()), TENSORS, bytes(160))


def gguf_values() -> st.SearchStrategy[Any]:
    number = st.one_of(
        st.tuples(st.just("u64"), NUMBERS),
        st.tuples(st.just("i32"), st.integers(-3, 3)),
        st.tuples(st.sampled_from(["f32", "f64"]), st.sampled_from([0.0, -1.5, np.nan, np.inf])),
        st.just(("f64", 1e300)),
        st.tuples(st.just("bool"), st.booleans()),
    )
    texts = NAMES | st.sampled_from(["none", "gemma", "gemma2", "llama"])
    same = st.lists(st.tuples(st.just("u64"), NUMBERS), max_size=3)
    return st.one_of(texts, number, st.lists(texts, max_size=3), same)


@st.composite
def gguf_metadata(draw: st.DrawFn) -> bytes:
    """A key or two of any type and value, in a file that is whole otherwise."""
    metadata = dict(GEMMA)
    if draw(st.booleans()):
        metadata["general.architecture"] = draw(st.sampled_from(["gemma", "gemma2"]))
        renamed = str(metadata["general.architecture"])
        metadata = {key.replace("gemma3.", f"{renamed}."): v for key, v in metadata.items()}
    keys = st.sampled_from([*metadata, "general.alignment"])
    for key in draw(st.lists(keys, min_size=1, max_size=2)):
        metadata[key] = draw(gguf_values())
    return gguf_file(list(metadata.items()), TENSORS, bytes(160))


@st.composite
def gguf_tensors(draw: st.DrawFn) -> bytes:
    """Tensors of any name, shape, type and place."""
    tensors = list(TENSORS)
    for _ in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(NUMBERS, max_size=6))
        tensors.append((draw(NAMES), shape, draw(st.integers(0, 40)), draw(NUMBERS)))
    return gguf_file(list(GEMMA.items()), tensors, bytes(draw(st.sampled_from([0, 160, 1 << 12]))))


def read_gguf(path: Path) -> int:
    """Reads everything that is in a GGUF file for us; returns the number of layers."""
    file = GGUFFile(path)
    for name, shape in file.shapes.items():
        if file.tensors[name].num_bytes <= len(GGUF_BYTES):
            assert sum(len(block) for _, block in file.blocks(name)) == np.prod(shape[:-1])
    return from_hf_config(hf_config(file), str(path)).num_layers


@fuzzed
@given(data=gguf_metadata())
def test_gguf_metadata(directory: Path, data: bytes) -> None:
    path = directory / "model.gguf"
    path.write_bytes(data)
    outcome(lambda: read_gguf(path), path)
    outcome(lambda: Tokenizer.from_gguf(path), path)


@fuzzed
@given(data=gguf_tensors() | damaged(GGUF_BYTES, len(GGUF_BYTES) - 160))
def test_gguf(directory: Path, data: bytes) -> None:
    path = directory / "model.gguf"
    path.write_bytes(data)
    outcome(lambda: read_gguf(path), path)


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (("b", [8], 0, 127), "begins inside another"),
        (("b", [8], 0, 1 << 63), "inside tensor b"),
        (("b", [1 << 63] * 4, 0, 128), "inside tensor b"),
        (("b", [1] * 5, 0, 128), "has 5 dimensions"),
        (("b", [8, 0], 0, 128), "has shape"),
        (("token_embd.weight", [8], 0, 128), "appears twice"),
    ],
)
def test_gguf_tensors(tensor: Any, complaint: str, directory: Path) -> None:
    path = directory / "model.gguf"
    path.write_bytes(GGUF_BYTES)
    assert read_gguf(path) == 2 and Tokenizer.from_gguf(path).vocab_size == len(TOKENS)
    path.write_bytes(gguf_file(list(GEMMA.items()), [TENSORS[0], tensor], bytes(160)))
    assert complaint in outcome(lambda: read_gguf(path), path)


@pytest.fixture(scope="module")
def vocabulary(directory: Path) -> bytes:
    """A whole `tokenizer.model` of Gemma's kind."""
    (directory / "model.gguf").write_bytes(GGUF_BYTES)
    return Tokenizer.from_gguf(directory / "model.gguf").model_bytes


@fuzzed
@given(draw=st.data())
def test_tokenizer_model(directory: Path, vocabulary: bytes, draw: st.DataObject) -> None:
    path = directory / "tokenizer.model"
    proto = ModelProto.FromString(vocabulary)
    for _ in range(draw.draw(st.integers(0, 3))):
        piece = proto.pieces[draw.draw(st.integers(0, len(TOKENS) - 1))]
        piece.piece = draw.draw(NAMES | st.sampled_from(TOKENS))
        piece.score = draw.draw(st.floats(width=32))
        piece.type = draw.draw(st.integers(1, 6))
    proto.trainer_spec.vocab_size = draw.draw(st.sampled_from([-1, 0, 7, (1 << 31) - 1]))
    whole = proto.SerializeToString()
    path.write_bytes(draw.draw(st.just(whole) | damaged(whole, len(whole))))
    tokenizer = outcome(lambda: Tokenizer.from_file(path), path)
    if isinstance(tokenizer, Tokenizer):
        assert not tokenizer.control_ids & set(tokenizer.encode(" <bos> a é <end_of_turn>"))


ADAPTER = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
LORA = "layers.0.self_attn.q_proj.lora_"
HF_CONFIG = to_hf_config(PRESETS["gemma-2-2b"]) | {"layer_types": None, "_name_or_path": None}


@fuzzed
@given(changed=st.dictionaries(st.sampled_from(list(HF_CONFIG)), VALUES, min_size=1, max_size=2))
def test_model_config(directory: Path, changed: dict[str, Any]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(HF_CONFIG | changed))
    config = outcome(lambda: from_hf_config(path), path)
    if not isinstance(config, str):
        assert 1 <= config.num_layers <= 512
        json.dumps(vars(config), allow_nan=False)  # no NaN, no complex number


@fuzzed
@given(
    changed=st.dictionaries(
        st.sampled_from(
            [
                *(*ADAPTER, "lora_dropout", "use_rslora", "base_model_name_or_path", "bias"),
                *("rank_pattern", "alpha_pattern", "layers_to_transform", "init_lora_weights"),
            ]
        ),
        VALUES,
        min_size=1,
        max_size=2,
    )
)
def test_adapter_config(directory: Path, changed: dict[str, Any]) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(ADAPTER | changed))
    pair = F32_PAIR.replace(b'"b"', f'"{LORA}B.weight"'.encode())
    pair = pair.replace(b'"a"', f'"{LORA}A.weight"'.encode())
    (directory / "adapter_model.safetensors").write_bytes(safetensors(pair, bytes(28)))
    config = outcome(lambda: read_adapter_config(directory), path)
    if not isinstance(config, str):
        assert config.rank >= 1 and 0 < config.alpha < float("inf") and config.targets
        # Whatever the rank, nothing is made before the tensors' shapes were compared.
        model: Any = SimpleNamespace(config=from_hf_config(dict(HF_CONFIG)))
        assert "on layers 0 only" in outcome(lambda: load_adapter(directory, model), directory)


@pytest.mark.parametrize("text", JSON_TEXTS, ids=lambda text: repr(text[:12]))
def test_json_texts(text: str, directory: Path) -> None:
    readers: dict[str, Callable[[Path], Any]] = {
        "config.json": from_hf_config,
        "adapter_config.json": lambda path: read_adapter_config(path.parent),
        "index.safetensors.index.json": lambda path: SafetensorsDirectory(
            path.parent, "index.safetensors"
        ),
    }
    for name, read in readers.items():
        (directory / name).write_text(text)
        line = outcome(lambda read=read, name=name: read(directory / name), directory / name)
        assert isinstance(line, str)
    outcome(lambda: read_json(directory / "config.json"), directory / "config.json")


@fuzzed
@given(name=NAMES | st.text(st.sampled_from("./\\:a\x00\n~*"), max_size=8))
def test_names_on_a_hub_stay_below_the_directory(directory: Path, name: str) -> None:
    entry = SimpleNamespace(rfilename=name, size=1, blob_id="0" * 40, lfs=None)
    try:
        listed = hub_files._listed("owner/name", entry)
    except ValueError as error:
        assert repr(name) in str(error)
        return
    below = (directory / listed.path).resolve().relative_to(directory.resolve())
    assert below.as_posix() == name and "\x00" not in name


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp("prepared")
    (root / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n')
    return prepare([root / "rows.jsonl"], FakeTokenizer(), OPTIONS, root / "set")


@pytest.fixture
def tokens_file(prepared: Prepared) -> Iterator[Path]:
    path = prepared.directory / "tokens.npy"
    whole = path.read_bytes()
    yield path
    path.write_bytes(whole)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_prepared_rows_unpickle_nothing(
    prepared: Prepared, tokens_file: Path, tmp_path: Path
) -> None:
    manifest = read_json(prepared.directory / "manifest.json")
    assert sealed(manifest) == manifest  # so that it is the arrays that are refused below
    trap = Trap(tmp_path / "sprung")
    np.save(tokens_file, np.array([trap], object), allow_pickle=True)
    object_array = tokens_file.read_bytes()
    with tokens_file.open("wb") as file:
        np.savez(file, tokens=np.array([trap], object))
    for data in (object_array, pickle.dumps(trap), tokens_file.read_bytes()):
        tokens_file.write_bytes(data)
        line = outcome(lambda: open_prepared(prepared.directory), prepared.directory)
        assert "damaged, or no prepared rows; delete it" in line
    assert not trap.path.exists()


def npy_header(dtype: str, length: int) -> str:
    return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({length},)}}"


@pytest.mark.parametrize(
    "header",
    [
        *(npy_header("<i4", 1 << 62), npy_header("<i4", 1 << 80), npy_header("<i4", -1)),
        *(npy_header(f"<U{1 << 28}", 1), npy_header("|O", 1), npy_header("<i4', 1: '", 1)),
        *("__import__('os').system('true')", "(" * 5000, "-" * 9000 + "1", "\x00"),
    ],
    ids=range(10),
)
def test_prepared_rows_with_a_hostile_header(
    header: str, prepared: Prepared, tokens_file: Path
) -> None:
    text = header.encode() + b"\n"
    tokens_file.write_bytes(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + bytes(64))
    line = outcome(lambda: open_prepared(prepared.directory), prepared.directory)
    assert "damaged, or no prepared rows; delete it" in line


def test_native_readers_are_bounded_too(directory: Path, vocabulary: bytes) -> None:
    """What tracemalloc does not see: in a process whose address space may grow by 64 MB."""
    entry = '"%s": {"dtype": "F32", "shape": [%s], "data_offsets": [0, %d]}'
    headers = [
        "{" + entry % ("a", 1 << 61, 1 << 63) + "}",
        "{" + entry % ("a", f"{1 << 32}, {1 << 32}", 0) + "}",
        '{"a": ' + "[" * 10_000,
    ]
    files = [safetensors(header.encode()) for header in headers]
    files += [safetensors(b"{}", size=size) for size in (3, 90_000_000, 1 << 40, (1 << 64) - 1)]
    paths = []
    for number, data in enumerate(files):
        paths.append(directory / f"native{number}" / "model.safetensors")
        paths[-1].parent.mkdir()
        paths[-1].write_bytes(data)
    # A field's length in a protobuf is a varint; groups nest.
    huge = b"\x0a" + b"\xff" * 9 + b"\x01"
    for number, data in enumerate((huge, vocabulary + huge, b"\x0b" * 100_000, b"\x0a\x00" * 500)):
        paths.append(directory / f"native{number}.model")
        paths[-1].write_bytes(data)
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from jaxsft.formats.safetensors import SafetensorsDirectory\n"
        "from jaxsft.data.tokenizer import Tokenizer\n"
        "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
        "limit = pages * resource.getpagesize() + (64 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "for path in map(Path, sys.argv[1:]):\n"
        "    try:\n"
        "        if path.suffix == '.model': Tokenizer.from_file(path)\n"
        "        else: SafetensorsDirectory(path.parent)\n"
        "    except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, *map(str, paths)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    refused = re.findall(r"^\S+?(?=: )", result.stdout, re.MULTILINE)
    assert refused == list(map(str, paths)), result.stdout
