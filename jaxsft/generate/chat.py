"""Answers on a terminal, or a pipe, as they come: one prompt's, or a chat's."""

import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from flax import nnx
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from jaxsft.cli import EXIT_BAD_INPUT, fail
from jaxsft.config import EvalOptions
from jaxsft.data.chat import encode_prompt
from jaxsft.data.rows import Turn
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma.decode import stream
from jaxsft.generate.answer_style import Kind, parts_of_text, printable, text_of_tokens

CHAT_HELP = "/reset forgets what was said, Ctrl-C stops an answer, /quit or Ctrl-D ends."
# Reasoning steps back, the answer stands out, tags are hardly seen.
_STYLES: dict[Kind, str] = {
    "text": "",
    "tag": "bright_black",
    "reasoning": "dim",
    "answer": "bold",
}


class Voice(NamedTuple):
    """A model that answers: its name, and the model split for the sampler."""

    heading: str
    graphdef: nnx.GraphDef
    adapter: nnx.State
    frozen: nnx.State


class Session(NamedTuple):
    """What all answers have in common."""

    tokenizer: Tokenizer
    max_positions: int
    decoding: EvalOptions
    console: Console


class Answer(NamedTuple):
    """What a voice said; `is_whole` is False where Ctrl-C stopped it."""

    text: str
    is_whole: bool


def chat(voices: Sequence[Voice], session: Session, system: str) -> None:
    """Answers the lines of stdin, each with what was said before, until it ends.

    Unless a person types them, a line that can't be answered raises ValueError, and Ctrl-C
    KeyboardInterrupt.
    """
    console, start = session.console, [Turn("system", system)]
    has_person = sys.stdin.isatty()
    is_terminal = has_person and console.is_terminal
    if is_terminal:
        import readline  # noqa: F401  (gives input() its editing and history)

        show(console, f"{CHAT_HELP}\n\n", "dim")
    said = [start for _ in voices]
    while True:
        try:
            text = input("> " if is_terminal else "").strip()
            text.encode()  # in some locales other bytes come as lone surrogates
        except EOFError:
            show(console, "\n" if is_terminal else "")
            return
        except KeyboardInterrupt:
            if not has_person:
                raise
            show(console, f"\n{CHAT_HELP}\n", "dim")
            continue
        except UnicodeError:
            raise ValueError("the input is not UTF-8 text") from None
        if text == "/quit":
            return
        if text == "/reset":
            said = [start for _ in voices]
        elif re.fullmatch(r"/\w+", text):
            show(console, f"{text}: no such command. {CHAT_HELP}\n", "dim")
        elif text:
            try:
                said = [
                    reply(voice, [*turns, Turn("user", text)], session)
                    for voice, turns in zip(voices, said, strict=True)
                ]
            except ValueError as error:
                if not has_person:
                    raise
                fail(f"{error} (/reset forgets what was said)", EXIT_BAD_INPUT)


def reply(voice: Voice, turns: list[Turn], session: Session) -> list[Turn]:
    """The turns with the answer to the last one; without both where nothing was said."""
    text, is_whole = answer(voice, turns, session)
    if not is_whole and not sys.stdin.isatty():
        raise KeyboardInterrupt
    show(session.console, "\n")
    return [*turns, Turn("assistant", text)] if text.strip() else turns[:-1]


def answer(voice: Voice, turns: Sequence[Turn], session: Session) -> Answer:
    """Shows an answer as it comes, under the voice's heading; Ctrl-C stops it.

    Raises ValueError, as `encode`, before anything is shown.
    """
    prompt, (tokenizer, _, decoding, console) = encode(turns, session), session
    if voice.heading:
        show(console, f"{voice.heading}\n", "underline")
    ids: list[int] = []
    with stoppable() as is_stopped:

        def tokens() -> Iterator[int]:
            for token in stream(
                voice.graphdef,
                voice.adapter,
                voice.frozen,
                prompt,
                options=decoding,
                stop_ids=tokenizer.stop_ids,
                num_ids=tokenizer.vocab_size,
            ):
                if is_stopped():
                    return
                ids.append(token)
                yield token

        for kind, text in parts_of_text(text_of_tokens(tokenizer, tokens())):
            show(console, printable(text), _STYLES[kind])
        stopped = is_stopped()
    show(console, "\n")
    if stopped:
        note("stopped")
    elif len(ids) == decoding.max_new_tokens:
        note(f"cut off after --max_new_tokens {len(ids)}")
    return Answer(tokenizer.decode(ids), not stopped)


def encode(turns: Sequence[Turn], session: Session) -> list[int]:
    """The prompt's ids; ValueError where they leave no room for an answer."""
    ids, longest = encode_prompt(session.tokenizer, turns), session.decoding.max_new_tokens
    if len(ids) + longest > session.max_positions:
        raise ValueError(
            f"the prompt has {len(ids):,} tokens, which with --max_new_tokens {longest:,} is "
            f"beyond the model's {session.max_positions:,} positions; shorten it, or lower "
            "--max_new_tokens"
        )
    return ids


def show(console: Console, text: str, style: str = "") -> None:
    """Prints the text as it is; in its style where the terminal has any and NO_COLOR is not set."""
    is_styled = console.is_terminal and not console.no_color
    segment = Segment(text, Style.parse(style if is_styled else ""))
    console.print(Segments([segment]), end="", soft_wrap=True)


def note(text: str) -> None:
    """A remark that is no part of the answer."""
    print(f"({text})", file=sys.stderr, flush=True)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed; the second time it interrupts as ever."""
    pressed = False

    def press(*_: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
