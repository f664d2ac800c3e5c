"""From the hub to an adapter with the real commands: the token stays with the first of them, and
the others do without a network."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.fake_hub import FakeHub, parquet_bytes, running_hub

from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED
from jaxsft.common.text import visible_line
from jaxsft.download.files import Hub
from jaxsft.prepare.__main__ import main as prepare
from jaxsft.train.__main__ import main as train

ROOT = Path(__file__).parents[1]
DOWNLOAD = [sys.executable, str(ROOT / "data" / "download_sft_datasets.py")]
NO_NETWORK = [sys.executable, str(ROOT / "tests" / "support" / "no_network.py"), sys.executable]
REPO = "some/facts"
Said = subprocess.CompletedProcess[str]
TOKEN = "hf_" + "Canary" * 6
FACTS = {"Name a red fruit.": "Apple", "Which animal barks?": "A dog", "What is 2 + 3?": "Five"}


def shard(first: int) -> bytes:
    rows = [
        {"prompt": f"{first}. {q}", "response": f"<think>I recall it: {a}.</think>\nIt is: {a}."}
        for q, a in FACTS.items()
    ]
    return parquet_bytes(rows)


class Place:
    """A directory that holds all that the commands leave, and what they said."""

    def __init__(self, directory: Path, environment: dict[str, str]):
        self.directory = directory
        self.environment = environment | {
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(directory / "hf_home"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "600",  # no test depends on how fast the machine is
            "XDG_CACHE_HOME": str(directory / "cache"),
            "HOME": str(directory),
        }
        self.said: dict[str, Said] = {}

    def run(self, name: str, command: Sequence[str], **environment: str) -> Said:
        options: Any = {"capture_output": True, "text": True, "cwd": self.directory}
        self.said[name] = subprocess.run(command, env=self.environment | environment, **options)
        return self.said[name]

    def download(self, name: str, endpoint: str, *options: str) -> Said:
        where = ["--output_dir", str(self.directory / name), "--retries", "0", *options]
        return self.run(name, [*DOWNLOAD, *where], HF_ENDPOINT=endpoint)

    def holding(self, text: str) -> set[str]:
        """The files, and the commands' outputs, in which the text is."""
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        found = {path.name for path in files if text.encode() in path.read_bytes()}
        return found | {
            name for name, said in self.said.items() if text in said.stdout + said.stderr
        }


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        hub.add(REPO, {"train-0.parquet": shard(0), "test-0.parquet": shard(9)})
        yield hub


