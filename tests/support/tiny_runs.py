"""Training runs that take seconds, on a model made here: to be killed, stopped and damaged.

The model is a random Gemma 3 of two layers with real tokens. Runs are those of the command, in
processes of their own, on the CPU; they share compiled programs, so that a restart takes seconds.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from etils import epath
from flax import nnx
from safetensors.numpy import save_file
from support.child import Child, ChildError

from jaxsft.data.vocabulary import Vocabulary, canonical_types, read_gguf, serialize
from jaxsft.gemma.model import Gemma
from jaxsft.run.checkpoint_files import DamagedError, read_arrays, read_record
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.load import demo_model_path, hf_tensors

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH = 15
BATCH_SIZE = 8  # splits over 8 devices
# What depends on the clock in a line of metrics.jsonl.
SPEEDS = {
    *("train/tokens_per_s", "train/model_flops_per_s"),
    *("train/rollout_s", "train/reference_s", "train/reward_s", "train/update_s"),  # of grpo
}
_NUM_PIECES = 4096  # of the vocabulary; everything else is spelt in characters and bytes

_MODEL = {
    "model_type": "gemma3_text",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
_CONFIG = {
    "lora": {"r": 64, "alpha": 64},
    "eval": {"num_prompts": 0, "batch_size": BATCH_SIZE, "max_new_tokens": 4},
    "global_batch_size": BATCH_SIZE,
    "learning_rate": 3e-3,
    "warmup_steps": 5,
    "save_steps": 5,
    "loss_chunk_tokens": 256,
}


class TinyRuns:
    """Runs of one config, `directory`/config.yaml, in `directory`/runs.

    The rows make STEPS_PER_EPOCH steps an epoch, one sample a row; held-out rows are measured
    before and after.
    """

    command = "jaxsft.train"
    rows_per_step = BATCH_SIZE
    epoch_line = r"^train: ([\d,]+) rows of"  # what the command says of the rows of an epoch

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        write_model(directory / "model")
        num_rows = STEPS_PER_EPOCH * BATCH_SIZE
        write_rows(directory / "train.jsonl", range(num_rows))
        write_rows(directory / "heldout.jsonl", range(num_rows, num_rows + BATCH_SIZE))
        data = {
            "train_files": [str(directory / "train.jsonl")],
            "eval_files": [str(directory / "heldout.jsonl")],
            "max_length": 72,
            "system_prompt": None,
            "drop_contaminated": False,
        }
        places = {
            "output_dir": str(directory / "runs"),
            "model": {"path": str(directory / "model")},
        }
        self.config = directory / "config.yaml"
        self.config.write_text(yaml.safe_dump(_CONFIG | places | {"data": data}))
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster
        }

    def path(self, name: str) -> Path:
        """The run's directory."""
        return self.directory / "runs" / name

    def start(
        self,
        name: str,
        *options: str,
        log: str | None = None,
        stdout: Path | None = None,
        **environment: str,
    ) -> Child:
        """Starts the run, or goes on with it; other keywords are set in its environment.

        `log` is the name of its output's files, that of the run where not given; `stdout` as in
        Child.
        """
        command = [sys.executable, "-m", self.command, "--config", str(self.config)]
        return Child(
            [*command, "--name", name, *options],
            self.environment | environment,
            self.directory / (log or name),
            stdout,
        )

    def finish(self, name: str, *options: str, **environment: str) -> Child:
        """Runs to the end; ChildError unless that is a good one without a word on stderr."""
        with self.start(name, *options, **environment) as child:
            code = child.wait()
        if code or child.err:
            raise ChildError(f"{name}: {child.said}")
        return child


