"""Config files and values of options: read as they are meant, and bounded, whoever wrote them."""

import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxsft.cli import config_yaml, parse_options
from jaxsft.config import TrainConfig
from jaxsft.train.__main__ import TrainOptions
from jaxsft.weights.find import run_config

DATA = "data.train_files: [rows.jsonl]\n"

# A kilobyte that stands for 9^12 numbers.
BOMB = "[" + ", ".join(
    f"&{name} [{', '.join([f'*{chr(ord(name) - 1)}' if name > 'a' else '1'] * 9)}]"
    for name in "abcdefghijkl"
) + "]"  # fmt: skip


def read(path: Path, text: str, argv: Sequence[str] = ()) -> TrainConfig:
    path.write_text(text, encoding="utf-8")
    args = ["--config", str(path), *argv]
    config, _ = parse_options("jaxsft.train", "", args, TrainConfig, TrainOptions)
    return config


MEANT = [
    ("deadline: 1798761600", "1798761600"),
    ("deadline: 2026-11-22T21:30", "2026-11-22T21:30"),
    ("deadline: 2026-11-22 21:30:00Z", "2026-11-22 21:30:00Z"),
    ("deadline: 21:30", "21:30"),  # session.py asks for the day
    ("name: no", "no"),
    ("name: 010", "010"),
    ("name: 1e-4", "1e-4"),
    ("name: 2026-11-22", "2026-11-22"),
    ("step: plain", "plain"),
    ("data.system_prompt: ~", None),
    ("data.system_prompt: '~'", "~"),
    ("data.system_prompt: 12:30:00", "12:30:00"),
    ("data.eval_files: [1, off, 2.50]", ["1", "off", "2.50"]),
    ("data.weights: [1, .5]", [1, 0.5]),
    ("learning_rate: 1e-4", 1e-4),
    ("learning_rate: '1e-4'", 1e-4),
    ("learning_rate: 5", 5.0),
    ("max_steps: 22_500", 22500),
    ("max_steps: 0x10", 16),
    ("max_steps: null", None),
    ("multihost: no", False),
    ("multihost: On", True),
    ('"max_steps": 7', 7),  # JSON
]


@pytest.mark.parametrize(("line", "value"), MEANT, ids=[line for line, _ in MEANT])
def test_a_value_is_what_its_option_needs(line: str, value: Any, tmp_path: Path) -> None:
    config = read(tmp_path / "mine.yaml", DATA + line + "\n")
    name = line.partition(":")[0].strip('"')
    found = operator.attrgetter(name)(config)
    assert found == value and type(found) is type(value if name != "learning_rate" else 1.0)
    # What a run keeps as its config.yaml is the same config.
    assert read(tmp_path / "again.yaml", config_yaml(config)) == config


REFUSED = [
    (f"seed: 1\nx: {BOMB}\n", "line 3: &a: anchors and aliases are not read; write the value out"),
    (f'data.weights: ["{BOMB}"]\n', "line 2: data.weights: & and \\* are not read"),
    (f'learning_rate: "{BOMB}"\n', "line 2: learning_rate: & and \\* are not read"),
    ("lora: {<<: {r: 4}}\n", "line 2: << is not read; write the options out"),
    ("seed: !!int 3\n", "line 2: a tag .*is not read"),
    ("seed: !!python/object/apply:os.system [ls]\n", "line 2: a tag .*is not read"),
    (f"seed: {'[' * 500}{']' * 500}\n", "line 2: nested deeper than 16; no option is"),
    ("? " * 200_000 + "\n", "line 2: nested deeper than 16"),
    ("x: " + "{" * 500_000 + "\n", "line 2: "),
    ("seed: 1\nname: a\nseed: 2\n", "line 4: seed is on line 2 already; keep one"),
    ("lora: {r: 8}\nlora: {alpha: 8}\n", "line 3: lora is on line 2 already; keep one"),
    ("lora.r: 8\nlora:\n  r: 16\n", "line 4: lora.r is on line 2 already; keep one"),
    ("seed: 1\n---\nseed: 2\n", r"line 3: a second document begins \(---\); keep one"),
    ("seed: 010\n", "line 2: seed: 010: programs differ on .* 0; write 10"),
    ("max_seconds: 12:30:00\n", "line 2: max_seconds: 12:30:00: is no .*such as 45000 for seconds"),
    ("max_seconds: 12:30\n", "line 2: max_seconds: 12:30: is no number; write a plain one"),
    (f"max_steps: {'9' * 5000}\n", "line 2: max_steps: 9+: is too large a number"),
    (f"learning_rate: {'9' * 400}\n", "line 2: learning_rate: 9+: is too large a number"),
    ("lora: other.yaml\n", "lora: is a group of options; write each as lora.NAME: VALUE"),
    ("lora:\n", "lora: is a group of options"),
    ("config: other.yaml\n", "config: is for the command line, not for a file"),
    ("print_config: true\n", "print_config: is for the command line, not for a file"),
    ("name: [\n", "line 3: no YAML: did not find .*; quote a text"),
    ("name: a: b\n", "line 2: no YAML: .*; quote a text with special characters"),
    ("# " + "x" * 2**20, "is larger than 1 MiB, so it holds no options"),
]


