"""What a model can do: `python -m jaxsft.evaluate MODEL [--compare OTHER] [--files ROWS] …`.

Held-out loss per completion token, of the reasoning and of the answer apart, and what the answers
to the rows' prompts are worth: form, length, repetition, and accuracy where the rows have numbers
for answers (GSM8K). Two models are compared on the same rows with a paired test. The numbers, the
answers and a page that shows them side by side are written to a directory.

Exit codes: 0 done; 1 out of memory; 2 bad input; 130 interrupted.
"""

import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import jax
import optax
from rich.console import Console

from jaxsft import lora
from jaxsft.bins import pack
from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, cache_dir, fail, parse_options
from jaxsft.config import DataOptions
from jaxsft.data import as_list
from jaxsft.evaluation.heldout import (
    Prompt,
    SampleLosses,
    answer_mask,
    answer_prompts,
    compare_losses,
    held_out_losses,
    read_prompts,
    with_examples,
)
from jaxsft.evaluation.options import BASE, EvaluateOptions, check, run_defaults
from jaxsft.evaluation.page import compare_page
from jaxsft.evaluation.scoring import Answer, Comparison, compare
from jaxsft.evaluation.table import show_comparison, with_perplexity
from jaxsft.json_file import write_json
from jaxsft.models import Origin, find_model, load, open_tokenizer
from jaxsft.packing import PackedRows, Sample
from jaxsft.prepare import all_samples, load_heldout
from jaxsft.run import configure_jax
from jaxsft.sharding import make_mesh
from jaxsft.step import StepSpec
from jaxsft.terminal import make_console
from jaxsft.tokenizer import Tokenizer

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
DESCRIPTION = (
    "Measures a model (a run, an adapter, or anything that train takes as model.path) on held-out "
    "rows: loss, and the form and accuracy of its answers, with 95% intervals. For a run, its own "
    "held-out rows, lengths and decoding options are the defaults."
)
_CHUNK_TOKENS = 512  # loss positions per device that meet the vocabulary at once
_MIN_ROW_LENGTH, _ROW_MULTIPLE = 512, 128  # a TPU's lanes; shorter rows pack badly
_LINE_EVERY_S = 30.0  # where there is no terminal


class Rows(NamedTuple):
    """What models are measured on."""

    heldout: PackedRows
    prompts: list[Prompt]


class Measured(NamedTuple):
    """What one model did."""

    name: str
    losses: dict[str, SampleLosses]
    answers: list[Answer]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    console = make_console()
    try:
        return command(list(sys.argv[1:] if argv is None else argv), console)
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        return fail("interrupted; nothing was written", EXIT_INTERRUPTED)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return fail("out of memory: lower --eval.batch_size or --max_length", EXIT_FAILED)


def command(argv: Sequence[str], console: Console) -> int:
    """Measures what `argv` asks for. ValueError and OSError are bad input."""
    options = parse_options("jaxsft.evaluate", DESCRIPTION, argv, EvaluateOptions)
    origin = find_model(options.model, options.tokenizer, options.base_model)
    if origin.run_dir is not None:
        defaults = run_defaults(origin.run_dir)
        options = parse_options("jaxsft.evaluate", DESCRIPTION, argv, EvaluateOptions, defaults)
    check(options, origin)
    output = output_directory(options, origin)
    configure_jax()
    other = find_other(options, origin)
    tokenizer = open_tokenizer(origin.tokenizer)
    if other is not None and open_tokenizer(other.tokenizer).digest != tokenizer.digest:
        raise ValueError(
            f"{options.compare}: has another tokenizer than {options.model}: losses per token "
            "would not compare; evaluate each by itself"
        )
    rows = read_rows(options, tokenizer)
    measured = [measure(options.model, origin, rows, tokenizer, options, console)]
    if other is not None:
        assert options.compare is not None
        gc.collect()  # the first model's weights
        name = other.name if options.compare == BASE else options.compare
        measured.append(measure(name, other, rows, tokenizer, options, console))
    lines = compare_losses(*(each.losses for each in measured))
    if options.eval.num_prompts:
        lines += compare(*(each.answers for each in measured))
    lines = with_perplexity(lines)
    about = describe(options, rows)
    names = [each.name for each in measured]
    console.print(show_comparison(about, names, lines))
    write_results(output, options, about, measured, lines)
    console.print(f"The numbers, the answers and a page with them are in {output}.")
    return 0


def find_other(options: EvaluateOptions, origin: Origin) -> Origin | None:
    """The model to compare with, if any."""
    if options.compare is None:
        return None
    if options.compare == BASE:
        return dataclasses.replace(origin, adapter=None)
    base = options.base_model if origin.adapter is not None else None
    return find_model(options.compare, options.tokenizer, base)


def output_directory(options: EvaluateOptions, origin: Origin) -> Path:
    """Where results go; made now, so that it can't fail after the work."""
    if options.output is not None:
        directory = Path(options.output)
    elif origin.run_dir is not None:
        directory = origin.run_dir / "evaluation"
    else:
        directory = Path(f"evaluation-{Path(options.model).name}")
    directory.mkdir(parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"--output {directory}: is not writable")
    return directory


