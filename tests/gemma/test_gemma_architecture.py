"""Presets against transformers' own models; formulas by hand."""

import dataclasses

import pytest
import torch
import transformers

from jaxsft.gemma.architecture import GLOBAL, LOCAL, PRESETS
from jaxsft.gemma.lora import TARGETS
from jaxsft.weights.hf_config import to_hf_config

NUM_PARAMS = {
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
}


@pytest.mark.parametrize("name", PRESETS)
def test_num_params(name: str) -> None:
    config = transformers.AutoConfig.for_model(**to_hf_config(PRESETS[name]))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    parameters = {id(p): p.numel() for p in model.parameters()}  # the tied embedding once
    assert PRESETS[name].num_params == sum(parameters.values()) == NUM_PARAMS[name]
    linears = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for target, (in_dim, out_dim) in PRESETS[name].linear_shapes.items():
        linear = next(getattr(m, target) for m in linears if hasattr(m, target))
        assert (linear.in_features, linear.out_features) == (in_dim, out_dim)


def test_layer_patterns() -> None:
    assert PRESETS["gemma-2b"].layer_pattern == (GLOBAL,)
    assert PRESETS["gemma-2-2b"].layer_pattern == (LOCAL, GLOBAL)
    global_layers = {
        name: [i for i, kind in enumerate(PRESETS[name].layer_types) if kind == GLOBAL]
        for name in ("gemma-3-270m", "gemma-3-1b")
    }
    assert global_layers == {"gemma-3-270m": [5, 11, 17], "gemma-3-1b": [5, 11, 17, 23]}
    for name in global_layers:
        assert PRESETS[name].layer_pattern == (LOCAL,) * 5 + (GLOBAL,)
    irregular = dataclasses.replace(PRESETS["gemma-2b"], layer_types=(LOCAL, GLOBAL, GLOBAL))
    assert irregular.layer_pattern == (LOCAL, GLOBAL, GLOBAL)


def test_lora_params() -> None:
    gemma2 = PRESETS["gemma-2-2b"]
    assert gemma2.lora_params(64, TARGETS) == pytest.approx(83.1e6, rel=1e-3)
    # q: 64 · (2304 + 2048) in each of 26 layers.
    assert gemma2.lora_params(64, ("q_proj",)) == 26 * 64 * (2304 + 2048)


def test_lora_step_flops() -> None:
    gemma2 = PRESETS["gemma-2-2b"]

    def per_token(**changes: int) -> float:
        sizes = {"num_tokens": 65_536, "num_loss_tokens": 65_536, "row_length": 2048}
        return gemma2.lora_step_flops(**{**sizes, "lora_params": 0, **changes}) / 65_536

    assert per_token() == pytest.approx(11.1e9, rel=5e-3)
    lora_params = gemma2.lora_params(64, TARGETS)
    assert per_token(lora_params=lora_params) - per_token() == pytest.approx(6 * lora_params)
    head = 4 * 256_000 * 2304
    assert per_token() - per_token(num_loss_tokens=0) == pytest.approx(head)
    # At 16,384 a local layer looks at 4096 keys, a global one at 8192 on average.
    attention = per_token(row_length=16_384) - per_token()
    assert attention == pytest.approx(12 * 8 * 256 * 13 * (4096 + 8192 - 2 * 1024))
