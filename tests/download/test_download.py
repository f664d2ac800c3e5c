"""The download command against a local hub, through the hub's own client, with its faults."""

import errno
import importlib.util
import itertools
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from support.fake_hub import FakeHub, glaive_rows, parquet_bytes, running_hub

from jaxsft.common.locks import DirectoryLock
from jaxsft.data.fields import UNREAD
from jaxsft.data.sources import read_rows
from jaxsft.download import parts
from jaxsft.download.files import Hub, HubFile, Snapshot, fetch
from jaxsft.download.splits import parse_split

ROOT = Path(__file__).parents[2]
COMMAND = ROOT / "data" / "download_sft_datasets.py"
GLAIVE = "glaiveai/reasoning-v1-20m"
SHARD_ROWS = 100
TOKEN = "hf_CANARYcanaryCANARY"
# Rows 150 to 330 begin and end in the middle of shards 1 and 3; of ten rows four are defective.
MIDDLE = ("--dataset", "glaive", "--split", "train[150:330]", "--rows_per_file", "40")
MIDDLE_NAME = "train-150-330"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Download:
    """The command in a process of its own, with an output directory that its runs share."""

    def __init__(self, hub: FakeHub, environment: dict[str, str], directory: Path):
        self.hub = hub
        self.directory = directory
        self.home = directory / "glaive"
        self.environment = environment | {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(directory.parent / "hf_home"),
            "HF_TOKEN": TOKEN,
            "HF_HUB_DOWNLOAD_TIMEOUT": "600",  # no test depends on how fast the machine is
        }

    def arguments(self, *options: str) -> list[str]:
        where = ["--output_dir", str(self.directory), "--retry_wait", "0.01", *options]
        return [sys.executable, str(COMMAND), *where]

    def start(self, *options: str) -> subprocess.Popen[str]:
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(self.arguments(*options), env=self.environment, **pipes)

    def __call__(self, *options: str) -> Outcome:
        with self.start(*options) as process:
            out, err = process.communicate()
        assert TOKEN not in out + err
        return Outcome(process.returncode, out, err)

    def refused(self, *options: str, code: int = 2) -> str:
        """The one line with which the command ends."""
        outcome = self(*options)
        assert outcome.code == code, outcome
        assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
        assert "Traceback" not in outcome.out
        return outcome.err


class InProcess:
    """The command's `main`, for what needs no hub; returns what it prints."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]):
        self.directory = directory
        self.capsys = capsys
        specification = importlib.util.spec_from_file_location("download_command", COMMAND)
        assert specification is not None and specification.loader is not None
        self.module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(self.module)

    def __call__(self, *options: str, code: int = 2) -> str:
        assert self.module.main(["--output_dir", str(self.directory), *options]) == code
        out, err = self.capsys.readouterr()
        assert err.startswith("error: ") if code else not err
        assert err.count("\n") == bool(code)
        return err or out


@pytest.fixture
def in_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> InProcess:
    return InProcess(tmp_path / "data", capsys)


def shard_name(number: int, num_shards: int = 5) -> str:
    return f"train-{number:05d}-of-{num_shards:05d}.parquet"


def glaive_shards(first_row: int = 0) -> dict[str, bytes]:
    firsts = [first_row + number * SHARD_ROWS for number in range(5)]
    return {
        f"data/{shard_name(i)}": parquet_bytes(glaive_rows(range(first, first + SHARD_ROWS)))
        for i, first in enumerate(firsts)
    }


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running_hub() as hub:
        hub.add(GLAIVE, glaive_shards())
        yield hub


@pytest.fixture
def download(hub: FakeHub, command_environment: dict[str, str], tmp_path: Path) -> Download:
    return Download(hub, command_environment, tmp_path / "data")


@pytest.fixture(scope="module")
def undisturbed(
    command_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What the MIDDLE download makes of a hub without faults."""
    with running_hub() as hub:
        hub.add(GLAIVE, glaive_shards())
        download = Download(hub, command_environment, tmp_path_factory.mktemp("plain") / "data")
        assert download(*MIDDLE).code == 0
    return contents(download.home)


