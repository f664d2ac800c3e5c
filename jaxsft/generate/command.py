"""Asks a model: `python -m jaxsft.generate MODEL [--prompt TEXT | --prompts FILE] [--OPTION …]`.

MODEL is whatever models.py knows: a run, an adapter, a model directory, a name on the hub, demo.
One prompt, a file of prompts (answers as JSONL, in the file's order), or else a chat in which
/reset forgets what was said, Ctrl-C stops an answer, and /quit or Ctrl-D ends.

Exit codes: 0 done; 1 out of memory, the hub did not deliver, or nobody takes the answers (a full
disk, a pipe whose reader has gone); 2 bad input; 130 interrupted.
"""

import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from jaxsft.cli import EXIT_INTERRUPTED, check_output, parse_options, run_command
from jaxsft.common.console import make_console
from jaxsft.common.devices import check_device, configure_jax
from jaxsft.common.files import write_text
from jaxsft.config import (
    SYSTEM_PROMPT,
    DataOptions,
    Dtype,
    EvalOptions,
    ModelOptions,
    TrainConfig,
    validate,
)
from jaxsft.data.rows import Turn, split_completion
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma import lora
from jaxsft.gemma.decode import Generation, generate, num_rows
from jaxsft.gemma.sharding import make_mesh
from jaxsft.generate.chat import Session, Voice, answer, chat, encode, show
from jaxsft.generate.prompts import FilePrompt, read_prompt_file
from jaxsft.weights.find import Loaded, Origin, find_model, load, run_config, system_text

DESCRIPTION = (
    "Asks a model, with its adapter: one prompt, a file of prompts, or, without either, a chat in "
    "the terminal. MODEL is a run's directory, a PEFT adapter, a Hugging Face or Flax model "
    "directory, a .gguf file, a name on the hub (owner/name or owner/name@revision), or demo."
)


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """The options of this command."""

    model: str
    """What to ask: a run, an adapter, a model directory, a .gguf file, owner/name, or demo."""
    prompt: str | None = None
    """One prompt to answer."""
    prompts: str | None = None
    """A file of prompts: .txt, one a line, or JSONL or Parquet with prompt, question, instruction
    or messages, of which what follows the last user turn is left out."""
    output: str | None = None
    """Where the answers to --prompts go as JSONL, a new file; by default to the terminal."""
    base: bool = False
    """Ask the base model without the adapter as well."""
    base_model: str | None = None
    """The base model of an adapter or a run, in place of the one that it names."""
    tokenizer: str | None = None
    """tokenizer.model or .gguf file; by default the one that comes with the model."""
    system: str | None = None
    """System text, '' for none; by default the one that the run or the export was trained with, or
    else the recipe's."""
    max_new_tokens: int = EvalOptions.max_new_tokens
    """Longest answer."""
    temperature: float = EvalOptions.temperature
    """0 is greedy."""
    top_k: int = EvalOptions.top_k
    """Sample from the k likeliest tokens; 0 for all."""
    top_p: float = EvalOptions.top_p
    """Sample from the smallest set of tokens whose probability reaches this."""
    seed: int = EvalOptions.seed
    """Seed of the sampler."""
    batch_size: int = EvalOptions.batch_size
    """Prompts of a file that are answered at once."""
    dtype: Dtype | None = None
    """Weights and matmuls; by default the run's, or else float32."""

    @property
    def decoding(self) -> EvalOptions:
        """As the sampler takes them."""
        names = [field.name for field in dataclasses.fields(EvalOptions)]
        return EvalOptions(**{name: getattr(self, name) for name in names if hasattr(self, name)})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(
        lambda: command(parse_options("jaxsft.generate", DESCRIPTION, argv, GenerateOptions)),
        interrupted="what stands above is all: answers to --prompts are written at the end",
        memory_advice="lower --batch_size or --max_new_tokens, or use --dtype bfloat16",
    )


