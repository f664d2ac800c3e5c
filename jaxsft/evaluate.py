"""What a model does on held-out rows: loss per completion token, and the form of its answers."""

import dataclasses
import re
from collections.abc import Callable, Sequence

import numpy as np
from flax import nnx

from jaxsft.config import EvalOptions
from jaxsft.packing import PackedRows, Sample
from jaxsft.sample import generate
from jaxsft.step import StepSpec, eval_step, put_batch
from jaxsft.tokenizer import Tokenizer

# As the field's GRPO demonstrations test it; `is_exact_format` asks for each tag once as well.
EXACT_FORMAT = re.compile(
    r"^\s*<reasoning>(.+?)</reasoning>.*?<answer>(.+?)</answer>\s*$", re.DOTALL
)
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A generated answer beside its prompt and the row's own answer, as text."""

    prompt: str
    reference: str
    text: str
    stopped: bool


@dataclasses.dataclass(frozen=True)
class FormatReport:
    """Over `num_answers` answers. Rates are shares, lengths are words; NaN where nothing counts.

    `exact_format`: the whole text matches EXACT_FORMAT and holds each tag once. `stop_rate`: ended
    by a stop token. The lengths and `distinct_answers` are over exactly formatted answers.
    """

    num_answers: int
    exact_format: float
    stop_rate: float
    mean_reasoning_words: float
    mean_answer_words: float
    distinct_answers: int


def held_out_loss(
    adapter: nnx.State,
    frozen: nnx.State,
    rows: PackedRows,
    *,
    spec: StepSpec,
    batch_size: int,
    on_batch: Callable[[], None] = lambda: None,
) -> float:
    """Mean loss in nats per completion token over all of `rows`; `on_batch` is called before each
    batch and may raise."""
    loss_sum = num_tokens = 0.0
    for low in range(0, len(rows), batch_size):
        on_batch()
        indices = [i if i < len(rows) else -1 for i in range(low, low + batch_size)]
        batch = put_batch(rows.batch(indices), spec.mesh)
        batch_sum, batch_tokens = eval_step(adapter, frozen, batch, spec=spec)
        loss_sum += float(batch_sum)
        num_tokens += float(batch_tokens)
    return loss_sum / num_tokens


def split_prompt(sample: Sample) -> tuple[list[int], list[int]]:
    """(prompt ids, completion ids) of a sample, cut where its last assistant turn begins."""
    last_unlabelled = int(np.flatnonzero(~sample.loss_mask)[-1])
    return sample.ids[: last_unlabelled + 1].tolist(), sample.ids[last_unlabelled + 1 :].tolist()


def answer_prompts(
    adapter: nnx.State,
    frozen: nnx.State,
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    *,
    spec: StepSpec,
    options: EvalOptions,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """Generates an answer to each sample's prompt; `on_batch` as in `held_out_loss`."""
    parts = [split_prompt(sample) for sample in samples]
    generations = generate(
        spec.graphdef,
        adapter,
        frozen,
        [prompt for prompt, _ in parts],
        options=options,
        stop_ids=tokenizer.stop_ids,
        on_batch=on_batch,
    )
    return [
        Answer(
            prompt=user_text(tokenizer.decode(prompt)),
            reference=tokenizer.decode(completion, skip_special=True),
            text=tokenizer.decode(generation.ids),
            stopped=generation.stopped,
        )
        for (prompt, completion), generation in zip(parts, generations, strict=True)
    ]


def user_text(rendered_prompt: str) -> str:
    """The text of a decoded prompt's last user turn, the system text in front of it included."""
    last_turn = rendered_prompt.rsplit("<start_of_turn>user\n", 1)[-1]
    return last_turn.split("<end_of_turn>", 1)[0]


def is_exact_format(text: str) -> bool:
    """The whole text is <reasoning>…</reasoning>, then <answer>…</answer>, each tag once."""
    return bool(EXACT_FORMAT.match(text)) and all(text.count(tag) == 1 for tag in TAGS)


def score_format(answers: Sequence[Answer]) -> FormatReport:
    """Counts what FormatReport holds; ValueError without answers."""
    if not answers:
        raise ValueError("no answers to score")
    matches = [EXACT_FORMAT.match(a.text) for a in answers if is_exact_format(a.text)]
    parts = [(match[1].strip(), match[2].strip()) for match in matches if match]
    return FormatReport(
        num_answers=len(answers),
        exact_format=len(parts) / len(answers),
        stop_rate=sum(a.stopped for a in answers) / len(answers),
        mean_reasoning_words=_mean([len(reasoning.split()) for reasoning, _ in parts]),
        mean_answer_words=_mean([len(answer.split()) for _, answer in parts]),
        distinct_answers=len({answer for _, answer in parts}),
    )


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else float("nan")
