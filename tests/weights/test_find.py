"""What the name of a model means: every kind, every mistake, and the hub's, pinned and offline."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import _tree_cache, constants, file_download, hf_hub_download
from safetensors.numpy import load_file, save_file
from support.fake_hub import FakeHub, running_hub
from support.tiny_run import make_run

from jaxsft.cli import parse_config
from jaxsft.common import locks
from jaxsft.common.files import file_sha256
from jaxsft.config import DataOptions, LoraOptions, ModelOptions, TrainConfig
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma import lora
from jaxsft.run.fork import add_adapter, with_fork
from jaxsft.weights import find as models
from jaxsft.weights import hub_files
from jaxsft.weights.adapter_config import read_adapter_config
from jaxsft.weights.find import DEMO_NAME, Origin, find_base, find_model, find_tokenizer, load
from jaxsft.weights.load import load_model
from jaxsft.weights.peft import load_adapter, save_adapter

FLOAT32 = {"dtype": "float32", "param_dtype": "float32"}
TOKEN = "hf_" + "Canary" * 6
REPO = "google/gemma-tiny"


@pytest.fixture(scope="module")
def run_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_model_dir)


@pytest.fixture
def adapter_dir(run_dir: Path, tmp_path: Path) -> Callable[[str | None], Path]:
    """An adapter on its own that names a base."""

    def make(base: str | None) -> Path:
        directory = tmp_path / "adapter"
        shutil.copytree(run_dir / "adapter", directory)
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": base}
        path.write_text(json.dumps(config))
        return directory

    return make


def refused(*arguments: Any, **options: Any) -> str:
    """The one line with which `find_model` refuses."""
    with pytest.raises(ValueError) as caught:
        find_model(*map(str, arguments), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_directory_and_a_gguf_file(tiny_model_dir: Path, real_gguf: Path) -> None:
    name = str(tiny_model_dir)
    tokenizer = tiny_model_dir / "tokenizer.model"
    expected = Origin(tiny_model_dir, None, None, tokenizer, name, None)
    assert find_model(name) == find_base(name) == expected
    found = find_model(str(real_gguf), tokenizer=name)
    assert (found.base, found.tokenizer) == (real_gguf, tokenizer)
    assert find_model(str(real_gguf)).tokenizer == real_gguf
    demo = find_model("demo")
    assert (demo.base.name, demo.name, demo.revision) == (real_gguf.name, DEMO_NAME, None)


def test_a_run_and_its_adapters(run_dir: Path, tiny_model_dir: Path) -> None:
    found = find_model(str(run_dir))
    tokenizer = tiny_model_dir / "tokenizer.model"
    assert found == Origin(
        *(tiny_model_dir, run_dir / "adapter", run_dir, tokenizer, str(tiny_model_dir), None),
        adapter_config=read_adapter_config(run_dir / "adapter"),
    )
    assert find_model(str(run_dir / "adapter")) == found
    best = dataclasses.replace(found, adapter=run_dir / "adapter-best")
    assert find_model(str(run_dir / "adapter-best")) == best


def test_a_run_keeps_its_tokenizer_but_not_with_another_model(
    run_dir: Path, tiny_model_dir: Path, real_gguf: Path, tmp_path: Path
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: null", f"tokenizer: {real_gguf}"))
    assert find_model(str(tmp_path / "run")).tokenizer == real_gguf
    moved = find_model(str(tmp_path / "run"), base=str(tiny_model_dir))
    assert moved.tokenizer == tiny_model_dir / "tokenizer.model"


def test_an_adapter_and_its_base(
    adapter_dir: Callable[[str | None], Path], tiny_model_dir: Path, real_gguf: Path
) -> None:
    adapter = adapter_dir(DEMO_NAME)
    said: list[str] = []
    found = find_model(str(adapter), say=said.append)
    assert found.base.name == real_gguf.name and found.name == DEMO_NAME and len(said) == 1
    assert (found.adapter, found.run_dir) == (adapter, None)
    assert find_model(str(adapter), base=str(tiny_model_dir)).base == tiny_model_dir


def test_a_flax_checkpoint_has_its_tokenizer_beside_it(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "2b").mkdir()
    monkeypatch.setattr(models, "is_flax_checkpoint", lambda path: Path(path).name == "2b")
    assert "has no tokenizer.json and no tokenizer.model" in refused(tmp_path / "2b")
    shutil.copy(tiny_model_dir / "tokenizer.model", tmp_path)
    assert find_model(str(tmp_path / "2b")).tokenizer == tmp_path / "tokenizer.model"
    # Elsewhere what lies beside the model is none of its files.
    (tmp_path / "3b").mkdir()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json and"):
        find_tokenizer(tmp_path / "2b", str(tmp_path / "3b"))


def has_adapter(origin: Origin) -> bool:
    return bool(lora.split(load(origin, **FLOAT32).model)[1])


def test_a_tokenizer_of_another_model(tiny_model_dir: Path, real_gguf: Path) -> None:
    origin = find_model(str(tiny_model_dir), tokenizer=str(real_gguf))
    with pytest.raises(ValueError, match=r"has 262144 ids, the model's embedding \d+ rows; use"):
        load(origin, **FLOAT32)


def test_an_adapter_is_not_put_on_other_weights(
    run_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_model_dir, base)
    shutil.copytree(run_dir, run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_model_dir), str(base)))
    model, info = load_model(base, **FLOAT32)
    settings = load_adapter(run / "adapter", model)
    save_adapter(run / "adapter", model, dataclasses.replace(settings, base_digest=info.digest))
    assert has_adapter(find_model(str(run)))

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    for name in (run, run / "adapter"):
        with pytest.raises(ValueError) as caught:
            load(find_model(str(name)), **FLOAT32)
        line = str(caught.value)
        assert line.startswith(f"{run / 'adapter'}: was trained on other weights (SHA-256")
        assert "give its own as --base_model, or these" in line and "\n" not in line
        assert f"{info.digest:.12}" in line and info.digest not in line
    for place in (tiny_model_dir, base):  # it's the user who knows
        found = find_model(str(run), base=str(place))
        assert found.is_named_base and has_adapter(found)


def test_a_run_notes_what_it_trains(run_dir: Path, tiny_model_dir: Path) -> None:
    model, info = load_model(tiny_model_dir, **FLOAT32)
    options = {"data": DataOptions(train_files=["rows"]), "lora": LoraOptions(r=2)}
    config = TrainConfig(model=ModelOptions(path=f"{REPO}@v1"), **options)
    said: list[str] = []
    here = find_base(str(tiny_model_dir))
    on_hub = dataclasses.replace(here, name=REPO, revision="c" * 40)
    made = add_adapter(config, model, info, on_hub, None, said.append)
    assert (made.base_digest, made.base_revision) == (info.digest, "c" * 40)
    assert (made.base_model_name, said) == (REPO, [])

    config = dataclasses.replace(config, fork_from=str(run_dir / "adapter"))
    config, fork = with_fork(config, ["lora.dropout"])
    assert fork is not None and fork.adapter is not None
    fork = fork._replace(adapter=dataclasses.replace(fork.adapter, base_digest="d" * 64))
    made = add_adapter(
        config, load_model(tiny_model_dir, **FLOAT32)[0], info, here, fork, said.append
    )
    assert (made.base_digest, made.base_revision) == (info.digest, None)
    assert (made.rank, made.alpha, made.targets) == (2, 4.0, ("o_proj",))
    assert len(said) == 1 and "that adapter was trained on other weights" in said[0]


def test_what_only_looks_like_a_run_or_a_flax_checkpoint(
    run_dir: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model, project = tmp_path / "model", tmp_path / "project"
    shutil.copytree(tiny_model_dir, model)
    # A run's own too: where there is a model, it is the model that is meant.
    shutil.copy(run_dir / "config.yaml", model)
    (model / "manifest.ocdbt").write_bytes(b"left behind")
    found = find_model(str(model))
    assert (found.base, found.adapter, found.run_dir) == (model, None, None)
    assert load_model(model, **FLOAT32)[1].format == "safetensors"

    project.mkdir()
    (project / "config.yaml").write_text("base_model: x\nadapter: lora\nlora_r: 8\n")
    assert "holds neither config.json" in refused(project)
    shutil.copytree(run_dir / "adapter", project / "adapter")
    alone = find_model(str(project / "adapter"))
    assert (alone.base, alone.run_dir) == (tiny_model_dir, None)
    shutil.copy(run_dir / "config.yaml", project)
    assert find_model(str(project / "adapter")).run_dir == project
    (project / "adapter").rename(project / "other")
    assert find_model(str(project / "other")).run_dir is None


def test_an_adapter_beside_a_config_or_a_whole_model(
    adapter_dir: Callable[[str | None], Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Trainers push a config.json with the adapter, and merged weights to where one lies."""
    adapter, said = adapter_dir(str(tiny_model_dir)), []
    shutil.copy(tiny_model_dir / "config.json", adapter)
    found = find_model(str(adapter), say=said.append)
    assert (found.base, found.adapter, said) == (tiny_model_dir, adapter, [])
    with pytest.raises(ValueError, match="is a PEFT adapter, and here a whole model is needed"):
        find_base(str(adapter))

    shutil.copy(tiny_model_dir / "model.safetensors", adapter)
    assert find_model(str(adapter), say=said.append) == found
    assert find_base(str(adapter), str(tiny_model_dir)).base == adapter
    assert said == [f"{adapter} holds an adapter and a whole model; the adapter is taken"]
    (adapter / "adapter_model.safetensors").unlink()
    shutil.copy(tiny_model_dir / "tokenizer.model", adapter)
    alone = find_model(str(adapter), say=said.append)
    assert (alone.base, alone.adapter, len(said)) == (adapter, None, 1)