def command(options: GenerateOptions) -> int:
    """Loads the model and answers; returns the exit code. Errors of the input are ValueError."""
    check(options)
    check_device()
    configure_jax()
    origin = find_model(options.model, options.tokenizer, options.base_model)
    if options.base and origin.adapter is None:
        raise ValueError(f"--base: {options.model} has no adapter, it is a base model itself")
    config = None if origin.run_dir is None else run_config(origin.run_dir)
    trained_with = system_text(origin)
    system = SYSTEM_PROMPT if trained_with is None else trained_with
    system = system if options.system is None else options.system
    prompts = [] if options.prompts is None else read_prompt_file(Path(options.prompts), system)
    default = ModelOptions() if config is None else config.model
    devices = jax.devices()
    mesh = make_mesh(len(devices), 1, devices) if prompts else None  # one prompt keeps one busy
    loaded = load(
        origin,
        dtype=options.dtype or default.dtype,
        param_dtype=options.dtype or default.param_dtype,
        mesh=mesh,
    )
    voices = voices_of(options, origin, loaded)
    console = make_console()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    console.file = sys.stdout  # which fails where nobody reads any more, and that ends the work
    session = Session(loaded.tokenizer, loaded.info.config.max_positions, options.decoding, console)
    if options.prompts is not None:
        write_lines(answer_prompts(prompts, voices, session, mesh), options.output, console)
        return 0
    if options.prompt is None:
        chat(voices, session, system)
        return 0
    turns = [Turn("system", system), Turn("user", options.prompt)]
    whole = [answer(voice, turns, session).is_whole for voice in voices]
    return 0 if all(whole) else EXIT_INTERRUPTED


def check(options: GenerateOptions) -> None:
    """ValueError for options that are wrong or do not go together."""
    if options.prompt is not None and options.prompts is not None:
        raise ValueError("--prompt and --prompts: give one of them")
    for name, text in (("--prompt", options.prompt), ("--system", options.system)):
        if re.search("[\ud800-\udfff]", text or ""):  # as Python has other bytes
            raise ValueError(f"{name} is not UTF-8 text")
    if options.prompt is not None and not options.prompt.strip():
        raise ValueError("--prompt is empty; without the option a chat begins")
    if (options.prompt, options.prompts, sys.stdin) == (None, None, None):
        raise ValueError("there is no stdin to chat over; give --prompt or --prompts")
    if options.output is not None:
        if options.prompts is None:
            raise ValueError("--output is for the answers to --prompts FILE")
        check_output("--output", options.output)
        if Path(options.output).exists():
            raise ValueError(f"--output {options.output}: is there already; name a new file")
    try:
        validate(TrainConfig(eval=options.decoding, data=DataOptions(train_files=["none"])))
    except ValueError as error:
        raise ValueError(str(error).replace("eval.", "--")) from None


def voices_of(options: GenerateOptions, origin: Origin, loaded: Loaded) -> list[Voice]:
    """The model and, if asked for, the base model, which share their weights. No headings for
    one alone."""
    model = loaded.model
    tuned = Voice(f"{options.model}:" if options.base else "", *lora.split(model))
    if not options.base:
        return [tuned]
    return [tuned, Voice(f"{origin.name}, untrained:", *lora.split(lora.without_adapter(model)))]


def answer_prompts(
    prompts: Sequence[FilePrompt], voices: Sequence[Voice], session: Session, mesh: Mesh | None
) -> list[dict[str, Any]]:
    """A row for each prompt, in their order: the answer, whole and in its parts.

    ValueError names the file and line of a prompt that is too long.
    """
    tokenizer, decoding = session.tokenizer, session.decoding
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(encode(prompt.turns, session))
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from None
    batch_size = num_rows(decoding, len(prompts), mesh)
    num_batches, done = len(voices) * math.ceil(len(prompts) / batch_size), 0
    by_voice = []
    with Console(stderr=True).status("answering …") as status:

        def on_batch() -> None:
            nonlocal done
            done += 1
            status.update(f"answering, batch {done} of {num_batches} …")

        for voice in voices:
            generations = generate(
                voice.graphdef,
                voice.adapter,
                voice.frozen,
                encoded,
                options=decoding,
                stop_ids=tokenizer.stop_ids,
                num_ids=tokenizer.vocab_size,
                on_batch=on_batch,
                mesh=mesh,
            )
            by_voice.append([answer_row(tokenizer, generation) for generation in generations])
    return [
        {"prompt": prompt.turns[-1].content} | own | ({"base": others[0]} if others else {})
        for prompt, own, *others in zip(prompts, *by_voice, strict=True)
    ]


def answer_row(tokenizer: Tokenizer, generation: Generation) -> dict[str, Any]:
    """An answer as JSON has it; reasoning and answer are null where the form is another."""
    text = tokenizer.decode(generation.ids)
    reasoning, final = split_completion(text) or (None, None)
    return {
        "text": text,
        "reasoning": reasoning,
        "answer": final,
        "stopped": generation.stopped,
        "num_tokens": len(generation.ids),
    }


def write_lines(rows: Sequence[dict[str, Any]], output: str | None, console: Console) -> None:
    """Prints the rows as JSONL, or writes the file whole."""
    # What goes to a terminal is ASCII: no control characters.
    text = "".join(json.dumps(row, ensure_ascii=output is None) + "\n" for row in rows)
    if output is None:
        show(console, text)
    else:
        write_text(Path(output), text)


if __name__ == "__main__":
    sys.exit(main())
