"""The command that asks a model: a prompt, a file, and a chat over a pipe and on a terminal."""

import codecs
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.child import HEARS_SIGNALS
from support.other_devices import EIGHT_DEVICES
from support.tiny_run import make_run

from jaxsft.config import ANSWER_TEMPLATE, SYSTEM_PROMPT
from jaxsft.data.chat import encode_prompt
from jaxsft.data.rows import Turn
from jaxsft.gemma import lora
from jaxsft.gemma.decode import SamplingOptions, generate
from jaxsft.gemma.sharding import make_mesh
from jaxsft.generate.__main__ import main
from jaxsft.generate.chat import ChatSession, Voice
from jaxsft.weights.find import find_model, load

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUM_NEW = 8
SHORT = ("--max_new_tokens", str(NUM_NEW), "--batch_size", "2")
SYSTEM = "Be brief."
QUESTIONS = ["Which animal barks?", "What is 2 + 3?", "Name a fruit."]
# A person at a terminal of its own: what is written to the first process is typed there.
ON_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
Ask = Callable[..., tuple[str, str]]
Told = tuple[list[str], list[str]]
Write = Callable[..., Path]
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"


@pytest.fixture(scope="module")
def run_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    return make_run(directory, tiny_model_dir, data__system_prompt=SYSTEM)


@pytest.fixture(scope="module", autouse=True)
def shared_programs(command_environment: dict[str, str]) -> Iterator[None]:
    """Compiled once for this process and those of the commands."""
    name = "JAX_COMPILATION_CACHE_DIR"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name, command_environment[name])
        jax.config.update("jax_compilation_cache_dir", command_environment[name])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        yield


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str]) -> Ask:
    """The command in this process: (stdout, stderr)."""

    def run(*arguments: Any, code: int = 0) -> tuple[str, str]:
        assert main([str(argument) for argument in arguments]) == code, capfd.readouterr()
        return capfd.readouterr()

    return run


def answers(run_dir: Path, chats: Sequence[Sequence[Turn]], with_adapter: bool = True) -> list[str]:
    """What `sample.generate` says to each, in batches of two: one program for all tests."""
    mesh, origin = make_mesh(1, 1, jax.devices()), find_model(str(run_dir))
    dtypes = {"dtype": "float32", "param_dtype": "float32"}
    origin = origin if with_adapter else dataclasses.replace(origin, adapter=None)
    loaded = load(origin, **dtypes, mesh=mesh)
    prompts = [encode_prompt(loaded.tokenizer, turns) for turns in [*chats, chats[0]]]
    options = SamplingOptions(batch_size=2, max_new_tokens=NUM_NEW)
    stop_ids = loaded.tokenizer.stop_ids
    generations = generate(
        *lora.split(loaded.model), prompts, options=options, stop_ids=stop_ids, mesh=mesh
    )
    return [loaded.tokenizer.decode(generation.ids) for generation in generations[:-1]]


def asked(*texts: str) -> list[Turn]:
    """A chat: user, assistant, user, … after the run's system text."""
    roles: Any = ("system", *("user", "assistant") * len(texts))
    return [Turn(role, text) for role, text in zip(roles, (SYSTEM, *texts), strict=False)]


@pytest.fixture(scope="module")
def tuned_and_base(run_dir: Path) -> Told:
    """The answers to QUESTIONS with and without the adapter."""
    chats = [asked(question) for question in QUESTIONS]
    tuned, base = answers(run_dir, chats), answers(run_dir, chats, with_adapter=False)
    assert all(a != b for a, b in zip(tuned, base, strict=True))
    return tuned, base


def test_a_file_of_prompts_and_the_base_model(
    run_dir: Path, tuned_and_base: Told, ask: Ask, write: Write, tmp_path: Path
) -> None:
    file, output = write(*({"prompt": text} for text in QUESTIONS)), tmp_path / "answers.jsonl"
    asking = (run_dir, "--prompts", file, *SHORT, "--base")
    assert ask(*asking, "--output", output) == ("", "")
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    told = [(row["prompt"], row["text"], row["base"]["text"]) for row in rows]
    assert told == list(zip(QUESTIONS, *tuned_and_base, strict=True))
    assert all(row["stopped"] or row["num_tokens"] == NUM_NEW for row in rows)
    assert {(row["reasoning"], row["answer"]) for row in rows} == {(None, None)}  # not the form
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", file.name]
    # What goes to a terminal is ASCII: no control character of Unicode is.
    printed, _ = ask(*asking[:-1])
    tuned = [{key: row[key] for key in row if key != "base"} for row in rows]
    assert printed.isascii() and list(map(json.loads, printed.splitlines())) == tuned


