"""Measures held-out tasks: answers as in training's evaluation, and what they earn."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from jaxsft.config import GrpoConfig
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.evaluate.heldout import Prompt, answer_prompts
from jaxsft.evaluate.rewarded import compare_passed, compare_rewards
from jaxsft.evaluate.scoring import compare_answers
from jaxsft.evaluate.tasks import score_answers
from jaxsft.grpo.prompts import TaskPrompt
from jaxsft.rewards.answer_form import exact_parts
from jaxsft.rewards.scorer import Scorer
from jaxsft.run.measure import log_measured
from jaxsft.run.metrics import MetricsWriter
from jaxsft.run.setup import Setup


def measure_tasks(
    config: GrpoConfig,
    prompts: Sequence[TaskPrompt],
    tokenizer: Tokenizer,
    scorer: Scorer,
    setup: Setup,
    writer: MetricsWriter,
    on_batch: Callable[[], None],
    *,
    console: Console,
) -> dict[str, Any]:
    """Answers the first held-out tasks and scores the answers; as `measure_rows`.

    `on_batch` is called before each batch and may raise.
    """
    asked = prompts[: config.eval.num_prompts]
    if not asked:
        return {}
    step, template = int(setup.state.step), AnswerTemplate(config.data.answer_template)
    console.print(f"Measuring at step {step} on {len(asked)} held-out tasks …")
    answers = answer_prompts(
        setup.state.adapter,
        setup.frozen,
        [Prompt(ids, task.prompt, task.answer or "") for task, ids, _ in asked],
        tokenizer,
        spec=setup.spec.model,
        options=config.eval,
        on_batch=on_batch,
    )
    tasks = [each.task for each in asked]
    rewards, passed = score_answers(scorer, tasks, answers)
    lines = compare_passed(passed) + compare_rewards(tasks, scorer.weights, rewards)
    lines += compare_answers(template, answers)
    shown = []
    for i, (answer, earned) in enumerate(zip(answers, rewards, strict=True)):
        flags = {
            "exact_format": exact_parts(answer.text, template) is not None,
            "rewards": {name: reward._asdict() for name, reward in earned.items()},
        }
        shown.append(dataclasses.asdict(answer) | flags)
        writer.sample(step, i, shown[-1])
    return log_measured(writer, step, lines, shown)
