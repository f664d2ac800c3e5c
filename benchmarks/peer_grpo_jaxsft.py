"""Our own side of `grpo_step`: the package's rollout, reference and update.

`python -m benchmarks.peer_grpo_jaxsft MODEL_DIR ADAPTER_DIR SETTINGS_FILE`.
"""

import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks.peer_protocol import peak_rss_bytes, serve
from jaxsft.config import GrpoConfig, ModelOptions, ObjectiveOptions, RolloutOptions, RowFileOptions
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.samples import DataReport
from jaxsft.grpo.collect import Learner, collect
from jaxsft.grpo.objective import Objective
from jaxsft.grpo.prompts import Prompts, TaskPrompt
from jaxsft.rewards.records import Reward, Task
from jaxsft.run.fork import with_fork
from jaxsft.run.setup import load_run
from jaxsft.step.train_step import put_batch, train_step
from jaxsft.weights.adapter_config import WEIGHTS_NAME
from jaxsft.weights.find import Origin
from jaxsft.weights.peft import save_adapter


class _Words:
    """A tokenizer that never stops: every completion has as many tokens as the peer's."""

    stop_ids = ()
    start_of_turn_id = -1

    def __init__(self, num_ids: int):
        self.vocab_size = num_ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"t{each}" for each in ids)


class _Given:
    """A scorer whose rewards differ in every group: no completion is left out."""

    user_files = ()

    def __init__(self, rewards: Sequence[float]):
        self.weights, self.rewards = {"given": 1.0}, rewards

    def __call__(self, tasks: Any, completions: Any) -> list[dict[str, Reward]]:
        return [{"given": Reward(value, "")} for value in self.rewards]


class JaxsftGrpo:
    """What `jaxsft.grpo` does in a step, without its files: float32, the plain step."""

    def __init__(self, model_dir: str, adapter_dir: str, settings_file: str):
        jax.config.update("jax_default_matmul_precision", "highest")
        settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
        prompts = [
            TaskPrompt(Task("", "text", None, (), "", {}), ids, "") for ids in settings["prompts"]
        ]
        config = GrpoConfig(
            model=ModelOptions(path=model_dir, remat="projections"),
            fork_from=adapter_dir,
            data=RowFileOptions(max_length=settings["row_length"]),
            rollout=RolloutOptions(
                num_prompts=len(prompts),
                num_generations=settings["group_size"],
                max_new_tokens=settings["new_tokens"],
                batch_size=len(prompts) * settings["group_size"],
            ),
            objective=ObjectiveOptions(**settings["objective"], mask_truncated_completions=False),
            # Of half as many completions, should each have a row of its own. Packed, a micro-batch
            # holds more tokens than the peer's.
            gradient_accumulation_steps=2 * settings["micro_batches"],
            learning_rate=settings["learning_rate"],
            lr_scheduler_type="constant",
            loss_chunk_tokens=256,  # as in grpo_demo
        )
        config, fork = with_fork(config, ())
        names = [field.name for field in dataclasses.fields(Objective)]
        self.loaded: Any = load_run(
            config,
            Origin(Path(model_dir), None, None, Path(), model_dir, None),
            1000,
            check=lambda info: None,
            fork=fork,
            token_loss=Objective(**{name: getattr(config.objective, name) for name in names}),
        )
        reference = nnx.to_flat_state(self.loaded.state.adapter)
        share = {"a": 1.0, "b": settings["reference_share"]}
        self.learner = Learner(
            config=config,
            # The prompts stand in their order, for the peer's completions to be those of ours.
            prompts=Prompts(prompts, [], list(range(len(prompts))), DataReport()),
            tokenizer=_Words(settings["num_ids"]),  # type: ignore[arg-type]
            scorer=_Given(settings["rewards"]),  # type: ignore[arg-type]
            template=AnswerTemplate(config.data.answer_template),
            reference=nnx.from_flat_state(
                [(path, leaf.replace(leaf[...] * share[path[-1]])) for path, leaf in reference]
            ),
        )
        self.thread, self.rollouts = ThreadPoolExecutor(1), 0

    def _collect(self) -> Any:
        self.rollouts += 1
        arguments = self.learner, self.loaded, self.rollouts, self.thread
        return collect(*arguments, lambda what: None)

    def gradients(self, out: str, completions: str) -> dict[str, Any]:
        """Writes the unclipped gradient of a rollout's loss to `out`, as PEFT's matrices, and the
        rollout's token ids to `completions`."""
        found, batch, _ = self._collect()
        drawn = [{"prompt": each.prompt_ids, "ids": each.ids} for each in found.completions]
        Path(completions).write_text(json.dumps(drawn), encoding="utf-8")
        # Adam's first moment has the gradient of the very step that is timed: it compiles here.
        loaded, spec, config = self.loaded, self.loaded.spec, self.learner.config
        kept = jax.tree.map(jnp.copy, loaded.state)
        on_device = put_batch(batch, spec.model.mesh)
        state, frozen, metrics = train_step(loaded.state, loaded.frozen, on_device, spec=spec)
        self.loaded = dataclasses.replace(loaded, state=kept, frozen=frozen)
        scale = max(1.0, float(metrics["grad_norm"]) / config.max_grad_norm)  # undoes the clipping
        scale /= 1.0 - config.adam_beta1
        gradient = jax.tree.map(lambda x: x * scale, optax.tree.get(state.moments, "mu"))
        model = nnx.merge(spec.model.graphdef, gradient, loaded.model_weights)
        with tempfile.TemporaryDirectory(dir=Path(out).parent) as directory:
            save_adapter(directory, model, loaded.adapter_config)
            (Path(directory) / WEIGHTS_NAME).rename(out)
        return {"loss": float(metrics["loss"])}

    def step(self) -> dict[str, Any]:
        """The seconds of one step's parts."""
        began_s = time.perf_counter()
        _, batch, seen = self._collect()
        collected_s = time.perf_counter()
        on_device = put_batch(batch, self.loaded.spec.model.mesh)
        state, frozen, metrics = train_step(
            self.loaded.state, self.loaded.frozen, on_device, spec=self.loaded.spec
        )
        self.loaded = dataclasses.replace(self.loaded, state=state, frozen=frozen)
        assert bool(metrics["applied"])
        jax.block_until_ready(self.loaded.state)
        ended_s = time.perf_counter()
        return {
            "rollout": seen["rollout_s"],
            "reference": collected_s - began_s - seen["rollout_s"],
            "update": ended_s - collected_s,
            "whole": ended_s - began_s,
            "peak_rss_bytes": peak_rss_bytes(),
        }


if __name__ == "__main__":
    serve(lambda: JaxsftGrpo(*sys.argv[1:]), methods=("gradients", "step"))