def test_an_export_is_asked_as_its_run_is(
    run_dir: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what its manifest says; the recipe's where that is another program's."""
    asked_with: list[str] = []
    taught: list[tuple[str, str]] = []

    def answer(voice: Voice, turns: Sequence[Turn], session: ChatSession) -> tuple[str, bool]:
        asked_with.append(turns[0].content)
        taught.append((session.taught.template.text, session.taught.earlier_reasoning))
        return "", True

    monkeypatch.setattr("jaxsft.generate.command.answer", answer)
    export = shutil.copytree(run_dir / "adapter", tmp_path / "export")
    ask(export, "--prompt", "Why?")
    for text in (SYSTEM, "", 3):
        manifest = {"format": "peft", "system_prompt": text}
        (export / "manifest.json").write_text(json.dumps(manifest))
        ask(export, "--prompt", "Why?")
    ask(run_dir, "--prompt", "Why?")
    ask(run_dir, "--prompt", "Why?", "--system", "")
    form = "<think>{reasoning}</think>{answer}"
    manifest = {"format": "peft", "system_prompt": ""}
    manifest |= {"answer_template": form, "earlier_reasoning": "strip"}
    (export / "manifest.json").write_text(json.dumps(manifest))
    ask(export, "--prompt", "Why?")
    assert asked_with == [SYSTEM_PROMPT, SYSTEM, "", SYSTEM_PROMPT, SYSTEM, "", ""]
    assert taught == [(ANSWER_TEMPLATE, "keep")] * 6 + [(form, "strip")]


def test_one_prompt_and_the_base_model(
    run_dir: Path, tuned_and_base: Told, ask: Ask, tiny_model_dir: Path
) -> None:
    (tuned, *_), (base, *_) = tuned_and_base
    out, err = ask(run_dir, "--prompt", QUESTIONS[0], *SHORT, "--base")
    assert out == f"{run_dir}:\n{tuned}\n{tiny_model_dir}, untrained:\n{base}\n"
    assert err == f"(cut off after --max_new_tokens {NUM_NEW})\n" * 2


def test_eight_devices_and_bfloat16_give_the_answers_of_one(
    run_dir: Path, ask: Ask, command_environment: dict[str, str], write: Write, tmp_path: Path
) -> None:
    file = write(*({"prompt": text} for text in QUESTIONS))
    asking = (run_dir, "--prompts", file, *SHORT, "--dtype", "bfloat16", "--output")
    ask(*asking, tmp_path / "one.jsonl")
    command = [sys.executable, "-m", "jaxsft.generate", *map(str, asking), tmp_path / "eight.jsonl"]
    subprocess.run(command, env=command_environment | EIGHT_DEVICES, check=True)
    answers = (tmp_path / "one.jsonl").read_text()
    assert (tmp_path / "eight.jsonl").read_text() == answers and answers.count("\n") == 3


def test_it_starts_without_what_only_training_needs(command_environment: dict[str, str]) -> None:
    script = "import sys, jaxsft.generate.command; print(*{m.split('.')[0] for m in sys.modules})"
    command = [sys.executable, "-c", script]
    loaded = subprocess.check_output(command, env=command_environment, text=True).split()
    assert "jax" in loaded and not {"grain", "orbax", "tensorboardX", "pyarrow"} & set(loaded)


def test_mistakes(
    run_dir: Path,
    ask: Ask,
    tiny_model_dir: Path,
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good, bad = write({"prompt": "a"}), write({"prompt": 1}, name="bad.jsonl")
    long = write({"prompt": "a"}, {"prompt": "a " * 500}, name="long.jsonl")
    for arguments, line in (
        ([tmp_path / "nothing"], "nothing: no such file or directory; give"),
        ([run_dir, "--prompts", bad], 'bad.jsonl:1 ("prompt" is a int'),
        ([run_dir, "--prompts", long, *SHORT], "long.jsonl:2: the prompt has 516 tokens, which"),
        ([run_dir, "--prompt", "a " * 500, *SHORT], "error: the prompt has 516 tokens, which"),
        ([run_dir, "--prompt", "a", "--prompts", good], "--prompt and --prompts: give one of"),
        ([run_dir, "--prompt", " "], "--prompt is empty; without the option a chat begins"),
        ([run_dir, "--prompt", "\udcff"], "--prompt is not UTF-8 text"),
        ([run_dir, "--prompt", "a", "--output", "b"], "--output is for the answers to --prompts"),
        ([run_dir, "--prompts", good, "--output", tmp_path], "is a directory"),
        ([run_dir, "--prompts", good, "--output", good], f"{good}: is there already; name a new"),
        ([run_dir, "--temperature", "-1"], "--temperature is -1.0, but must be 0, or from 1e-6"),
        ([run_dir, "--top_k", "5"], "--top_k and --top_p do nothing at --temperature 0"),
        ([run_dir, "--promt", "a"], "did you mean --prompt"),
        ([tiny_model_dir, "--base", "--prompt", "a"], "has no adapter, it is a base model"),
    ):
        out, err = ask(*arguments, code=2)
        assert line in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    monkeypatch.setattr(sys, "stdin", None)  # as Python has it where it's closed
    assert "there is no stdin to chat over; give --prompt" in ask(run_dir, code=2)[1]


def test_a_chat_over_a_pipe(
    run_dir: Path, tiny_model_dir: Path, command_environment: dict[str, str]
) -> None:
    """Each answer follows from all that was said; the whole text goes into the next turn."""
    (first,) = answers(run_dir, [asked("One?")], with_adapter=False)
    (second,) = answers(run_dir, [asked("One?", first, "Two?")], with_adapter=False)
    said = "One?\n\nTwo?\n/reset\nOne?\n/quit\nnever read\n"
    command = [sys.executable, "-m", "jaxsft.generate", str(tiny_model_dir), *SHORT]
    command += ["--system", SYSTEM]
    result = subprocess.run(
        command, env=command_environment, input=said, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, f"{first}\n\n{second}\n\n{first}\n\n")
    assert result.stderr == f"(cut off after --max_new_tokens {NUM_NEW})\n" * 3
    assert first.strip() and second != first


@pytest.fixture(scope="module")
def chain(
    tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[list[str]], Path]:
    """Makes a model that says the given pieces after "model\\n", and then the last for ever.

    All its layers add nothing, so that a token's embedding decides the next token. That of piece k
    is 3^k (e_k + e_(k+1)), whose product with the next is 3/2 times that with itself.
    """
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    def make(pieces: list[str]) -> Path:
        directory = tmp_path_factory.mktemp("chain")
        shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
        proto = ModelProto.FromString((directory / "tokenizer.model").read_bytes())
        ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
        for i, piece in enumerate(piece for piece in pieces if piece not in ids):
            ids[piece] = 3000 + i  # in place of an ordinary one
            proto.pieces[3000 + i].piece = piece
        (directory / "tokenizer.model").write_bytes(proto.SerializeToString())
        tensors = load_file(directory / "model.safetensors")
        tensors = {name: np.zeros_like(tensor) for name, tensor in tensors.items()}
        for k, piece in enumerate(["\n", *pieces]):
            tensors["model.embed_tokens.weight"][ids[piece], k : k + 2] = 3.0**k
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        config = json.loads((directory / "config.json").read_text())
        config |= {"max_position_embeddings": 20_000}
        (directory / "config.json").write_text(json.dumps(config))
        return directory

    return make


def test_a_reader_that_goes_and_one_that_interrupts(
    chain: Callable[[list[str]], Path], command_environment: dict[str, str]
) -> None:
    """Either ends the command, which would answer for minutes."""
    model = chain(["<answer>", "5"])
    arguments = ["-m", "jaxsft.generate", str(model), "--max_new_tokens", "19000"]
    command = [*HEARS_SIGNALS, sys.executable, *arguments]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    for stop, code, line in (
        (lambda process: process.stdout.close(), 1, b""),
        (
            lambda process: process.send_signal(signal.SIGINT),
            130,
            b"\nerror: interrupted; what stands above is all: "
            b"answers to --prompts are written at the end\n",
        ),
    ):
        with subprocess.Popen(command, env=command_environment, bufsize=0, **pipes) as process:
            process.stdin.write(b"Count.\nAgain.\n")
            assert process.stdout.read(5) == b"<answ"
            stop(process)
            assert process.stderr.read().endswith(line)
            assert process.wait(600) == code


class Person:
    """Somebody who types at the terminal of a command and reads what it shows."""

    def __init__(self, environment: dict[str, str], *arguments: object):
        command = [sys.executable, "-c", ON_A_TERMINAL, sys.executable, "-m", "jaxsft.generate"]
        self.process = subprocess.Popen(
            [*command, *map(str, arguments)],
            env=environment | {"TERM": "xterm-256color"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.seen = ""
        self._has_more = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        decoder = codecs.getincrementaldecoder("utf-8")()  # a read may end within a character
        while data := self.process.stdout.read1(4096):  # type: ignore[attr-defined]
            with self._has_more:
                self.seen += decoder.decode(data)
                self._has_more.notify()

    def reads(self, pattern: str) -> str:
        """Waits for the pattern; returns what was shown up to its end, which is read then."""
        with self._has_more:
            assert self._has_more.wait_for(lambda: re.search(pattern, self.seen), 600), self.seen
            end = re.search(pattern, self.seen).end()  # type: ignore[union-attr]
            text, self.seen = self.seen[:end], self.seen[end:]
        return text.replace("\r\n", "\n")

    def types(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def leaves(self) -> int:
        """The exit code, when the command has ended."""
        with self.process as process:
            return process.wait(600)


def test_a_chat_on_a_terminal(
    chain: Callable[[list[str]], Path], command_environment: dict[str, str]
) -> None:
    """Reasoning dim, the answer bold, one character of it in two tokens, and a control character
    that stays one to look at."""
    thought, answer = ["▁hm", "\x1b[31m"], ["5", "<0xC3>", "<0xA9>"]
    tagged = ["<reasoning>", *thought, "</reasoning>", "<answer>", *answer, "</answer>"]
    model = chain([*tagged, "<end_of_turn>"])
    environment = {k: v for k, v in command_environment.items() if k != "NO_COLOR"}
    person = Person(environment, model)
    assert "/reset forgets what was said" in person.reads("> ")
    for _ in range(2):
        person.types("What is 2 + 3?\n")
        shown = person.reads(r"</answer>[^>]*> ")
        grey = "\x1b[90m"
        assert (
            f"{grey}<reasoning>{PLAIN}{DIM} hm{PLAIN}{DIM}\\u{{1b}}[31m{PLAIN}"
            f"{grey}</reasoning>{PLAIN}{grey}<answer>{PLAIN}{BOLD}5{PLAIN}{BOLD}é{PLAIN}"
            f"{grey}</answer>{PLAIN}\n\n"
        ) in shown, shown
    person.types("/nothing\n")
    person.reads("/nothing: no such command")
    person.reads("> ")
    person.types("a " * 30_000 + "\n")
    assert "tokens, which with --max_new_tokens" in person.reads("error: [^\n]*\n")
    person.reads("> ")
    person.types("\x04")
    assert person.leaves() == 0


def test_control_c_stops_the_answer_alone(
    chain: Callable[[list[str]], Path], command_environment: dict[str, str]
) -> None:
    model = chain(["<answer>", "5"])
    plain = command_environment | {"NO_COLOR": "1"}
    person = Person(plain, model, "--max_new_tokens", "19000")
    person.reads("> ")
    # With no answer under way it says what to do. The key after it: Python's readline would sleep
    # through a signal that comes just before it begins to wait for one.
    person.types("\x03\n")
    person.reads("Ctrl-D ends")
    for _ in range(2):
        person.reads("> ")
        person.types("Count.\n")
        assert "<answer>555" in person.reads("555")
        person.types("\x03")
        shown = person.reads(r"\(stopped\)\n*")
        assert re.fullmatch(r"5*(\^C)?5*\s*\(stopped\)\s*", shown), shown
    person.types("/quit\n")
    assert person.leaves() == 0 and "\x1b[2m" not in person.seen
