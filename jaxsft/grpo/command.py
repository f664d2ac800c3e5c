"""GRPO, from its options to its results, with the visible loop: rollout, rewards, reference,
advantages, update."""

import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp

from jaxsft.config import GrpoConfig
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.grpo.alarms import Alarms
from jaxsft.grpo.collect import Learner, collect, time_rollouts
from jaxsft.grpo.heldout import measure_tasks
from jaxsft.grpo.prompts import prompts_digest, read_prompts_of
from jaxsft.grpo.rewarded_rollout import describe
from jaxsft.grpo.setup import build_grpo
from jaxsft.rewards.scorer import Scorer
from jaxsft.run.fit_deadline import forecast
from jaxsft.run.report import progress
from jaxsft.run.run import Best, Run, is_best
from jaxsft.run.session import StopNow
from jaxsft.run.setup import Setup
from jaxsft.run.skips import SkippedSteps
from jaxsft.run.start import Started, go_on, start_run
from jaxsft.step.train_step import put_batch, train_step
from jaxsft.weights.find import open_tokenizer

HIGHEST_REWARD = Best("reward", False, "held-out reward was highest")
_FORECAST_AFTER = 3  # rollouts


def run_grpo(
    *,
    config: GrpoConfig,
    typed: frozenset[str],
    scorer: Scorer,
    argv: list[str],
    began_s: float,
) -> int:
    """Trains as the options ask; arguments and errors as of `run_training`."""
    return start_run(
        "jaxsft.grpo",
        config,
        typed=typed,
        argv=argv,
        began_s=began_s,
        go=partial(read_and_learn, scorer=scorer),
    )


def read_and_learn(started: Started[GrpoConfig], scorer: Scorer) -> int:
    """Reads the prompts, loads the model and trains it; returns the exit code."""
    config, session, console = started.config, started.session, started.console
    session.beat("reading prompts")
    tokenizer = open_tokenizer(started.origin.tokenizer)
    prompts = read_prompts_of(
        config.data,
        tokenizer,
        console,
        rewards=scorer.weights,
        max_new_tokens=config.rollout.max_new_tokens,
        on_progress=lambda: session.beat("reading prompts"),
    )
    scorer.check_tasks([each.task for each in (*prompts.train, *prompts.heldout)])
    session.beat("loading the model")
    setup = build_grpo(started, prompts, tokenizer, scorer)
    learner = Learner(
        config=config,
        prompts=prompts,
        tokenizer=tokenizer,
        scorer=scorer,
        template=AnswerTemplate(config.data.answer_template),
        # A copy: the step donates the state.
        reference=jax.tree.map(jnp.copy, setup.state.adapter) if config.objective.beta else None,
    )
    session.steps_per_pass = config.objective.num_iterations
    return go_on(
        started,
        setup,
        partial(learn, learner),
        measure_now=partial(
            measure_tasks, config, prompts.heldout, tokenizer, scorer, console=console
        ),
        heldout=prompts_digest(prompts.heldout),
        best=HIGHEST_REWARD,
        rows_read={
            "rows_read": prompts.report.rows_read,
            "prompts": len(prompts.train),
            "heldout_prompts": len(prompts.heldout),
        },
        time_steps=partial(time_rollouts, learner, session.go_on),
    )


def learn(learner: Learner, run: Run, setup: Setup) -> Setup:
    """The loop, from the state in `setup` to the last step, or to where the session stops it.

    `setup` is donated to the steps. Returns the setup as it stands then.
    """
    config, session, writer = learner.config, run.session, run.writer
    num_iterations = config.objective.num_iterations
    first_step, last_step = int(setup.state.step), len(setup.step_batches)
    saver, alarms = run.saver(setup), Alarms.from_metrics(run.path, first_step)
    skipped = SkippedSteps(
        lambda step: [each.source for each in learner.of_rollout((step - 1) // num_iterations)],
        writer,
        config.max_nonfinite_steps,
    )
    step = first_step
    with (
        progress(run.console, first_step, last_step, describe) as show,
        ThreadPoolExecutor(1) as thread,
    ):
        while step < last_step:
            # ---- The rollout ----
            number = step // num_iterations
            try:
                found, batch, seen = collect(learner, setup, number, thread, session.go_on)
            except StopNow:
                break
            writer.rollout(found.lines(step + 1, learner.scorer.weights))

            # ---- Its updates ----
            on_device = put_batch(batch, setup.spec.model.mesh)
            for _ in range(num_iterations):
                step += 1
                session.beat(f"step {step}")
                began_s = time.monotonic()
                with jax.transfer_guard("disallow"):
                    state, frozen, scalars = train_step(
                        setup.state, setup.frozen, on_device, spec=setup.spec
                    )
                setup = dataclasses.replace(setup, state=state, frozen=frozen)
                update = {name: float(x) for name, x in jax.device_get(scalars).items()}
                metrics = seen | update | {"update_s": time.monotonic() - began_s}
                run.say(skipped.check(step, metrics))

                # ---- What people and programs see of it ----
                left_s = session.median_step_s * (last_step - step)
                is_logged = step % config.logging_steps == 0 or step == last_step
                show(step, metrics, left_s, is_logged)
                if is_logged:
                    writer.log(step, {f"train/{name}": value for name, value in metrics.items()})
                    for line in alarms.check(step, metrics):
                        run.say(f"WARNING: {line}")

            # ---- Stop, measure, save ----
            if session.why_stop() or step == last_step:
                break
            reward = None
            if config.eval_steps and step % config.eval_steps == 0:
                try:
                    reward = run.best.of(run.measure(setup))
                except StopNow:
                    break
            if saver.is_due(step) or is_best(reward, run.checkpoints):
                saver.save(step, setup.state, reward)
            run.watch_metrics()
            session.step_done()
            if number == first_step // num_iterations + _FORECAST_AFTER:
                run.say(forecast(config, setup, step, session, session.median_step_s))
    if step > first_step:
        saver.finish(step, setup.state)
    return setup