def test_mistakes(
    run_dir: Path,
    adapter_dir: Callable[[str | None], Path],
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    for name in ("./nothing", "no.gguf", "a/b/c", "/x/y", "plain"):
        assert f"{name}: no such file or directory; give a Hugging Face" in refused(name)
    for address in ("gs://bucket/runs/demo", "https://example.org/model"):
        assert refused(address) == f"{address}: is not on this machine; copy it here first"
    assert "nothing of this name in runs/; did you mean runs/demo? runs/dmo@main" in refused(
        "runs/dmo"
    )
    assert "runs/demo: holds neither config.json, adapter_config.json" in refused("runs/demo")
    assert "is neither a directory nor a .gguf file" in refused(file)
    assert "is no adapter, so there is no other base" in refused(tiny_model_dir, base="demo")
    assert "tokenizer none: no such file" in refused(tiny_model_dir, tokenizer="none")
    with pytest.raises(ValueError, match="is a run's directory, and here a whole model is needed"):
        find_base(str(run_dir))

    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    assert "the run has no adapter/ yet" in refused(unfinished)
    with (unfinished / "config.yaml").open("a") as file:
        file.write("max_stepz: 3\n")
    shutil.copytree(run_dir / "adapter", unfinished / "adapter")
    assert f"{unfinished / 'config.yaml'}: unknown option 'max_stepz'" in refused(unfinished)

    for step in (500, 1000):  # a trainer's directory
        shutil.copytree(tiny_model_dir, tmp_path / "out" / f"checkpoint-{step}")
    line = "there are checkpoint-500 and checkpoint-1000: give out/checkpoint-1000"
    assert refused("out").endswith(line)
    shutil.copy(tiny_model_dir / "config.json", tmp_path / "out")
    assert refused("out") == f"out: has no weights of its own; {line}"

    adapter = adapter_dir("gone/base/model")
    line = refused(adapter)
    assert line.startswith(f"{adapter}: its base model: gone/base/model: no such file")
    assert line.endswith("; --base_model names another")
    assert "a PEFT adapter, and here a whole model" in refused(
        adapter, base=str(run_dir / "adapter")
    )
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_dora": True}))
    assert refused(adapter).startswith(f"{path}: not supported: use_dora=True; merge it")
    shutil.rmtree(adapter)
    assert "its base model: the adapter names none; --base_model" in refused(adapter_dir(None))


@pytest.fixture
def hub(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the tiny model, which is the one that is asked, with a token. Nobody waits."""
    with running_hub() as hub:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 600)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        hub.add(REPO, repository(tiny_model_dir))
        yield hub


def repository(model: Path, at_end: bytes = b"") -> dict[str, bytes]:
    """The model's files, with `at_end` of its config, among others that nobody reads."""
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    files["config.json"] += at_end
    more = ("README.md", "pytorch_model.bin", "tf/model.safetensors")
    return files | {name: b"not asked for" for name in more}


def holding(directory: Path, text: str) -> list[Path]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [path for path in files if text.encode() in path.read_bytes()]


def test_the_hub_s_model_is_fetched_once_and_stays(
    hub: FakeHub, tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    found = find_model(REPO, say=said.append)
    commit = hub.main[REPO]
    assert (found.name, found.revision, found.adapter) == (REPO, commit, None)
    asked = {name for name, _ in hub.downloads()}
    assert asked == {"config.json", "tokenizer.model", "model.safetensors"}
    assert {path.name for path in found.base.iterdir()} == asked
    for name in asked:
        assert (found.base / name).read_bytes() == (tiny_model_dir / name).read_bytes()
    assert len(said) == 1 and commit in said[0] and str(found.base) in said[0]

    # "main" moves on; whoever continues a run gets what it began with, and asks nobody.
    new = hub.add(REPO, repository(tiny_model_dir, b"\n"))
    hub.log.clear()
    assert find_model(REPO, say=said.append) == found
    assert find_model(f"{REPO}@{commit}", say=said.append) == find_base(REPO) == found
    assert hub.log == [] and len(said) == 1
    other = find_model(f"{REPO}@{new}", say=said.append)
    assert (other.base / "config.json").read_bytes()[-1:] == b"\n" and other.revision == new

    hubs = [request for request in hub.log if REPO in request.path]
    assert {r.authorization for r in hubs if r.server == "hub"} == {f"Bearer {TOKEN}"}
    assert {r.authorization for r in hubs if r.server == "cdn"} == {None}
    assert holding(tmp_path, commit) and holding(tmp_path, TOKEN) == []
    assert TOKEN not in "".join(said) + "".join(capfd.readouterr())


def test_an_adapter_s_base_on_the_hub_is_the_one_that_it_was_trained_on(
    hub: FakeHub, adapter_dir: Callable[[str | None], Path], tiny_model_dir: Path, tmp_path: Path
) -> None:
    commit = hub.main[REPO]
    hub.add(REPO, repository(tiny_model_dir, b"\n"))
    adapter = adapter_dir(REPO)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"revision": commit}))
    found = find_model(str(adapter), say=lambda line: None)
    assert (found.name, found.revision, found.is_named_base) == (REPO, commit, False)
    # A run says no more than the name, or a branch that has moved.
    config = parse_config("jaxsft.train", "", [f"--model.path={REPO}@main", "--name=x"])[1]
    (tmp_path / "config.yaml").write_text(config)
    assert find_model(str(tmp_path)) == dataclasses.replace(found, run_dir=tmp_path)
    assert find_model(str(tmp_path), base=REPO, say=lambda line: None).revision == hub.main[REPO]


