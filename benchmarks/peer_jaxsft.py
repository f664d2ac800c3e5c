"""Our own side of the comparison: the package's train step.

`python -m benchmarks.peer_jaxsft MODEL_DIR ADAPTER_DIR LEARNING_RATE DATA_FILE`.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.peer_lab import NUM_ROWS, ROW_LENGTH
from benchmarks.peer_protocol import serve
from jaxsft.common.batch import Batch
from jaxsft.config import DataOptions, ModelOptions, TrainConfig
from jaxsft.prepare.rows import load_data, run_model
from jaxsft.run.fork import with_fork
from jaxsft.run.setup import build
from jaxsft.step.train_step import init_state, put_batch, train_step
from jaxsft.weights.adapter_config import WEIGHTS_NAME
from jaxsft.weights.find import open_tokenizer
from jaxsft.weights.load import demo_model_path
from jaxsft.weights.peft import save_adapter


class JaxsftTrainer:
    """The train step as `jaxsft.train` builds it: float32, gradients clipped to 1."""

    def __init__(self, model_dir: str, adapter_dir: str, learning_rate: float, data_file: str):
        jax.config.update("jax_default_matmul_precision", "highest")
        config = TrainConfig(
            model=ModelOptions(path=model_dir, tokenizer=str(demo_model_path())),
            fork_from=str(adapter_dir),
            data=DataOptions(train_files=[data_file], max_length=ROW_LENGTH),
            global_batch_size=NUM_ROWS,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
        )
        origin = run_model(config.model)
        data = load_data(config.data, open_tokenizer(origin.tokenizer))
        config, fork = with_fork(config, ())
        self.setup = build(config, data, origin, fork=fork)
        self.state, self.frozen = self.setup.state, self.setup.frozen

    def _batch(self, rows: Path) -> Batch:
        with np.load(rows) as arrays:
            batch = Batch(*(arrays[name] for name in Batch._fields))
        return put_batch(batch, self.setup.spec.model.mesh)

    def gradients(self, rows: Path, out: Path) -> float:
        """See `peer_protocol.Trainer`."""
        # An optimizer whose state is the gradient.
        spec = self.setup.spec
        update = dataclasses.replace(spec.update, transform=optax.trace(decay=0.0))
        spec = dataclasses.replace(spec, update=update)
        state = init_state(jax.tree.map(jnp.copy, self.state.adapter), spec)
        state, self.frozen, metrics = train_step(state, self.frozen, self._batch(rows), spec=spec)
        model = nnx.merge(spec.model.graphdef, state.moments.trace, self.setup.model_weights)
        with tempfile.TemporaryDirectory(dir=out.parent) as directory:
            save_adapter(directory, model, self.setup.adapter_config)
            (Path(directory) / WEIGHTS_NAME).rename(out)
        return float(metrics["loss"])

    def step(self, rows: Path) -> float:
        """See `peer_protocol.Trainer`."""
        self.state, self.frozen, metrics = train_step(
            self.state, self.frozen, self._batch(rows), spec=self.setup.spec
        )
        jax.block_until_ready((self.state, self.frozen))
        return float(metrics["loss"])


if __name__ == "__main__":
    model_dir, adapter_dir, learning_rate, data_file = sys.argv[1:]
    serve(lambda: JaxsftTrainer(model_dir, adapter_dir, float(learning_rate), data_file))
