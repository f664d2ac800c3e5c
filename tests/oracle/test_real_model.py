"""The pretrained Gemma 3 270M equals transformers' model of the same GGUF file."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxsft.model import Gemma
from jaxsft.tokenizer import Tokenizer

LOGIT_BOUND = 2e-3
# Where the best two tokens are closer than this, either may be chosen.
NEAR_TIE = 1e-2
NUM_NEW_TOKENS = 32
PROMPT_LENGTH = 16

CHAT = "<start_of_turn>user\nWhat is a sonnet?<end_of_turn>\n<start_of_turn>model\n"
LONG = " ".join(
    f"{i}. The house number {i * i} stood in a row of {i % 7} others." for i in range(60)
)
PROMPTS = {
    "english": "The committee met on Tuesday to discuss how the old library should be used.",
    "chat": CHAT,
    "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return",
    "longer than the window": LONG,
}
# Each is cut to the same number of tokens, so that transformers decodes them without padding.
CONTINUED = [
    "The capital of France is Paris, and the capital of Italy is Rome. The capital of Spain is",
    "Once upon a time there was a little girl who lived in a village near the forest with her",
    "To make bread you need flour, water, salt and yeast. First you mix the flour with the rest",
    "Die Hauptstadt von Deutschland ist Berlin. Die Stadt hat mehr als drei Millionen Einwohner",
    "import numpy as np\n\ndef mean(values):\n    return sum(values) / len(values)\n\ndef variance(",
    "Question: What is 12 times 12? Answer: 144. Question: What is 9 times 9? Answer: 81.",
    "水は地球上で最も重要な物質の一つであり、生物が生きるために欠かせない。人間の体の約",
    "In economics, inflation is a general increase in the prices of goods and services in an",
]


@jax.jit
def _hidden(state: nnx.State, tokens_BT: jax.Array, graphdef: nnx.GraphDef) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return nnx.merge(graphdef, state)(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))


def our_logits(model: Gemma, tokens_BT: np.ndarray, at: np.ndarray) -> np.ndarray:
    """float32 [B, len(at), V]: the logits at positions `at`."""
    graphdef, state = nnx.split(model)
    hidden_BTD = _hidden(state, jnp.asarray(tokens_BT), graphdef)
    return np.asarray(jax.jit(lambda x: model.logits(x))(hidden_BTD[:, at]))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_id, *tokenizer.encode(text)]


@pytest.mark.parametrize("name", PROMPTS)
def test_logits(name: str, real_model: Gemma, hf_real_model: Any, tokenizer: Tokenizer) -> None:
    tokens_BT = np.asarray([encode(tokenizer, PROMPTS[name])])
    num_tokens = tokens_BT.shape[1]
    window = real_model.config.sliding_window
    assert window is not None and (num_tokens > window + 200) == name.startswith("longer")
    # All positions of a short prompt; of the long one the last few and some on both sides of 512.
    at = np.unique(np.linspace(0, num_tokens - 1, min(num_tokens, 48)).astype(int))
    with torch.no_grad():
        reference = hf_real_model(torch.tensor(tokens_BT), logits_to_keep=torch.tensor(at)).logits
    ours = our_logits(real_model, tokens_BT, at)
    assert ours.shape == (1, len(at), real_model.config.vocab_size)
    assert np.abs(ours - reference.numpy()).max() <= LOGIT_BOUND


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
    # On transformers' own tokens: were a near tie decided otherwise, the rest could not be compared.
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
