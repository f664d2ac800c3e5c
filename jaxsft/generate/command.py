"""Answers one prompt or a file of prompts, or chats."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from jaxsft.cli import EXIT_INTERRUPTED
from jaxsft.common.console import make_console
from jaxsft.common.devices import check_device, configure_jax
from jaxsft.common.files import write_text
from jaxsft.common.text import plural, visible_line
from jaxsft.config import ModelOptions
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.rows import RowOptions, Turn
from jaxsft.download.names import find_row_files
from jaxsft.gemma import lora
from jaxsft.gemma.decode import Generation, SamplingOptions, generate, generation_batch_size
from jaxsft.gemma.sharding import make_mesh
from jaxsft.generate.chat import ChatSession, Voice, answer, chat, encode, show
from jaxsft.generate.options import GenerateOptions
from jaxsft.generate.prompts import FilePrompt, read_prompt_file
from jaxsft.weights.find import (
    DEFAULT_TAUGHT,
    find_model,
    load,
    run_config,
    say_on_stderr,
    taught_by,
)


def generate_answers(options: GenerateOptions) -> int:
    """Loads the model and answers; returns the exit code. ValueError and OSError are bad input."""
    check_device()
    configure_jax()
    origin = find_model(options.model, options.tokenizer, options.base_model)
    if options.base and origin.adapter is None:
        raise ValueError(f"--base: {options.model} has no adapter, it is a base model itself")
    config = None if origin.run_dir is None else run_config(origin.run_dir)
    taught = taught_by(origin) or DEFAULT_TAUGHT
    system = taught.system_prompt if options.system is None else options.system
    prompts: list[FilePrompt] = []
    if options.prompts is not None:
        (file,) = find_row_files([Path(options.prompts)], say_on_stderr)
        how = RowOptions(
            None if config is None else config.data.columns,
            earlier_reasoning=taught.earlier_reasoning,
            template=taught.template,
        )
        prompts, left_out = read_prompt_file(file, system, how)
        if left_out:
            examples = visible_line("; ".join(left_out[:2]))
            note = f"{plural(len(left_out), 'row')} left out: {examples}"
            make_console(on_stderr=True).print(note, soft_wrap=True)
    default = ModelOptions() if config is None else config.model
    devices = jax.devices()
    mesh = make_mesh(len(devices), 1, devices) if prompts else None  # one prompt keeps one busy
    loaded = load(
        origin,
        dtype=options.dtype or default.dtype,
        param_dtype=options.dtype or default.param_dtype,
        mesh=mesh,
    )
    # One model alone has no heading. The base model shares the weights.
    voices = [Voice(f"{options.model}:" if options.base else "", *lora.split(loaded.model))]
    if options.base:
        untrained = lora.split(lora.without_adapter(loaded.model))
        voices.append(Voice(f"{origin.name}, untrained:", *untrained))
    console = make_console(strict=True)  # when the reader has gone, the work ends
    positions = loaded.info.config.max_positions
    sampling = SamplingOptions.from_fields(options.decoding)
    session = ChatSession(loaded.tokenizer, taught, positions, sampling, console)
    if options.prompts is not None:
        rows = answer_file(prompts, voices, session, mesh)
        # ASCII for a terminal: no control characters.
        text = "".join(json.dumps(row, ensure_ascii=options.output is None) + "\n" for row in rows)
        if options.output is None:
            show(console, text)
        else:
            write_text(Path(options.output), text)
        return 0
    if options.prompt is None:
        chat(voices, session, system)
        return 0
    turns = [Turn("system", system), Turn("user", options.prompt)]
    whole = [answer(voice, turns, session)[1] for voice in voices]
    return 0 if all(whole) else EXIT_INTERRUPTED


def answer_file(
    prompts: Sequence[FilePrompt], voices: Sequence[Voice], session: ChatSession, mesh: Mesh | None
) -> list[dict[str, Any]]:
    """A row for each prompt, in order: the answer as a whole and in parts.

    ValueError names the file and line of a prompt that is too long.
    """
    tokenizer, decoding = session.tokenizer, session.decoding
    encoded = []
    for prompt in prompts:
        try:
            encoded.append(encode(prompt.turns, session))
        except ValueError as error:
            raise ValueError(f"{prompt.where}: {error}") from None
    batch_size = generation_batch_size(decoding, len(prompts), mesh)
    num_batches, done = len(voices) * math.ceil(len(prompts) / batch_size), 0
    by_voice = []
    with make_console(on_stderr=True).status("answering …") as status:

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
            template = session.taught.template
            by_voice.append(
                [answer_row(tokenizer.decode(each.ids), each, template) for each in generations]
            )
    return [
        {"prompt": prompt.turns[-1].content} | own | ({"base": others[0]} if others else {})
        for prompt, own, *others in zip(prompts, *by_voice, strict=True)
    ]


def answer_row(text: str, generation: Generation, template: AnswerTemplate) -> dict[str, Any]:
    """An answer for JSON; reasoning and answer are null where it is not in the format."""
    reasoning, final = template.split(text) or (None, None)
    return {
        "text": text,
        "reasoning": reasoning,
        "answer": final,
        "stopped": generation.stopped,
        "num_tokens": len(generation.ids),
    }
