"""Data sets of the hub in the options of the real commands, against a local hub."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_hub import FakeHub, parquet_bytes, running_hub

from jaxsft.download.names import HubRows, find_row_files, parse_hub_name

SUMS = [
    {"question": f"What is {n} + 1?", "answer": f"I count on from {n}.\n#### {n + 1}"}
    for n in range(30)
]
FACTS = [
    {"instruction": "Name it.", "input": f"Fact {n}", "output": f"Its name is {n}, I think."}
    for n in range(30)
]
CALLS = [{"messages": [{"role": "user", "content": "q", "tool_calls": [{"name": "f"}]}]}, FACTS[0]]
NAMED = [{"task": f"Do the job {n}.", "note": f"The job {n} is done now."} for n in range(30)]

# Finds each of its arguments, and says what it found or why not.
FIND = """
import sys
from pathlib import Path
from jaxsft.download.names import find_row_files
for name in sys.argv[1:]:
    columns = {"prompt": "task", "response": "note"} if name == "me/named" else None
    try:
        print(*find_row_files([Path(name)], lambda line: None, columns=columns))
    except (ValueError, OSError) as error:
        print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        sets = {"main/train": SUMS, "main/test": SUMS[:4], "socratic/test": SUMS}
        hub.add("openai/gsm8k", {f"{k}-0.parquet": parquet_bytes(v) for k, v in sets.items()})
        hub.configs["openai/gsm8k"] = [
            {"config_name": name, "data_files": [{"split": s, "path": f"{name}/{s}-*"} for s in sp]}
            for name, sp in (("main", ("train", "test")), ("socratic", ("test",)))
        ]
        lines = {"train": FACTS, "test": CALLS}
        files = {k: "".join(json.dumps(row) + "\n" for row in v) for k, v in lines.items()}
        about = {"README.md": b"x", "dataset_infos.json": b"{}"}
        hub.add("me/lines", about | {f"{k}.jsonl": v.encode() for k, v in files.items()})
        hub.add("me/named", {"train.parquet": parquet_bytes(NAMED)})
        hub.add(
            "me/folders", {f"{d}/x.jsonl": b'{"prompt": "Ask.", "response": "Tell."}' for d in "ab"}
        )
        folders = [{"config_name": d, "data_dir": d} for d in "ab"]
        hub.configs["me/folders"] = folders
        hub.add("me/sound", {"train-0.wav": b"RIFF"})
        yield hub


