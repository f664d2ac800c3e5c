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
from jaxsft.config import ANSWER_TEMPLATE, DataOptions
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.bins import pack
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.data.samples import DataReport, as_list, read_samples
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.download.names import find_row_files
from jaxsft.evaluate.heldout import (
    NEXT_QUESTION,
    Prompt,
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
from jaxsft.evaluate.scoring import compare_answers
from jaxsft.evaluate.sides import (
    Side,
    check_alike,
    check_evaluate_options,
    defaults_of,
    find_side,
    names_of,
    row_data,
    shared_tokenizer,
    sides_of,
)
from jaxsft.evaluate.table import show_comparison, with_perplexity
from jaxsft.gemma import lora
from jaxsft.gemma.decode import SamplingOptions, generation_batch_size
from jaxsft.gemma.sharding import make_mesh
from jaxsft.prepare.rows import all_samples, load_heldout
from jaxsft.step.score import ModelSpec
from jaxsft.weights.adapter_config import WEIGHTS_NAME
from jaxsft.weights.find import check_tokenizer, load, say_on_stderr
from jaxsft.weights.load import open_weights, without_weights
from jaxsft.weights.merged import MergedWeights
from jaxsft.weights.peft import load_adapter

_CHUNK_TOKENS = 512  # positions per device whose logits exist at a time
_MIN_ROW_LENGTH, _ROW_MULTIPLE = 512, 128  # a TPU's lanes; shorter rows pack badly
_ANY_LENGTH = 1 << 24  # tokens
_SHOWN = 80  # characters of a system text
_LINE_EVERY_S = 30.0  # where there is no terminal


Parse = Callable[[Mapping[str, Any]], EvaluateOptions]


class Rows(NamedTuple):
    """The rows and prompts to measure models on; `about` describes them in a line."""

    heldout: PackedRows
    prompts: list[Prompt]
    about: str


def evaluate(parse: Parse) -> int:
    """Measures the models of the options; returns the exit code.

    `parse` returns the options; its argument replaces the defaults of some. ValueError and OSError
    are bad input.
    """
    console = make_console()
    options, sides = resolve(parse)
    output = output_directory(options, sides[0].origin)
    check_device()
    configure_jax()
    tokenizer = shared_tokenizer(sides)
    rows = load_rows(options, tokenizer)
    for side in sides:  # both, before the first one takes an hour
        check_model(side, rows, tokenizer, options)
    measured: list[Measured] = []
    template = AnswerTemplate(options.answer_template)
    for side in sides:
        gc.collect()  # frees the other model's weights
        found = measure_model(side, rows, tokenizer, options=options, console=console)
        measured.append(found)
        lines = compare_losses(*(each.losses for each in measured))
        if options.eval.num_prompts:
            lines += compare_answers(template, *(each.answers for each in measured))
        lines = with_perplexity(lines)
        write_evaluation(output, options, rows.about, measured, lines)
    console.print(show_comparison(rows.about, [each.name for each in measured], lines))
    console.print(f"The numbers, the answers and a page with them are in {output}.")
    return 0


def resolve(parse: Parse) -> tuple[EvaluateOptions, list[Side]]:
    """The options, with those of a run among the models as defaults, and the models.

    ValueError where the two were trained to answer differently, see `check_alike`.
    """
    options = parse({})
    # A run is a local directory. Models of the hub are found after the options are checked.
    here = [name for name in names_of(options) if Path(name).parent.is_dir()]
    found = {name: find_side(name, options) for name in here}
    defaults = [each for each in map(defaults_of, found.values()) if each]
    check_alike([parse(each) for each in defaults])
    options = parse(max(defaults, key=len, default={}))  # a run has more of them than an export
    check_evaluate_options(options)
    return options, sides_of(options, found)


def load_rows(options: EvaluateOptions, tokenizer: Tokenizer) -> Rows:
    """The rows to measure on and their prompts, with the solved examples in front."""
    data = row_data(options)
    files, shots = find_row_files(as_list(options.files), say_on_stderr), options.few_shot
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
    system_prompt = None if shots else options.system_prompt
    asked = dataclasses.replace(data, system_prompt=system_prompt)
    found = first_samples(files, tokenizer, asked, options.eval.num_prompts)
    prompts = read_prompts(found, tokenizer, system_prompt)
    solved = read_prompts(examples, tokenizer, options.system_prompt)
    seen = {each.text for each in solved}
    if shared := [prompt.text for prompt in prompts if prompt.text in seen]:
        raise ValueError(f"few_shot_files: {shared[0][:80]!r} is among the rows measured on")
    if options.few_shot_style == "text":
        prompts = as_text(prompts, solved, tokenizer)
    else:
        prompts = with_examples(prompts, examples, tokenizer)
    about = describe_evaluation(options, heldout.report, len(prompts))
    if options.system_prompt:
        text = visible_line(options.system_prompt)
        about += f'; system text "{text[:_SHOWN]}{"…" if len(text) > _SHOWN else ""}"'
    if options.answer_template != ANSWER_TEMPLATE:
        about += f"; answers as {visible_line(options.answer_template)}"
    # Rows as short as possible: a token of padding costs as much as any other.
    samples = all_samples(heldout)
    lengths = [len(sample.ids) for sample in samples]
    row_length = -(-max(*lengths, _MIN_ROW_LENGTH) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    rows = PackedRows.from_samples(samples, pack(lengths, row_length), row_length)
    return Rows(rows, prompts, about)


def first_samples(
    files: Sequence[Path], tokenizer: Tokenizer, data: DataOptions, num: int
) -> list[Sample]:
    """The first rows, unfiltered and of any length: the length limit is not for prompts."""
    options = dataclasses.replace(
        data,
        max_length=_ANY_LENGTH,
        without_thought="keep_plain",  # as the rows of the loss
        min_completion_tokens=0,
        drop_degenerate=False,
        drop_duplicates=False,
    )
    samples = read_samples(files, tokenizer, options, DataReport())
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
    most = max(longest + options.eval.max_new_tokens, rows.heldout.row_length)
    if most > info.config.max_positions:
        raise ValueError(
            f"{name} has {info.config.max_positions} positions; the longest prompt has {longest} "
            f"tokens, eval.max_new_tokens is {options.eval.max_new_tokens}, the longest row "
            f"{rows.heldout.row_length}"
        )


def measure_model(
    side: Side, rows: Rows, tokenizer: Tokenizer, *, options: EvaluateOptions, console: Console
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
    return Measured(name, digest, losses, answers)


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
