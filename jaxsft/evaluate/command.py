"""Measures one or two models on held-out rows and writes the results."""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.text import Text

from jaxsft.common.console import make_console
from jaxsft.common.devices import check_device, configure_jax
from jaxsft.common.files import cache_dir, file_sha256
from jaxsft.common.text import visible_line
from jaxsft.config import ANSWER_TEMPLATE, DataOptions, GrpoConfig, named_rewards
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.bins import pack
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.data.samples import DataReport, as_list, read_samples
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.download.names import find_row_files
from jaxsft.evaluate.heldout import (
    NEXT_QUESTION,
    Prompt,
    SampleLosses,
    answer_mask,
    answer_prompts,
    as_text,
    compare_losses,
    held_out_losses,
    read_prompts,
    with_examples,
)
from jaxsft.evaluate.options import EvaluateOptions
from jaxsft.evaluate.results import (
    Measured,
    describe_evaluation,
    output_directory,
    write_evaluation,
)
from jaxsft.evaluate.rewarded import compare_passed, compare_rewards
from jaxsft.evaluate.scoring import Comparison, compare_answers
from jaxsft.evaluate.sides import (
    Side,
    check_alike,
    check_evaluate_options,
    code_left_out,
    defaults_of,
    find_side,
    names_of,
    row_data,
    shared_tokenizer,
    sides_of,
)
from jaxsft.evaluate.table import show_comparison, with_perplexity
from jaxsft.evaluate.tasks import as_asked, read_asked, score_answers
from jaxsft.gemma import lora
from jaxsft.gemma.decode import SamplingOptions, generation_batch_size
from jaxsft.gemma.sharding import make_mesh
from jaxsft.prepare.rows import all_samples, load_heldout
from jaxsft.rewards.records import Task
from jaxsft.rewards.scorer import Scorer
from jaxsft.step.score import ModelSpec
from jaxsft.weights.adapter_config import WEIGHTS_NAME
from jaxsft.weights.find import check_tokenizer, load, say_on_stderr
from jaxsft.weights.load import open_weights, without_weights
from jaxsft.weights.merged import MergedWeights
from jaxsft.weights.peft import load_adapter

_CHUNK_TOKENS = 512  # positions per device whose logits exist at a time
_MIN_ROW_LENGTH, _ROW_MULTIPLE = 512, 128  # a TPU's lanes; shorter rows pack badly
_SHOWN = 80  # characters of a system text
_LINE_EVERY_S = 30.0  # where there is no terminal


Parse = Callable[[Mapping[str, Any]], EvaluateOptions]


class Rows(NamedTuple):
    """The rows and prompts to measure models on.

    Attributes:
      heldout: for the loss; None where no row has an answer.
      prompts, tasks: of each row that is asked. No tasks where no rewards are measured.
      about: all of it in a line.
    """

    heldout: PackedRows | None
    prompts: list[Prompt]
    tasks: list[Task]
    about: str


def evaluate(parse: Parse) -> int:
    """Measures the models of the options; returns the exit code.

    `parse` returns the options; its argument replaces the defaults of some. ValueError and OSError
    are bad input.
    """
    console = make_console()
    options, sides = resolve(parse)
    output = output_directory(options, sides[0].origin)
    with make_scorer(options) as scorer:  # its processes start before JAX does
        check_device()
        configure_jax()
        tokenizer = shared_tokenizer(sides)
        rows = load_rows(options, tokenizer)
        scorer.check_tasks(rows.tasks)
        for side in sides:  # both, before the first one takes an hour
            check_model(side, rows, tokenizer, options)
        measured: list[Measured] = []
        for side in sides:
            gc.collect()  # frees the other model's weights
            found = measure_model(
                side, rows, tokenizer, scorer=scorer, options=options, console=console
            )
            measured.append(found)
            lines = compare_measured(options, rows.tasks, scorer.weights, measured)
            write_evaluation(output, options, rows.about, measured, lines)
    console.print(show_comparison(rows.about, [each.name for each in measured], lines))
    console.print(f"The numbers, the answers and a page with them are in {output}.")
    return 0