@pytest.fixture(scope="module")
def environment(
    hub: FakeHub, command_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    (home / "token").write_text("hf_ofAuthLogin\n")  # as `hf auth login` keeps it
    ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "XDG_CACHE_HOME": str(home)}
    others = {name: each for name, each in command_environment.items() if name != "HF_TOKEN"}
    return others | ours | {"HF_HUB_DOWNLOAD_TIMEOUT": "600"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def find(environment: dict[str, str], *names: str) -> list[str]:
    command = [sys.executable, "-c", FIND, *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_prepare_downloads_once(
    here: Path, tiny_model_dir: Path, environment: dict[str, str], hub: FakeHub
) -> None:
    def prepare(**more: str) -> str:
        files = ("['openai/gsm8k:main/train[5:25]', me/lines]", "openai/gsm8k@main:main/test")
        options = ("--model.path", str(tiny_model_dir), "--data.prepared_dir", "sets")
        named = ("--data.train_files", files[0], "--data.eval_files", files[1])
        done = subprocess.run(
            [sys.executable, "-m", "jaxsft.prepare", *options, *named, "--data.stop", "40"],
            env=environment | more,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    said = prepare()
    assert f"[5:25]: 20 rows of commit {hub.main['openai/gsm8k']}, in " in said
    assert "train: 40 rows read" in said and "held out: 4 rows read, 4 kept" in said
    assert "columns used: input, instruction, output; not used: none" in said
    asked = {r.authorization for r in hub.log if r.server == "hub" and "gsm8k" in r.path}
    assert asked == {"Bearer hf_ofAuthLogin"}
    assert not [r for r in hub.log if "socratic" in r.path or "test.jsonl" in r.path]
    # The commit stays, and without a network all is there.
    hub.add("openai/gsm8k", {"main/train-0.parquet": parquet_bytes(SUMS[::-1])})
    again = prepare(HF_HUB_OFFLINE="1")
    assert again.splitlines()[-2:] == said.splitlines()[-2:]  # the same sets


def test_what_is_found(here: Path, environment: dict[str, str], hub: FakeHub) -> None:
    new = find(environment | {"HF_HUB_OFFLINE": "1"}, "me/lines/test")
    assert "not in the cache, and the hub cannot be reached (HF_HUB_OFFLINE is set); " in new[0]
    home = Path(environment["XDG_CACHE_HOME"]) / "jaxsft" / "rows"
    expected = {
        "me/lines/test": str(home / "me/lines/test"),  # a row that is not usable among others
        "me/lines/train[20:]": str(home / "me/lines/train-20-end"),
        "me/named": str(home / "me/named/train"),
        "me/named/train[:3]": '"task", "note"; name them with data.columns',
        "me/folders:b": str(home / "me/folders/b:train"),
        "me/folders:b/test": "has no split 'test' (it has train)",
        "me/sound": "holds no file of Parquet, JSON, CSV or Arrow",
        "me/lines/train[31:]": "goes beyond its 30 rows",
        "me/lines/train[:10%]": "write it as train or train[180000:280000]",
        "openai/gsm8k@main": "choose one, as in openai/gsm8k:main",
        "openai/gsm8k:mian": "has no subset 'mian' (it has main, socratic); did you mean 'main'",
        "me/lines/tset": "has no split 'tset' (it has test, train); did you mean 'test'",
        "me/lines@v2": "has no revision 'v2'",
        "me/lnes": "is not on the hub, or is private: check the name, or set HF_TOKEN or run 'hf",
        "me/rows.jsonl": "me/rows.jsonl",
        "[a/b/train[:5], c]": "a name with brackets needs quotes",
        "data/glaive/train-0-9": "no such file or directory; check the path, or let data/download",
    }
    for (name, part), line in zip(expected.items(), find(environment, *expected), strict=True):
        assert line.endswith(part) if part.startswith("/") else part in line, (name, line)
        assert len(line) <= 600
    rows = (home / "me/lines/test/part-00000.jsonl").read_text().splitlines()
    assert list(map(json.loads, rows)) == CALLS
    hub.faults.append(("hub /api/datasets/me/lines", "403"))
    (line,) = find(environment, "me/lines/train[:5]")
    assert "the hub refuses access (HTTP 403)" in line
    hub.faults.append(("hub /api/datasets/me/lines", "501"))
    (line,) = find(environment, "me/lines/train[:5]")
    assert line.startswith("ConnectionError") and "goes on where it stopped" in line


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("a/b", HubRows("a/b", None, None, "train")),
        ("a/b:c/d[3:4]", HubRows("a/b", None, "c", "d[3:4]")),
        ("a/b@v1/d", HubRows("a/b", "v1", None, "d")),
        ("a/b@refs/convert/parquet:c/d", HubRows("a/b", "refs/convert/parquet", "c", "d")),
        ("a/b[:4]", HubRows("a/b", None, None, "train[:4]")),
        ("there/b", None),
        ("there/b@main", HubRows("there/b", "main", None, "train")),
        ("x/there", None),
        *((name, None) for name in ("a", "a/b/c/d", "/a/b", "./a/b", "../a", "a/b.csv", "a/b*")),
        *(
            (name, None)
            for name in ("a/b/c.jsonl.gz", "data/b/c", "gs://a/b", "a/[0-9]", "a/b[0-9]")
        ),
    ],
)
def test_names_and_paths(name: str, meant: HubRows | None, here: Path) -> None:
    for folder in ("there", "x/there"):
        (here / folder).mkdir(parents=True)
    assert parse_hub_name(name) == meant


def test_a_path_stays_as_it_is(here: Path) -> None:
    paths = [Path("/no/such"), Path("rows.jsonl"), Path("a*/b")]
    assert find_row_files(paths, say=print, may_download=False) == paths
    with pytest.raises(ValueError, match="is not in the cache"):
        find_row_files([Path("no/such")], say=print, may_download=False)