@pytest.mark.quick
def test_rows_shards_and_manifest(download: Download, hub: FakeHub) -> None:
    later = ("--split", "train[330:420]")
    outcome = download(*MIDDLE, *later)
    assert outcome.code == 0 and outcome.err == "", outcome

    directory = download.home / MIDDLE_NAME
    assert [row for _, row in read_rows(directory)] == glaive_rows(range(150, 330))
    assert [row for _, row in read_rows(download.home / "train-330-420")] == glaive_rows(
        range(330, 420)
    )
    # Shards 0 and 5 were not asked for; shard 3, which both need, once.
    assert [name for name, _ in hub.downloads()] == [shard_name(n) for n in (1, 2, 3, 4)]
    assert not (download.home / ".source").exists()

    manifest = json.loads((directory / "manifest.json").read_text())
    # A row without a thought is not among them: `data.without_thought` decides.
    assert manifest["rejected"] == {"unclosed_thought": 18, "unknown_fields": 18}
    assert (manifest["rows_read"], manifest["rows"]) == (180, 180)
    assert manifest["revision"] == hub.main[GLAIVE]
    assert manifest["split"] == "train[150:330]"
    # 50, 100 and 30 rows of three shards, at most 40 to a file.
    assert [file["rows"] for file in manifest["files"]] == [40, 10, 40, 40, 20, 30]
    assert "cannot be used as they are: unclosed_thought 18, unknown_fields 18" in outcome.out

    # The token went to the hub alone, and nowhere into what was written.
    assert {r.authorization for r in hub.log if r.server == "hub" and GLAIVE in r.path} == {
        f"Bearer {TOKEN}"
    }
    assert {r.authorization for r in hub.log if r.server == "cdn"} == {None}
    assert not any(TOKEN.encode() in data for data in contents(download.directory.parent).values())


@pytest.mark.quick
def test_a_complete_directory_is_left_alone(
    download: Download, hub: FakeHub, in_process: InProcess
) -> None:
    assert download(*MIDDLE).code == 0
    before = contents(download.home)
    hub.log.clear()
    outcome = download(*MIDDLE)
    assert outcome.code == 0 and "complete, nothing to do" in outcome.out
    assert not [request for request in hub.log if GLAIVE in request.path]
    assert contents(download.home) == before
    # Another revision, and a file that is not as it was, are not taken for it.
    assert "was made with source" in in_process(*MIDDLE, "--revision", "other")
    (download.home / MIDDLE_NAME / "part-00001.parquet").write_bytes(b"PAR1")
    assert "part-00001.parquet: missing or not as downloaded" in in_process(*MIDDLE)


def shard(number: int, kind: str = "file") -> str:
    """Matches requests for one shard on the CDN."""
    return f"cdn .*{shard_name(number)} {kind}"


def test_faults_in_answers(download: Download, hub: FakeHub, undisturbed: dict[str, bytes]) -> None:
    hub.faults += [
        ("hub /api/datasets", "500"),
        ("hub .*/resolve/.* footer", "503"),
        (shard(1, "footer"), "corrupt"),
        (shard(1), "429 1"),
        (shard(2), "wrong length"),
        (shard(3), "corrupt"),
    ]
    outcome = download(*MIDDLE)
    assert outcome.code == 0 and outcome.err == "" and not hub.faults, outcome
    assert contents(download.home) == undisturbed
    assert [line for line in outcome.out.splitlines() if "retry" in line] == [
        f"{GLAIVE}: the hub answered HTTP 500; retry 1 of 6 in 0.01 s",
        f"data/{shard_name(0)} (footer): the hub answered HTTP 503; retry 1 of 6 in 0.01 s",
        f"data/{shard_name(1)} (footer): no Parquet footer; retry 1 of 6 in 0.01 s",
        f"data/{shard_name(1)}: the hub answered HTTP 429; retry 1 of 6 in 1 s",  # as it asks
        f"data/{shard_name(2)}: another part or length than asked for; retry 1 of 6 in 0.01 s",
        f"data/{shard_name(3)}: not the bytes that the hub lists; retry 1 of 6 in 0.01 s",
    ]


