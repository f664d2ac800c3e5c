"""The pretrained Gemma 3 270M equals transformers' model of the same GGUF file."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jaxsft
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma.model import Gemma

LOGIT_BOUND = 2e-3
LONG_LENGTH = 768  # beyond the window of 512

PROMPTS = [
    "The committee met on Tuesday to discuss how the old library should be used.",
    "<start_of_turn>user\nWhat is a sonnet?<end_of_turn>\n<start_of_turn>model\n",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
]


@partial(jax.jit, static_argnums=0)
def _hidden(graphdef: nnx.GraphDef, state: nnx.State, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return nnx.merge(graphdef, state)(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))


def our_logits(model: Gemma, tokens_BT: np.ndarray, at: np.ndarray) -> np.ndarray:
    """float32 [B, len(at), V]: the logits at positions `at`."""
    hidden_BTD = _hidden(*nnx.split(model), jnp.asarray(tokens_BT))
    return np.asarray(model.logits(hidden_BTD[:, at]))


def their_logits(hf_model: Any, tokens_BT: np.ndarray, at: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return hf_model(torch.tensor(tokens_BT), logits_to_keep=torch.tensor(at)).logits.numpy()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def test_logits(real_model: Gemma, hf_real_model: Any, tokenizer: Tokenizer) -> None:
    prompts = [encode(tokenizer, prompt) for prompt in PROMPTS]
    # Ours in one batch: padding on the right is the future, which no token sees.
    padded_BT = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(padded_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    ours_BTV = our_logits(real_model, padded_BT, np.arange(padded_BT.shape[1]))
    for ours_TV, prompt in zip(ours_BTV, prompts, strict=True):
        reference = their_logits(hf_real_model, np.asarray([prompt]), np.arange(len(prompt)))[0]
        assert np.abs(ours_TV[: len(prompt)] - reference).max() <= LOGIT_BOUND


# English prose that does not change, and the worst text found for rounding errors.
LONG_TEXTS = {
    "licence": (Path(jaxsft.__file__).parents[1] / "LICENSE").read_text(),
    "repetitive": " ".join(
        f"The house number {i} is painted in colour {i * 7}." for i in range(99)
    ),
}


@pytest.mark.parametrize("text", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_logits_beyond_the_window(
    real_model: Gemma, hf_real_model: Any, tokenizer: Tokenizer, text: str
) -> None:
    tokens_BT = np.asarray([encode(tokenizer, text)[:LONG_LENGTH]])
    assert tokens_BT.shape[1] == LONG_LENGTH > real_model.config.sliding_window + 200
    at = np.arange(0, LONG_LENGTH, 16)
    ours = our_logits(real_model, tokens_BT, at)
    assert ours.shape == (1, len(at), real_model.config.vocab_size)
    assert np.abs(ours - their_logits(hf_real_model, tokens_BT, at)).max() <= LOGIT_BOUND
