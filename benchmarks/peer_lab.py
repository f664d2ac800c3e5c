"""What the trainers of `peers.py` share: rows, weights and adapter on disk, how one is started."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from benchmarks.peer_protocol import Worker
from jaxsft.common.batch import Batch
from jaxsft.config import DataOptions
from jaxsft.data.bins import one_per_row
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.data.samples import DataReport, read_samples
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.formats.gguf import GGUFFile, hf_config
from jaxsft.gemma import lora
from jaxsft.gemma.model import Gemma
from jaxsft.weights.adapter_config import WEIGHTS_NAME, AdapterConfig
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.load import demo_model_path, hf_tensors, load_model
from jaxsft.weights.peft import save_adapter

ROOT = Path(__file__).parents[1]
NUM_ROWS, ROW_LENGTH = 4, 256
RANK, ALPHA, LEARNING_RATE = 64, 32.0, 1e-4  # alpha / rank is not 1: a lost scale would show
NUM_THREADS = 2

TINY = {
    **{"model_type": "gemma3_text", "vocab_size": 256, "hidden_size": 32, "head_dim": 16},
    **{"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 1},
    **{"num_hidden_layers": 6, "max_position_embeddings": 512, "sliding_window": 64},
    "query_pre_attn_scalar": 16,
}
OURS = "jaxsft"
PEERS = {"transformers + PEFT": "torch", "Tunix + qwix": "tunix"}  # name -> peer_<module>.py
# glibc gives large blocks back to the system, which maps and zeroes them page by page at the next
# step. Without mmap and trimming it keeps them; one arena, for the others end at 64 MiB.
ALLOCATORS: dict[str, dict[str, str]] = {
    "default": {},
    "reuse": {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "MALLOC_ARENA_MAX": "1",
    },
}


def make_row_sets(data_file: Path, tokenizer: Tokenizer) -> dict[str, Batch]:
    """The two batches [4, 256]: samples of the file padded to a row each, and full rows.

    A full row is one segment, cut from the samples joined end to end. Raises ValueError when the
    file is unreadable or holds too little.
    """
    options = DataOptions(
        max_length=ROW_LENGTH, overlong="drop", min_completion_tokens=0, max_drop=1
    )
    samples = [each.sample for each in read_samples([data_file], tokenizer, options, DataReport())]
    joined = Sample(*(np.concatenate(arrays) for arrays in zip(*samples, strict=True)))
    if len(samples) < NUM_ROWS or len(joined.ids) < NUM_ROWS * ROW_LENGTH:
        raise ValueError(
            f"{data_file}: {len(samples)} samples of up to {ROW_LENGTH} tokens, "
            f"{len(joined.ids)} tokens in all; {NUM_ROWS} samples and "
            f"{NUM_ROWS * ROW_LENGTH} tokens are needed"
        )
    cuts = [slice(i * ROW_LENGTH, (i + 1) * ROW_LENGTH) for i in range(NUM_ROWS)]
    full = [Sample(joined.ids[cut], joined.loss_mask[cut]) for cut in cuts]
    return {"padded": _batch(samples[:NUM_ROWS]), "full": _batch(full)}


def _batch(samples: Sequence[Sample]) -> Batch:
    bins = one_per_row([len(sample.ids) for sample in samples], ROW_LENGTH)
    return PackedRows.from_samples(samples, bins, ROW_LENGTH).batch(range(len(samples)))


def save_rows(path: Path, batch: Batch) -> None:
    """Writes a batch for all trainers: ours takes the five arrays of `Batch`, the others `tokens`
    and `loss_mask` [B, T], true where that token is a label (ours: where its successor is)."""
    loss_mask = np.zeros(batch.tokens_BT.shape, bool)
    loss_mask[:, 1:] = batch.loss_weights_BT[:, :-1]
    np.savez(path, **batch._asdict(), tokens=batch.tokens_BT, loss_mask=loss_mask)


def export(
    model_dir: Path, adapter_dir: Path, rank: int, alpha: float, *, is_tiny: bool = False
) -> None:
    """Writes the pretrained 270M as a Hugging Face directory, and an adapter to start from.

    B is not zero, so that both factors have a gradient. K and V hold the same A: qwix has one.
    With `is_tiny` the model is a random one of a few numbers.
    """
    jax.config.update("jax_platforms", "cpu")
    model_dir.mkdir()
    config_file, kind = model_dir / "config.json", {"architectures": ["Gemma3ForCausalLM"]}
    if is_tiny:
        config_file.write_text(json.dumps(TINY | kind), encoding="utf-8")
        model = Gemma(from_hf_config(config_file), rngs=nnx.Rngs(0))
    else:
        path = demo_model_path()
        config_file.write_text(json.dumps(hf_config(GGUFFile(path)) | kind), encoding="utf-8")
        model, _ = load_model(path, dtype="float32", param_dtype="float32")
    save_file(dict(hf_tensors(model)), model_dir / "model.safetensors", {"format": "pt"})

    lora.inject(model, rank=rank, alpha=alpha, rngs=nnx.Rngs(0))
    save_adapter(adapter_dir, model, AdapterConfig(rank, alpha, 0.0, False, lora.TARGETS, None))
    tensors = load_file(adapter_dir / WEIGHTS_NAME)
    rng = np.random.default_rng(0)
    for key in tensors:
        if "lora_B" in key:
            tensors[key] = rng.normal(0, 0.02, tensors[key].shape).astype(np.float32)
        elif "v_proj" in key:
            tensors[key] = tensors[key.replace("v_proj", "k_proj")]
    save_file(tensors, adapter_dir / WEIGHTS_NAME, {"format": "pt"})


class Lab:
    """What all trainers share, on disk, and the way to start one."""

    def __init__(
        self,
        directory: Path,
        pythons: dict[str, Path],
        data_file: Path,
        row_sets: dict[str, Batch],
    ):
        self.directory, self.pythons, self.data_file = directory, pythons, data_file
        self.row_sets = row_sets
        self.files = {name: directory / f"{name}.npz" for name in row_sets}
        for name, batch in row_sets.items():
            save_rows(self.files[name], batch)
        # In a process of its own, so that this one holds no model while others are measured.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            model, adapter = directory / "model", directory / "adapter"
            pool.submit(export, model, adapter, RANK, ALPHA).result()

    @contextlib.contextmanager
    def start(self, name: str, allocator: str) -> Iterator[Worker]:
        """A loaded trainer."""
        model, adapter = self.directory / "model", self.directory / "adapter"
        module = f"benchmarks.peer_{PEERS.get(name, OURS)}"
        command = [self.pythons[name], "-m", module, model, adapter, LEARNING_RATE]
        command += [self.data_file] if name == OURS else []
        environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        log = self.directory / f"{PEERS.get(name, OURS)}.log"
        worker = Worker(
            name,
            [str(part) for part in command],
            threads=NUM_THREADS,
            environment=environment | ALLOCATORS[allocator],
            log=log,
        )
        try:
            worker.ask("load")
            yield worker
        finally:
            worker.close()
