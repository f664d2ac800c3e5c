"""Weights of all four architectures, in and out, equal transformers' own, bit for bit."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.other_devices import EIGHT_DEVICES
from support.twins import TWINS, make_twin, write_gguf

from jaxsft.formats.gguf import GGUFFile, hf_config
from jaxsft.gemma.architecture import PRESETS
from jaxsft.gemma.model import Gemma, layer_location
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.load import hf_tensors, load_model

FLOAT32 = {"dtype": "float32", "param_dtype": "float32"}
# Where each tensor must arrive, written by hand: (tree attribute path, Hugging Face name).
LINEARS = {
    "attn.q_proj.kernel": "self_attn.q_proj",
    "attn.k_proj.kernel": "self_attn.k_proj",
    "attn.v_proj.kernel": "self_attn.v_proj",
    "attn.o_proj.kernel": "self_attn.o_proj",
    "mlp.gate_proj.kernel": "mlp.gate_proj",
    "mlp.up_proj.kernel": "mlp.up_proj",
    "mlp.down_proj.kernel": "mlp.down_proj",
}
NORMS_GEMMA1 = {
    "pre_attn_norm.scale": "input_layernorm",
    "pre_mlp_norm.scale": "post_attention_layernorm",
}
NORMS_GEMMA2 = {
    "pre_attn_norm.scale": "input_layernorm",
    "post_attn_norm.scale": "post_attention_layernorm",
    "pre_mlp_norm.scale": "pre_feedforward_layernorm",
    "post_mlp_norm.scale": "post_feedforward_layernorm",
}
QK_NORMS = {"attn.q_norm.scale": "self_attn.q_norm", "attn.k_norm.scale": "self_attn.k_norm"}
NAMES = {
    "gemma1": LINEARS | NORMS_GEMMA1,
    "gemma2": LINEARS | NORMS_GEMMA2,
    "gemma3-270m": LINEARS | NORMS_GEMMA2 | QK_NORMS,
    "gemma3-1b": LINEARS | NORMS_GEMMA2 | QK_NORMS,
}


def assert_holds(model: Gemma, tensors: dict[str, np.ndarray], names: dict[str, str]) -> None:
    """Every parameter of `model` is the tensor that `names` says, and none is left out."""
    np.testing.assert_array_equal(model.embedding[...], tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(model.final_norm.scale[...], tensors["model.norm.weight"])
    for layer in range(model.config.num_layers):
        where, index, row = layer_location(model.config, layer)
        for attributes, hf_name in names.items():
            node: Any = getattr(model, where)[index]
            for attribute in attributes.split("."):
                node = getattr(node, attribute)
            ours = node[...] if row is None else node[...][row]
            theirs = tensors[f"model.layers.{layer}.{hf_name}.weight"]
            np.testing.assert_array_equal(ours, theirs.T, err_msg=f"layer {layer} {hf_name}")
    assert len(tensors) == 2 + model.config.num_layers * len(names)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
    assert num_params == model.config.num_params == sum(x.size for x in tensors.values())


def saved_tensors(directory: Path) -> dict[str, np.ndarray]:
    return {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("max_shard_size", ["1GB", "40KB"])
def test_hugging_face_directory_round_trip(name: str, max_shard_size: str, tmp_path: Path) -> None:
    hf_model, config = make_twin(name)
    hf_model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or max_shard_size == "1GB"

    model, info = load_model(tmp_path, **FLOAT32)

    tensors = saved_tensors(tmp_path)
    assert_holds(model, tensors, NAMES[name])
    assert (info.format, info.config) == ("safetensors", config) == ("safetensors", model.config)
    exported = dict(hf_tensors(model))
    assert exported.keys() == tensors.keys()
    for key, array in tensors.items():
        assert exported[key].flags.c_contiguous and exported[key].dtype == array.dtype
        assert exported[key].shape == array.shape and exported[key].tobytes() == array.tobytes()


@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
def test_half_precision_files(source: torch.dtype, tmp_path: Path) -> None:
    hf_model, _ = make_twin("gemma3-1b")
    hf_model.to(source).save_pretrained(tmp_path)
    tensors = saved_tensors(tmp_path)

    exact, _ = load_model(tmp_path, **FLOAT32)
    assert_holds(exact, {k: v.astype(np.float32) for k, v in tensors.items()}, NAMES["gemma3-1b"])

    model, _ = load_model(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(model))} == {"bfloat16"}
    if source == torch.bfloat16:
        exported = dict(hf_tensors(model))
        assert all(exported[k].tobytes() == v.tobytes() for k, v in tensors.items())


def test_float32_to_bfloat16_rounds_as_torch(tmp_path: Path) -> None:
    hf_model, _ = make_twin("gemma2")
    hf_model.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
    rounded = {k: v.to(torch.bfloat16).float().numpy() for k, v in hf_model.state_dict().items()}
    for name, array in hf_tensors(model):
        np.testing.assert_array_equal(array.astype(np.float32), rounded[name])


def test_tied_head_is_accepted_and_another_refused(tmp_path: Path) -> None:
    hf_model, _ = make_twin("gemma1")
    hf_model.save_pretrained(tmp_path)
    tensors = saved_tensors(tmp_path)
    embedding = tensors["model.embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": embedding.copy()}, tmp_path / "model.safetensors")
    model, _ = load_model(tmp_path, **FLOAT32)
    assert_holds(model, tensors, NAMES["gemma1"])

    other = embedding.copy()
    other[-1, -1] += 1e-6
    save_file({**tensors, "lm_head.weight": other}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load_model(tmp_path, **FLOAT32)


def test_digest_is_the_weights_identity(tmp_path: Path) -> None:
    hf_model, _ = make_twin("gemma1")
    for name in ("one", "two"):
        hf_model.save_pretrained(tmp_path / name)
    digest = load_model(tmp_path / "one", **FLOAT32)[1].digest
    assert load_model(tmp_path / "two", **FLOAT32)[1].digest == digest

    tensors = saved_tensors(tmp_path / "two")
    tensors["model.norm.weight"][3] += 1e-6
    save_file(tensors, tmp_path / "two" / "model.safetensors")
    assert load_model(tmp_path / "two", **FLOAT32)[1].digest != digest

    path = tmp_path / "one" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert load_model(tmp_path / "one", **FLOAT32)[1].digest != digest


SHARDED_LOAD = """
import sys
import jax
import numpy as np
from flax import nnx
from jaxsft.gemma.sharding import make_mesh
from jaxsft.weights.load import hf_tensors, load_model