def test_bodies_that_end_early_go_on_there(
    download: Download, hub: FakeHub, undisturbed: dict[str, bytes]
) -> None:
    hub.faults += [(shard(1), "cut"), (shard(2), "short"), (shard(3), "stall")]
    download.environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
    outcome = download(*MIDDLE)
    assert outcome.code == 0 and outcome.err == "" and not hub.faults, outcome
    assert contents(download.home) == undisturbed
    retries = [line for line in outcome.out.splitlines() if "retry" in line]
    causes = ("the connection was cut off", "bytes too few", "nothing came for 1 s")
    # On a slow machine more may take longer than 1 s, and is asked for again as well.
    for number, cause in zip((1, 2, 3), causes, strict=True):
        start, end = f"data/{shard_name(number)}: ", f"{cause}; retry 1 of 6 in 0.01 s"
        assert any(line.startswith(start) and line.endswith(end) for line in retries), retries
        size = len(hub.repos[GLAIVE][hub.main[GLAIVE]][f"data/{shard_name(number)}"])
        asked = [part for name, part in hub.downloads() if name == shard_name(number)]
        different = [part for part, _ in itertools.groupby(asked)]
        assert different == [f"bytes=0-{size - 1}", f"bytes={size // 2}-{size - 1}"]


@pytest.mark.parametrize(
    ("fault", "num_tries", "line"),
    [
        ("503", 4, "the hub answered HTTP 503; gave up after 3 retries"),
        ("corrupt", 2, "the bytes are not those listed, 2 times"),
        ("429 3600", 1, "HTTP 429; the hub asks to wait 3600 s"),
    ],
)
def test_faults_that_stay(
    fault: str, num_tries: int, line: str, download: Download, hub: FakeHub
) -> None:
    hub.faults += [(shard(2), fault)] * num_tries
    err = download.refused(*MIDDLE, "--retries", "3", code=1)
    assert f"data/{shard_name(2)}: " in err and line in err and not hub.faults
    assert err.endswith("the same command goes on where it stopped\n")
    assert not (download.home / MIDDLE_NAME / "manifest.json").exists()


def test_after_a_failure_the_rest_is_downloaded(
    download: Download, hub: FakeHub, undisturbed: dict[str, bytes]
) -> None:
    hub.faults += [(shard(2), "403")]
    err = download.refused(*MIDDLE)
    assert "the hub refuses access (HTTP 403); check HF_TOKEN" in err
    err = download.refused(*MIDDLE[:-1], "50")
    assert "was made with rows_per_file 40, not 50; delete it" in err
    hub.log.clear()
    assert download(*MIDDLE).code == 0
    assert [name for name, _ in hub.downloads()] == [shard_name(2), shard_name(3)]
    assert contents(download.home) == undisturbed


def test_kill_and_resume(download: Download, hub: FakeHub, undisturbed: dict[str, bytes]) -> None:
    old = hub.main[GLAIVE]
    hub.faults += [(shard(2), "hold")]
    with download.start(*MIDDLE) as process:
        hub.wait_held(process)
        assert "another process works in it" in download.refused(*MIDDLE)
        process.kill()
    hub.release.set()
    message = f"{MIDDLE_NAME}: its download is not finished"
    with pytest.raises(ValueError, match=message):
        next(read_rows(download.home / MIDDLE_NAME))

    # Meanwhile "main" gets other rows: the download stays with those that it began with.
    hub.add(GLAIVE, glaive_shards(first_row=7))
    hub.log.clear()
    assert download(*MIDDLE).code == 0
    assert {name for name, _ in hub.downloads()} == {shard_name(2), shard_name(3)}
    assert all(old in request.path for request in hub.log if GLAIVE in request.path)
    assert contents(download.home) == undisturbed

    # So do other splits of it, which could else hold the same rows; a revision is taken by name.
    assert download("--dataset", "glaive", "--split", "train[:20]").code == 0
    assert [row for _, row in read_rows(download.home / "train-0-20")] == glaive_rows(range(20))
    new = ("--dataset", "glaive", "--split", "train[20:40]", "--revision", hub.main[GLAIVE])
    assert download(*new).code == 0
    assert [row for _, row in read_rows(download.home / "train-20-40")] == glaive_rows(
        range(27, 47)
    )


