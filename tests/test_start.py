"""What the commands import: before their options are read, and never."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = ("train", "plan", "prepare", "inspect", "evaluate", "generate", "export")
HELP = """
import sys
from jaxsft.{0}.__main__ import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
"""
EVERYTHING = """
import sys
from jaxsft.run.metrics import MetricsWriter
{1}
with MetricsWriter({0!r}) as writer:
    writer.log(1, {{"loss": 2.5}})
    writer.sample(1, 0, {{"prompt": "Why?", "text": "So."}})
"""
SHOW = "print('loaded:', *{name.partition('.')[0] for name in sys.modules})"


def loaded_by(script: str, environment: dict[str, str]) -> set[str]:
    """The packages that are loaded at the end of a script."""
    command = [sys.executable, "-c", script + SHOW]
    out = subprocess.check_output(command, env=environment, text=True)
    return set(out.rpartition("loaded:")[2].split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_nothing_that_computes(
    command: str, command_environment: dict[str, str]
) -> None:
    loaded = loaded_by(HELP.format(command), command_environment)
    slow = {"jax", "numpy", "torch", "flax", "orbax", "grain", "datasets", "pyarrow", "rich"}
    assert "jsonargparse" in loaded and not loaded & slow


def test_nothing_imports_torch(command_environment: dict[str, str], tmp_path: Path) -> None:
    assert importlib.util.find_spec("torch"), "the test says nothing where torch is missing"
    imports = "\n".join(f"import jaxsft.{command}.command" for command in COMMANDS)
    unblocked = command_environment | {"PYTHONPATH": str(ROOT)}
    loaded = loaded_by(EVERYTHING.format(str(tmp_path), imports), unblocked)
    assert "jax" in loaded and not loaded & {"torch", "transformers", "peft", "tensorboardX"}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_a_file(command: str, command_environment: dict[str, str]) -> None:
    """Python then looks in the command's folder first, before its own library."""
    file = ROOT / "jaxsft" / command / "__main__.py"
    subprocess.run([sys.executable, file, "--help"], env=command_environment, check=True)
    for module in file.parent.glob("*.py"):
        assert module.stem not in sys.stdlib_module_names - {"__main__"}, module
