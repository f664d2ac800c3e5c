"""Shows the prompts of `grpo` token by token, what is right for them, and which were left out."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from jaxsft.common.console import make_console
from jaxsft.common.text import visible_text
from jaxsft.config import GrpoConfig, named_rewards
from jaxsft.grpo.prompts import Prompts, TaskPrompt, read_prompts_of
from jaxsft.inspect.options import LOG_WIDTH, InspectOptions, chosen_rows
from jaxsft.inspect.report import legend, title, tokens_text
from jaxsft.inspect.tokens import view_tokens
from jaxsft.prepare.rows import run_model
from jaxsft.weights.find import open_tokenizer


def show_prompts(config: GrpoConfig, options: InspectOptions) -> int:
    """Shows the prompts; returns the exit code, 0. ValueError and OSError are bad input."""
    for name in ("html", "prepared"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"--{name} is for rows of jaxsft.train; leave it out for a grpo recipe"
            )
    console = make_console(log_width=LOG_WIDTH)
    tokenizer = open_tokenizer(run_model(config.model).tokenizer)
    prompts = read_prompts_of(  # says what became of every row
        config.data,
        tokenizer,
        console,
        rewards=named_rewards(config.rewards),
        max_new_tokens=config.rollout.max_new_tokens,
    )
    indices = chosen_rows(options, len(prompts.train))
    console.print("", legend(), "", sep="\n", soft_wrap=True)
    for index in indices:
        prompt = prompts.train[index]
        tokens = list(view_tokens(prompt.ids, [False] * len(prompt.ids), tokenizer))
        console.print(title(f"prompt {index}: {len(prompt.ids):,} tokens, {prompt.source}"))
        console.print(tokens_text(tokens, options.ids), soft_wrap=True)
        console.print(_right(prompt), "")
    console.print(_counts(prompts, config))
    return 0


def _right(prompt: TaskPrompt) -> RenderableType:
    """What is right for the prompt, and what of it the model sees."""
    task, table = prompt.task, Table.grid(padding=(0, 2))
    lines = [("kind", task.kind), ("answer", task.answer)]
    lines += [
        ("hidden test" if number else "shown test", test) for number, test in enumerate(task.tests)
    ]
    for name, value in [*lines, ("setup of the tests", task.setup)]:
        if value:
            table.add_row(Text(name, "bold"), Text(visible_text(value)))
    return table


def _counts(prompts: Prompts, config: GrpoConfig) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, value in _facts(prompts, config):
        table.add_row(Text(name, "bold"), Text(value))
    return table


def _facts(prompts: Prompts, config: GrpoConfig) -> Iterator[tuple[str, str]]:
    lengths, new = [len(each.ids) for each in prompts.train], config.rollout.max_new_tokens
    low, middle, high = np.percentile(lengths, (0, 50, 100), method="nearest")
    kinds = Counter(each.task.kind for each in prompts.train)
    drawn = (config.max_steps or 0) // config.objective.num_iterations * config.rollout.num_prompts
    yield "prompts", f"{len(prompts.train):,}; {len(prompts.heldout):,} held out"
    yield "kinds", ", ".join(f"{kind} {num:,}" for kind, num in kinds.most_common())
    yield "prompt length", f"shortest {low:,}, median {middle:,}, longest {high:,}"
    yield (
        "room",
        f"{config.data.max_length - new:,} tokens: data.max_length {config.data.max_length:,} "
        f"without rollout.max_new_tokens {new:,}",
    )
    yield (
        "passes",
        f"{drawn / len(prompts.epoch):.3g}: {drawn:,} prompts in max_steps {config.max_steps:,}",
    )
