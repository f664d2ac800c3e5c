"""The files of an evaluation: numbers, answers and a page, in a directory of their own."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.common.files import write_json, write_text
from jaxsft.common.text import plural
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.samples import DataReport, as_list
from jaxsft.evaluate.heldout import SampleLosses
from jaxsft.evaluate.options import EvaluateOptions
from jaxsft.evaluate.page import compare_page
from jaxsft.evaluate.scoring import Comparison, GeneratedAnswer, score_answer
from jaxsft.evaluate.tasks import Asked, ScoredAnswers
from jaxsft.weights.find import Origin

NUMBERS, ANSWERS, PAGE = "evaluation.json", "answers.jsonl", "page.html"


class Measured(NamedTuple):
    """One model's results; `adapter` is the SHA-256 of its adapter's weights, None for a base.

    `scored` is None where no rewards are measured."""

    name: str
    adapter: str | None
    losses: dict[str, SampleLosses]
    answers: list[GeneratedAnswer]
    scored: ScoredAnswers | None


def output_directory(options: EvaluateOptions, origin: Origin) -> Path:
    """The directory for the results; `write_evaluation` makes it.

    Raises ValueError, before any work is done, where it can't be made or written.
    """
    if options.output is not None:
        directory = Path(options.output)
    elif origin.run_dir is not None:
        directory = origin.run_dir / "evaluation"
    else:
        directory = Path(f"evaluation-{Path(options.model).resolve().name}")
    ours = (NUMBERS, ANSWERS, PAGE)  # and, after a kill, one of these with .tmp at the end
    there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"--output {directory}: {there} is a file; name a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output {directory}: {there} is not writable")
    names = [each.name for each in there.iterdir()] if there == directory else []
    if foreign := [name for name in names if not name.startswith(ours)]:
        raise ValueError(f"--output {directory}: holds {foreign[0]}; name a directory of its own")
    return directory


def describe_evaluation(
    options: EvaluateOptions, report: DataReport | None, asked: Asked, is_scored: bool
) -> str:
    """The data and the decoding, in one line.

    Args:
      report: of the rows of the loss; None where no row has an answer.
      asked: the rows that are asked.
      is_scored: whether rewards are measured.
    """
    files, num_prompts = ", ".join(file.name for file in as_list(options.files)), len(asked.prompts)
    if report is None:
        parts = [
            f"{files}: {plural(num_prompts, 'answer')}; no loss: train takes none of these rows"
        ]
    else:
        parts = [f"{files}: {plural(report.samples, 'row')}, {plural(num_prompts, 'answer')}"]
        unlike = [(report.num_rejected, "left out of"), (report.shortened, "shortened for")]
        parts += [f"{plural(num, 'row')} {what} the loss" for num, what in unlike if num]
    if is_scored or report is None:
        told = [(asked.skipped, "not asked"), (asked.form_only, "scored by their form alone")]
        parts += [
            f"{plural(each.num_rejected, 'row')} {what}: {each.why_rejected()}"
            for each, what in told
            if each.num_rejected
        ]
    if options.few_shot:
        style = " as text" if options.few_shot_style == "text" else ""
        parts += [f"{plural(options.few_shot, 'example')}{style} in front"]
    decoding = options.eval
    if decoding.temperature > 0:
        parts += [f"temperature {decoding.temperature:g}, seed {decoding.seed}"]
        parts += [f"top-k {decoding.top_k}"] if decoding.top_k else []
        parts += [f"top-p {decoding.top_p:g}"] if decoding.top_p < 1 else []
    else:
        parts += ["greedy"]
    return "; ".join([*parts, f"at most {decoding.max_new_tokens:,} new tokens", options.dtype])


def write_evaluation(
    directory: Path,
    options: EvaluateOptions,
    about: str,
    measured: Sequence[Measured],
    lines: Sequence[Comparison],
) -> None:
    """Writes the three files, each whole or not at all; makes the directory if necessary."""
    directory.mkdir(parents=True, exist_ok=True)
    names, template = [each.name for each in measured], AnswerTemplate(options.answer_template)
    text = ""
    scored = [each.scored for each in measured if each.scored is not None]
    for number, each in enumerate(zip(*(each.answers for each in measured), strict=True)):
        scores = [dataclasses.asdict(score_answer(answer, template)) for answer in each]
        line: dict[str, Any] = {
            "prompt": each[0].prompt,
            "reference": each[0].reference,
            "answers": dict(zip(names, (answer.text for answer in each), strict=True)),
            "scores": dict(zip(names, scores, strict=True)),
        }
        if scored:
            line["tests_passed"] = {n: x.passed[number] for n, x in zip(names, scored, strict=True)}
            line["rewards"] = {
                name: {reward: each._asdict() for reward, each in found.rewards[number].items()}
                for name, found in zip(names, scored, strict=True)
            }
        text += json.dumps(line, ensure_ascii=False) + "\n"
    write_text(directory / ANSWERS, text)
    title = " and ".join(names)
    answers = [each.answers for each in measured]
    page = compare_page(title, names, answers, lines, template, about=about, scored=scored)
    write_text(directory / PAGE, page)
    metrics = {
        line.metric.name: {
            "models": [estimate._asdict() for estimate in line.estimates],
            "difference": line.difference and line.difference._asdict(),
        }
        for line in lines
    }
    told = {"models": names, "adapters": [each.adapter for each in measured], "about": about}
    told |= {"options": dataclasses.asdict(options), "metrics": metrics}
    write_json(directory / NUMBERS, told)