def test_a_second_conversion_is_refused(in_process: InProcess, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n')
    with DirectoryLock(in_process.directory / "mine"):
        assert "another process works in it" in in_process("--dataset", str(file))
    in_process("--dataset", str(file), code=0)


def test_another_version_of_the_converter(
    download: Download, hub: FakeHub, in_process: InProcess, undisturbed: dict[str, bytes]
) -> None:
    def make_old(file: str) -> dict[str, Any]:
        path = download.home / MIDDLE_NAME / file
        values = json.loads(path.read_text()) | {"converter": "0" * 12}
        path.write_text(json.dumps(values))
        return values

    hub.faults += [(shard(2), "403")] * 2
    download.refused(*MIDDLE)
    assert make_old("unfinished.json")["parts"]
    download.refused(*MIDDLE)
    unfinished = download.home / MIDDLE_NAME / "unfinished.json"
    values = json.loads(unfinished.read_text()) | {"parts": [[3]]}
    unfinished.write_text(json.dumps(values))
    hub.faults += [(shard(2), "403")]
    outcome = download(*MIDDLE)
    assert outcome.code == 2 and "unfinished.json: lists no parts; starts over" in outcome.out
    make_old("unfinished.json")
    outcome = download(*MIDDLE)
    assert outcome.code == 0 and "another version of the converter; starts over" in outcome.out
    assert contents(download.home) == undisturbed

    make_old("manifest.json")
    line = "made by another version, which may have kept less; delete it to make it anew"
    assert line in in_process(*MIDDLE, code=0)


def test_what_was_left_over_at_the_very_end(
    download: Download, in_process: InProcess, undisturbed: dict[str, bytes]
) -> None:
    assert download(*MIDDLE).code == 0
    left_over = download.home / ".source" / f"{'0' * 40}.parquet"
    other = download.home / "train-0-20"
    for path in (left_over, download.home / MIDDLE_NAME / "unfinished.json", other / "x"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    (other / "x").rename(other / "unfinished.json")  # which needs the shard
    in_process(*MIDDLE, code=0)
    assert left_over.is_file()
    shutil.rmtree(other)
    in_process(*MIDDLE, code=0)
    assert contents(download.home) == undisturbed and not left_over.parent.exists()


def test_damaged_manifests_are_named(download: Download, in_process: InProcess) -> None:
    assert download(*MIDDLE).code == 0
    path = download.home / MIDDLE_NAME / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["files"][0]
    for files in (None, [3], [{}], [entry | {"name": 3}]):
        path.write_text(json.dumps(manifest | {"files": files}))
        assert MIDDLE_NAME in in_process(*MIDDLE)
    pins = {"repo": GLAIVE, "commits": {"main": 3}}
    (download.home / "revision.json").write_text(json.dumps(pins))
    err = download.refused("--dataset", "glaive", "--split", "train[:9]")
    assert f"revision.json: names no commits of {GLAIVE}; delete it" in err


def test_unusable_data_is_refused_before_it_is_downloaded(download: Download, hub: FakeHub) -> None:
    hub.add("some/other", {"train-0.parquet": parquet_bytes([{"task": "t", "key": "s", "id": 3}])})
    err = download.refused("--dataset", "some/other")
    assert err == (
        "error: some/other: train-0.parquet: no prompt with a response, and no messages, in "
        '"task", "key", "id"; name them with data.columns\n'
    )
    names = ("--column", "prompt=task", "--column", "response=key")
    assert download("--dataset", "some/other", *names).code == 0
    numbers = [{"prompt": i, "response": "r"} for i in range(9)]
    hub.add("some/numbers", {"train-0.parquet": parquet_bytes(numbers)})
    err = download.refused("--dataset", "some/numbers")
    assert 'train-0.parquet: "prompt" is a int, not a text' in err
    # These two are smaller than what is asked for to get a footer; a large one shows the rest.
    filler = [{"text": "x", "digits": row["prompt"]} for row in glaive_rows(range(150))]
    hub.add("some/large", {"train-0.parquet": parquet_bytes(filler)})
    hub.log.clear()
    assert '"text" alone does not say' in download.refused("--dataset", "some/large")
    assert [r.range for r in hub.log if r.server == "cdn"] and not hub.downloads()
    rejected = [{"prompt": "p", "response": "<think>for ever"}] * 1500
    hub.add("some/unthinking", {"train-0.parquet": parquet_bytes(rejected)})
    err = download.refused("--dataset", "some/unthinking", "--rows_per_file", "1000")
    assert "none of the first 1,500 rows can be used (unclosed_thought 1,500)" in err
    assert not list(download.directory.glob("*/train/manifest.json"))[1:]


def test_names_that_leave_the_directory(download: Download, hub: FakeHub) -> None:
    hub.add(GLAIVE, glaive_shards() | {"../up.parquet": b"x"})
    err = download.refused(*MIDDLE)
    assert "a file named '../up.parquet', which is no path inside of it; nothing is taken" in err
    assert not hub.downloads()


def test_no_network(download: Download, hub: FakeHub) -> None:
    with running_hub() as stopped:
        download.environment["HF_ENDPOINT"] = stopped.endpoint
    line = (
        "error: cannot reach 127.0.0.1 ({}): without a network name a file that you have, "
        "--dataset FILE, or train on data/sample/train.jsonl\n"
    )
    assert download.refused() == line.format("no connection")
    download.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1"}
    assert download.refused() == line.format("HF_HUB_OFFLINE is set")
    assert not hub.log


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--dataset", "glaive", "--split", "train[:501]"], "goes beyond its 500 rows"),
        (["--dataset", "glaive", "--split", "test"], "has no split 'test' (it has train)"),
        (["--dataset", "glaive", "--subset", "no"], "has no subset 'no' (it has data)"),
        (["--dataset", "glaive", "--revision", "v2"], "has no revision 'v2'"),
        (["--dataset", "some/where"], "some/where: is not on the hub, or is private"),
    ],
)
def test_what_the_hub_lacks(options: list[str], line: str, download: Download) -> None:
    assert line in download.refused(*options)
    assert not list(download.directory.glob("*"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--dataset", "glaiv"], "--dataset glaiv: no such file; use glaive, gsm8k, mbpp, owner/"),
        (["--dataset", "../glaive"], "no such file"),
        (["--dataset", "rows.jsonl"], "rows.jsonl: no such file"),
        (["--datset", "glaive"], "unknown option '--datset'; did you mean --dataset?"),
        (["--dataset", "glaive", "--split", "train[:10%]"], "write it as train or train[180000:2"),
        (["--dataset", "glaive", "--split", "train[9:9]"], "holds no rows"),
        (["--split", "train"], "--split, --subset, --column and --revision need --dataset"),
        (["--retries", "-1"], "not negative"),
        (["--rows_per_file", "many"], "invalid int value"),
    ],
)
def test_wrong_options(options: list[str], line: str, in_process: InProcess) -> None:
    assert line in in_process(*options)
    assert not in_process.directory.exists()


