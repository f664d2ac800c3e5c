"""The page of the inspect command in a real browser, light and dark."""

import json
from pathlib import Path

import pytest
from support.browser import Browser

from jaxsft.inspect.__main__ import main

pytestmark = pytest.mark.browser

EVIL = "<script>document.title='evil'</script><img src=http://evil.invalid/a.png>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The page of 30 samples, three of its rows token by token, the first with markup in it."""
    answers = [f"<think>{'So. ' * n}</think>\nAnswer {n}" for n in range(1, 31)]
    rows = [{"prompt": f"Why {n}?", "response": text} for n, text in enumerate(answers)]
    rows[0]["prompt"] = EVIL
    directory = tmp_path_factory.mktemp("inspect")
    source, page = directory / "rows.jsonl", directory / "report.html"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model.path", str(tiny_model_dir), "--data.train_files", str(source)]
    options += ["--data.eval_files", "[]", "--data.system_prompt", "null", "--data.packing=false"]
    options += ["--data.prepared_dir", str(directory / "prepared"), "--data.max_length", "160"]
    assert main([*options, "--html", str(page)]) == 0
    return page


def test_rows_are_shown_and_nothing_of_the_data_runs(page: Path, browser: Browser) -> None:
    browser.show(page)
    assert browser.evaluate("document.title") == "Rows of rows.jsonl"
    rows = browser.evaluate("[...document.querySelectorAll('.row')].map(row => row.id)")
    assert rows == ["row-0", "row-1", "row-2"]
    assert browser.evaluate("document.querySelectorAll('script, img, link, iframe').length") == 0
    text = browser.evaluate("document.body.textContent")
    assert EVIL in text and "all checks hold" in text
    assert browser.evaluate("document.querySelectorAll('svg.chart').length") == 3
    # Lengths, fill and loss share are all spread.
    assert browser.evaluate("document.querySelectorAll('.bar').length") > 30
    # Row 0 has one sample: its five control tokens, the last of them trained on.
    controls = browser.evaluate(
        "[...document.querySelectorAll('#row-0 .tokens .c')].map(c => [c.className, c.textContent])"
    )
    names = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<start_of_turn>", "<end_of_turn>"]
    assert [name for _, name in controls] == names
    assert [kind for kind, _ in controls] == ["t p c"] * 4 + ["t l c"]
    browser.check_requests(page, EVIL)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_page_fits_and_can_be_read(width: int, scheme: str, page: Path, browser: Browser) -> None:
    parts = [
        ".verdict",
        ".path",
        ".tile i",
        ".checks li",
        ".fates small",
        ".quantiles th",
        ".lessons td",
    ]
    parts += ["h4 small", ".tokens .p", ".tokens .l", ".tokens .l:nth-child(even)"]
    browser.check_colours(page, width, scheme, parts)
    for part in (".tokens .p.c", ".tokens .l.c"):
        assert browser.contrast(part) >= 3, part  # bold