def make_scorer(options: EvaluateOptions) -> Scorer:
    """The scorer of the rewards to measure, or of those that rows with tests would have.

    ValueError for a reward that there is not.
    """
    return Scorer(
        named_rewards(GrpoConfig().rewards if options.rewards is None else options.rewards),
        AnswerTemplate(options.answer_template),
        options.reward,
        log=make_console(on_stderr=True).print,
    )


def compare_measured(
    options: EvaluateOptions,
    tasks: Sequence[Task],
    weights: Mapping[str, float],
    measured: Sequence[Measured],
) -> list[Comparison]:
    """The lines of the table: losses, what answers earn, their form and length."""
    lines = compare_losses(*(each.losses for each in measured))
    scored = [each.scored for each in measured if each.scored is not None]
    if scored:
        lines += compare_passed(*(each.passed for each in scored))
        lines += compare_rewards(tasks, weights, *(each.rewards for each in scored))
    if measured[0].answers:
        template = AnswerTemplate(options.answer_template)
        lines += compare_answers(template, *(each.answers for each in measured))
    return with_perplexity(lines)


def resolve(parse: Parse) -> tuple[EvaluateOptions, list[Side]]:
    """The options, with those of a run among the models as defaults, and the models.

    stderr has a line on rewards of a run that are not measured. ValueError where the two were
    trained to answer differently, see `check_alike`.
    """
    options = parse({})
    # A run is a local directory. Models of the hub are found after the options are checked.
    here = [name for name in names_of(options) if Path(name).parent.is_dir()]
    found = {name: find_side(name, options) for name in here}
    defaults = [each for each in map(defaults_of, found.values()) if each]
    check_alike([parse(each) for each in defaults])
    if options.rewards is None:
        for line in filter(None, map(code_left_out, found.values())):
            say_on_stderr(line)
    # The model's own; of an export, which has few, the others are those of the run beside it.
    options = parse({name: x for each in reversed(defaults) for name, x in each.items()})
    check_evaluate_options(options)
    return options, sides_of(options, found)