def test_without_options_it_is_the_data_of_the_recipe(download: Download, hub: FakeHub) -> None:
    def files(folder: str, texts: dict[str, list[dict[str, Any]]]) -> dict[str, bytes]:
        return {
            f"{folder}/{split}-00000-of-00001.parquet": parquet_bytes(rows)
            for split, rows in texts.items()
        }

    def config(name: str) -> dict[str, Any]:
        listed = [{"split": s, "path": f"{name}/{s}-*"} for s in ("train", "test")]
        return {"config_name": name, "data_files": listed}

    def large_shard(first: int, num_rows: int = 100_000) -> bytes:
        prompts = [str(n) for n in range(first, first + num_rows)]
        out = BytesIO()
        table = arrow.table({"prompt": prompts, "response": ["<think>r</think>a"] * num_rows})
        parquet.write_table(table, out, row_group_size=10_000)
        return out.getvalue()

    def problem(n: int) -> dict[str, Any]:
        return {"question": f"{n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>\n#### {n + 1}"}

    def task(n: int) -> dict[str, Any]:
        code = f"def f():\r\n  return {n}"
        row = {"task_id": n, "text": f"Return {n}.", "code": code, "test_list": [f"f() == {n}"]}
        return row | {"test_setup_code": "", "challenge_test_list": []}

    gsm8k = {"train": [problem(n) for n in range(6)], "test": [problem(6)]}
    hub.add("openai/gsm8k", files("socratic", gsm8k) | files("main", gsm8k))
    hub.configs["openai/gsm8k"] = [config("socratic"), config("main")]
    mbpp = {"train": [task(n) for n in range(5)], "test": [task(9)]}
    hub.add("google-research-datasets/mbpp", files("full", mbpp) | files("sanitized", mbpp))

    names = [shard_name(n, 218) for n in range(5)]
    hub.add(GLAIVE, {f"data/{name}": large_shard(n * 100_000) for n, name in enumerate(names)})
    hub.configs[GLAIVE] = [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}
    ]

    assert download().code == 0
    for first, last in ((0, 180_000), (180_000, 280_000), (280_000, 280_512)):
        directory = download.home / f"train-{first}-{last}"
        manifest = json.loads((directory / "manifest.json").read_text())
        assert manifest["rows"] == last - first
        prompts = parquet.read_table(directory / "part-00000.parquet")["prompt"]
        assert prompts[0].as_py() == str(first)
    assert [name for name, _ in hub.downloads()][:3] == names[:3]
    assert not {name for name, _ in hub.downloads()} & set(names[3:])

    rows = [row for _, row in read_rows(download.directory / "gsm8k" / "train")]
    assert rows == gsm8k["train"]
    assert not [path for path in hub.log if "socratic" in path.path]
    (row,) = [row for _, row in read_rows(download.directory / "mbpp" / "test")]
    unread = {"task_id": UNREAD, "challenge_test_list": UNREAD}
    assert row == task(9) | unread

    err = download.refused("--dataset", "openai/gsm8k")
    assert "has several subsets (socratic, main); choose one, as in openai/gsm8k:socr" in err
    assert download("--dataset", "openai/gsm8k", "--subset", "socratic").code == 0
    assert (download.directory / "openai--gsm8k" / "socratic-train" / "manifest.json").is_file()


