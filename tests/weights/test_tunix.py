"""Adapters written for Tunix: qwix's own einsums over them give the update that ours is."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from support.lora_twins import ATTENTION, clone, inject_random, twin

from jaxsft.gemma.lora import TARGETS
from jaxsft.gemma.model import Gemma, layer_location
from jaxsft.weights.adapter_config import AdapterConfig
from jaxsft.weights.tunix import write_tunix_lora

NUM_LAYERS = 3  # one repetition of Gemma 2's two and a tail
# (A, B) -> the update, as qwix forms its einsums of Tunix's; c: k or v, k: KV heads, r: rank.
EINSUMS = {
    "attn.q_einsum.w": "dr,rnh->dnh",
    "attn.kv_einsum.w": "dr,rckh->cdkh",
    "attn.attn_vec_einsum.w": "nhr,rd->nhd",
    "mlp.gate_proj.kernel": "dr,rf->df",
    "mlp.up_proj.kernel": "dr,rf->df",
    "mlp.down_proj.kernel": "fr,rd->fd",
}


def adapted(targets: str, use_rslora: bool) -> tuple[Gemma, AdapterConfig]:
    model = clone(twin("gemma2", num_hidden_layers=NUM_LAYERS)[1])
    return model, inject_random(model, targets, use_rslora, size=1.0)


def our_updates(model: Gemma, layer: int, scale: float) -> dict[str, np.ndarray]:
    """scale · a b, float64 [in, out], of one layer by target."""
    group, index, row = layer_location(model.config, layer)
    block = getattr(model, group)[index]
    updates = {}
    for target in TARGETS:
        slot = getattr(block.attn if target in ATTENTION else block.mlp, target).lora
        if slot is not None:
            a, b = (np.asarray(x[...], np.float64) for x in (slot.a, slot.b))
            updates[target] = scale * (a @ b if row is None else a[row] @ b[row])
    return updates


@pytest.mark.parametrize(
    ("targets", "use_rslora", "rank", "modules"),
    [
        ("all-linear", False, 6, list(EINSUMS)),
        ("k_proj,v_proj", True, 6, ["attn.kv_einsum.w"]),
        ("q_proj,v_proj", False, 3, ["attn.q_einsum.w", "attn.kv_einsum.w"]),
        ("o_proj,down_proj", True, 3, ["attn.attn_vec_einsum.w", "mlp.down_proj.kernel"]),
    ],
)
def test_same_update(
    targets: str, use_rslora: bool, rank: int, modules: list[str], tmp_path: Path
) -> None:
    model, config = adapted(targets, use_rslora)
    settings = write_tunix_lora(tmp_path / "new", model, config)

    scale = 7 / 3**0.5 if use_rslora else 7 / 3
    assert settings["rank"] == rank and settings["alpha"] == pytest.approx(scale * rank)
    assert settings["module_path"] == "|".join(f".*{name.split('.')[1]}" for name in modules)
    stored = json.loads((tmp_path / "new" / "0" / "_CHECKPOINT_METADATA").read_text())
    assert stored["custom_metadata"] == settings

    tree = ocp.PyTreeCheckpointer().restore(tmp_path / "new" / "0" / "model_params")
    layers = tree["layers"]
    assert sorted(layers) == ["0", "1", "2"]
    for layer in range(NUM_LAYERS):
        ours = our_updates(model, layer, scale)
        arrays = {".".join(k): v for k, v in flatten(layers[str(layer)]).items()}
        assert arrays.keys() == {f"{m}_lora_{ab}.value" for m in modules for ab in "ab"}
        theirs = {}
        for module in modules:
            a, b = (arrays[f"{module}_lora_{ab}.value"].astype(np.float64) for ab in "ab")
            assert a.shape[-1] == b.shape[0] == rank
            theirs[module] = settings["alpha"] / rank * np.einsum(EINSUMS[module], a, b)
        for target, update in ours.items():
            np.testing.assert_allclose(pick(theirs, target), update, rtol=1e-6, atol=1e-6)
        if targets == "q_proj,v_proj":
            assert not theirs["attn.kv_einsum.w"][0].any()  # nothing for k


def pick(theirs: dict[str, np.ndarray], target: str) -> np.ndarray:
    """[in, out] of one of our layers."""
    if target in ("k_proj", "v_proj"):
        return theirs["attn.kv_einsum.w"]["kv".index(target[0])].reshape(32, -1)
    if target == "q_proj":
        return theirs["attn.q_einsum.w"].reshape(32, -1)
    if target == "o_proj":
        return theirs["attn.attn_vec_einsum.w"].reshape(-1, 32)
    return theirs[f"mlp.{target}.kernel"]


def flatten(tree: dict[str, Any]) -> dict[tuple[str, ...], np.ndarray]:
    leaves = jax.tree.leaves_with_path(tree)
    return {tuple(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def test_existing_directory_is_refused(tmp_path: Path) -> None:
    model, config = adapted("q_proj", False)
    with pytest.raises(ValueError, match="exists already"):
        write_tunix_lora(tmp_path, model, config)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="can't be written"):
        write_tunix_lora(tmp_path / "file" / "new", model, config)
