"""The page of rollouts: self-contained, small enough, right about torn and foreign lines."""

import base64
import hashlib
import json
import re
import zlib
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from jaxsft.grpo.page import write_page

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u202e\ud800"
PAGE_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
DATA = re.compile(r'<script type="application/octet-stream" id="([\w-]+)">([\w+/=]*)</script>')


def completion(step: int, prompt: int, member: int, reward: float, **other: Any) -> dict[str, Any]:
    """A line of rollouts.jsonl, as the loop writes it."""
    return {
        **{"step": step, "prompt": prompt, "member": member, "source": "a.jsonl:row 1"},
        **{"kind": "number", "question": f"Question {prompt}?", "text": "So. 7", "num_tokens": 5},
        **{"ended": "stop", "log_prob": -1.5, "reward": reward, "advantage": 0.5, "counted": True},
        **{"rewards": {"answer": {"value": reward, "reason": "the number"}}},
        **other,
    }


def parts(page: Path) -> dict[str, Any]:
    """What lies packed in the page: "index" and each "step-N"."""
    html = page.read_text("utf-8")
    return {
        name: json.loads(zlib.decompress(base64.b64decode(x))) for name, x in DATA.findall(html)
    }


def test_a_page_has_all_of_a_run(write: Callable[..., Path]) -> None:
    rows = [
        completion(step, prompt, member, float(prompt and member))
        for step in (1, 3)
        for prompt in (0, 1)
        for member in (0, 1)
    ]
    rows[-1] |= {"kind": "code", "ended": "limit"}
    metrics = [
        {"step": n, "train/reward": n / 2, "train/right": 0.1 * n, "train/x": 1} for n in (1, 2, 3)
    ]
    run_dir = write(*rows, name="rollouts.jsonl").parent
    write(*metrics, {"step": 3, "eval/right": 0.5}, name="metrics.jsonl")
    page = write_page(run_dir)
    assert page == run_dir / "rollouts.html"
    html, packed = page.read_text("utf-8"), parts(page)
    assert list(packed) == ["step-1", "step-3", "index"]
    assert packed["index"] == {
        "kind": ["code", "number"],
        "ended": ["limit", "stop"],
        "rewards": ["answer"],
        "steps": [1, 3],
        "facts": {str(n): f"reward {n / 2:.4g} · right {n}0.0%" for n in (1, 2, 3)},
    }
    first, second = packed["step-3"]
    assert [first["live"], second["live"]] == [False, True]
    assert second["members"][1] == {
        **{"step": 3, "member": 1, "text": "So. 7", "num_tokens": 5, "ended": "limit"},
        **{"log_prob": -1.5, "reward": 1.0, "advantage": 0.5, "counted": True},
        "rewards": {"answer": {"value": 1.0, "reason": "the number"}},
    }
    assert "2 rollouts, each by the first step that it served.</p>" in html
    assert "Warnings" not in html


def test_foreign_text_is_inert(write: Callable[..., Path]) -> None:
    row = completion(1, 0, 0, 1.0, kind=EVIL, question=EVIL, text=EVIL, ended=EVIL, source=EVIL)
    row["rewards"] = {EVIL: {"value": 1, "reason": EVIL}}
    metrics = [{"step": n, f"train/reward_{EVIL}": n, f"eval/{EVIL}": n} for n in (1, 2)]
    run_dir = write(row, name="rollouts.jsonl").parent
    write(*metrics, name="metrics.jsonl")
    page = write_page(run_dir)
    html = page.read_text("utf-8")
    (script,) = PAGE_SCRIPT.findall(html)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html
    tags: set[str] = set()
    attributes: set[str] = set()

    class Names(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.add(tag)
            attributes.update(name for name, _ in attrs)

    Names().feed(html)
    assert "select" in tags and not tags & {"img", "link", "iframe", "base", "object"}
    assert not [name for name in attributes if name in ("src", "href") or name.startswith("on")]
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script
    (group,) = parts(page)["step-1"]
    assert [group["question"], group["members"][0]["text"]] == [EVIL, EVIL]


def test_lines_that_are_torn_or_lack_something_are_counted(write: Callable[..., Path]) -> None:
    whole = [completion(1, 0, member, 1.0) for member in range(4)]
    old = completion(1, 1, 0, 1.0)
    del old["advantage"], old["rewards"]
    bad = [b"[1]", b"[" * 9999, old, b'{"step": 1, "pro']
    # Between them, so that no part of the step may get lost.
    path = write(*whole[:2], *bad[:3], *whole[2:], bad[3], name="rollouts.jsonl")
    page = write_page(path.parent)
    assert [len(group["members"]) for group in parts(page)["step-1"]] == [4]
    assert "4 lines that cannot be read." in page.read_text("utf-8")


def test_a_page_that_would_be_too_large_has_evenly_spaced_steps(write: Callable[..., Path]) -> None:
    rows = [
        completion(step, 0, 0, 1.0, text=str(hash((step, i))))
        for step in range(1, 102)
        for i in range(3)
    ]
    path = write(*rows, name="rollouts.jsonl")
    whole = write_page(path.parent)
    everything = sum(len(match[0]) for match in DATA.finditer(whole.read_text("utf-8")))
    assert parts(whole)["index"]["steps"] == list(range(1, 102))
    page = write_page(path.parent, max_bytes=everything // 4)
    steps = parts(page)["index"]["steps"]
    assert steps[0] == 1 and steps[-1] == 101 and 20 < len(steps) <= 26
    assert {b - a for a, b in pairwise(steps)} <= {4, 5}
    assert f"{len(steps)} of them are here, evenly spaced" in page.read_text("utf-8")
    assert parts(write_page(path.parent, max_bytes=1))["index"]["steps"] == [1, 101]


def test_a_directory_without_rollouts_is_refused(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"rollouts.jsonl: no such file; name the directory"
    ):
        write_page(tmp_path)
    write(b"", name="rollouts.jsonl")
    with pytest.raises(ValueError, match="has no completion yet"):
        write_page(tmp_path)
    assert not (tmp_path / "rollouts.html").exists()
