"""The table of tensor names in the model's tree, in Hugging Face and in llama.cpp's GGUF.

Loading, export and PEFT adapters use this one table.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxsft.common.listed import error_line
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
    path: Path,
    found: dict[str, tuple[int, ...]],
    expected: dict[str, tuple[int, ...]],
    advice: str = "",
) -> None:
    """ValueError about missing, extra and misshapen tensors in the weights at `path`.

    Its line has three of each kind, their number, and what they have in common; `advice` ends it.
    """
    kinds = {
        "missing": {name: "" for name in expected if name not in found},
        "unexpected": {name: "" for name in found if name not in expected},
        "misshapen": {
            name: f"(is {list(found[name])}, must be {list(shape)})"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        },
    }
    if any(kinds.values()):
        raise ValueError(error_line(f"{path}: tensors do not fit the config", kinds, advice))


# Modules that hold one other under a name of their own: torch.compile, DDP, FSDP, checkpointing,
# DeepSpeed, PEFT, and the text part of a model that sees images.
_WRAPPERS = ("module", "base_layer", "base_model", "model", "language_model", "text_model")
_ROOTS = ("embed_tokens", "norm", "lm_head")


class UnwrappedName(NamedTuple):
    """A tensor's name without wrappers: what is left of its prefix, and its name in the model."""

    prefix: tuple[str, ...]
    tail: str


def unwrapped(name: str) -> UnwrappedName | None:
    """`base_model.model.model._orig_mod.layers.0.mlp.up_proj.weight` is `layers.0.….weight`.

    None for a name that is neither of a layer nor of the embedding, the last norm or the head.
    """
    parts = [part for part in name.split(".") if part[:1] != "_"]
    for i, part in enumerate(parts):
        is_layer = part == "layers" and parts[i + 1 : i + 2] and parts[i + 1].isdecimal()
        if is_layer or (part in _ROOTS and len(parts) > i + 1):
            prefix = tuple(each for each in parts[:i] if each not in _WRAPPERS)
            tail = [each for each in parts[i:] if each not in _WRAPPERS]
            return UnwrappedName(prefix, ".".join(tail))
    return None


def canonical_names(path: Path, found: Iterable[str], expected: Iterable[str]) -> dict[str, str]:
    """Name in a file -> name among `expected`, for tensors that differ in wrappers or a prefix.

    What remains without wrappers decides. All that is renamed has one prefix, that of most of the
    expected tensors: a model that sees images has layers of its own. Other names stay as they are.

    Raises ValueError where two tensors of the file are the same one, or of two models.
    """
    found, wanted = list(found), set(expected)
    if wanted.issuperset(found):
        return {name: name for name in found}
    by_tail = {each.tail: name for name in wanted if (each := unwrapped(name))}
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name in found:
        each = unwrapped(name)
        if each is not None and each.tail in by_tail:
            groups.setdefault(each.prefix, {})[name] = by_tail[each.tail]
    chosen = max(groups.values(), key=len, default={})
    names = {name: chosen.get(name, name) for name in found}
    first: dict[str, str] = {}
    twice = {
        name: ""
        for name in found
        if names[name] in wanted and first.setdefault(names[name], name) != name
    }
    if twice:
        line = error_line(f"{path}: tensors are there twice under other names", {"extra": twice})
        raise ValueError(line)
    # Otherwise a lone tensor of the model beside a copy (ema., teacher.) would be taken with it.
    mixed = {name: "" for name in found if chosen and name in wanted and name not in chosen}
    if mixed:
        line = error_line(f"{path}: holds tensors of several models", {"extra": mixed})
        raise ValueError(f"{line}; save the one that is meant")
    return names
