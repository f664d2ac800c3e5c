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
from jaxsft.model import Gemma
from jaxsft.tokenizer import Tokenizer

LOGIT_BOUND = 2e-3
# Where the best two tokens are closer than this, either may be chosen.
NEAR_TIE = 1e-2
NUM_NEW_TOKENS = 32
PROMPT_LENGTH = 16
LONG_LENGTH = 768  # beyond the window of 512

PROMPTS = [
    "The committee met on Tuesday to discuss how the old library should be used.",
    "<start_of_turn>user\nWhat is a sonnet?<end_of_turn>\n<start_of_turn>model\n",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
]
# Each is cut to the same number of tokens, so that transformers decodes them without padding.
CONTINUED = [
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "Once upon a time there was a little girl who lived in a village near the forest with her",
    "To make bread you need flour, water, salt and yeast. First you mix the flour with the rest",
    "Die Hauptstadt von Deutschland ist Berlin. Die Stadt hat mehr als drei Millionen Einwohner",
    "import numpy as np\n\ndef mean(values):\n    return sum(values) / len(values)\n\ndef var(",
    "Question: What is 12 times 12? Answer: 144. Question: What is 9 times 9? Answer: 81.",
    "水は地球上で最も重要な物質の一つであり、生物が生きるために欠かせない。人間の体の約",
    "In economics, inflation is a general increase in the prices of goods and services in an",
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


@pytest.fixture(scope="module")
def continuations(hf_real_model: Any, tokenizer: Tokenizer) -> np.ndarray:
    """int [8, 16 + 32]: prompts and transformers' greedy tokens, decoded with its cache."""
    prompts = [encode(tokenizer, text)[:PROMPT_LENGTH] for text in CONTINUED]
    assert {len(prompt) for prompt in prompts} == {PROMPT_LENGTH}
    tokens = step = torch.tensor(prompts)
    cache = None
    with torch.no_grad():
        for _ in range(NUM_NEW_TOKENS):
            out = hf_real_model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, step], dim=1)
    return tokens.numpy()


def test_greedy_continuation(real_model: Gemma, continuations: np.ndarray) -> None:
    # On transformers' own tokens: after a near tie decided otherwise nothing could be compared.
    at = np.arange(PROMPT_LENGTH - 1, PROMPT_LENGTH + NUM_NEW_TOKENS - 1)
    logits_BTV = our_logits(real_model, continuations[:, :-1], at)
    theirs = continuations[:, PROMPT_LENGTH:]
    chosen_BT = np.take_along_axis(logits_BTV, theirs[..., None], axis=-1)[..., 0]
    differs = logits_BTV.argmax(-1) != theirs
    behind = logits_BTV.max(-1) - chosen_BT
    assert (behind[differs] <= NEAR_TIE).all(), behind[differs]
    assert differs.mean() < 0.02
    # The comparison means something: the continuations are not one token over and over.
    assert len(np.unique(theirs)) > 50
