"""What evaluation, scoring and generation need of a model: no optimizer, no gradient.

`ModelSpec.fused` chooses between two formulations of one function: None is model.py (the reference:
any device, dropout, sharded weights), otherwise fused.py runs each device on its own rows.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from jaxsft.common.batch import Batch
from jaxsft.gemma.decode import ModelBuilder
from jaxsft.gemma.loss import chunked_log_probs
from jaxsft.gemma.sharding import partition_spec
from jaxsft.step.fused import FusedSpec, fused_log_probs
from jaxsft.step.fused_decode import FusedModelBuilder
from jaxsft.step.fused_weights import group_adapter


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Compile-time settings of a model; hashable, so that `jit` compiles once for each value.

    `chunk_tokens`: loss positions per device that meet the vocabulary at once. With `fused` the
    frozen weights are those of fused_weights.py, else the model's own frozen state.
    """

    graphdef: nnx.GraphDef
    mesh: Mesh
    logit_cap: float | None
    chunk_tokens: int
    fused: FusedSpec | None = None

    @property
    def builder(self) -> ModelBuilder:
        """What the sampler takes with these frozen weights."""
        if self.fused is None:
            return self.graphdef
        return FusedModelBuilder(self.fused.layout, self.fused.dtype)


@partial(jax.jit, static_argnames="spec")
def token_log_probs(adapter: nnx.State, frozen: Any, batch: Batch, *, spec: ModelSpec) -> jax.Array:
    """float32 [B, T]: log-probability in nats of every target, without dropout or gradient.

    0 where the loss weight is 0. The sum of -log-probability · weight is the loss of a train step.
    """
    if spec.fused is None:
        model = nnx.merge(spec.graphdef, adapter, frozen)
        hidden_BTD = model(
            batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, mesh=spec.mesh
        )
        return chunked_log_probs(
            hidden_BTD,
            model.embedding[...],
            batch,
            logit_cap=spec.logit_cap,
            chunk_tokens=spec.chunk_tokens,
            mesh=spec.mesh,
        )
    settings, rows = spec.fused, partition_spec("batch")

    def local(adapter, weights, batch):
        whole = jax.tree.map(lambda x: x.astype(settings.dtype), adapter)
        return fused_log_probs(weights, group_adapter(whole, settings.layout), batch, settings)

    whole_spec = partition_spec()
    return jax.shard_map(
        local,
        mesh=spec.mesh,
        in_specs=(whole_spec, whole_spec, rows),
        out_specs=rows,
        check_vma=False,  # the loss head's trip count differs from device to device on purpose
    )(adapter, frozen, batch)
