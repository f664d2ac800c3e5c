"""The rules of the house: what ruff and import-linter check of them, and what neither can.

pyproject.toml holds the order of the folders, who may import what, and the banned names. Each rule
here is a function from a module to complaints; `test_rules_bite` shows each of them a culprit.
"""

import ast
import functools
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxsft

PACKAGE = Path(jaxsft.__file__).parent
ROOT = PACKAGE.parent
RUFF = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
LINT_IMPORTS = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80  # the visible loops too, so far
# Beside the commands: what reads the environment, sets JAX options or talks to the terminal.
TOUCHES_THE_PROCESS = {
    "cli": "options, exit codes",
    "common.console": "stdout of the console",
    "common.streams": "stdout and stderr",
    "common.devices": "JAX options of every command",
    "common.files": "XDG_CACHE_HOME",
    "export.peers": "environments of workers",
    "export.transformers_worker": "a script",
    "export.tunix_worker": "a script",
    "rewards.sandbox_worker": "a script",
    "run.out_of_memory": "the environment of the search for a setting that fits",
    "rewards.user_rewards": "the environment of workers",
    "rewards.user_worker": "a script",
    "run.remote": "options of gcsfs",
    "weights.hub_files": "stderr",
    "weights.find": "stderr",
    "generate.chat": "stderr",
}
TOKEN_READERS = {"weights.hub", "download.files", "download_sft_datasets"}
RUNS_PROGRAMS = "rewards.sandbox_worker"  # in a process that can do nothing else
PROCESS = re.compile(r"os\.(environ|getenv|putenv)|sys\.(argv|exit|stdout|stderr)|jax\.config\..*")
# At import these start a JAX backend (on a TPU host: take the TPU) or touch the file system.
AT_IMPORT = re.compile(
    r"jax\.((numpy|random|lax|nn|scipy|sharding)\.(?!(dtype|finfo|iinfo)$)|config\.|make_mesh$"
    r"|(local_)?devices$|device_(count|put)$|process_(index|count)$|default_backend$)"
    r"|open$|print$|os\.(makedirs|mkdir|environ)"
)
REGISTRATION = re.compile(r".*\.(defvjp|defjvp|defvjps|register_\w+)$")
UNSAFE_KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}
EVERY_COMMAND_HAS = {"main", "command"}


class Module:
    """A source file: its dotted name, its tree, and what its local names stand for."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        self.tree = ast.parse(source)
        self.aliases: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                base = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    if base or alias.asname:
                        self.aliases[alias.asname or alias.name] = base + alias.name

    def dotted(self, node: ast.AST) -> str:
        """`a.b.c` with the import alias of `a` resolved; "" for anything else."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (base := self.dotted(node.value)):
            return f"{base}.{node.attr}"
        return ""

    def called(self, node: ast.AST) -> str:
        """The dotted name of what a call calls."""
        return self.dotted(node.func) if isinstance(node, ast.Call) else ""


def only_commands_touch_the_process(module: Module) -> Iterator[tuple[ast.AST, str]]:
    is_command = (
        module.name.endswith(("__main__", ".command")) or module.name in TOUCHES_THE_PROCESS
    )
    for node in [] if is_command else ast.walk(module.tree):
        if PROCESS.fullmatch(name := module.dotted(node)):
            yield node, f"{name}: pass the value in, only commands touch it"


def nothing_happens_at_import(module: Module) -> Iterator[tuple[ast.AST, str]]:
    for node in module.tree.body:
        match node:
            case ast.Expr(ast.Constant()):  # a docstring
                continue
            case ast.Expr(ast.Call()) if REGISTRATION.match(module.called(node.value)):
                continue  # `f.defvjp(forward, backward)` completes a definition
            case ast.If() if re.search(r"TYPE_CHECKING$|^__name__ == ", ast.unparse(node.test)):
                continue
            case ast.Expr() | ast.If() | ast.For() | ast.While() | ast.With() | ast.Try():
                yield node, "runs at import: only imports, definitions and constants may"
        for call in calls_at_import(node):
            if AT_IMPORT.match(name := module.called(call)):
                yield call, f"{name}() runs at import: move it into a function"


def calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    """Calls that run when the statement does: not those in bodies of functions and lambdas."""
    children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        defaults = [each for each in node.args.kw_defaults if each]
        children = [*node.decorator_list, *node.args.defaults, *defaults]
    elif isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.Call):
        yield node
    for child in children:
        yield from calls_at_import(child)


def sizes(module: Module) -> Iterator[tuple[ast.AST, str]]:
    if (num_lines := module.source.count("\n")) > MAX_FILE_LINES:
        yield module.tree.body[0], f"{num_lines} lines: {MAX_FILE_LINES} at most, split it"
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef):
            num_lines = (node.end_lineno or 0) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield node, f"{node.name} has {num_lines} lines: {MAX_FUNCTION_LINES} at most"


def nothing_unsafe(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """What ruff's rules do not know."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            name = module.called(node)
            is_run = name in ("compile", "__import__") and module.name != RUNS_PROGRAMS
            if is_run or (name == "numpy.load" and len(node.args) > 2):
                yield node, f"{name}: no code from data"
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in UNSAFE_KEYWORDS and not is_off:
                    yield node, f"{keyword.arg}: leave it off"
        elif isinstance(node, ast.Constant) and node.value == "HF_TOKEN":
            if module.name.split("/")[-1] not in TOKEN_READERS:
                yield node, f"HF_TOKEN: only {TOKEN_READERS} read it"
        elif isinstance(node, ast.Attribute) and node.attr == "sow":
            yield node, ".sow: return the value"


def one_console_writes(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """That of common/console.py makes foreign text harmless."""
    for node in [] if module.name == "common.console" else ast.walk(module.tree):
        if module.called(node) == "rich.console.Console" and "quiet=True" not in ast.unparse(node):
            yield node, "Console(): make_console() writes no escape sequences of others"


RULES = [
    only_commands_touch_the_process,
    nothing_happens_at_import,
    sizes,
    nothing_unsafe,
    one_console_writes,
]


@functools.cache
def modules(folder: Path) -> list[Module]:
    names = {p: p.relative_to(folder).with_suffix("").parts for p in sorted(folder.rglob("*.py"))}
    return [Module(".".join(name), path.read_text("utf-8")) for path, name in names.items()]


def complaints(rule, found: list[Module]) -> list[str]:
    return [f"{each.name}:{node.lineno}: {why}" for each in found for node, why in rule(each)]


def named_twice(found: list[Module]) -> dict[str, list[str]]:
    """Public functions and classes that two modules define, and where."""
    places = defaultdict(list)
    for module in found:
        for node in module.tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
                places[node.name].append(module.name)
    return {
        name: where
        for name, where in places.items()
        if len(where) > 1 and name not in EVERY_COMMAND_HAS
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule):
    assert complaints(rule, modules(PACKAGE)) == []


def test_scripts_are_as_safe():
    scripts = [*modules(ROOT / "data"), *modules(ROOT / "benchmarks")]
    assert complaints(nothing_unsafe, scripts) == []


def test_public_names_are_unique():
    assert named_twice(modules(PACKAGE)) == {}


def test_the_house_plan_lists_every_file():
    plan = (PACKAGE / "README.md").read_text("utf-8")
    listed = set(re.findall(r"^[★ ] (\w+\.py) ", plan, re.MULTILINE))
    there = {p.name for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE} - {"__init__.py"}
    assert listed == there


def test_inits_hold_nothing_but_the_version():
    inits = {p.parent.name: p.read_text("utf-8") for p in PACKAGE.rglob("__init__.py")}
    assert [name for name, text in inits.items() if ast.parse(text).body[1:]] == ["jaxsft"]


BENIGN = """
import re
from typing import TYPE_CHECKING
import jax, jax.numpy as jnp
if TYPE_CHECKING:
    import numpy
PATTERN = re.compile("a")
DTYPE = jnp.dtype("bfloat16")
SINE = lambda x: jnp.sin(x)
@jax.jit
def f(x):
    return jnp.sin(x), model.eval(), f.lower(1).compile()
f.defvjp(f, f)
"""


@pytest.mark.parametrize(
    ("rule", "source", "expected"),
    [
        (only_commands_touch_the_process, "from os import environ\nenviron", "os.environ"),
        (only_commands_touch_the_process, "import sys\nsys.exit(1)", "sys.exit"),
        (only_commands_touch_the_process, "import jax\njax.config.update('a', 1)", "jax.config"),
        (nothing_happens_at_import, "for i in range(3): pass", "runs at import"),
        (nothing_happens_at_import, "class A:\n    x = [open('f')]", "open() runs"),
        (nothing_happens_at_import, "import jax.numpy as n\nx = n.ones(3)", "numpy.ones() runs"),
        (nothing_happens_at_import, "from jax import devices\ndef f(x=devices()): 1", "devices()"),
        (sizes, "x = 1\n" * 501, "501 lines"),
        (sizes, "def f():\n" + "    x = 1\n" * 80, "f has 81 lines"),
        (nothing_unsafe, "import numpy as np\nnp.load(f, 'r', True)", "numpy.load"),
        (nothing_unsafe, "f(allow_pickle=x)", "allow_pickle"),
        (nothing_unsafe, "def f():\n    compile('1')", "m:2: compile"),
        (nothing_unsafe, "x = 'HF_TOKEN'", "HF_TOKEN"),
        (one_console_writes, "from rich.console import Console\nConsole()", "make_console"),
        (nothing_unsafe, "def f(self):\n    self.sow(1)", ".sow"),
    ],
)
def test_rules_bite(rule, source, expected):
    assert [line for line in complaints(rule, [Module("m", source)]) if expected in line]
    assert complaints(rule, [Module("m", BENIGN)]) == []


def test_twice_named_is_found():
    one, two = (Module(name, "def same(): 1\ndef main(): 1\nclass _Own: 1") for name in "ab")
    assert named_twice([one, two]) == {"same": ["a", "b"]}


CULPRIT = """
import pickle
import torch
import yaml
from flax import nnx
def undocumented(name):
    print(eval(name))
    yaml.load(name)
    nnx.jit(torch.load(name))
"""


def test_ruff_bites():
    options = ["--stdin-filename=jaxsft/gemma/new.py", "-"]
    found = subprocess.run(
        [*RUFF, *options], input=CULPRIT, capture_output=True, text=True, cwd=ROOT
    )
    for expected in (
        *("2:8: TID251 `pickle`", "7:5: T201", "7:11: S307", "6:5: D103", "1:1: D100"),
        *("8:5: TID251 `yaml.load`", "9:5: TID251 `flax.nnx.jit`", "9:13: TID251 `torch.load`"),
    ):
        assert expected in found.stdout


def test_folders_import_as_agreed(tmp_path: Path):
    done = subprocess.run(LINT_IMPORTS, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # A copy of the house with a culprit for each contract.
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "jaxsft", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "jaxsft" / "common" / "new.py").write_text("import torch\nimport jaxsft.train")
    (tmp_path / "jaxsft" / "data" / "new.py").write_text("import jax, socket, rich\n")
    (tmp_path / "jaxsft" / "rewards" / "new.py").write_text("import jax\n")
    done = subprocess.run(LINT_IMPORTS, cwd=tmp_path, capture_output=True, text=True)
    assert "Contracts: 0 kept, 6 broken." in done.stdout


def test_importing_everything_starts_no_backend_and_says_nothing():
    names = [f"jaxsft.{module.name}" for module in modules(PACKAGE)]
    program = (
        "import importlib, os\n"
        "before = dict(os.environ)\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized(), 'a JAX backend was started'\n"
        "changed = dict(os.environ).items() ^ before.items()\n"
        "changed -= {('CRC32C_SW_MODE', 'auto')}  # google_crc32c's, below tensorstore\n"
        "assert not changed, changed\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr
