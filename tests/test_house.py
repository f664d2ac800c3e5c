"""The package's rules, read from its source: layering, purity, sizes, the nnx subset, security.

Each rule is a function from a module's syntax tree to complaints "file:line: what, and the way
out". `test_rules_bite` shows that each of them finds what it looks for.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxsft

PACKAGE = Path(jaxsft.__file__).parent

# One total import order: a module imports only from modules before it. A module that isn't written
# yet may stand here; a module that is written must.
ORDER = [
    # L0
    "config",
    "validation",
    "presets",
    "json_file",
    "text",
    "out_of_memory",
    "hosts",
    # L1
    "sharding",
    "layers",
    "attention",
    "row_kernels",
    "flash_attention",
    "fused_weights",
    "bins",
    "packing",
    "gguf_io",
    "safetensors_io",
    "vocabulary",
    "tokenizer",
    "reasoning",
    "sources",
    "loss",
    "planning.hlo_text",
    "planning.llo_text",
    # L2
    "lora",
    "model",
    "fused_layer",
    "fused",
    "spikes",
    "chat",
    "evaluation.intervals",
    "evaluation.number_text",
    "evaluation.scoring",
    "filters",
    "planning.workload",
    "planning.hlo_values",
    "planning.hlo_cost",
    "planning.hlo_memory",
    "planning.hlo_price",
    "planning.llo_schedule",
    # L3
    "data",
    "preparing.store",
    "preparing.cache",
    "inspecting.rows",
    "inspecting.tokens",
    "hub.parts",
    "hub.retry",
    "hub.files",
    "hub.pins",
    "hub.splits",
    "hub.datasets",
    "tensor_names",
    "flax_names",
    "flax_io",
    "weights",
    "peft_io",
    "tunix_io",
    "optimizer",
    "step",
    "sample",
    "planning.pricing",
    "planning.tpu_aot",
    "planning.kernel_price",
    # L4
    "checkpoint_directory",
    "checkpoint_files",
    "checkpoint",
    "append_file",
    "metrics",
    "watchdog",
    "evaluation.heldout",
    "evaluation.page_style",
    "evaluation.page",
    "program",
    "inspecting.charts",
    "inspecting.page_style",
    "inspecting.page",
    "planning.estimate",
    "planning.run_plan",
    "planning.search",
    # L5
    "terminal",
    "evaluation.table",
    "session",
    "cli",
    "jax_settings",
    "hub.models",
    "models",
    "preparing.report",
    "prepare",
    "identity",
    "fork",
    "build",
    "agreement",
    "measure",
    "preflight",
    "schedule",
    "report",
    "run_dir",
    "remote",
    "saver",
    "skips",
    "run",
    "device_errors",
    "train",
    "planning.report",
    "planning.plot",
    "planning.options",
    "planning.local",
    "planning.kernel_worker",
    "plan",
    "inspecting.report",
    "inspect",
    "exporting.options",
    "exporting.peers",
    "exporting.transformers_worker",
    "exporting.tunix_worker",
    "exporting.verify",
    "exporting.verify_flax",
    "exporting.hf_tokenizer",
    "exporting.hf_model",
    "exporting.output",
    "exporting.formats",
    "exporting.card",
    "export",
    "evaluation.options",
    "evaluation.results",
    "evaluate",
    "prompts",
    "answer_style",
    "dialogue",
    "generate",
]
L5 = frozenset(ORDER[ORDER.index("terminal") :])

# These two share `Batch` and nothing else. The data side has no JAX in it.
DATA_SIDE = frozenset(
    {
        "bins",
        "packing",
        "vocabulary",
        "tokenizer",
        "reasoning",
        "sources",
        "chat",
        "filters",
        "data",
        "preparing.store",
        "preparing.cache",
        "inspecting.rows",
        "inspecting.tokens",
    }
    | {"planning.workload"}
)
MODEL_SIDE = frozenset(
    {"sharding", "layers", "attention", "row_kernels", "flash_attention", "fused_weights"}
    | {"fused_layer", "fused", "loss", "lora", "model", "peft_io", "step"}
)

MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 80

# Functional transforms, optimizers and mutation of a graph: the step is pure JAX over split trees.
BANNED_NNX = frozenset(
    {"jit", "pmap", "shard_map", "cached_partial"}
    | {"grad", "value_and_grad", "vjp", "jvp", "custom_vjp"}
    | {"scan", "while_loop", "fori_loop", "cond", "switch"}
    | {"Optimizer", "ModelAndOptimizer", "MultiMetric", "sow"}
    | {"update_context", "UpdateContext", "split_context", "merge_context"}
)

CLI_MODULES = frozenset({"argparse", "jsonargparse", "rich", "click"})
ORACLES = frozenset({"torch", "transformers", "peft", "tokenizers", "tunix", "qwix"})
# Scripts for another process, imported by nobody.
PEER_WORKERS = ("exporting.transformers_worker", "exporting.tunix_worker")
UNSAFE_MODULES = frozenset(
    {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "jinja2", "joblib"}
)
UNSAFE_CALLS = {
    "eval": "no code from data",
    "exec": "no code from data",
    "compile": "no code from data",
    "__import__": "no code from data",
    "torch.load": "it unpickles",
    "yaml.load": "use yaml.safe_load",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "yaml.load_all": "use yaml.safe_load_all",
    "yaml.unsafe_load_all": "use yaml.safe_load_all",
    "yaml.full_load_all": "use yaml.safe_load_all",
    "builtins.eval": "no code from data",
    "builtins.exec": "no code from data",
    "numpy.lib.format.read_array": "numpy.load refuses pickles by itself",
    "pandas.read_pickle": "it unpickles",
    "os.system": "no shell",
    "os.popen": "no shell",
}
UNSAFE_KEYWORDS = {"allow_pickle", "trust_remote_code", "shell"}

# After the download there is no network: these modules alone know of one. (`remote` is for run
# directories on gs://, `metrics` takes the host's name from socket, TRL wants a `Dataset`, and
# `sources` reads one from a disk.)
NETWORK_SIDE = frozenset(
    {"hub.files", "hub.retry", "remote", "metrics", "sources", "download_sft_datasets", "peer_trl"}
)
TOKEN_READERS = ("download_sft_datasets", "hub.models")  # and none writes it
NETWORK_MODULES = frozenset(
    {"socket", "ssl", "http", "urllib.request", "requests", "httpx", "httpx2", "aiohttp", "ftplib"}
    | {"huggingface_hub", "datasets", "gcsfs"}
)

# At import they would start a JAX backend (on a TPU host: take the TPU) or touch the file system.
IMPORT_TIME_CALLS = re.compile(
    r"(jax\.(numpy|random|lax|nn|scipy|sharding)|jnp|lax)\."
    r"|jax\.(devices|local_devices|device_count|device_put|process_index|process_count|make_mesh)$"
    r"|jax\.default_backend$|jax\.config\."
    r"|open$|print$|os\.(makedirs|mkdir|environ)"
)
REGISTRATIONS = re.compile(r".*\.(defvjp|defjvp|defvjps|register_\w+)$")
IMPORT_TIME_HARMLESS = frozenset({"jnp.dtype", "jnp.finfo", "jnp.iinfo", "jax.numpy.dtype"})


class Module:
    """A source file: its name, its tree, what its local names stand for, and what it imports."""

    def __init__(self, name: str, source: str, folder: str = "jaxsft"):
        self.name, self.folder = name, folder
        self.is_benchmark = folder == "benchmarks"
        self.num_lines = len(source.splitlines())
        self.tree = ast.parse(source)
        self.imports: list[tuple[int, str, str | None]] = []  # line, module, name taken from it
        self.aliases: dict[str, str] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    self.imports.append((node.lineno, alias.name, None))
                    if alias.asname:
                        self.aliases[alias.asname] = alias.name
            elif isinstance(node, ast.ImportFrom):
                source_module = node.module or ""
                if node.level:  # taken from the root, so that one in planning breaks the order
                    source_module = f"jaxsft.{source_module}".rstrip(".")
                for alias in node.names:
                    self.imports.append((node.lineno, source_module, alias.name))
                    self.aliases[alias.asname or alias.name] = f"{source_module}.{alias.name}"

    def where(self, node: ast.AST | int) -> str:
        line = node if isinstance(node, int) else node.lineno  # type: ignore[attr-defined]
        return f"{self.folder}/{self.name.replace('.', '/')}.py:{line}"

    def dotted(self, node: ast.AST) -> str:
        """`a.b.c` with the import aliases of `a` resolved; "" for anything else."""
        if isinstance(node, ast.Name):
            return self.aliases.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return f"{base}.{node.attr}" if base else ""
        return ""

    def own_imports(self) -> list[tuple[int, str, str | None]]:
        """Imports from jaxsft as (line, module of jaxsft, name or None)."""
        found: list[tuple[int, str, str | None]] = []
        for line, module, name in self.imports:
            if module == "jaxsft" and name is not None:
                found.append((line, name, None))
            elif module.startswith("jaxsft."):
                found.append((line, module.removeprefix("jaxsft."), name))
        return found

    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        return [
            node
            for node in ast.walk(self.tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]


def below(module: str, tops: frozenset[str]) -> bool:
    """Is `module` one of `tops`, or inside one?"""
    return any(module == top or module.startswith(top + ".") for top in tops)


def layering(module: Module):
    if module.name not in ORDER:
        yield f"{module.where(1)}: not in ORDER of {Path(__file__).name}; give it its place there"
        return
    allowed = ORDER[: ORDER.index(module.name)]
    for line, target in sorted({(line, target) for line, target, _ in module.own_imports()}):
        if target != "__version__" and target not in allowed:
            yield (
                f"{module.where(line)}: imports {target}, which isn't before it in the order;"
                " move the shared part to an earlier module"
            )


def only_the_top_layer_faces_the_user(module: Module):
    if module.name in L5:
        return
    for line, target in sorted({(line, target) for line, target, _ in module.imports}):
        if below(target, CLI_MODULES):
            yield f"{module.where(line)}: imports {target}; only the commands (L5) do"
    for node in ast.walk(module.tree):
        name = module.dotted(node)
        if name in {"os.environ", "os.getenv", "os.putenv", "sys.argv", "sys.exit"}:
            yield f"{module.where(node)}: {name}; pass the value in, only L5 reads it"
        elif name in {"sys.stdout", "sys.stderr"}:
            yield f"{module.where(node)}: {name}; return the text, only L5 prints"
        elif name == "jax.config.update":
            yield f"{module.where(node)}: {name}; only L5 sets global JAX configuration"
        elif called(module, node) == "print":
            yield f"{module.where(node)}: print; return the text, only L5 prints"


def data_and_model_share_only_batch(module: Module):
    other = MODEL_SIDE if module.name in DATA_SIDE else DATA_SIDE
    if module.name in DATA_SIDE | MODEL_SIDE:
        for line, target, name in module.own_imports():
            if target in other and (target, name) != ("packing", "Batch"):
                yield (
                    f"{module.where(line)}: imports {name or 'all'} of {target}; the data side and"
                    " the model side share only packing.Batch"
                )
    if module.name in DATA_SIDE:
        for line, target, _ in module.imports:
            if below(target, frozenset({"jax", "flax", "optax"})):
                yield f"{module.where(line)}: imports {target}; the data side is NumPy only"


def nothing_happens_at_import(module: Module):
    allowed = (
        *(ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef),
        *(ast.Assign, ast.AnnAssign, ast.Assert),
    )
    for node in module.tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.Expr) and REGISTRATIONS.match(called(module, node.value)):
            continue  # `f.defvjp(forward, backward)` completes a definition
        if isinstance(node, ast.If):
            test = ast.unparse(node.test)
            if test.endswith("TYPE_CHECKING"):
                continue
            if module.name in L5 and test == "__name__ == '__main__'":
                continue
        if not isinstance(node, allowed):
            yield (
                f"{module.where(node)}: a statement that runs at import; only imports, definitions"
                " and constants may stand here"
            )
            continue
        for call in import_time_calls(node):
            name = module.dotted(call.func)
            short = name.replace("jax.numpy.", "jnp.")
            if IMPORT_TIME_CALLS.match(name) and short not in IMPORT_TIME_HARMLESS:
                yield f"{module.where(call)}: {name}() runs at import; move it into a function"


def called(module: Module, node: ast.AST) -> str:
    return module.dotted(node.func) if isinstance(node, ast.Call) else ""


def import_time_calls(node: ast.AST):
    """Calls that run when the statement does: not those in function and lambda bodies."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = node.args
        defaults = [default for default in arguments.kw_defaults if default is not None]
        children: list[ast.AST] = [*node.decorator_list, *arguments.defaults, *defaults]
    elif isinstance(node, ast.Lambda):
        children = []
    else:
        children = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.Call):
            yield node
    for child in children:
        yield from import_time_calls(child)


