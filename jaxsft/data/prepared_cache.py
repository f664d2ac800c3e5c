"""Finds the prepared rows of some files and options, or makes them.

A set's directory is named by a fingerprint of everything that decides its contents: the files, the
tokenizer, the options, the code. So nothing stale is ever found under a name, and nothing has to be
compared again but times and sizes of files.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from jaxsft.common.files import read_json, write_json
from jaxsft.common.locks import remove_leftovers, scratch_beside
from jaxsft.config import DataOptions
from jaxsft.data.prepared import KIND, Prepared, map_prepared, open_prepared, sealed, write_rows
from jaxsft.data.samples import DataReport, as_list, check_any_left, read_samples
from jaxsft.data.sources import MANIFEST, file_digest, row_files, stamp
from jaxsft.data.tokenizer import Tokenizer

# The modules that turn rows into packed samples.
CODE = (
    *("bins", "packing", "vocabulary", "tokenizer", "rows", "sources", "chat", "filters"),
    *("samples", "prepared", "prepared_cache"),
)

_DATA = Path(__file__).parent
_FILE_DIGESTS = "files.json"
# Options that decide where rows are found or how many may be lost, not what they are.
_NOT_IN_FINGERPRINT = ("train_files", "eval_files", "max_drop", "prepared_dir")


def prepare(
    files: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    options: DataOptions,
    root: Path,
    *,
    heldout_files: str | Path | Sequence[str | Path] = (),
    progress: Callable[[DataReport], None] = lambda report: None,
) -> Prepared:
    """The prepared set of these files and options, made under `root` unless it is there.

    Args:
      files: what `sources.read_rows` reads, one source each.
      tokenizer: the model's.
      options: how; `train_files` and `eval_files` are not looked at.
      root: directory of prepared sets.
      heldout_files: left out of the rows with `options.drop_contaminated`.
      progress: called now and then with the counts so far.

    Raises:
      ValueError: as data.read_samples, no sample left or more than `options.max_drop` lost, or a
        weight for each file is not given. OSError: `root` cannot be written.
    """
    files = as_list(files)
    heldout = as_list(heldout_files) if options.drop_contaminated else []
    if options.weights is not None and len(options.weights) != len(files):
        raise ValueError(
            f"data.weights has {len(options.weights)} numbers for {len(files)} files: give one each"
        )
    known = _known_digests(root)
    digests = dict(known)
    made_from = _made_from(files, heldout, tokenizer, options, digests)
    if digests != known:
        _keep_digests(root, digests)
    fingerprint = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()
    directory = root / fingerprint[:16]
    if directory.is_dir():
        prepared = open_prepared(directory)
        check_any_left(files, options, prepared.report)
        return prepared
    remove_leftovers(root)
    with _partial_directory(directory) as partial:
        report = DataReport()
        found = read_samples(files, tokenizer, options, report, heldout_files=heldout)
        about = write_rows(found, files, options, report, partial, progress)
        for file, _ in itertools.chain.from_iterable(map(row_files, (*files, *heldout))):
            if stamp(file) != digests[str(file.absolute())][:-1]:
                raise ValueError(f"{file}: was changed while it was read; run it again")
        start = {"kind": KIND, "fingerprint": fingerprint, "made_from": made_from}
        write_json(partial / MANIFEST, sealed(start | about))
    return map_prepared(directory)


@contextlib.contextmanager
def _partial_directory(directory: Path) -> Iterator[Path]:
    """A new directory that is renamed to `directory` at the end, and removed where that fails."""
    try:
        with scratch_beside(directory) as partial:
            yield partial
            try:
                partial.rename(directory)
            except OSError:
                if not directory.is_dir():  # else another process was faster
                    raise
    except OSError as error:  # of writing: what cannot be read is a ValueError
        why = error.strerror or error
        raise OSError(
            f"{directory.parent}: {why} while rows were prepared there; make room, or name "
            "another place with data.prepared_dir, or XDG_CACHE_HOME for all that is cached"
        ) from error


@functools.cache
def code_version() -> str:
    """12 hex digits that change with the code that turns rows into packed samples."""
    digest = hashlib.sha256(sentencepiece.__version__.encode())
    for name in CODE:
        digest.update((_DATA / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def _made_from(
    files: Sequence[Path],
    heldout_files: Sequence[Path],
    tokenizer: Tokenizer,
    options: DataOptions,
    digests: dict[str, Any],
) -> dict[str, Any]:
    """Everything that decides the rows, JSON-able; adds to the `digests` of files."""
    kept = dataclasses.asdict(options)
    for name in _NOT_IN_FINGERPRINT:
        del kept[name]

    # With their names, which the report has.
    def digest_all(sets: Sequence[Path]) -> list[list[str]]:
        return [
            [str(path), *(file_digest(file, digests) for file in row_files(path))] for path in sets
        ]

    return {
        "files": digest_all(files),
        "heldout_files": digest_all(heldout_files),
        "tokenizer": tokenizer.digest,
        "options": kept,
        "code": code_version(),
    }


def _known_digests(root: Path) -> dict[str, Any]:
    """Digests of files that were computed before; none of a damaged file of them."""
    try:
        return read_json(root / _FILE_DIGESTS)
    except ValueError:
        return {}


def _keep_digests(root: Path, digests: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a set may lie where nothing can be written
        root.mkdir(parents=True, exist_ok=True)
        write_json(root / _FILE_DIGESTS, digests)
