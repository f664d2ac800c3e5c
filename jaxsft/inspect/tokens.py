"""A packed row, token by token: text, id, piece and mask of each.

It is read from the same `Batch` that the model gets. Byte tokens that spell one character are shown
as that character, other bytes as hexadecimal.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxsft.data.prepared import Prepared, source_of
from jaxsft.data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UTF8_LENGTHS = ((0x80, 1), (0xC2, 0), (0xE0, 2), (0xF0, 3), (0xF5, 4))  # by first byte, below


class Token(NamedTuple):
    """One token, or the byte tokens of one character.

    `is_label`: the model is trained to predict it.
    """

    text: str
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    is_label: bool
    is_control: bool


class Segment(NamedTuple):
    """A sample in a row; `source` names its raw row, `num_labels` counts its targets with loss."""

    sample: int
    source: str
    num_tokens: int
    num_labels: int
    tokens: list[Token]

    def runs(self) -> list[tuple[bool, int]]:
        """Runs of tokens with the same mask: (whether they are labels, how many)."""
        runs: list[tuple[bool, int]] = []
        for token in self.tokens:
            if not runs or runs[-1][0] != token.is_label:
                runs.append((token.is_label, 0))
            runs[-1] = token.is_label, runs[-1][1] + len(token.ids)
        return runs


class RowView(NamedTuple):
    """Row `number`, from 0: segments, which do not attend to each other, then padding."""

    number: int
    segments: list[Segment]
    num_padding: int


class RowReader:
    """Reads rows of a prepared set, which was made with this tokenizer."""

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer):
        self._prepared, self._tokenizer = prepared, tokenizer

    def view(self, index: int) -> RowView:
        """Row `index`, from 0."""
        rows = self._prepared.rows
        batch = rows.row(index)
        # A token is a label if it is the target of the position before it.
        is_label = np.append(False, batch.loss_weights_BT[:-1] > 0)
        samples = rows.row_samples[rows.row_offsets[index] : rows.row_offsets[index + 1]]
        segments = []
        for number, sample in enumerate(samples.tolist(), 1):
            here = batch.segment_ids_BT == number
            ids, labels = batch.tokens_BT[here].tolist(), is_label[here].tolist()
            tokens = list(self._tokens(ids, labels))
            source = source_of(self._prepared, sample)
            segments.append(Segment(sample, source, len(ids), sum(labels), tokens))
        return RowView(index, segments, int((batch.segment_ids_BT == 0).sum()))

    def _tokens(self, ids: Sequence[int], labels: Sequence[bool]) -> Iterator[Token]:
        pieces = [self._piece(token) for token in ids]
        at = 0
        while at < len(ids):
            size, text = _character(pieces[at : at + 4])
            if len(set(labels[at : at + size])) > 1:  # two masks in a character: show its bytes
                size, text = 1, pieces[at]
            here = slice(at, at + size)
            is_control = ids[at] in self._tokenizer.control_ids
            yield Token(text, tuple(ids[here]), tuple(pieces[here]), labels[at], is_control)
            at += size

    def _piece(self, token: int) -> str:
        inside = 0 <= token < self._tokenizer.vocab_size
        return self._tokenizer.piece(token) if inside else f"<id {token}>"


def _character(pieces: Sequence[str]) -> tuple[int, str]:
    """(how many of the first pieces make one character, its text)."""
    matches = [_BYTE.fullmatch(piece) for piece in pieces]
    if matches[0] is None:
        return 1, pieces[0].replace("\u2581", " ")
    first = int(matches[0][1], 16)
    size = next((size for below, size in _UTF8_LENGTHS if first < below), 0)
    found = [match for match in matches[:size] if match]
    if size and len(found) == size:
        try:
            return size, bytes(int(match[1], 16) for match in found).decode()
        except UnicodeDecodeError:
            pass
    return 1, pieces[0]