def nnx_holds_trees_only(module: Module):
    for line, target, name in module.imports:
        if target == "flax.nnx" and name in BANNED_NNX:
            yield f"{module.where(line)}: nnx.{name} is banned; use plain JAX over split trees"
        elif below(target, frozenset({"flax.linen"})) or (target, name) == ("flax", "linen"):
            yield f"{module.where(line)}: flax.linen; one module system, flax.nnx"
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Attribute):
            continue
        name = module.dotted(node)
        if name.startswith("flax.nnx.") and name.removeprefix("flax.nnx.") in BANNED_NNX:
            yield f"{module.where(node)}: {name} is banned; use plain JAX over split trees"
        elif node.attr == "sow":
            yield f"{module.where(node)}: .sow is banned; return the value"


def sizes(module: Module):
    if module.num_lines > MAX_FILE_LINES:
        yield f"{module.where(1)}: {module.num_lines} lines; {MAX_FILE_LINES} at most, split it"
    too_long = []
    for node in module.functions():
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            too_long.append((num_lines, node))
    if module.name == "train" and too_long:  # the one visible loop may be long
        too_long.remove(max(too_long, key=lambda item: item[0]))
    for num_lines, node in too_long:
        yield (
            f"{module.where(node)}: {node.name} has {num_lines} lines;"
            f" {MAX_FUNCTION_LINES} at most, split it"
        )