@pytest.fixture(scope="module")
def place(
    hub: FakeHub,
    tiny_model_dir: Path,
    command_environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Place:
    """A download, then, where a socket of the internet is death, prepare and two steps of train."""
    place = Place(tmp_path_factory.mktemp("place"), command_environment)
    splits = ("--dataset", REPO, "--split", "train", "--split", "test")
    place.download("data", hub.endpoint, *splits)
    config = {
        "output_dir": str(place.directory / "runs"),
        "model": {"path": str(tiny_model_dir)},
        "lora": {"r": 2, "alpha": 4},
        "data": {
            "train_files": [str(place.directory / "data" / "some--facts" / "train")],
            "eval_files": [str(place.directory / "data" / "some--facts" / "test")],
            "max_length": 160,
        },
        "eval": {"num_prompts": 0},
        "global_batch_size": 1,
        "max_steps": 2,
        "warmup_steps": 0,
        "save_steps": 1,
        "loss_chunk_tokens": 256,
    }
    path = place.directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    for name in ("prepare", "train"):
        place.run(name, [*NO_NETWORK, "-m", f"jaxsft.{name}", "--config", str(path)])
    return place


@pytest.mark.parametrize("family", ["AF_INET", "AF_INET6", "AF_UNIX"])
def test_a_socket_of_the_internet_is_death(family: str) -> None:
    """So that the runs below prove something: in a process of its own, and in a thread of it."""
    program = (
        f"import socket, threading; ask = lambda: socket.socket(socket.{family})\n"
        "thread = threading.Thread(target=ask); thread.start(); thread.join()"
    )
    result = subprocess.run([*NO_NETWORK, "-c", program], capture_output=True)
    assert result.returncode == (-signal.SIGSYS if family == "AF_INET" else 0)
    assert (b"Address family not supported" in result.stderr) == (family == "AF_INET6")


def test_after_the_download_there_is_no_network(place: Place) -> None:
    for name, said in place.said.items():
        if name in ("data", "prepare", "train"):
            assert (said.returncode, said.stderr) == (0, ""), (name, said)
    assert json.loads((place.directory / "runs" / "run" / "result.json").read_text())["after"]


def test_the_token_is_in_nothing(place: Place, hub: FakeHub) -> None:
    assert {r.authorization for r in hub.log if REPO in r.path and r.server == "hub"} == {
        f"Bearer {TOKEN}"
    }
    # The search finds what is there: in outputs, manifests, metrics, events and checkpoints.
    assert {"manifest.json", "revision.json", "data"} <= place.holding(hub.main[REPO])
    kept = place.holding("train/loss")
    assert "metrics.jsonl" in kept and any("tfevents" in name for name in kept)
    assert {"config.yaml", "manifest.json", "train", "prepare"} <= place.holding(
        str(place.directory)
    )
    assert {"_CHECKPOINT_METADATA", "adapter_config.json"} & place.holding("lora")
    for part in (TOKEN, TOKEN.removeprefix("hf_")):
        assert place.holding(part) == set()


@pytest.mark.parametrize(
    ("pattern", "fault", "code"),
    [
        ("hub /api/datasets", "401", EXIT_BAD_INPUT),
        ("hub .*/resolve/", "401", EXIT_BAD_INPUT),
        ("hub .*/resolve/", "500", EXIT_FAILED),
    ],
)
def test_answers_that_repeat_the_token(
    pattern: str, fault: str, code: int, place: Place, hub: FakeHub
) -> None:
    """The hub's errors hold the caller's own headers, as a careless proxy's do."""
    hub.faults.append((pattern, fault))
    name = f"{fault} {pattern[-4:-1]}".replace("/", "")
    said = place.download(name, hub.endpoint, "--dataset", REPO)
    assert said.returncode == code and said.stderr.count("\n") == 1 and not hub.faults, said
    assert place.holding(TOKEN) == set()


def test_a_crash_shows_stacks_and_no_token(place: Place, hub: FakeHub) -> None:
    hub.faults.append(("hub /api/datasets", "hold"))
    with subprocess.Popen(
        [*DOWNLOAD, "--output_dir", str(place.directory / "crash"), "--dataset", REPO],
        env=place.environment | {"HF_ENDPOINT": hub.endpoint, "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        hub.wait_held(process)
        process.send_signal(signal.SIGABRT)
        out, err = process.communicate()
    hub.release.set()
    assert "Fatal Python error: Aborted" in err and "in look_up" in err
    assert TOKEN not in out + err and place.holding(TOKEN) == set()
    # Tracebacks with values, as pytest's and rich's, show objects by their repr.
    assert TOKEN not in repr(Hub(TOKEN))


def test_a_token_in_an_address(place: Place, hub: FakeHub) -> None:
    address = hub.endpoint.replace("://", f"://user:{TOKEN}@")
    assert place.download("address", address, "--dataset", REPO).returncode == 0
    with running_hub() as stopped:
        closed = stopped.endpoint.replace("://", f"://user:{TOKEN}@")
    for name, endpoint, dataset in (
        ("closed", closed, REPO),
        ("dataset", hub.endpoint, f"https://user:{TOKEN}@example.org/some/facts"),
        ("option", hub.endpoint, f"{REPO}?token={TOKEN}"),
    ):
        said = place.download(name, endpoint, "--dataset", dataset)
        assert said.returncode == EXIT_BAD_INPUT and said.stderr.count("\n") == 1, said
    said = place.download("traceback", f"http://user:{TOKEN}@[", "--dataset", REPO)
    assert "Traceback" in said.stderr and "Invalid IPv6 URL" in said.stderr
    assert place.holding(TOKEN) == set()
    assert (
        visible_line(f"at https://me:pass@x.org/ with {TOKEN}\n")
        == "at https://***@x.org/ with ***"
    )


@pytest.mark.parametrize("has_login", [False, True])
def test_a_model_of_the_hub(
    has_login: bool, place: Place, hub: FakeHub, tiny_model_dir: Path
) -> None:
    """Its token is in HF_TOKEN, or where `hf auth login` leaves it, and nowhere else after."""
    name = f"google/gemma-{has_login}"
    hub.add(name, {path.name: path.read_bytes() for path in tiny_model_dir.iterdir()})
    stored = place.directory / "hf_home" / "token"
    environment = {"HF_ENDPOINT": hub.endpoint}
    if has_login:
        stored.write_text(TOKEN)
        environment["HF_TOKEN"] = ""
    command = ["jaxsft.prepare", "--config", str(place.directory / "config.yaml"), "--model.path"]
    for model, fault, code in (
        ("google/other", "", EXIT_BAD_INPUT),
        (name, "hub /api/models", EXIT_FAILED),
        (name, "cdn .*safetensors", EXIT_FAILED),
        (name, "", 0),
    ):
        hub.faults += [(fault, "501")] if fault else []
        said = place.run("model", [sys.executable, "-m", *command, model], **environment)
        assert said.returncode == code and "Traceback" not in said.stderr, said
    asked = [r for r in hub.log if name in r.path]
    assert {r.authorization for r in asked if r.server == "hub"} == {f"Bearer {TOKEN}"}
    assert {r.authorization for r in asked if r.server == "cdn"} == {None}
    offline = [*NO_NETWORK, "-m", *command, name]
    assert place.run("offline", offline, HF_HUB_OFFLINE="1").returncode == 0
    stored.unlink(missing_ok=True)
    assert place.holding(hub.main[name]) and place.holding(TOKEN) == set()


@pytest.mark.parametrize(
    "options",
    [
        ["--hf_token", TOKEN],
        [f"--hf_token={TOKEN}"],
        [f"--model.path=https://user:{TOKEN}@example.org/model"],
        [f"--max_steps={TOKEN}"],
        ["--data.train_files", f"hf://{TOKEN}@datasets/some/facts"],
    ],
    ids=["option", "option=", "model", "wrong type", "file"],
)
@pytest.mark.parametrize("command", [prepare, train])
def test_a_token_among_the_options(
    command: Any,
    options: list[str],
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        (place.directory / "config.yaml").read_text().replace(str(place.directory), str(tmp_path))
    )
    (tmp_path / "data").symlink_to(place.directory / "data")
    assert command(["--config", str(config), *options]) == EXIT_BAD_INPUT
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert TOKEN not in said.out + said.err
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "data"]
