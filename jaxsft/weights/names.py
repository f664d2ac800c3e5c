"""The table of tensor names in the model's tree, in Hugging Face and in llama.cpp's GGUF.

Loading, export and PEFT adapters use this one table.
"""

from pathlib import Path
from typing import NamedTuple

from jaxsft.gemma.architecture import GemmaConfig


class TensorName(NamedTuple):
    """One parameter: its path in the tree and its name in both formats, without `.weight`."""

    tree: tuple[str, ...]
    hf: str
    gguf: str


ROOT_TENSORS = (
    TensorName(("embedding",), "model.embed_tokens", "token_embd"),
    TensorName(("final_norm", "scale"), "model.norm", "output_norm"),
)
# Relative to a Block, `model.layers.N.` and `blk.N.`. For Gemma llama.cpp does not permute q or k.
LINEAR_TENSORS = (
    TensorName(("attn", "q_proj", "kernel"), "self_attn.q_proj", "attn_q"),
    TensorName(("attn", "k_proj", "kernel"), "self_attn.k_proj", "attn_k"),
    TensorName(("attn", "v_proj", "kernel"), "self_attn.v_proj", "attn_v"),
    TensorName(("attn", "o_proj", "kernel"), "self_attn.o_proj", "attn_output"),
    TensorName(("mlp", "gate_proj", "kernel"), "mlp.gate_proj", "ffn_gate"),
    TensorName(("mlp", "up_proj", "kernel"), "mlp.up_proj", "ffn_up"),
    TensorName(("mlp", "down_proj", "kernel"), "mlp.down_proj", "ffn_down"),
)
# Gemma 1 calls its pre-MLP norm `post_attention_layernorm`; in Gemma 2 and 3 this name is the norm
# of the attention's output.
_PRE_NORMS = (
    TensorName(("pre_attn_norm", "scale"), "input_layernorm", "attn_norm"),
    TensorName(("pre_mlp_norm", "scale"), "post_attention_layernorm", "ffn_norm"),
)
_PRE_AND_POST_NORMS = (
    TensorName(("pre_attn_norm", "scale"), "input_layernorm", "attn_norm"),
    TensorName(("post_attn_norm", "scale"), "post_attention_layernorm", "post_attention_norm"),
    TensorName(("pre_mlp_norm", "scale"), "pre_feedforward_layernorm", "ffn_norm"),
    TensorName(("post_mlp_norm", "scale"), "post_feedforward_layernorm", "post_ffw_norm"),
)
_QK_NORMS = (
    TensorName(("attn", "q_norm", "scale"), "self_attn.q_norm", "attn_q_norm"),
    TensorName(("attn", "k_norm", "scale"), "self_attn.k_norm", "attn_k_norm"),
)


def layer_tensors(config: GemmaConfig) -> tuple[TensorName, ...]:
    """The tensors of one layer."""
    norms = _PRE_AND_POST_NORMS if config.post_norms else _PRE_NORMS
    return LINEAR_TENSORS + norms + (_QK_NORMS if config.qk_norm else ())


def file_tensors(config: GemmaConfig, *, is_gguf: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Hugging Face name -> (name in the file, shape), in the order of `hf_tensors`.

    Linear weights are [out, in].
    """

    def shape(tensor: TensorName) -> tuple[int, ...]:
        if len(tensor.tree) == 1:
            return config.vocab_size, config.d_model
        if tensor.tree[1] in config.linear_shapes:
            return config.linear_shapes[tensor.tree[1]][::-1]
        return (config.head_dim if tensor in _QK_NORMS else config.d_model,)

    places = [("", "", tensor) for tensor in ROOT_TENSORS]
    for layer in range(config.num_layers):
        hf, gguf = f"model.layers.{layer}.", f"blk.{layer}."
        places += [(hf, gguf, tensor) for tensor in layer_tensors(config)]
    return {
        f"{hf}{tensor.hf}.weight": (
            f"{gguf}{tensor.gguf}.weight" if is_gguf else f"{hf}{tensor.hf}.weight",
            shape(tensor),
        )
        for hf, gguf, tensor in places
    }


def check_shapes(
    path: Path, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """ValueError that names every missing, extra and misshapen tensor in the weights at `path`."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ValueError(f"{path}: tensors do not fit the config: {'; '.join(problems)}")