def load_rows(options: EvaluateOptions, tokenizer: Tokenizer) -> Rows:
    """The rows to measure on and their prompts, with the solved examples in front."""
    data = row_data(options)
    files, shots = find_row_files(as_list(options.files), say_on_stderr), options.few_shot
    system_prompt = None if shots else options.system_prompt
    asked = read_asked(
        files,
        tokenizer,
        dataclasses.replace(data, system_prompt=system_prompt),
        options.eval.num_prompts,
        named_rewards(options.rewards or []),
    )
    heldout = None
    if asked.has_samples or not asked.tasks or first_samples(files, tokenizer, data, 1):
        heldout = load_heldout(files, tokenizer, data, cache_dir("prepared"))
    examples: list[Sample] = []
    if shots:
        example_files = find_row_files(as_list(options.few_shot_files), say_on_stderr)
        # Only the first turn has the system text.
        examples = first_samples(example_files, tokenizer, data, 1)
        without = dataclasses.replace(data, system_prompt=None)
        examples += first_samples(example_files, tokenizer, without, shots)[1:]
        if len(examples) < shots:
            raise ValueError(f"few_shot_files: {len(examples)} rows, few_shot {shots}")
    prompts = asked.prompts
    solved = read_prompts(examples, tokenizer, options.system_prompt)
    seen = {each.text for each in solved}
    if shared := [prompt.text for prompt in prompts if prompt.text in seen]:
        raise ValueError(f"few_shot_files: {shared[0][:80]!r} is among the rows measured on")
    if options.few_shot_style == "text":
        prompts = as_text(prompts, solved, tokenizer)
    else:
        prompts = with_examples(prompts, examples, tokenizer)
    is_scored = options.rewards is not None or any(task.tests for task in asked.tasks)
    about = describe_evaluation(options, heldout and heldout.report, asked, is_scored)
    if options.system_prompt:
        text = visible_line(options.system_prompt)
        about += f'; system text "{text[:_SHOWN]}{"…" if len(text) > _SHOWN else ""}"'
    if options.answer_template != ANSWER_TEMPLATE:
        about += f"; answers as {visible_line(options.answer_template)}"
    tasks = asked.tasks if is_scored else []
    if heldout is None:
        return Rows(None, prompts, tasks, about)
    # Rows as short as possible: a token of padding costs as much as any other.
    samples = all_samples(heldout)
    lengths = [len(sample.ids) for sample in samples]
    row_length = -(-max(*lengths, _MIN_ROW_LENGTH) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    rows = PackedRows.from_samples(samples, pack(lengths, row_length), row_length)
    return Rows(rows, prompts, tasks, about)


def first_samples(
    files: Sequence[Path], tokenizer: Tokenizer, data: DataOptions, num: int
) -> list[Sample]:
    """The first rows as samples, unfiltered and of any length."""
    samples = read_samples(files, tokenizer, as_asked(data), DataReport())
    return [each.sample for each in islice(samples, num)]


def check_model(side: Side, rows: Rows, tokenizer: Tokenizer, options: EvaluateOptions) -> None:
    """ValueError where a model has too few positions, or its files are incomplete or do not fit.

    Reads the headers of the weights, and their digest, which loading needs as well.
    """
    name, origin = side
    source, info = open_weights(origin.base)
    check_tokenizer(tokenizer, info.config)
    MergedWeights(source, info, None)  # checks every shape
    if origin.adapter is not None:
        base = None if origin.is_named_base else info
        model = without_weights(info.config)
        load_adapter(origin.adapter, model, base, config=origin.adapter_config)
    longest = max((len(prompt.ids) for prompt in rows.prompts), default=0)
    row_length = rows.heldout.row_length if rows.heldout is not None else 0
    most = max(longest + options.eval.max_new_tokens, row_length)
    if most > info.config.max_positions:
        raise ValueError(
            f"{name} has {info.config.max_positions} positions; the longest prompt has {longest} "
            f"tokens, eval.max_new_tokens is {options.eval.max_new_tokens}, the longest row "
            f"{row_length}"
        )


def measure_model(
    side: Side,
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    scorer: Scorer,
    options: EvaluateOptions,
    console: Console,
) -> Measured:
    """Loads a model and measures it."""
    name, origin = side
    mesh = make_mesh(jax.device_count())
    loaded = load(
        origin, dtype=options.dtype, param_dtype=options.param_dtype or options.dtype, mesh=mesh
    )
    digest = file_sha256(origin.adapter / WEIGHTS_NAME) if origin.adapter is not None else None
    graphdef, adapter, frozen = lora.split(loaded.model)
    cap = loaded.info.config.final_softcap
    spec = ModelSpec(graphdef, mesh, cap, _CHUNK_TOKENS)
    losses: dict[str, SampleLosses] = {}
    if rows.heldout is not None:
        batch_size = min(options.eval.batch_size, len(rows.heldout))
        batch_size = -(-batch_size // mesh.size) * mesh.size
        with counting(console, name, "rows", len(rows.heldout), batch_size) as on_batch:
            losses = held_out_losses(
                adapter,
                frozen,
                rows.heldout,
                answer_mask(rows.heldout, tokenizer, AnswerTemplate(options.answer_template)),
                spec=spec,
                batch_size=batch_size,
                on_batch=on_batch,
            )
    num_prompts = len(rows.prompts)
    batch_size = generation_batch_size(SamplingOptions.from_fields(options.eval), num_prompts, mesh)
    with counting(console, name, "answers", num_prompts, batch_size) as on_batch:
        answers = answer_prompts(
            adapter,
            frozen,
            rows.prompts,
            tokenizer,
            spec=spec,
            options=options.eval,
            on_batch=on_batch,
            stop_text=NEXT_QUESTION if options.few_shot_style == "text" else None,
        )
    scored = score_answers(scorer, rows.tasks, answers) if rows.tasks else None
    return Measured(name, digest, losses, answers, scored)


@contextmanager
def counting(
    console: Console, name: str, what: str, total: int, batch_size: int
) -> Iterator[Callable[[], None]]:
    """Yields a function to call before each batch; it shows the progress, elsewhere than on a
    terminal every 30 seconds."""
    num_begun, last_s = 0, time.monotonic()
    with console.status(Text(f"{name}: {what} …")) as status:

        def on_batch() -> None:
            nonlocal num_begun, last_s
            line = f"{name}: {num_begun:,} of {total:,} {what}"
            status.update(Text(line))
            if not console.is_terminal and time.monotonic() - last_s >= _LINE_EVERY_S:
                last_s = time.monotonic()
                console.print(line)
            num_begun = min(num_begun + batch_size, total)

        yield on_batch
