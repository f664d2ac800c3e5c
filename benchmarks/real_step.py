"""The train step with random weights and tokens on this machine's devices, ready to run."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.common.batch import Batch
from jaxsft.config import TrainConfig
from jaxsft.config_check import check_devices
from jaxsft.run.program import (
    StepArguments,
    abstract_setup,
    lower_step,
    num_run_steps,
)
from jaxsft.weights.find import architecture

BOUND = 0.02 * 3**0.5


def random_steps(config: TrainConfig) -> tuple[StepArguments, Iterator[None]]:
    """(the step's shapes, an iterator that compiles it and then runs and awaits one step a turn).

    Every position bears loss; rows are whole, one segment each. Raises ValueError where config,
    model and devices do not go together.
    """
    check_devices(config, jax.device_count())
    model_config, _ = architecture(config.model.path)
    steps = num_run_steps(config, config.global_batch_size)
    arguments = abstract_setup(config, model_config, jax.devices(), steps)
    return arguments, _run(arguments, model_config.vocab_size)


def _run(arguments: StepArguments, vocab_size: int) -> Iterator[None]:
    compiled: Callable[..., Any] = lower_step(arguments).compile()
    state, frozen = _random((arguments.state, arguments.frozen))
    batch = _batch(arguments.batch, vocab_size)
    while True:
        state, frozen, metrics = compiled(state, frozen, batch)
        jax.block_until_ready((state, frozen, metrics))
        yield


def _random(shapes: Any) -> Any:
    """Uniform floats of standard deviation 0.02, integer zeros, as the shapes are placed."""
    leaves, tree = jax.tree.flatten(shapes)

    def make() -> list[jax.Array]:
        # Normals by threefry take half a minute to compile for the tree of a model.
        keys = jax.random.split(jax.random.key(0, impl="rbg"), len(leaves))
        return [
            jax.random.uniform(key, x.shape, x.dtype, -BOUND, BOUND)
            if jnp.issubdtype(x.dtype, jnp.floating)
            else jnp.zeros(x.shape, x.dtype)
            for key, x in zip(keys, leaves, strict=True)
        ]

    made = jax.jit(make, out_shardings=[x.sharding for x in leaves])()
    return jax.tree.unflatten(tree, made)


def _batch(shapes: Batch, vocab_size: int) -> Batch:
    """Whole rows of random tokens, on the devices."""
    shape = shapes.tokens_BT.shape
    tokens = np.random.default_rng(0).integers(0, vocab_size, shape, np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    batch = Batch(tokens, np.roll(tokens, -1, axis=1), ones.astype(np.float32), ones, positions)
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), batch, shapes)
