"""What the commands write: foreign text steers no terminal, and no terminal ends their work."""

import contextlib
import io
import json
import logging
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
import traceback
import tty
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from gguf import GGUFWriter
from rich.progress import Progress
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from jaxsft.__main__ import COMMANDS
from jaxsft.cli import EXIT_BAD_INPUT, fail, parse_config
from jaxsft.common.console import make_console
from jaxsft.common.page_style import html_page
from jaxsft.common.signals import catch_signals, interruptible
from jaxsft.common.streams import safe_streams
from jaxsft.common.text import harmless
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.generate import chat

# Title, clipboard, link, clear, blink; C1's forms of them; bidi; keys that overwrite.
EVIL = (
    "Evil\x1b]0;title\x07\x1b]52;c;ZXZpbA==\x07\x1b]8;;http://evil.example\x1b\\link\x1b[2J\x1b[7;5m"
    "\x9b2J\x9d0;t\x9c\x90q\x85\u202e\u2066\u2069\u200e\u200f\u061c\u2028\x7f\x08\x0b\x00"
)
FILE = EVIL.replace("\x00", "").replace("/", "")  # as a file's name
STEERING = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]"
)
# What rich writes on a terminal: colours, and a progress bar that is drawn again.
OURS = re.compile(r"\x1b\[(?!7;5m)[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A")

Said = Callable[..., str]


def main_of(command: str) -> Any:
    return import_module(f"jaxsft.{command}.__main__").main


@pytest.fixture(params=["terminal", "pipe"])
def said(request: pytest.FixtureRequest) -> Said:
    """What a call writes to its stdout and stderr, which are a terminal or a pipe."""

    def call(body: Callable[..., Any], *args: Any) -> str:
        reader, writer = pty.openpty() if request.param == "terminal" else os.pipe()
        if request.param == "terminal":
            tty.setraw(writer)  # line ends stay what they are
        parts: list[bytes] = []

        def read() -> None:
            with contextlib.suppress(OSError):  # the terminal's other end is closed
                while part := os.read(reader, 2**16):
                    parts.append(part)

        thread = threading.Thread(target=read)
        thread.start()
        with open(writer, "w", encoding="utf-8") as stream, pytest.MonkeyPatch.context() as patch:
            patch.setenv("TERM", "xterm-256color")
            patch.delenv("NO_COLOR", raising=False)
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            with contextlib.suppress(SystemExit):  # of --print_config
                body(*args)
        thread.join()
        os.close(reader)
        return b"".join(parts).decode()

    return call


def assert_harmless(text: str) -> None:
    rest = OURS.sub("", text.replace("\r\n", "\n"))
    assert STEERING.findall(rest) == [], rest[:500]