options = {"dtype": "float32", "param_dtype": "float32"}
whole, _ = load_model(sys.argv[1], **options)
model, _ = load_model(sys.argv[1], **options, mesh=make_mesh(2, 4))
for leaf, expected in zip(
    jax.tree.leaves(nnx.state(model)), jax.tree.leaves(nnx.state(whole)), strict=True
):
    np.testing.assert_array_equal(leaf, expected)
    assert len(leaf.addressable_shards) == 8
for (name, array), (_, expected) in zip(hf_tensors(model), hf_tensors(whole), strict=True):
    np.testing.assert_array_equal(array, expected, err_msg=name)
shard = model.blocks[0].attn.q_proj.kernel[...].addressable_shards[0].data
assert shard.shape == (2, 32 // 4, 128), shard.shape
assert model.tail[0].mlp.down_proj.kernel[...].addressable_shards[0].data.shape == (48, 8)
try:
    load_model(sys.argv[1], **options, mesh=make_mesh(1, 7, jax.devices()[:7]))
except ValueError as error:
    print(error)
"""


def test_sharded_over_eight_devices(tmp_path: Path) -> None:
    hf_model, _ = make_twin("gemma3-1b", num_hidden_layers=14, num_attention_heads=8)
    hf_model.save_pretrained(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", SHARDED_LOAD, str(tmp_path)],
        env=os.environ | EIGHT_DEVICES,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "mesh: fsdp = 7 does not divide a dimension of 32 (" in result.stdout
    assert "use one of 1, 2, 4, 8, 16, 32" in result.stdout


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("matrix_type", ["F32", "F16", "BF16", "Q8_0"])
def test_gguf(name: str, matrix_type: str, tmp_path: Path) -> None:
    # Blocks of 32: a width of 48 cannot be quantised. llama.cpp always scales by head_dim.
    overrides: dict[str, Any] = {"intermediate_size": 64}
    if name != "gemma1":
        overrides["query_pre_attn_scalar"] = 16
    hf_model, config = make_twin(name, **overrides)
    path = tmp_path / "model.gguf"
    stored = write_gguf(path, name, hf_model, matrix_type)

    model, info = load_model(path, **FLOAT32)

    assert_holds(model, stored, NAMES[name])
    assert (info.format, info.name) == ("gguf", f"{name} twin")
    assert info.config == dataclasses.replace(config, name=info.name)


def test_a_gguf_that_leaves_out_what_llama_cpp_knows(tmp_path: Path) -> None:
    drop = ("attn_logit_softcapping", "final_logit_softcapping", "sliding_window")
    for name in ("gemma2", "gemma3-270m"):
        write_gguf(tmp_path / f"{name}.gguf", name, make_twin(name)[0], drop=drop)
    config = load_model(tmp_path / "gemma2.gguf", **FLOAT32)[1].config
    assert (config.attn_softcap, config.final_softcap, config.sliding_window) == (50, 30, 4096)
    with pytest.raises(ValueError, match=r"lacks gemma3\.attention\.sliding_window"):
        load_model(tmp_path / "gemma3-270m.gguf", **FLOAT32)


def test_real_gguf_is_the_preset(real_gguf: Path) -> None:
    preset = PRESETS["gemma-3-270m"]
    config = from_hf_config(hf_config(GGUFFile(real_gguf)))
    assert dataclasses.replace(config, name=preset.name) == preset


def test_gguf_header_equals_the_reference_reader(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "gemma")
    numbers = {"uint8": 200, "int8": -3, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1}
    numbers |= {"int32": -5, "uint64": 2**64 - 1, "int64": -(2**60), "float32": 0.1}
    for kind, value in (numbers | {"float64": 0.1, "bool": True, "string": "a ▁ 😀"}).items():
        getattr(writer, f"add_{kind}")(kind, value)
    arrays = {"tokens": ["", "▁a", "<0x00>"], "scores": [0.5, -1e10], "types": [1, 6, 3]}
    for name, values in (arrays | {"flags": [True, False]}).items():
        writer.add_array(name, values)
    writer.add_custom_alignment(64)
    writer.add_tensor("a.weight", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("b.weight", np.arange(5, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    ours, reference = GGUFFile(path), gguf.GGUFReader(path)
    expected = {k: v.contents() for k, v in reference.fields.items() if not k.startswith("GGUF.")}
    found = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in ours.metadata.items()}
    assert found == expected
    assert {k: (t.offset, t.num_bytes) for k, t in ours.tensors.items()} == {
        t.name: (t.data_offset, t.n_bytes) for t in reference.tensors
    }
    assert ours.shapes == {"a.weight": (2, 3), "b.weight": (5,)}
    for tensor in reference.tensors:
        blocks = [block for _, block in ours.blocks(tensor.name)]
        np.testing.assert_array_equal(np.concatenate(blocks).ravel(), tensor.data.ravel())