@pytest.mark.parametrize(("text", "complaint"), REFUSED, ids=[text[:30] for text, _ in REFUSED])
def test_a_hostile_or_ambiguous_file_is_one_line(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        read(tmp_path / "config.yaml", DATA + text)
    # The same file as that of a run that came from elsewhere.
    with pytest.raises(ValueError, match=complaint) as of_run:
        run_config(tmp_path)
    for error in (caught, of_run):
        assert len(str(error.value)) < 600 and str(error.value).count("config.yaml") == 1
    assert capsys.readouterr().out == ""


def test_what_is_no_config_file(tmp_path: Path) -> None:
    for text in ("[1]", "abc", "# nothing\n", ""):
        with pytest.raises(ValueError, match="holds no options; write lines such as seed: 42"):
            read(tmp_path / "mine.yaml", text)
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(ValueError, match=r"latin.yaml: is not UTF-8 \(byte 6\); save it as UTF-8"):
        parse_options("jaxsft.train", "", [f"--config={tmp_path / 'latin.yaml'}"], TrainConfig)
    os.truncate(tmp_path / "latin.yaml", 10**12)
    with pytest.raises(ValueError, match="is larger than 1 MiB"):
        parse_options("jaxsft.train", "", [f"--config={tmp_path / 'latin.yaml'}"], TrainConfig)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--data.weights", BOMB, "--data.weights: & and \\* are not read; write the value out"),
        ("--learning_rate", BOMB, "--learning_rate: & and \\* are not read"),
        ("--lora", BOMB, "--lora: & and \\* are not read"),
        ("--lora", '{r: "' + BOMB + '"}', "--lora: & and \\* are not read"),
        ("--seed", "010", "--seed: 010: programs differ"),
        ("--max_seconds", "12:30:00", "such as 45000 for seconds"),
        ("--max_steps", "9" * 5000, "--max_steps: 9+: is too large a number"),
        ("--learning_rate", "9" * 400, "--learning_rate: 9+: is too large a number"),
    ],
    ids=lambda text: text[:20],
)
def test_the_same_on_the_command_line(
    option: str, value: str, complaint: str, tmp_path: Path
) -> None:
    for argv in ([option, value], [f"{option}={value}"]):
        with pytest.raises(ValueError, match=complaint) as caught:
            read(tmp_path / "mine.yaml", DATA, argv)
        assert len(str(caught.value)) < 600


def test_a_text_on_the_command_line_is_never_yaml(tmp_path: Path) -> None:
    for text in (BOMB, "[x", "a: *b", "12:30:00", "# 1", "~", "010"):
        config = read(tmp_path / "mine.yaml", DATA, ["--data.system_prompt", text])
        assert config.data.system_prompt == text
    for text in ("no", "None", "false"):  # nobody means these words
        with pytest.raises(ValueError, match=f"is '{text}', but must be a text; write null for"):
            read(tmp_path / "mine.yaml", DATA, ["--data.system_prompt", text])
