"""Gemma's tensors in Flax: names, shapes and layouts in the checkpoints that Kaggle distributes.

As google-deepmind/gemma (gm/nn/_modules.py, gm/ckpts/_compat.py) reads them. Axes: see layers.py.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsft.gemma.architecture import PRESETS, GemmaConfig

EMBEDDING = "embedder/input_embedding"
PADDING_ROWS = 128  # below the embedding of Gemma 1 and 2: 256,000 + 128


class FlaxTensor(NamedTuple):
    """One array of a checkpoint and the Hugging Face tensors that are its parts.

    Several (k and v, gate and up) are stacked along a first axis. `layout` says how a part lies:
    "DF" [in, out], "FD" [out, in] as in Hugging Face (norms and the embedding too), "NDH" and "NHD"
    with the output or input features split into heads.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    layout: str

    @property
    def tree_path(self) -> tuple[str, str]:
        """Kaggle's trees have two levels: {"transformer/layer_0/attn/q_einsum": {"w": …}}."""
        module, _, leaf = f"transformer/{self.name}".rpartition("/")
        return module, leaf

    @property
    def part_shape(self) -> tuple[int, ...]:
        """The shape of one part in the checkpoint."""
        return self.shape[1:] if len(self.parts) > 1 else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one part in Hugging Face."""
        if self.layout == "NDH":
            num_heads, d_model, head_dim = self.part_shape
            return num_heads * head_dim, d_model
        if self.layout == "NHD":
            num_heads, head_dim, d_model = self.part_shape
            return d_model, num_heads * head_dim
        return self.part_shape[::-1] if self.layout == "DF" else self.part_shape

    def to_hf(self, part: np.ndarray) -> np.ndarray:
        """A part as Hugging Face has it."""
        if self.layout == "NDH":
            return part.transpose(0, 2, 1).reshape(self.hf_shape)
        if self.layout == "NHD":
            return part.reshape(self.hf_shape[::-1]).T
        return part.T if self.layout == "DF" else part

    def from_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_hf`."""
        if self.layout == "NDH":
            num_heads, d_model, head_dim = self.part_shape
            return array.reshape(num_heads, head_dim, d_model).transpose(0, 2, 1)
        if self.layout == "NHD":
            return array.T.reshape(self.part_shape)
        return array.T if self.layout == "DF" else array


def flax_tensors(config: GemmaConfig, num_rows: int, gating_layout: str) -> list[FlaxTensor]:
    """Every array of a checkpoint whose embedding has `num_rows`.

    `gating_layout` is "DF", as in Gemma 1 and Gemma 2 2B, or "FD", as in Gemma 3.
    """
    embedding = FlaxTensor(
        EMBEDDING, (num_rows, config.d_model), ("model.embed_tokens.weight",), "FD"
    )
    tensors = [embedding, _norm("final_norm", config.d_model, "model.norm")]
    for layer in range(config.num_layers):
        tensors += _linears(config, layer, gating_layout) + _norms(config, layer)
    return tensors


def flax_name(stored: str) -> str:
    """A FlaxTensor's name from that in a checkpoint: Kaggle's, or of a tree that `gemma` saved."""
    name = stored.replace(".", "/").removeprefix("transformer/")
    return f"{name}/w" if name.endswith(("/mlp/gating_einsum", "/mlp/linear")) else name


def like_found(config: GemmaConfig, shapes: dict[str, tuple[int, ...]]) -> list[FlaxTensor]:
    """The arrays of `config`, padded and laid out as the `shapes` found in a checkpoint are."""
    num_rows = config.vocab_size
    if shapes.get(EMBEDDING, ())[:1] == (num_rows + PADDING_ROWS,):
        num_rows += PADDING_ROWS
    found = shapes.get("layer_0/mlp/gating_einsum/w")
    is_df = found == (2, config.d_model, config.d_ff)
    is_fd = found == (2, config.d_ff, config.d_model)
    # A square one shows no layout; nor does what is missing.
    layout = "FD" if config.qk_norm else "DF"
    if is_fd != is_df:
        layout = "FD" if is_fd else "DF"
    return flax_tensors(config, num_rows, layout)


def preset_of(path: Path, shapes: dict[str, tuple[int, ...]]) -> GemmaConfig:
    """The preset of the same width; ValueError if there is none. What else differs is not seen."""
    width = shapes.get(EMBEDDING, (0,))[-1]
    for preset in PRESETS.values():
        if preset.d_model == width:
            return preset
    known = ", ".join(f"{name} (width {config.d_model})" for name, config in PRESETS.items())
    raise ValueError(
        f"{path}: no supported Gemma has an {EMBEDDING} of width {width}: {known}; for any other, "
        "put its Hugging Face config.json into this directory"
    )


def _linears(config: GemmaConfig, layer: int, gating_layout: str) -> list[FlaxTensor]:
    n, k, h = config.num_heads, config.num_kv_heads, config.head_dim
    d, f = config.d_model, config.d_ff

    def linear(
        name: str, shape: tuple[int, ...], parts: tuple[str, ...], layout: str
    ) -> FlaxTensor:
        hf_names = tuple(f"model.layers.{layer}.{part}_proj.weight" for part in parts)
        return FlaxTensor(f"layer_{layer}/{name}/w", shape, hf_names, layout)

    q, kv = ("self_attn.q",), ("self_attn.k", "self_attn.v")
    if n == k:
        tensors = [linear("attn/qkv_einsum", (3, n, d, h), q + kv, "NDH")]
    else:
        tensors = [
            linear("attn/q_einsum", (n, d, h), q, "NDH"),
            linear("attn/kv_einsum", (2, k, d, h), kv, "NDH"),
        ]
    gating = (2, f, d) if gating_layout == "FD" else (2, d, f)
    return [
        *tensors,
        linear("attn/attn_vec_einsum", (n, h, d), ("self_attn.o",), "NHD"),
        linear("mlp/gating_einsum", gating, ("mlp.gate", "mlp.up"), gating_layout),
        linear("mlp/linear", (f, d), ("mlp.down",), "DF"),
    ]


def _norms(config: GemmaConfig, layer: int) -> list[FlaxTensor]:
    names = {
        "pre_attention_norm": "input_layernorm",
        # Gemma 1's norm before the MLP has this Hugging Face name: see tensor_names.
        "pre_ffw_norm": "post_attention_layernorm",
    }
    if config.post_norms:
        names |= {
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    if config.qk_norm:
        names |= {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
    return [
        _norm(
            f"layer_{layer}/{flax}",
            config.head_dim if flax.startswith("attn/") else config.d_model,
            f"model.layers.{layer}.{hf}",
        )
        for flax, hf in names.items()
    ]


def _norm(name: str, dim: int, hf_name: str) -> FlaxTensor:
    return FlaxTensor(f"{name}/scale", (dim,), (f"{hf_name}.weight",), "FD")