def read_rows(options: EvaluateOptions, tokenizer: Tokenizer) -> Rows:
    """The rows to measure on and their prompts, with the examples in front."""
    data = DataOptions(system_prompt=options.system_prompt, max_length=options.max_length)
    bare = dataclasses.replace(data, system_prompt=None)
    files, root = as_list(options.files), cache_dir("prepared")
    samples = all_samples(load_heldout(files, tokenizer, data, root))
    first = samples[: options.eval.num_prompts]
    if not options.few_shot:
        return Rows(pack_tightly(samples), read_prompts(first, tokenizer, options.system_prompt))
    examples = []
    for variant in (data, bare):
        found = load_heldout(as_list(options.few_shot_files), tokenizer, variant, root)
        examples.append(all_samples(found)[: options.few_shot])
    if len(examples[0]) < options.few_shot:
        raise ValueError(f"few_shot_files: {len(examples[0])} rows, few_shot {options.few_shot}")
    turns = examples[0][:1] + examples[1][1:]
    first = all_samples(load_heldout(files, tokenizer, bare, root))[: options.eval.num_prompts]
    prompts = with_examples(read_prompts(first, tokenizer, None), turns, tokenizer)
    return Rows(pack_tightly(samples), prompts)


def pack_tightly(samples: Sequence[Sample]) -> PackedRows:
    """Rows just long enough: every token of padding would cost as much as one of text."""
    lengths = [len(sample.ids) for sample in samples]
    row_length = -(-max(*lengths, _MIN_ROW_LENGTH) // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return PackedRows.from_samples(samples, pack(lengths, row_length), row_length)


def measure(
    name: str,
    origin: Origin,
    rows: Rows,
    tokenizer: Tokenizer,
    options: EvaluateOptions,
    console: Console,
) -> Measured:
    """Loads a model and measures it."""
    mesh = make_mesh(jax.device_count())
    loaded = load(origin, dtype=options.dtype, param_dtype=options.dtype, mesh=mesh)
    config = loaded.info.config
    longest = max((len(prompt.ids) for prompt in rows.prompts), default=0)
    room = config.max_positions - options.eval.max_new_tokens
    if longest > room or options.max_length > config.max_positions:
        raise ValueError(
            f"{name} has {config.max_positions} positions; the longest prompt has {longest} "
            f"tokens, eval.max_new_tokens is {options.eval.max_new_tokens}, max_length "
            f"{options.max_length}"
        )
    graphdef, adapter, frozen = lora.split(loaded.model)
    nothing = optax.identity(), optax.constant_schedule(0.0)
    spec = StepSpec(graphdef, *nothing, mesh, config.final_softcap, _CHUNK_TOKENS)
    batch_size = min(options.eval.batch_size, len(rows.heldout))
    batch_size = -(-batch_size // mesh.size) * mesh.size
    with counting(console, name, "rows", len(rows.heldout), batch_size) as on_batch:
        losses = held_out_losses(
            adapter,
            frozen,
            rows.heldout,
            answer_mask(rows.heldout, tokenizer),
            spec=spec,
            batch_size=batch_size,
            on_batch=on_batch,
        )
    with counting(console, name, "answers", len(rows.prompts), batch_size) as on_batch:
        answers = answer_prompts(
            adapter,
            frozen,
            rows.prompts,
            tokenizer,
            spec=spec,
            options=options.eval,
            on_batch=on_batch,
        )
    return Measured(name, losses, answers)


@contextmanager
def counting(
    console: Console, name: str, what: str, total: int, batch_size: int
) -> Iterator[Callable[[], None]]:
    """Yields what is to be called before each batch: a live line on a terminal, else a line now
    and then."""
    num_begun, last_s = 0, time.monotonic()
    with console.status(f"{name}: {what} …") as status:

        def on_batch() -> None:
            nonlocal num_begun, last_s
            line = f"{name}: {num_begun:,} of {total:,} {what}"
            status.update(line)
            if not console.is_terminal and time.monotonic() - last_s >= _LINE_EVERY_S:
                last_s = time.monotonic()
                console.print(line)
            num_begun += batch_size

        yield on_batch


def describe(options: EvaluateOptions, rows: Rows) -> str:
    """The data and the decoding in a line."""
    files = ", ".join(file.name for file in as_list(options.files))
    decoding = "greedy"
    if options.eval.temperature > 0:
        limits = {"top-k": options.eval.top_k, "top-p": options.eval.top_p}
        used = {"top-k": options.eval.top_k > 0, "top-p": options.eval.top_p < 1}
        parts = [f"temperature {options.eval.temperature:g}", f"seed {options.eval.seed}"]
        decoding = ", ".join([*parts, *(f"{k} {limits[k]:g}" for k in limits if used[k])])
    shots = f", {options.few_shot} examples in front" if options.few_shot else ""
    return (
        f"{files}: {rows.heldout.num_samples:,} rows, {len(rows.prompts):,} answers{shots}; "
        f"{decoding}, at most {options.eval.max_new_tokens:,} new tokens; {options.dtype}"
    )


def write_results(
    directory: Path,
    options: EvaluateOptions,
    about: str,
    measured: Sequence[Measured],
    lines: Sequence[Comparison],
) -> None:
    """evaluation.json, answers.jsonl and page.html, in place of what an earlier one left there."""
    names = [each.name for each in measured]
    metrics = {
        line.metric.name: {
            "models": [estimate._asdict() for estimate in line.estimates],
            "difference": line.difference and line.difference._asdict(),
        }
        for line in lines
    }
    told = {"models": names, "about": about, "options": dataclasses.asdict(options)}
    write_json(directory / "evaluation.json", told | {"metrics": metrics})
    answers = [
        {"prompt": each[0].prompt, "reference": each[0].reference}
        | {"answers": {name: answer.text for name, answer in zip(names, each, strict=True)}}
        for each in zip(*(each.answers for each in measured), strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in answers)
    (directory / "answers.jsonl").write_text(text, encoding="utf-8")
    title = " and ".join(names)
    page = compare_page(title, names, [each.answers for each in measured], lines, about=about)
    (directory / "page.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
