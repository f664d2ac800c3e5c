"""Twins with adapters: the same LoRA tensors in PEFT and here, and a torch loss to compare with."""

import copy
import functools
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx
from support.twins import make_twin, to_jax

from jaxsft.data.packing import Sample
from jaxsft.gemma.lora import TARGETS, inject, resolve_targets, split
from jaxsft.gemma.model import Gemma, layer_location
from jaxsft.weights.adapter_config import AdapterConfig

# alpha / rank is not 1 and not the same for rsLoRA.
RANK, ALPHA = 3, 7.0
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

# (layer, target name, "a" or "b") -> array; a [in, R], b [R, out]
AdapterTensors = dict[tuple[int, str, str], np.ndarray]


@functools.cache
def twin(name: str, **overrides: Any) -> tuple[Any, Gemma]:
    """(transformers model, ours), made once for all tests: change only copies of them."""
    hf_model, _ = make_twin(name, **overrides)
    with tempfile.TemporaryDirectory() as directory:
        return hf_model, to_jax(hf_model, Path(directory))


@functools.cache
def short_twin() -> tuple[peft.PeftModel, Gemma]:
    """Gemma 2's twin with one repetition under the scan, a tail and a random adapter.

    Quick to compile, for what does not depend on the architecture.
    """
    hf_model, model = twin("gemma2", num_hidden_layers=3)
    assert len(model.blocks) == 2 and len(model.tail) == 1
    peft_model = make_peft(hf_model, random_b=True)
    return peft_model, with_adapter(model, peft_model)


def clone(model: Gemma) -> Gemma:
    """The same model, sharing its arrays, to be changed freely."""
    graphdef, state = nnx.split(model)
    # The map makes new Variables: merge would put the old ones into the new model.
    return nnx.merge(graphdef, jax.tree.map(lambda x: x, state))


def inject_random(
    model: Gemma,
    targets: str | Sequence[str] = TARGETS,
    use_rslora: bool = False,
    *,
    rank: int = RANK,
    alpha: float = ALPHA,
    size: float = 0.1,
) -> AdapterConfig:
    """Puts a random adapter into `model`, B's entries of about `size`; returns its settings."""
    names = resolve_targets(targets)
    settings: dict[str, Any] = {"rank": rank, "alpha": alpha, "use_rslora": use_rslora}
    inject(model, **settings, targets=names, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    for path, variable in nnx.to_flat_state(split(model)[1]):
        if path[-1] == "b":
            variable[...] = jnp.asarray(rng.normal(0, size, variable.shape), jnp.float32)
    return AdapterConfig(rank, alpha, 0.0, use_rslora, names, None)


def make_peft(hf_model: Any, *, random_b: bool, seed: int = 1, **settings: Any) -> peft.PeftModel:
    """A copy of `hf_model` with PEFT adapters, by default on all seven targets; B is zero unless
    `random_b`. `settings` are those of `LoraConfig`."""
    usual = {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    config = peft.LoraConfig(**usual | {"task_type": "CAUSAL_LM"} | settings)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for a property that it has renamed.
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(copy.deepcopy(hf_model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if random_b and "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    return model


def with_adapter(model: Gemma, peft_model: peft.PeftModel, *, dropout: float = 0.0) -> Gemma:
    """A copy of our model with `peft_model`'s adapter."""

    def injected() -> Gemma:
        copied = clone(model)
        inject(copied, rank=RANK, alpha=ALPHA, dropout=dropout, rngs=nnx.Rngs(0))
        return copied

    # Abstract, and filled with NumPy arrays: eager initialisation would compile for seconds.
    graphdef, shapes, _ = split(nnx.eval_shape(injected))
    adapter = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), shapes)
    adapted = nnx.merge(graphdef, adapter, nnx.state(clone(model)))
    for (layer, target, ab), value in peft_tensors(peft_model).items():
        variable, row = _variable(adapted, layer, target, ab)
        variable[...][... if row is None else row] = value
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, nnx.state(adapted)))


def peft_tensors(peft_model: peft.PeftModel, *, gradients: bool = False) -> AdapterTensors:
    """Copies of PEFT's adapter tensors, or of their gradients, in our orientation."""
    tensors = {}
    for layer, block in enumerate(peft_model.base_model.model.model.layers):
        for target in TARGETS:
            linear = getattr(block.self_attn if target in ATTENTION else block.mlp, target)
            for ab, module in (("a", linear.lora_A), ("b", linear.lora_B)):
                weight = module["default"].weight
                value = weight.grad if gradients else weight.detach()
                tensors[layer, target, ab] = value.numpy().T.copy()
    return tensors


def our_tensors(graphdef: nnx.GraphDef, adapter: nnx.State, frozen: nnx.State) -> AdapterTensors:
    """The same dict from an adapter state or from anything of its structure, such as gradients."""
    model = nnx.merge(graphdef, adapter, frozen)
    tensors = {}
    for layer in range(model.config.num_layers):
        for target in TARGETS:
            for ab in ("a", "b"):
                variable, row = _variable(model, layer, target, ab)
                value = variable[...] if row is None else variable[...][row]
                tensors[layer, target, ab] = np.array(value)
    return tensors


def _variable(model: Gemma, layer: int, target: str, ab: str) -> tuple[nnx.Variable, int | None]:
    where, index, row = layer_location(model.config, layer)
    block = getattr(model, where)[index]
    linear = getattr(block.attn if target in ATTENTION else block.mlp, target)
    return getattr(linear.lora, ab), row


def max_relative_difference(ours: AdapterTensors, reference: AdapterTensors) -> float:
    """The largest over the tensors of norm(difference) / norm(reference); 0 / 0 is 0."""
    assert ours.keys() == reference.keys()
    worst = 0.0
    for key, expected in reference.items():
        difference = float(np.linalg.norm(ours[key] - expected))
        if difference:
            worst = max(worst, difference / float(np.linalg.norm(expected)))
    return worst


def random_samples(lengths: Sequence[int], *, seed: int, vocab_size: int = 256) -> list[Sample]:
    """Random token ids; a random first part of each sample, the prompt, carries no loss."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in lengths:
        ids = rng.integers(4, vocab_size, length).astype(np.int32)
        samples.append(Sample(ids, np.arange(length) >= rng.integers(1, length - 1)))
    return samples


def torch_loss_sum(model: Any, sample: Sample) -> tuple[torch.Tensor, int]:
    """(summed cross-entropy in nats of the sample's labels, their number)."""
    ids = torch.tensor(sample.ids, dtype=torch.long)
    logits = model(ids[None]).logits[0, :-1]
    labels, is_label = ids[1:], torch.tensor(sample.loss_mask[1:])
    log_probs = torch.log_softmax(logits, dim=-1)
    losses = -log_probs.gather(1, labels[:, None])[:, 0]
    return losses[is_label].sum(), int(is_label.sum())