def nothing_unsafe(module: Module):
    for line, target, name in module.imports:
        full = f"{target}.{name}"
        if below(target, UNSAFE_MODULES):
            yield f"{module.where(line)}: imports {target}; it runs code from data"
        elif below(target, ORACLES) and not (module.is_benchmark or module.name in PEER_WORKERS):
            yield f"{module.where(line)}: imports {target}; it is a test oracle, not a dependency"
        elif full in UNSAFE_CALLS:
            yield f"{module.where(line)}: {full}: {UNSAFE_CALLS[full]}"
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.Call):
            continue
        name = module.dotted(node.func)
        if name in UNSAFE_CALLS:
            yield f"{module.where(node)}: {name}: {UNSAFE_CALLS[name]}"
        if name == "numpy.load" and len(node.args) > 2:
            yield f"{module.where(node)}: numpy.load with allow_pickle by position; leave it off"
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in UNSAFE_KEYWORDS and not off:
                yield f"{module.where(node)}: {keyword.arg}; leave it off"


def only_the_hub_side_knows_a_network(module: Module):
    for line, target, name in module.imports:
        full = f"{target}.{name}"
        if module.name not in NETWORK_SIDE and any(
            below(each, NETWORK_MODULES) for each in (target, full)
        ):
            yield f"{module.where(line)}: imports {target}; after the download there is no network"
    for node in ast.walk(module.tree):
        is_token = isinstance(node, ast.Constant) and node.value == "HF_TOKEN"
        if is_token and module.name not in TOKEN_READERS:
            yield f"{module.where(node)}: HF_TOKEN; only {', '.join(TOKEN_READERS)} read it"


def public_means_documented(module: Module):
    if not ast.get_docstring(module.tree):
        yield f"{module.where(1)}: no module docstring"
    yield from undocumented(module, module.tree.body)


def undocumented(module: Module, body: list[ast.stmt]):
    for node in body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_"):  # dunder methods are documented by their class
            continue
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if not ast.get_docstring(node) and not decorators & {"overload", "typing.overload"}:
            yield f"{module.where(node)}: {node.name} is public and has no docstring"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(module, node.body)


RULES = [
    layering,
    only_the_top_layer_faces_the_user,
    data_and_model_share_only_batch,
    nothing_happens_at_import,
    nnx_holds_trees_only,
    sizes,
    nothing_unsafe,
    only_the_hub_side_knows_a_network,
    public_means_documented,
]

MODULES = [
    Module(".".join(path.relative_to(PACKAGE).with_suffix("").parts), path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
]


def scripts() -> list[Module]:
    """The commands and benchmarks beside the package."""
    return [
        Module(path.stem, path.read_text("utf-8"), folder)
        for folder in ("data", "benchmarks")
        for path in sorted((PACKAGE.parent / folder).rglob("*.py"))
    ]


@pytest.mark.parametrize(
    "rule", [nothing_unsafe, only_the_hub_side_knows_a_network], ids=lambda rule: rule.__name__
)
def test_scripts_are_as_safe(rule):
    complaints = [complaint for module in scripts() for complaint in rule(module)]
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule):
    complaints = [complaint for module in MODULES for complaint in rule(module)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_folders_are_the_parts_of_a_job_and_their_inits_are_empty():
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    packages = ("planning", "evaluation", "exporting", "hub", "inspecting", "preparing")
    assert folders == {PACKAGE, *(PACKAGE / name for name in packages)}
    bodies = [ast.parse((folder / "__init__.py").read_text("utf-8")).body for folder in folders]
    assert sorted(map(len, bodies)) == [*[1] * len(packages), 2]  # a docstring, and the version


def test_training_needs_no_planning():
    core = [module for module in MODULES if "." not in module.name and module.name != "plan"]
    taken = {target for module in core for _, target, _ in module.own_imports()}
    assert not {name for name in taken if name.startswith("planning")}


@pytest.mark.parametrize(
    ("rule", "name", "source", "expected"),
    [
        (layering, "unheard_of", "", "not in ORDER"),
        (layering, "layers", "from jaxsft import model", "imports model"),
        (layering, "layers", "def f():\n    from .model import Gemma", "layers.py:2: imports"),
        (layering, "model", "import jaxsft.gemma.model", "imports model"),
        (only_the_top_layer_faces_the_user, "data", "import argparse", "imports argparse"),
        (
            only_the_top_layer_faces_the_user,
            "data",
            "from os import environ\nenviron",
            "os.environ",
        ),
        (only_the_top_layer_faces_the_user, "data", "def f():\n    print(1)", "data.py:2: print"),
        (
            only_the_top_layer_faces_the_user,
            "step",
            "import jax\njax.config.update('a', 1)",
            "global JAX configuration",
        ),
        (
            data_and_model_share_only_batch,
            "chat",
            "from jaxsft.gemma.model import Gemma",
            "share only",
        ),
        (
            data_and_model_share_only_batch,
            "step",
            "from jaxsft.data.packing import Sample",
            "Sample",
        ),
        (data_and_model_share_only_batch, "data", "import jax.numpy as jnp", "NumPy only"),
        (nothing_happens_at_import, "data", "for i in range(3): pass", "runs at import"),
        (
            nothing_happens_at_import,
            "loss",
            "import jax.numpy as jnp\nclass A:\n    x = [jnp.zeros(3)]",
            "loss.py:3: jax.numpy.zeros",
        ),
        (
            nothing_happens_at_import,
            "loss",
            "from jax import devices\ndef f(x=devices()): pass",
            "jax.devices",
        ),
        (nnx_holds_trees_only, "step", "from flax import nnx\nf = nnx.jit(g)", "flax.nnx.jit"),
        (nnx_holds_trees_only, "step", "from flax.nnx import Optimizer", "nnx.Optimizer"),
        (nnx_holds_trees_only, "model", "def f(self):\n    self.sow(1)", ".sow"),
        (sizes, "data", "x = 1\n" * 301, "301 lines"),
        (sizes, "data", "def f():\n" + "    x = 1\n" * 80, "f has 81 lines"),
        (
            sizes,
            "train",
            "".join(f"def {f}():\n" + "    x = 1\n" * n for f, n in (("a", 90), ("b", 85))),
            "b has 86 lines",
        ),
        (nothing_unsafe, "weights", "import pickle", "imports pickle"),
        (nothing_unsafe, "weights", "from torch import load", "test oracle"),
        (
            nothing_unsafe,
            "weights",
            "import numpy\nnumpy.load(f, allow_pickle=True)",
            "allow_pickle",
        ),
        (nothing_unsafe, "config", "import yaml\nyaml.load(f)", "safe_load"),
        (nothing_unsafe, "config", "from yaml import unsafe_load", "safe_load"),
        (nothing_unsafe, "config", "def f():\n    eval('1')", "config.py:2: eval"),
        (nothing_unsafe, "weights", "f(trust_remote_code=x)", "trust_remote_code"),
        (nothing_unsafe, "weights", "import numpy as np\nnp.load(f, 'r', True)", "by position"),
        (nothing_unsafe, "config", "import yaml\nyaml.unsafe_load_all(f)", "safe_load_all"),
        (only_the_hub_side_knows_a_network, "data", "import urllib.request", "no network"),
        (only_the_hub_side_knows_a_network, "data", "from urllib import request", "no network"),
        (only_the_hub_side_knows_a_network, "train", "x = 'HF_TOKEN'", "train.py:1: HF_TOKEN"),
        (public_means_documented, "loss", '"""D."""\ndef f(): pass', "f is public"),
        (
            public_means_documented,
            "loss",
            "class A:\n    'D.'\n    def f(self): pass",
            "f is public",
        ),
        (public_means_documented, "loss", "x = 1", "no module docstring"),
    ],
)
def test_rules_bite(rule, name, source, expected):
    complaints = list(rule(Module(name, source)))
    assert any(expected in complaint for complaint in complaints), complaints


def test_rules_leave_plain_code_alone():
    source = (
        '"""D."""\nimport re\nfrom typing import TYPE_CHECKING\n'
        "import jax\nimport jax.numpy as jnp\n"
        "from flax import nnx\nfrom jaxsft.data.packing import Batch\n"
        "if TYPE_CHECKING:\n    import numpy\n"
        "P = re.compile('a')\nD = jnp.dtype('bfloat16')\nF = lambda x: jnp.sin(x)\n"
        '@jax.jit\ndef f(x):\n    """D."""\n    return nnx.merge(*nnx.split(jnp.sin(x)))\n'
        "f.defvjp(f, f)\n"
        "def _g(model):\n    return model.eval(), f.lower(1).compile()\n"
    )
    assert [complaint for rule in RULES for complaint in rule(Module("step", source))] == []


def test_importing_everything_starts_no_backend_and_says_nothing():
    names = [f"jaxsft.{module.name}" for module in MODULES]
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