def offline(*arguments: str) -> str:
    """The one line with which `find_model` fails for want of a network, or of a hub's answer."""
    with pytest.raises(ConnectionError) as caught:
        find_model(*arguments, say=lambda line: None)
    line = str(caught.value)
    assert line.startswith(f"{REPO}, a model of the hub (there is no such directory here): the ")
    assert "\n" not in line and TOKEN not in line
    return line


def test_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = offline(REPO)
    assert line.endswith("files of it, and HF_HUB_OFFLINE is set; unset it, or name a directory")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached or stopped sending (ConnectError)" in offline(REPO)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    hub.faults += [("hub /api/models", "503")] * 6
    assert "the hub answered HTTP 503; run the same command again" in offline(REPO)
    hub.faults += [("hub /api/models", "429 301")]
    assert "the hub answered HTTP 429; run the same command again" in offline(REPO)
    found = find_model(REPO, say=lambda line: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_model(REPO) == found
    weights = found.base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    line = refused(REPO)
    assert line.startswith(f"{weights}: is damaged") and f"delete {weights.resolve()}" in line
    weights.resolve().unlink()
    assert "the cache lacks files of it" in offline(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.log.clear()
    assert find_model(REPO, say=lambda line: None) == found and weights.read_bytes() == whole
    assert [name for name, _ in hub.downloads()] == ["model.safetensors"]


@pytest.mark.parametrize("has_network", [True, False])
def test_a_model_that_is_in_the_user_s_cache_is_not_downloaded_again(
    hub: FakeHub, has_network: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers leaves it: file by file, with a note of what `main` meant."""
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        hf_hub_download(REPO, name)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not has_network)
    said: list[str] = []
    found = find_model(REPO, say=said.append)
    assert found.revision == hub.main[REPO] and hub.downloads() == []
    assert find_model(REPO, say=said.append) == found and len(said) == 1
    (found.base / "tokenizer.model").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the cache lacks files of it" in offline(REPO)
    bare = find_model(REPO, tokenizer=str(found.base / "config.json"), say=said.append)
    assert bare.base == found.base


def test_a_stored_token_is_sent_to_the_hub_alone(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What `hf auth login` leaves."""
    monkeypatch.delenv("HF_TOKEN")
    stored = tmp_path / "login" / "token"
    stored.parent.mkdir()
    stored.write_text(TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(stored))
    find_model(REPO, say=print)
    assert {r.authorization for r in hub.log if r.server == "hub"} == {f"Bearer {TOKEN}"}
    assert {r.authorization for r in hub.log if r.server == "cdn"} == {None}
    assert holding(tmp_path, TOKEN) == [stored] and TOKEN not in "".join(capfd.readouterr())


def test_a_disk_that_is_full(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    line = refused(REPO, say=lambda line: None)
    assert " 1 MiB free, but " in line and "set HF_HOME to a place with more" in line
    assert [name for name, _ in hub.downloads()] == ["config.json"]


def test_all_tokenizer_files_of_the_hub(
    hub: FakeHub, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An offline machine does with one of two that another program left."""
    beside = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
    files = {name: json.dumps(name).encode() for name in ("tokenizer.json", *beside)}
    hub.add("some/new", repository(tiny_model_dir) | files)
    found = find_model("some/new", say=lambda line: None)
    assert found.tokenizer.name == "tokenizer.json"
    assert {name for name, _ in hub.downloads()} > {"tokenizer.model", "tokenizer.json", *beside}
    found.tokenizer.unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said: list[str] = []
    assert find_model("some/new", say=said.append).tokenizer.name == "tokenizer.model"
    assert said[-1].endswith("which the cache holds, is taken")


def test_weights_are_hashed_once(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    find_model(REPO, say=lambda line: None)
    hashed, digest = [], hashlib.file_digest
    now_ns = time.time_ns() + 10**10  # the files' times are beyond doubt

    def file_digest(file: Any, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", file_digest)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    origin = find_model(REPO)
    info = load(origin, **FLOAT32).info
    assert sorted(hashed) == ["model.safetensors", "tokenizer.model"]
    weights = origin.base / "model.safetensors"
    save_file({k: v + 1 for k, v in load_file(weights).items()}, weights, {"format": "pt"})
    assert load(origin, **FLOAT32).info.digest != info.digest


def test_an_interrupted_download_goes_on_with_its_commit(
    hub: FakeHub, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.main[REPO]
    hub.faults += [("cdn .*safetensors", "cut"), ("cdn .*safetensors", "501")]
    assert "run the same command again" in offline(REPO)
    hub.add(REPO, repository(tiny_model_dir, b"\n"))
    hub.log.clear()
    found = find_model(REPO, say=lambda line: None)
    assert found.revision == commit
    assert [name for name, _ in hub.downloads()] == ["model.safetensors"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_cache_without_locks(
    hub: FakeHub, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(code, "no locks")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = file_download.WeakFileLock
    locks._said.clear()
    assert find_model(REPO, say=print).revision == hub.main[REPO]
    assert file_download.WeakFileLock is lock
    assert capfd.readouterr().err.count("has no locks") == 1


def test_what_killed_downloads_left_is_removed(hub: FakeHub, tmp_path: Path) -> None:
    storage = tmp_path / "hub" / "models--google--gemma-tiny"
    held = tmp_path / "hub" / ".locks" / storage.name / f"{'b' * 64}.lock"
    for path in (storage / "blobs", held.parent):
        path.mkdir(parents=True)
    dead, alive, young, old = (
        storage / "blobs" / f"{digit * 64}.12345678.incomplete" for digit in "abcd"
    )
    for path in (dead, alive, young, old, held, held.with_name(f"{'a' * 64}.lock")):
        path.touch()
    os.utime(old, (0, 0))
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as another program that downloads it
        find_model(REPO, say=print)
    # A day passes before one without a lock file counts as dead.
    assert {*storage.glob("blobs/*.incomplete")} == {alive, young}


def test_a_busy_hub_is_asked_again(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    hub.faults += [("hub /api/models", fault) for fault in ("503", "429 7", "500")]
    hub.faults += [("hub .*/resolve/.*safetensors", "503"), ("cdn .*safetensors", "503")]
    said: list[str] = []
    assert find_model(REPO, say=said.append).revision == hub.main[REPO] and not hub.faults
    assert waits[:4] == [1, 7, 4, 1]  # huggingface_hub waits too
    assert said[1] == f"{REPO}: the hub answered HTTP 429; asked again in 7 s"


def test_a_cut_xet_download(hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """hf_xet raises a plain RuntimeError, which can hold addresses."""
    download = huggingface_hub.snapshot_download

    def cut(*arguments: Any, **options: Any) -> str:
        found = download(*arguments, **options)
        if "model.safetensors" in options["allow_patterns"]:
            Path(found, "model.safetensors").resolve().unlink()
            raise RuntimeError(f"Task error: CAS Client Error: https://x/?sig={TOKEN}")
        return found

    monkeypatch.setattr(huggingface_hub, "snapshot_download", cut)
    assert "Xet storage cannot be reached or stopped sending; run the same command" in offline(REPO)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    hub.log.clear()
    find_model(REPO, say=lambda line: None)
    assert [name for name, _ in hub.downloads()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "answer",
    [
        *("{}", "[]", "null", "<html>Log in</html>", "[" * 10**5, "\xff", ""),
        *('{"id": "a", "siblings": null}', '{"id": "a", "sha": null, "siblings": []}'),
        '{"id": "a", "sha": "%s", "siblings": [{"rfilename": "config.json"}]}' % ("0" * 40),
        '{"id": "a", "sha": "%s", "siblings": [{"size": 1}]}' % ("0" * 40),
    ],
)
def test_answers_that_no_hub_gives(hub: FakeHub, answer: str) -> None:
    hub.faults += [("hub /api/models", f"answer {answer}")]
    advice = "is not a hub's; check HF_ENDPOINT, and whether a proxy asks for a login"
    assert f"the answer from {hub.endpoint} {advice}" in offline(REPO)
    find_model(REPO, say=lambda line: None)  # nothing of it was kept


@pytest.mark.parametrize("answer", ["{}", "[1]", "<html>Log in</html>"])
@pytest.mark.parametrize("where", ["hub .*/tree/", "hub .*/resolve/"])
def test_later_answers_that_no_hub_gives(hub: FakeHub, where: str, answer: str) -> None:
    hub.faults += [(where, f"answer {answer}")]
    offline(REPO)
    assert not hub.faults
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()  # as in a new process
    find_model(REPO, say=lambda line: None)


def test_bytes_that_are_damaged_on_the_way(hub: FakeHub, tmp_path: Path) -> None:
    hub.faults += [("cdn .*config", "corrupt"), ("cdn .*safetensors", "corrupt")]
    said: list[str] = []
    found = find_model(REPO, say=said.append)
    again = [line for line in said if line.endswith("came damaged; it is downloaded again")]
    assert [line.split()[1] for line in again] == ["config.json", "model.safetensors"]
    shutil.rmtree(tmp_path / "hub")
    hub.faults += [("cdn .*safetensors", "corrupt")] * 2
    assert "model.safetensors came damaged twice; run the same" in offline(REPO)
    assert find_model(REPO, say=lambda line: None) == found


@pytest.mark.parametrize("fault", ["401", "403", "503", "501", "429 999", "answer []"])
def test_a_model_in_the_user_s_cache_when_the_hub_fails(hub: FakeHub, fault: str) -> None:
    for name in ("config.json", "tokenizer.model"):
        hf_hub_download(REPO, name)
    hub.faults += [("hub /api/models", fault)] * 6
    with pytest.raises((ConnectionError, ValueError)):
        find_model(REPO, say=lambda line: None)
    hub.faults.clear()
    hf_hub_download(REPO, "model.safetensors")
    hub.faults += [("hub /api/models", fault)] * 6
    said: list[str] = []
    found = find_model(REPO, say=said.append)
    commit = hub.main[REPO]
    assert found.revision == commit and found.base.name == commit
    assert said[-1].endswith(f"; {commit}, which the cache holds, is taken")
    assert "run the same" not in said[-1] and TOKEN not in "".join(said)
    hub.faults.clear()
    hub.log.clear()
    assert find_model(REPO) == found and hub.log == []


def test_a_copy_of_an_earlier_version(
    hub: FakeHub, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lies beside the pins, with its digests in manifest.json."""
    commit = hub.main[REPO]
    home = tmp_path / "cache" / "jaxsft" / "models" / "google--gemma-tiny"
    names = ("config.json", "tokenizer.model", "model.safetensors")
    (home / commit).mkdir(parents=True)
    for name in names:
        shutil.copy(tiny_model_dir / name, home / commit)
    digests = {name: file_sha256(home / commit / name) for name in names}
    manifest = {"repo": REPO, "revision": commit, "files": digests}
    (home / commit / "manifest.json").write_text(json.dumps(manifest))
    (home / "revision.json").write_text(json.dumps({"repo": REPO, "commits": {"main": commit}}))
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        found = find_model(REPO)
    assert (found.base, found.revision) == (home / commit, commit)
    assert find_base(f"{REPO}@{commit}").base == home / commit and hub.log == []
    (home / commit / "tokenizer.model").write_bytes(b"")
    said: list[str] = []
    assert find_model(REPO, say=said.append).base.parent.name == "snapshots"
    assert said[1] == (
        f"{home / commit}: an earlier version's copy, not complete; it can be deleted"
    )


def test_a_long_download_is_told_of(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_files, "_LINE_EVERY_S", 0.01)
    hub.faults += [("cdn .*safetensors", "hold")]
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if re.fullmatch(rf"{REPO}: \d+\.\d\d of \d+\.\d\d GB", line):
            hub.release.set()

    find_model(REPO, say=say)
    assert hub.release.is_set()


@pytest.mark.parametrize("token", ["hf_Gehe\u00efm" * 4, "hf_two words", "hf_\x1b[1m"])
def test_a_token_that_cannot_be_sent(
    hub: FakeHub, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    line = refused(REPO)
    assert line.startswith("the hub's token holds characters that no token has; set HF_TOKEN")
    assert token not in line and hub.log == []


@pytest.mark.parametrize("status", ["401", "403"])
@pytest.mark.parametrize("where", ["hub /api/models", "hub .*/resolve/"])
def test_gated(hub: FakeHub, where: str, status: str, tmp_path: Path) -> None:
    hub.faults += [(where, status)]
    line = refused(REPO, say=lambda line: None)
    assert line.startswith(f"{REPO}: ") and "accept the terms" in line and "HF_TOKEN or run" in line
    assert TOKEN not in line and holding(tmp_path, TOKEN) == [] and not hub.faults


def test_what_the_hub_has_not(hub: FakeHub, tiny_model_dir: Path) -> None:
    assert "is not on the hub, or not open to you" in refused("google/no-such")
    assert refused(f"{REPO}@v7") == f"{REPO}: has no revision 'v7'"
    files = repository(tiny_model_dir)
    hub.add("some/gguf", {"model.gguf": b""})
    assert refused("some/gguf").startswith("some/gguf: holds no config.json; it must be")
    pickled = ("config.json", "tokenizer.model", "pytorch_model.bin")
    hub.add("some/pickle", {name: files[name] for name in pickled})
    line = refused("some/pickle")
    assert line.startswith("some/pickle: holds no model.safetensors; it must be")
    assert "pytorch_model.bin is a pickle, which could run any code: save it as" in line
    other = json.loads(files["config.json"]) | {"model_type": "gemma3n"}
    hub.add("some/other", files | {"config.json": json.dumps(other).encode()})
    hub.log.clear()
    assert "config.json: model_type 'gemma3n' is not supported" in refused("some/other")
    assert [name for name, _ in hub.downloads()] == ["config.json"]
    del files["tokenizer.model"]
    hub.add("some/bare", files)
    hub.log.clear()
    assert "some/bare: has no tokenizer.json and no tokenizer.model; name one" in refused(
        "some/bare"
    )
    assert hub.downloads() == []
    bare = find_model("some/bare", tokenizer=str(tiny_model_dir), say=lambda line: None)
    assert bare.tokenizer == tiny_model_dir / "tokenizer.model"


def test_shards_and_adapters_of_the_hub(hub: FakeHub, run_dir: Path, tiny_model_dir: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    files = dict.fromkeys([*shards, "tokenizer.model"], b"{}")
    files["config.json"] = (tiny_model_dir / "config.json").read_bytes()
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.add("some/sharded", files)
    found = find_model("some/sharded", say=lambda line: None)
    assert {path.name for path in found.base.iterdir()} == files.keys()

    names = ("adapter_config.json", "adapter_model.safetensors")
    hub.add("some/lora", {name: (run_dir / "adapter" / name).read_bytes() for name in names})
    tuned = find_model("some/lora", base=REPO, say=lambda line: None)
    assert (tuned.name, tuned.revision) == (REPO, hub.main[REPO]) and tuned.adapter is not None
    both = {name: (run_dir / "adapter" / name).read_bytes() for name in names}
    hub.add("some/config", both | {"config.json": b"{}"})
    tuned = find_model("some/config", base=REPO, say=lambda line: None)
    assert tuned.adapter is not None
    assert {path.name for path in tuned.adapter.iterdir()} == set(names)
    hub.add("some/both", both | repository(tiny_model_dir))
    said: list[str] = []
    tuned = find_model("some/both", base=REPO, say=said.append)
    assert tuned.name == REPO and tuned.adapter is not None and len(said) == 2
    assert said[1] == "some/both holds an adapter and a whole model; the adapter is taken"
    assert find_base("some/both").base == tuned.adapter
    assert Tokenizer.from_file(tuned.tokenizer).vocab_size > 4000
