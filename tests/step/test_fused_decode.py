"""Decoding from fused weights: the plain model's answers, no second copy of the weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.lora_twins import make_peft, twin, with_adapter

from jaxsft.gemma import decode, lora
from jaxsft.gemma.architecture import GLOBAL, LOCAL, PRESETS
from jaxsft.gemma.decode import SamplingOptions, generate
from jaxsft.gemma.model import Gemma
from jaxsft.step.fused_decode import FusedModelBuilder
from jaxsft.step.fused_weights import fuse, group_adapter, make_layout, write_adapter

pytestmark = pytest.mark.usefixtures("quick_compilation")

OPTIONS = SamplingOptions(batch_size=4, max_new_tokens=16)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("gemma1", {"num_hidden_layers": 3}),
        ("gemma2", {"num_hidden_layers": 3}),  # windows of 8, a tail
        # One stack of all layers, for rows of 40; answers go beyond the window of 64 all the same.
        ("gemma2", {"num_hidden_layers": 5, "sliding_window": 64}),
        ("gemma3-1b", {"sliding_window_pattern": 2, "num_hidden_layers": 3}),
    ],
)
def test_equals_the_plain_model(name: str, overrides: dict[str, int]) -> None:
    hf_model, model = twin(name, **overrides)
    model = with_adapter(model, make_peft(hf_model, random_b=True))
    scale = model.blocks[0].attn.q_proj.lora.scale
    layout = make_layout(model.config, row_length=40, rank=3, scale=scale, targets=lora.TARGETS)
    assert layout.is_uniform == (name == "gemma1" or "sliding_window" in overrides)
    graphdef, adapter, frozen = lora.split(model)
    # The pads hold another adapter, as they do after a train step.
    other = group_adapter(jax.tree.map(lambda x: 5 * x, adapter), layout)
    weights = fuse(frozen, layout)
    pairs = zip(weights["stacks"], other, strict=True)
    weights |= {"stacks": [list(map(write_adapter, *pair)) for pair in pairs]}

    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, 256, length).tolist() for length in (3, 21, 70, 14)]
    builder = FusedModelBuilder(layout, jnp.dtype("float32"))
    fused = generate(builder, adapter, weights, prompts, options=OPTIONS, stop_ids=(9999,))
    plain = generate(graphdef, adapter, frozen, prompts, options=OPTIONS, stop_ids=(9999,))
    for ours, theirs in zip(fused, plain, strict=True):
        assert ours.ids == theirs.ids and len(ours.ids) == 16
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-4)


def test_no_second_copy_of_the_weights() -> None:
    """Temporaries of both programs for eight of Gemma 2 2B's layers, compiled but never allocated.

    A CPU copies the two layers of a repetition out of their stacks (25% of the weights), and the
    padded adapter is 8%: 33% in all. The model's own weights restored would be over 90%.
    """
    config = dataclasses.replace(
        PRESETS["gemma-2-2b"], vocab_size=64, layer_types=(LOCAL, GLOBAL) * 4, sliding_window=16
    )
    layout = make_layout(config, row_length=64, rank=64, scale=1.5, targets=lora.TARGETS)

    def with_lora() -> Gemma:
        model = Gemma(config, rngs=nnx.Rngs(0))
        lora.inject(model, rank=64, alpha=96.0, rngs=nnx.Rngs(1))
        return model

    _, adapter, frozen = lora.split(nnx.eval_shape(with_lora))
    weights = jax.eval_shape(lambda frozen: fuse(frozen, layout), frozen)
    num_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(weights))

    program = decode._Program(FusedModelBuilder(layout, jnp.dtype("float32")), OPTIONS)
    prompt, rows = decode._pad([[5, 6, 7]], [0], jax.random.key(0))
    prefill = decode._prefill.lower(adapter, weights, prompt, rows, program)
    drawn, cache = jax.eval_shape(
        lambda *args: decode._prefill(*args, program), adapter, weights, prompt, rows
    )
    stops = np.array([1], np.int32)
    step = decode._decode.lower(adapter, weights, cache, drawn, rows, stops, program)
    for lowered in (prefill, step):
        memory = lowered.compile().memory_analysis()
        assert 0 < memory.temp_size_in_bytes < 0.5 * num_bytes