@pytest.mark.quick
def test_local_files(in_process: InProcess, tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": f"p{n}", "completion": f"c{n}", "id": n} for n in range(5)]
    rows[1] |= {"reasoning": "r", "system": "s", "weight": 0.5}
    rows[2] = {"messages": [{"role": "user", "content": "q", "tool_calls": [{"name": "f"}]}]}
    rows[3] = {"question": "\ud800", "answer": None}
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = in_process("--dataset", str(file), "--rows_per_file", "2", code=0)
    assert "cannot be used as they are: tools 1, unknown_fields 1, weight 1" in out
    assert [row for _, row in read_rows(in_process.directory / "mine" / "train")] == rows
    assert "complete, nothing to do" in in_process("--dataset", str(file), code=0)

    table = tmp_path / "table.parquet"
    parquet.write_table(arrow.Table.from_pylist(glaive_rows(range(4, 7))), table)
    in_process("--dataset", str(table), "--rows_per_file", "2", code=0)
    made = [row for _, row in read_rows(in_process.directory / "table" / "train")]
    assert made == glaive_rows(range(4, 7))


def test_local_files_that_are_refused(in_process: InProcess, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    for text, expected in (
        ("", f"{file}: is empty"),
        ("{}\n", "none of the first 1 rows can be used (unknown_fields 1)"),
        ('{"prompt": "p", "completion": "c"}\n{"prompt"', f"{file}:2: broken or cut off"),
    ):
        file.write_text(text)
        assert expected in in_process("--dataset", str(file))
    file.write_text('{"prompt": "p", "completion": "c"}\n' * 3)
    options = ("--split", "train[:9]", "--rows_per_file", "2")
    assert "goes beyond its 3 rows" in in_process("--dataset", str(file), *options)
    assert not in_process.directory.exists()


def test_columns_that_are_kept(download: Download, hub: FakeHub) -> None:
    row = {
        "instruction": "i",
        "input": "in",
        "output": "o",
        "system": "s",
        "tools": [{"name": "f", "calls": [{"text": "deep"}]}],
        "weight": 1.0,
        "source": "web",
    }
    left_out = {"image": {"bytes": b"x", "path": "p"}, "raw": b"x", "embedding": [0.5]}
    table = arrow.Table.from_pylist([row | left_out] * 2)
    bad = arrow.array([b"\xff", b"o"]).view(arrow.string())
    out = BytesIO()
    parquet.write_table(arrow.concat_tables([table, table.set_column(2, "output", bad)]), out)
    hub.add("some/alpaca", {"train-0.parquet": out.getvalue()})
    outcome = download("--dataset", "some/alpaca")
    # Rows with text in other columns stay, for `data.columns`.
    assert "cannot be used as they are: not_utf8 1, unused_text 3" in outcome.out
    made = [row for _, row in read_rows(download.directory / "some--alpaca" / "train")]
    assert made == [row | {"source": UNREAD}] * 3


def test_a_file_whose_name_would_leave_the_directory(in_process: InProcess, tmp_path: Path) -> None:
    file = tmp_path / "...jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n')
    assert f"{file}: names the output; rename it" in in_process("--dataset", str(file))
    assert not in_process.directory.exists()


@pytest.mark.quick
def test_a_token_that_is_none(in_process: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("hf_é", "hf_a b"):
        monkeypatch.setenv("HF_TOKEN", token)
        err = in_process("--dataset", "glaive")
        assert "HF_TOKEN holds characters that no token has" in err and token not in err


def test_a_disk_that_gets_full(
    in_process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_to_write(*arguments: object, **options: object) -> None:
        detail = "Detail: [errno 28] No space left on device"
        raise OSError(errno.ENOSPC, f"Error writing bytes to file. {detail}")  # as pyarrow does

    monkeypatch.setattr(parts, "json", SimpleNamespace(dumps=fail_to_write))
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "p", "completion": "c"}\n')
    assert in_process("--dataset", str(file), code=1) == (
        f"error: {in_process.directory}: no space left: make room or name another --output_dir\n"
    )
    assert not in_process.directory.exists()


def test_terminal_shows_the_time_left(download: Download, hub: FakeHub) -> None:
    hub.faults += [(shard(2), "stall")]
    terminal, other_end = pty.openpty()
    environment = download.environment | {"TERM": "xterm", "COLUMNS": "140"}
    environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
    with subprocess.Popen(
        download.arguments(*MIDDLE), env=environment, stdout=other_end, stderr=other_end
    ) as process:
        os.close(other_end)
        shown = b""
        try:
            while chunk := os.read(terminal, 4096):
                shown += chunk
        except OSError:  # the other end is closed
            pass
    os.close(terminal)
    assert process.returncode == 0, shown
    assert re.search(rb"download .*0\.\d of 0\.\d MB.*ETA \d:\d\d:\d\d", shown), shown
    assert re.search(rb"convert .*\d+ of 180 rows", shown)


def test_a_full_disk_is_named_first(tmp_path: Path) -> None:
    file = HubFile("big.parquet", 10**18, "0" * 40, None)
    with pytest.raises(ValueError, match=r"MiB free, but .* MiB are needed for big\.parquet"):
        fetch(Hub(), Snapshot("a/b", "0" * 40, (file,), []), file, tmp_path / "big.parquet")


@pytest.mark.parametrize("text", ["train", "train[:5]", "train[3:]", "train[3:5]", "a-b.c"])
def test_splits_read_back(text: str) -> None:
    assert parse_split(text).text == text
