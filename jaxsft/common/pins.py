"""Remembers the commit that a branch or tag of a repository meant when it was first used.

A file beside the copies:

    revision.json    {"repo": "google/gemma-2-2b-it", "commits": {"main": "…40 hex digits…"}}
"""

import re
from pathlib import Path

from jaxsft.common.files import read_json, write_json

COMMIT = re.compile(r"[0-9a-f]{40}")

_NAME = "revision.json"


def read_pins(home: Path, repo: str) -> dict[str, str]:
    """Revision -> commit; ValueError where the file is not one of `repo`'s."""
    path = home / _NAME
    if not path.is_file():
        return {}
    pins = read_json(path)
    commits = pins.get("commits")
    if (
        pins.get("repo") != repo
        or not isinstance(commits, dict)
        or not all(isinstance(each, str) and COMMIT.fullmatch(each) for each in commits.values())
    ):
        raise ValueError(f"{path}: names no commits of {repo}; delete it, or choose another place")
    return commits


def write_pin(home: Path, repo: str, revision: str, commit: str) -> None:
    """Adds one; the others stay."""
    commits = read_pins(home, repo) | {revision: commit}
    write_json(home / _NAME, {"repo": repo, "commits": commits})
