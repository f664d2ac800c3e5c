"""Answers on a terminal or a pipe while they are generated: to one prompt, or in a chat.

Neither a character of several tokens nor a tag of the answer's template is ever shown in part: text
that may be the beginning of one is held back.
"""

import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from flax import nnx
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from jaxsft.cli import EXIT_BAD_INPUT, fail
from jaxsft.common.signals import hears_signals
from jaxsft.common.text import visible_text
from jaxsft.data.chat import encode_prompt
from jaxsft.data.rows import Turn
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma.decode import SamplingOptions, stream
from jaxsft.weights.find import Taught

CHAT_HELP = "/reset forgets what was said, Ctrl-C stops an answer, /quit or Ctrl-D ends."
_STYLES = {"text": "", "reasoning": "dim", "answer": "bold"}
_TAG_STYLE = "bright_black"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how the vocabulary spells one byte of UTF-8
_MAX_HELD_BYTES = 3  # of a character's four


class Voice(NamedTuple):
    """A model that answers: its name, and the model split for the sampler."""

    heading: str
    graphdef: nnx.GraphDef
    adapter: nnx.State
    frozen: nnx.State


class ChatSession(NamedTuple):
    """The settings of all answers; `taught` is the form that the model was trained with."""

    tokenizer: Tokenizer
    taught: Taught
    max_positions: int
    decoding: SamplingOptions
    console: Console


def chat(voices: Sequence[Voice], session: ChatSession, system: str) -> None:
    """Answers the lines of stdin, each with the conversation before it, until stdin ends.

    If stdin is not a terminal, a line that can't be answered raises ValueError, and Ctrl-C raises
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
            text = input("> " if is_terminal else "")
            # In some locales other bytes than ASCII come as lone surrogates.
            text = text.encode(errors="surrogateescape").decode().strip()
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


def reply(voice: Voice, turns: list[Turn], session: ChatSession) -> list[Turn]:
    """The turns with the answer to the last one; without that one if the answer is empty."""
    text, is_whole = answer(voice, turns, session)
    if not is_whole and not sys.stdin.isatty():
        raise KeyboardInterrupt
    show(session.console, "\n")
    return [*turns, Turn("assistant", text)] if text.strip() else turns[:-1]


def answer(voice: Voice, turns: Sequence[Turn], session: ChatSession) -> tuple[str, bool]:
    """Shows an answer while it is generated, under the voice's heading; Ctrl-C stops it.

    Returns the text, and whether it is whole.

    Raises ValueError, as `encode` does, before anything is shown.
    """
    prompt, (tokenizer, taught, _, decoding, console) = encode(turns, session), session
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

        for piece in taught.template.pieces(text_of_tokens(tokenizer, tokens())):
            style = _TAG_STYLE if piece.is_marker else _STYLES[piece.part]
            show(console, printable(piece.text), style)
        stopped = is_stopped()
    show(console, "\n")
    if stopped or len(ids) == decoding.max_new_tokens:
        remark = "stopped" if stopped else f"cut off after --max_new_tokens {len(ids)}"
        print(f"({remark})", file=sys.stderr, flush=True)
    return tokenizer.decode(ids), not stopped


def encode(turns: Sequence[Turn], session: ChatSession) -> list[int]:
    """The prompt's ids; ValueError where they leave no room for an answer.

    Earlier answers are without their reasoning if the model was trained so.
    """
    if session.taught.earlier_reasoning == "strip":
        template = session.taught.template
        turns = [
            turn._replace(content=template.without_reasoning(turn.content))
            if turn.role == "assistant"
            else turn
            for turn in turns
        ]
    ids, longest = encode_prompt(session.tokenizer, turns), session.decoding.max_new_tokens
    if len(ids) + longest > session.max_positions:
        raise ValueError(
            f"the prompt has {len(ids):,} tokens, which with --max_new_tokens {longest:,} is "
            f"beyond the model's {session.max_positions:,} positions; shorten it, or lower "
            "--max_new_tokens"
        )
    return ids


def text_of_tokens(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text in pieces, mostly one for each token; together they are `tokenizer.decode(ids)`."""
    held: list[int] = []  # byte tokens that may begin a character
    for token in ids:
        held.append(token)
        num_held = 0
        if _BYTE.fullmatch(tokenizer.piece(token)):
            text = tokenizer.decode(held)
            # Each byte of an unfinished character is a U+FFFD of its own.
            num_held = min(len(text) - len(text.rstrip("\ufffd")), _MAX_HELD_BYTES)
        whole = len(held) - num_held
        if whole:
            yield tokenizer.decode(held[:whole])
        held = held[whole:]
    if held:
        yield tokenizer.decode(held)


def printable(text: str) -> str:
    """The text without control characters but line ends and tabs; see `visible_text`.

    Joiners (U+200C and U+200D) stay too: Persian words and many emoji need them.
    """
    return re.sub(r"[^\n\t\u200c\u200d]+", lambda run: visible_text(run[0]), text)


def show(console: Console, text: str, style: str = "") -> None:
    """Prints the text; in the style if the terminal has colours and NO_COLOR is not set."""
    is_styled = console.is_terminal and not console.no_color
    segment = Segment(text, Style.parse(style if is_styled else ""))
    console.print(Segments([segment]), end="", soft_wrap=True)


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed. A second Ctrl-C interrupts.

    Outside the main thread nobody hears of it.
    """
    pressed = False
    if not hears_signals():
        yield lambda: False
        return

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
