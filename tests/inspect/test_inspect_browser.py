"""The page of the inspect command as a real browser shows it, light and dark."""

import json
import re
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path

import matplotlib.image
import numpy as np
import numpy.typing as npt
import pytest

from jaxsft.inspect.__main__ import main

pytestmark = pytest.mark.browser

EVIL = "<script>document.title='evil'</script><img src=http://evil.invalid/a.png>"
DARK, LIGHT = 0, 1
WIDTH, HEIGHT = 1200, 1600

Chromium = Callable[..., str]


@pytest.fixture
def chromium(tmp_path: Path) -> Chromium:
    def chromium(page: Path, *options: str) -> str:
        """What chromium prints when it shows the page."""
        command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--disable-background-networking"]
        command += ["--disable-component-update", f"--window-size={WIDTH},{HEIGHT}", *options]
        done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True)
        return done.stdout

    return chromium


@pytest.fixture
def page(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """The page of 30 samples, three of its rows token by token, the first with markup in it."""
    answers = [f"<think>{'So. ' * n}</think>\nAnswer {n}" for n in range(1, 31)]
    rows = [{"prompt": f"Why {n}?", "response": text} for n, text in enumerate(answers)]
    rows[0]["prompt"] = EVIL
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = tmp_path / "report.html"
    options = ["--model.path", str(tiny_model_dir), "--data.train_files", str(source)]
    options += ["--data.eval_files", "[]", "--data.system_prompt", "null", "--data.packing=false"]
    options += ["--data.prepared_dir", str(tmp_path / "prepared"), "--data.max_length", "160"]
    assert main([*options, "--html", str(page)]) == 0
    return page


def test_dom_has_the_rows_and_nothing_of_the_data_runs(page: Path, chromium: Chromium) -> None:
    dom = chromium(page, "--dump-dom")
    assert re.findall(r'class="card row" id="(row-\d)"', dom) == ["row-0", "row-1", "row-2"]
    assert "<title>Rows of rows.jsonl</title>" in dom
    assert "<script" not in dom and "<img" not in dom
    text = unescape(re.sub(r"<[^>]*>", "", dom))
    assert EVIL in text and "all checks hold" in text
    assert len(re.findall(r'<svg class="chart"', dom)) == 3
    assert len(re.findall(r'class="bar"', dom)) > 30  # lengths, fill and loss share all spread
    # Row 0 has one sample: its five control tokens, the last of them trained on.
    row = dom[dom.index('id="row-0"') : dom.index('id="row-1"')]
    controls = re.findall(r'class="t (. c)" title="\d+ +([^"]*)"', row)
    names = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_turn>", "<end_of_turn>"]
    assert [unescape(name) for _, name in controls] == names
    assert [classes for classes, _ in controls] == ["p c"] * 4 + ["l c"]


def test_page_asks_for_nothing(page: Path, chromium: Chromium) -> None:
    def num_requests(page: Path) -> int:
        log = page.with_suffix(".net.json")
        chromium(page, "--dump-dom", f"--log-net-log={log}")
        # A file's page has the origin "null"; what Chromium asks for on its own has none.
        return log.read_text("utf-8").count('"initiator":"null"')

    assert num_requests(page) == 0
    careless = page.with_name("careless.html")
    careless.write_text(EVIL)
    assert num_requests(careless) == 1


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_page_looks_like_something(scheme: int, page: Path, chromium: Chromium) -> None:
    picture = page.with_name("page.png")
    chromium(page, f"--blink-settings=preferredColorScheme={scheme}", f"--screenshot={picture}")
    pixels = matplotlib.image.imread(picture)[..., :3]
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    background = pixels.mean()
    assert background > 0.8 if scheme == LIGHT else background < 0.3
    red, green, blue = np.moveaxis(pixels, -1, 0)
    # Trained tokens are green, bars are blue, and there is text of the other extreme all over.
    assert share((green > red + 0.05) & (green > blue + 0.03)) > 0.01
    assert share((blue > red + 0.3) & (blue > green + 0.1)) > 0.002
    grey = pixels.mean(-1)
    text = grey < 0.4 if scheme == LIGHT else grey > 0.6
    assert share(text) > 0.01
    for band in np.array_split(text[: HEIGHT // 2], 4):
        assert share(band) > 0.001


def share(pixels: npt.NDArray[np.bool_]) -> float:
    """The share of the pixels that are true."""
    return float(pixels.mean())
