"""Flax checkpoints of all four architectures, in and out, and what is wrong with others."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import torch
from support.twins import TWINS, make_twin, our_logits

from jaxsft.gemma.architecture import PRESETS
from jaxsft.weights import flax as flax_io
from jaxsft.weights.flax import (
    FlaxCheckpoint,
    is_flax_checkpoint,
    like_found,
    preset_of,
    write_flax,
)
from jaxsft.weights.load import hf_tensors, load_model

pytestmark = pytest.mark.usefixtures("quick_compilation")

FLOAT32 = {"dtype": "float32", "param_dtype": "float32"}


def hf_weights(hf_model: Any) -> dict[str, np.ndarray]:
    return {name: p.detach().numpy() for name, p in hf_model.named_parameters()}


def restored(directory: Path) -> dict[str, np.ndarray]:
    """What Orbax itself finds there, by "module/leaf"."""
    tree = ocp.StandardCheckpointer().restore(directory)
    return {
        f"{module}/{leaf}": np.asarray(a) for module, v in tree.items() for leaf, a in v.items()
    }


def kaggle_layout(name: str, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Kaggle's arrays of a twin, by einsum: written by hand, apart from the tables of the code.

    n heads, k KV heads, h = 16 head dim, d = 32 width, f = 48 in the MLP.
    """
    n, k = {"gemma1": (8, 1), "gemma2": (8, 4)}.get(name, (4, 1))
    embedding = weights["model.embed_tokens.weight"]
    arrays = {
        "embedder/input_embedding": embedding,
        "final_norm/scale": weights["model.norm.weight"],
    }
    if not name.startswith("gemma3"):
        padding = np.broadcast_to(embedding[0], (128, 32))
        arrays["embedder/input_embedding"] = np.concatenate([embedding, padding])
    num_layers = 1 + max(int(key.split(".")[2]) for key in weights if ".layers." in key)
    for i in range(num_layers):
        ours = {
            key.removeprefix(f"model.layers.{i}.").removesuffix(".weight"): value
            for key, value in weights.items()
            if key.startswith(f"model.layers.{i}.")
        }
        norms = {
            "pre_attention_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
        if name == "gemma1":
            norms = {"pre_attention_norm": "input_layernorm"}
            norms["pre_ffw_norm"] = "post_attention_layernorm"
        if name.startswith("gemma3"):
            norms |= {"attn/_query_norm": "self_attn.q_norm", "attn/_key_norm": "self_attn.k_norm"}
        layer = {f"{flax}/scale": ours[hf] for flax, hf in norms.items()}
        # Hugging Face's rows are head by head.
        layer["attn/q_einsum/w"] = np.einsum(
            "nhd->ndh", ours["self_attn.q_proj"].reshape(n, 16, 32)
        )
        kv = [ours[f"self_attn.{x}_proj"].reshape(k, 16, 32) for x in "kv"]
        layer["attn/kv_einsum/w"] = np.einsum("ckhd->ckdh", np.stack(kv))
        o = ours["self_attn.o_proj"].reshape(32, n, 16)
        layer["attn/attn_vec_einsum/w"] = np.einsum("dnh->nhd", o)
        gating = np.stack([ours["mlp.gate_proj"], ours["mlp.up_proj"]])
        is_gemma3 = name.startswith("gemma3")
        layer["mlp/gating_einsum/w"] = gating if is_gemma3 else np.einsum("cfd->cdf", gating)
        layer["mlp/linear/w"] = ours["mlp.down_proj"].T
        arrays |= {f"layer_{i}/{key}": value for key, value in layer.items()}
    return {f"transformer/{key}": value for key, value in arrays.items()}


@pytest.mark.parametrize("name", TWINS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    hf_model, config = make_twin(name)
    weights = hf_weights(hf_model)
    directory = tmp_path / "checkpoint"
    write_flax(directory, weights.items(), config)
    hf_model.config.save_pretrained(directory)

    stored, expected = restored(directory), kaggle_layout(name, weights)
    assert stored.keys() == expected.keys()
    for key, array in expected.items():
        np.testing.assert_array_equal(stored[key], array, err_msg=key, strict=True)

    model, info = load_model(directory, **FLOAT32)
    assert (info.format, info.name, info.config) == ("flax", "checkpoint", config)
    assert len(info.digest) == 64
    for key, array in hf_tensors(model):
        np.testing.assert_array_equal(array, weights[key], err_msg=key, strict=True)

    tokens = np.random.default_rng(0).integers(1, 256, (2, 24))
    with torch.no_grad():
        theirs = hf_model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(our_logits(model, tokens) - theirs).max() <= 1e-4


SMALL = {"num_hidden_layers": 1, "vocab_size": 300}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """(checkpoint of a Gemma 2 of one layer, its Hugging Face tensors); read only."""
    hf_model, config = make_twin("gemma2", **SMALL)
    directory = tmp_path_factory.mktemp("flax") / "small"
    write_flax(directory, hf_weights(hf_model).items(), config)
    hf_model.config.save_pretrained(directory)
    return directory, hf_weights(hf_model)


def read_all(directory: Path) -> dict[str, np.ndarray]:
    source = FlaxCheckpoint(directory)
    arrays = {}
    for name, shape in source.shapes.items():
        blocks = list(source.blocks(name))
        starts = np.cumsum([0, *(len(block) for _, block in blocks)])
        assert [start for start, _ in blocks] == starts[:-1].tolist()
        arrays[name] = np.concatenate([block for _, block in blocks]).reshape(shape)
    return arrays


def assert_same(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, err_msg=name)


def test_chunks_and_blocks(
    small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, weights = small
    config = FlaxCheckpoint(directory).config
    monkeypatch.setattr(flax_io, "_CHUNK_BYTES", 7 * 32 * 4)  # 7 rows of the embedding
    monkeypatch.setattr(flax_io, "_COMMIT_BYTES", 1000)
    write_flax(tmp_path / "chunked", iter(weights.items()), config)
    (tmp_path / "chunked" / "config.json").write_bytes((directory / "config.json").read_bytes())
    assert_same(restored(tmp_path / "chunked"), restored(directory))

    monkeypatch.setattr(flax_io, "_BLOCK_ELEMENTS", 10 * 32)
    blocks = FlaxCheckpoint(tmp_path / "chunked").blocks("model.embed_tokens.weight")
    # Two chunks a block, the padding's rows cut from the last.
    assert [(start, len(block)) for start, block in blocks][-2:] == [(280, 14), (294, 6)]
    assert_same(read_all(tmp_path / "chunked"), weights)


@pytest.mark.parametrize("variant", ["nested", "no ocdbt", "zarr3", "beside a tokenizer"])
def test_other_ways_to_store(
    variant: str, small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    directory, weights = small
    tree: Any = ocp.StandardCheckpointer().restore(directory)
    if variant == "nested":  # as gm.ckpts.save_params writes the parameters of a Flax module
        nested: dict[str, Any] = {}
        for module, leaves in tree.items():
            node = nested
            *parents, last = module.split("/")[1:]
            for key in parents:
                node = node.setdefault(key, {})
            node[last] = leaves["w"] if parents[-1:] == ["mlp"] else leaves
        tree = nested
    target = tmp_path / "outer" / "gemma2-2b"
    options = {"use_ocdbt": variant != "no ocdbt", "use_zarr3": variant == "zarr3"}
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(target, tree)
    assert (target / "manifest.ocdbt").exists() == options["use_ocdbt"]
    (target / "config.json").write_bytes((directory / "config.json").read_bytes())
    assert not is_flax_checkpoint(tmp_path / "outer")
    (tmp_path / "outer" / "tokenizer.model").touch()
    assert is_flax_checkpoint(tmp_path / "outer") and is_flax_checkpoint(target)
    assert_same(read_all(tmp_path / "outer" if "beside" in variant else target), weights)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_by_its_shapes(name: str) -> None:
    # As the comments of Tunix's gemma3/params.py and the gemma package's classes have them.
    expected = {
        "gemma-2b": {
            "embedder/input_embedding": (256_128, 2048),
            "layer_17/attn/q_einsum/w": (8, 2048, 256),
            "layer_17/attn/kv_einsum/w": (2, 1, 2048, 256),
            "layer_17/mlp/gating_einsum/w": (2, 2048, 16_384),
        },
        "gemma-2-2b": {
            "embedder/input_embedding": (256_128, 2304),
            "layer_25/attn/kv_einsum/w": (2, 4, 2304, 256),
            "layer_25/mlp/gating_einsum/w": (2, 2304, 9216),
            "layer_25/post_ffw_norm/scale": (2304,),
        },
        "gemma-3-270m": {
            "embedder/input_embedding": (262_144, 640),
            "layer_17/mlp/gating_einsum/w": (2, 2048, 640),
            "layer_17/attn/_key_norm/scale": (256,),
        },
        "gemma-3-1b": {
            "embedder/input_embedding": (262_144, 1152),
            "layer_25/attn/attn_vec_einsum/w": (4, 256, 1152),
            "layer_25/attn/kv_einsum/w": (2, 1, 1152, 256),
            "layer_25/attn/q_einsum/w": (4, 1152, 256),
            "layer_25/mlp/gating_einsum/w": (2, 6912, 1152),
            "layer_25/mlp/linear/w": (6912, 1152),
        },
    }
    assert preset_of(Path(), expected[name]) is PRESETS[name]
    gating = [shape for key, shape in expected[name].items() if "gating" in key]
    tensors = like_found(
        PRESETS[name], {**expected[name], "layer_0/mlp/gating_einsum/w": gating[0]}
    )
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    assert shapes | expected[name] == shapes
    assert {"layer_0/attn/_query_norm/scale" in shapes} == {PRESETS[name].qk_norm}
    padding = 0 if name.startswith("gemma-3") else 128 * PRESETS[name].d_model
    assert sum(map(np.prod, shapes.values())) == PRESETS[name].num_params + padding


def refused(directory: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load_model(directory, **FLOAT32)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 1500, text
    return text


def change_config(directory: Path, **changes: Any) -> None:
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | changes))


def test_what_does_not_fit(small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(small[0], directory)
    change_config(
        directory, num_hidden_layers=2, layer_types=["full_attention"] * 2, vocab_size=299
    )
    kvstore = {"driver": "ocdbt", "base": f"file://{directory}", "path": "transformer/vision.w/"}
    spec = {"driver": "zarr", "kvstore": kvstore}
    ts.open(spec, create=True, dtype="float32", shape=[3]).result()
    text = refused(directory)
    assert "missing: layer_1/attn/q_einsum/w, layer_1/attn/kv_einsum/w, " in text
    assert "unexpected vision/w" in text
    assert "misshapen embedder/input_embedding (is [428, 32], must be [299, 32])" in text

    (directory / "config.json").unlink()
    assert "no supported Gemma has an embedder/input_embedding of width 32" in refused(directory)
    shutil.rmtree(directory / "d")
    assert "is damaged or not whole" in refused(directory)


@pytest.mark.parametrize(
    ("shape", "chunk", "dtype", "message"),
    [
        ((1 << 40, 32), (8, 32), "<f4", "cannot hold the 140737488355328 bytes of arrays"),
        ((300, 32), (1 << 40, 32), "<f4", "([1099511627776, 32], of [300, 32])"),
        ((300, 32), (300, 32), "<i4", "(int32, only float32, bfloat16, float16)"),
    ],
)
def test_hostile_metadata(
    shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, message: str, tmp_path: Path
) -> None:
    array = tmp_path / "transformer" / "embedder.input_embedding"
    array.mkdir(parents=True)
    (tmp_path / "_METADATA").touch()
    metadata = {
        "zarr_format": 2, "shape": shape, "chunks": chunk, "dtype": dtype, "compressor": None,
        "fill_value": 0, "order": "C", "filters": None,
    }  # fmt: skip
    (array / ".zarray").write_text(json.dumps(metadata))
    assert message in refused(tmp_path)


def test_links_and_pipes(small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    for number, make in enumerate(
        (lambda path: path.symlink_to("/"), os.mkfifo, lambda path: path.symlink_to("nowhere"))
    ):
        directory = tmp_path / str(number)
        shutil.copytree(small[0], directory)
        make(directory / "d" / "strange")
        assert "strange is neither a file nor a directory" in refused(directory)


def test_damaged_files(small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(small[0], directory)
    files = [file for file in FlaxCheckpoint(directory).files if file.name != "_METADATA"]
    assert {file.name for file in files} > {"config.json", "manifest.ocdbt"}
    rng = np.random.default_rng(0)
    num_refused = 0
    for file in files:
        intact = file.read_bytes()
        damaged = [intact[: len(intact) // 2], b"", b"\0" * len(intact)]
        for at in rng.integers(0, len(intact), 12):
            damaged.append(intact[:at] + bytes([intact[at] ^ 0xFF]) + intact[at + 1 :])
        for content in damaged:
            file.write_bytes(content)
            try:
                read_all(directory)
            except (ValueError, OSError) as error:
                assert "\n" not in str(error)
                num_refused += 1
        file.write_bytes(intact)
    assert num_refused >= 3 * (len(files) - 1)
    assert_same(read_all(directory), small[1])


def test_nothing_is_left_of_a_failed_write(
    small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    directory, weights = small
    config = FlaxCheckpoint(directory).config

    def breaks_off() -> Iterator[tuple[str, np.ndarray]]:
        yield next(iter(weights.items()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_flax(tmp_path / "new", breaks_off(), config)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="exists already"):
        write_flax(tmp_path, iter(weights.items()), config)
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        write_flax(tmp_path / "file" / "new", iter(weights.items()), config)