@pytest.fixture
def place(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with rows, a config and a finished run in which every text is hostile."""
    monkeypatch.chdir(tmp_path)
    good = {"prompt": f"{EVIL} why?", "response": f"<think>It {EVIL} is.</think>\nSo {EVIL} it is."}
    rejected, unusable = {"prompt": EVIL, "response": EVIL}, {EVIL: EVIL, "prompt": "Why?"}
    for name, row in (("", rejected), ("bad", unusable)):
        Path(f"{name}{FILE}.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    data = {"train_files": [f"{FILE}.jsonl"], "prepared_dir": FILE, "max_drop": 1.0}
    data |= {"max_length": 512, "system_prompt": EVIL, "drop_degenerate": False}
    config = {"name": f"run{FILE}", "model": {"path": str(tiny_model_dir)}, "data": data}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    answer = {"prompt": EVIL, "text": EVIL, "exact_format": True}
    measured = {"loss": 2.0, "answers": [answer]}
    result = {"before": measured, "after": measured, "command": EVIL}
    run = tmp_path / "runs" / f"run{FILE}"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps(result))
    (run / "config.yaml").write_text(f"name: {json.dumps(EVIL)}\n")
    return tmp_path


TRAIN = ["--config", "config.yaml"]


@pytest.mark.parametrize(
    ("command", "argv"),
    [
        ("train", TRAIN),  # the table of the finished run
        ("train", [*TRAIN, f"--{EVIL}", EVIL]),
        ("train", [*TRAIN, "--seed", EVIL]),
        ("train", [*TRAIN, "--print_config"]),
        ("train", ["--config", f"evil{FILE}.yaml"]),
        ("train", [*TRAIN, "--name", "x", "--model.path", FILE]),
        ("prepare", TRAIN),
        ("prepare", [*TRAIN, "--data.train_files", f"bad{FILE}.jsonl"]),
        ("inspect", [*TRAIN, "--ids", "--html", f"{FILE}.html"]),
        ("plan", [*TRAIN, "--topology", EVIL]),
        ("generate", [FILE]),
        ("generate", ["adapter", "--prompt", "Why?"]),
        ("generate", ["evil.gguf", "--prompt", "Why?"]),
        ("generate", [str(Path("runs") / f"run{FILE}"), "--prompt", "Why?"]),
        ("evaluate", ["model", "--files", f"{FILE}.jsonl"]),
        ("export", ["model", "--output", FILE]),
    ],
)
def test_a_command_writes_nothing_that_steers(
    command: str, argv: list[str], place: Path, said: Said, tiny_model_dir: Path
) -> None:
    Path(f"evil{FILE}.yaml").write_text(yaml.safe_dump({EVIL: EVIL, "data": {EVIL: 1}}))
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [EVIL]}
    Path("adapter").mkdir()
    config = json.dumps(adapter | {"base_model_name_or_path": EVIL})
    Path("adapter/adapter_config.json").write_text(config)
    shutil.copy(tiny_model_dir / "model.safetensors", "adapter/adapter_model.safetensors")
    writer = GGUFWriter("evil.gguf", EVIL)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    shutil.copytree(tiny_model_dir, "model")
    config = json.loads(Path("model/config.json").read_text()) | {"model_type": EVIL, "dtype": EVIL}
    Path("model/config.json").write_text(json.dumps(config))
    text = said(main_of(command), argv)
    assert_harmless(text)
    assert text.strip() and "Traceback" not in text
    if argv == TRAIN:
        assert "error" not in text and "Evil\\u{1b}]0;title" in text
    for page in place.glob("*.html"):
        assert_harmless(page.read_text())


def test_an_answer_steers_nothing(
    said: Said, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = Tokenizer.from_file(tiny_model_dir / "tokenizer.model").encode(EVIL)
    monkeypatch.setattr(chat, "stream", lambda *args, **options: iter(ids))
    text = said(
        main_of("generate"), [str(tiny_model_dir), "--prompt", "Why?", "--max_new_tokens", "400"]
    )
    assert_harmless(text)
    assert "Evil\\u{1b}]0;title\\u{7}" in text


def test_the_download_steers_nothing(place: Path, said: Said, download: ModuleType) -> None:
    for argv in (["--dataset", f"{FILE}.jsonl"], [f"--{EVIL}"], ["--dataset", EVIL]):
        text = said(download.main, [*argv, "--output_dir", FILE])
        assert_harmless(text)
        assert text.strip()
    shutil.copy(f"{FILE}.jsonl", "rows.jsonl")
    assert_harmless(said(download.main, ["--dataset", "rows.jsonl"]))


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "data"))
    return import_module("download_sft_datasets")


def write_everywhere() -> None:
    """By every way on which a library or a command of ours may write."""
    with safe_streams():
        console = make_console()
        link = Text(EVIL, "red link http://evil.example")
        table = Table(title=EVIL, caption=Text(EVIL))
        table.add_column(EVIL)
        table.add_column(Text(EVIL))
        table.add_row(EVIL, link)
        console.print(EVIL, Text(EVIL), link, table, Segments([Segment(EVIL)]))
        console.rule(EVIL)
        console.out(EVIL)
        with console.status(Text(EVIL)), safe_streams():
            print(EVIL)
        with Progress("{task.description}", console=console) as bars:
            bars.add_task(EVIL)
            print(EVIL, file=sys.stderr)
        logging.StreamHandler().handle(logging.makeLogRecord({"msg": EVIL}))
        print(EVIL, file=sys.stderr)
        fail(EVIL, 2)
        try:
            raise ValueError(EVIL)
        except ValueError:
            traceback.print_exc()


def test_no_way_of_writing_is_left_out(said: Said) -> None:
    text = said(write_everywhere)
    assert_harmless(text)
    assert text.count("Evil") > 15 and "evil.example\x1b" not in text


def test_our_own_styles_stay(said: Said, request: pytest.FixtureRequest) -> None:
    text = said(lambda: make_console().print(Text("\tגבר – ok \u200d", "bold red")))
    styled = "\x1b[1;31m" in text
    assert styled == ("terminal" in request.node.name)
    assert "גבר – ok \u200d" in text


def test_what_is_harmless_is_left_as_it_is() -> None:
    text = "a\tb\n é 面 🙂 👩\u200d💻 \u05d2\u05d1\u05e8 \u200c"
    assert harmless(text) == text
    assert harmless("\x1b\x9b\u202e\udc80") == "\\u{1b}\\u{9b}\\u{202e}\\u{dc80}"
    assert "\u202e" not in html_page("a\u202e", ["<p>b\u202e</p>"])


def test_a_printed_config_is_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What programs read loses nothing, whatever the terminal."""
    for encoding in ("utf-8", "ascii"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit), safe_streams():
            parse_config("x", "", ["--data.system_prompt", f"naïve {EVIL}", "--print_config"])
        out.flush()
        (tmp_path / "a.yaml").write_bytes(out.buffer.getvalue())
        again = parse_config("x", "", ["--config", str(tmp_path / "a.yaml")])[0]
        assert again.data.system_prompt == f"naïve {EVIL}"


class Broken(io.TextIOBase):
    """The reader of the pipe has gone."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def terminals() -> dict[str, Any]:
    poor = {name: io.TextIOWrapper(io.BytesIO(), encoding=name) for name in ("ascii", "latin-1")}
    return {"closed": None, "broken": Broken()} | poor


@pytest.mark.parametrize("terminal", terminals())
def test_no_terminal_is_an_error(
    terminal: str, place: Path, download: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    mains = {name: main_of(name) for name in COMMANDS} | {"download": download.main}
    calls = [
        (main, ["--help"], 0) for main in (*mains.values(), import_module("jaxsft.__main__").main)
    ]
    calls += [(main, ["--version"], 0) for main in mains.values()]
    calls += [(mains["train"], TRAIN, 0), (mains["inspect"], TRAIN, 0)]
    calls += [(mains["prepare"], TRAIN, 0), (mains["train"], ["--größe"], EXIT_BAD_INPUT)]
    for main, argv, expected in calls:
        monkeypatch.setattr(sys, "stdout", terminals()[terminal])
        monkeypatch.setattr(sys, "stderr", terminals()[terminal])
        try:
            code = main(argv)
        except SystemExit as end:
            code = end.code
        assert (code or 0) == expected, (main.__module__, argv)


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", "| head -1"])
def test_a_shell_s_terminals(
    redirection: str, place: Path, command_environment: dict[str, str]
) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    script = f"{sys.executable} -m jaxsft prepare --config config.yaml {redirection}"
    command = ["bash", "-o", "pipefail", "-c", script]
    done = subprocess.run(command, env=command_environment | locale, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_thread_is_as_good(place: Path) -> None:
    """Python lets the main thread alone handle signals."""
    codes: list[Any] = []

    def run() -> None:
        with interruptible(), catch_signals() as is_caught:
            codes.append(is_caught())
        codes.append(main_of("train")(TRAIN))
        codes.append(main_of("inspect")(TRAIN))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [False, 0, 0]


def test_libtpu_is_not_heard_where_there_is_no_tpu(command_environment: dict[str, str]) -> None:
    """JAX loads libtpu, which is installed for plans, unless it is told not to."""
    unnamed = {k: v for k, v in command_environment.items() if not re.match("JAX_P|TPU_", k)}
    command = [sys.executable, "-m", "jaxsft", "generate", "no-such-model", "--prompt", "Why?"]
    done = subprocess.run(command, env=unnamed, capture_output=True, text=True)
    assert done.returncode == EXIT_BAD_INPUT
    assert re.fullmatch("error: no-such-model.*\n", done.stderr), done.stderr
