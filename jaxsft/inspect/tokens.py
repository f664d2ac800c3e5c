"""A packed row, token by token: text, id, piece and mask of each.

It is read from the same `Batch` that the model gets. Byte tokens that spell one character are shown
as that character, other bytes as hexadecimal.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from jaxsft.data.prepared import Prepared, source_of
from jaxsft.data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


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


def view_row(prepared: Prepared, tokenizer: Tokenizer, index: int) -> RowView:
    """Row `index`, from 0, of a set that was made with this tokenizer."""
    rows = prepared.rows
    batch = rows.row(index)
    # A token is a label if it is the target of the position before it.
    is_label = np.append(False, batch.loss_weights_BT[:-1] > 0)
    samples = rows.row_samples[rows.row_offsets[index] : rows.row_offsets[index + 1]]
    segments = []
    for number, sample in enumerate(samples.tolist(), 1):
        here = batch.segment_ids_BT == number
        ids, labels = batch.tokens_BT[here].tolist(), is_label[here].tolist()
        tokens = list(view_tokens(ids, labels, tokenizer))
        source = source_of(prepared, sample)
        segments.append(Segment(sample, source, len(ids), sum(labels), tokens))
    return RowView(index, segments, int((batch.segment_ids_BT == 0).sum()))


def view_tokens(
    ids: Sequence[int], labels: Sequence[bool], tokenizer: Tokenizer
) -> Iterator[Token]:
    """The tokens of one segment; `labels` says for each id whether it is trained on."""
    num_ids = tokenizer.vocab_size
    pieces = [tokenizer.piece(i) if 0 <= i < num_ids else f"<id {i}>" for i in ids]
    at = 0
    while at < len(ids):
        size, text = _character(pieces[at : at + 4])
        if len(set(labels[at : at + size])) > 1:  # two masks in a character: show its bytes
            size, text = 1, pieces[at]
        here = slice(at, at + size)
        is_control = ids[at] in tokenizer.control_ids
        yield Token(text, tuple(ids[here]), tuple(pieces[here]), labels[at], is_control)
        at += size


def _character(pieces: Sequence[str]) -> tuple[int, str]:
    """(how many of the first pieces make one character, its text)."""
    if not _BYTE.fullmatch(pieces[0]):
        return 1, pieces[0].replace("\u2581", " ")
    matches = takewhile(bool, map(_BYTE.fullmatch, pieces))
    spelt = bytes(int(match[1], 16) for match in matches if match)
    for size in range(1, len(spelt) + 1):
        with suppress(UnicodeDecodeError):  # no character begins with another one's bytes
            return size, spelt[:size].decode()
    return 1, pieces[0]