def write_model(directory: Path) -> None:
    """A random Gemma 3 in Hugging Face's layout, with the tokenizer of the demo model, cut."""
    directory.mkdir(parents=True, exist_ok=True)
    whole = read_gguf(demo_model_path())
    characters = {"\u2581", *map(chr, range(128))}
    kept = [i for i, piece in enumerate(whole.pieces) if i < _NUM_PIECES or piece in characters]
    vocabulary = Vocabulary(
        pieces=[whole.pieces[i] for i in kept],
        scores=[whole.scores[i] for i in kept],
        types=[whole.types[i] for i in kept],
    )
    model = serialize(vocabulary, canonical_types(vocabulary, "the demo model"))
    (directory / "tokenizer.model").write_bytes(model)
    config = _MODEL | {"vocab_size": len(kept)}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = dict(hf_tensors(Gemma(from_hf_config(config), rngs=nnx.Rngs(0))))
    save_file(tensors, directory / "model.safetensors")


def write_rows(path: Path, numbers: Iterable[int]) -> None:
    """One row of JSONL for each number, no two alike."""
    with path.open("w") as file:
        for number in numbers:
            left, right = number + 10, 3 * number + 1
            total = left + right
            row = {
                "prompt": f"What is {left} plus {right}?",
                "response": f"<think>{left} and {right} make {total}.</think>\nIt is {total}.",
            }
            file.write(json.dumps(row) + "\n")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a torn last one, of a killed run, is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def train_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of steps, without what depends on the clock."""
    lines = [line for line in metrics(run_dir) if "train/loss" in line]
    return [{name: line[name] for name in line if name not in SPEEDS} for line in lines]


def differences(run_dir: Path, reference: Path) -> list[str]:
    """What of a finished run differs from the reference; nothing, if it is the same run.

    Every number of every step but speeds, each step once; held-out losses or rewards; bytes of the
    adapter and of what was generated, with the rewards of completions; arrays of the reference's
    checkpoints. One more checkpoint may be there: that of a run killed before it deletes what is
    over the limit.
    """
    return [*_metric_differences(run_dir, reference), *_file_differences(run_dir, reference)]


def _metric_differences(run_dir: Path, reference: Path) -> Iterator[str]:
    ours, theirs = train_metrics(run_dir), train_metrics(reference)
    expected = {line["step"]: line for line in theirs}
    counts = Counter(line["step"] for line in ours)
    for step in sorted(expected.keys() | counts.keys()):
        if counts[step] != (step in expected):
            yield f"step {step} is in metrics.jsonl {counts[step]} times"
    for line in ours:
        other = expected.get(line["step"], {})
        for name in sorted(line.keys() | other.keys()):
            if line.get(name) != other.get(name):
                yield f"step {line['step']}: {name} {line.get(name)} instead of {other.get(name)}"
    heldout = [
        [line for line in metrics(each) if "train/loss" not in line]
        for each in (run_dir, reference)
    ]
    if heldout[0] != heldout[1]:
        yield f"held-out {heldout[0]} instead of {heldout[1]}"


def _file_differences(run_dir: Path, reference: Path) -> Iterator[str]:
    generated = (reference / "samples.jsonl", reference / "rollouts.jsonl")
    for path in sorted([*filter(Path.exists, generated), *reference.glob("adapter*/*")]):
        ours = run_dir / path.relative_to(reference)
        if not ours.exists() or ours.read_bytes() != path.read_bytes():
            yield f"{path.relative_to(reference)} is missing or differs"
    for path in sorted((reference / "checkpoints").iterdir()):
        ours = run_dir / "checkpoints" / path.name
        try:
            is_same = same_arrays(checkpoint_arrays(ours), checkpoint_arrays(path))
        except DamagedError as error:
            yield f"checkpoint {path.name}: {error}"
        else:
            if not is_same:
                yield f"checkpoint {path.name} has other arrays"


def checkpoint_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one checkpoint by path in the state; DamagedError where it is not whole."""
    checkpoint = epath.Path(path.absolute())
    return read_arrays(checkpoint, read_record(checkpoint)["arrays"])


def same_arrays(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Are names, shapes, dtypes and bytes the same?"""
    described = [
        {name: (x.shape, x.dtype, np.asarray(x).tobytes()) for name, x in arrays.items()}
        for arrays in jax.device_get((dict(left), dict(right)))
    ]
    return described[0] == described[1]
