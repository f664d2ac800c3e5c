"""Gemma's SentencePiece tokenizer, from `tokenizer.model` or rebuilt from a GGUF's vocabulary.

Both sources give the same model, byte for byte. It is BPE with byte fallback. It does not
normalise text (a space becomes U+2581 `▁`, nothing else changes). Every reserved token has the type
CONTROL. SentencePiece never makes a CONTROL piece from text, so `<end_of_turn>` in user text is
ordinary text, whatever type the source gives to that token.

The ids equal those of the official `tokenizer.json` without reserved tokens in its list of added
tokens (tests/golden/tokenizer_gemma3.json). There are two exceptions. U+2581 in user text gets the
ids of a space and decodes to a space, as in the official tokenizers. If two or more literal `▁`
stand next to a space, `tokenizer.json` splits them and SentencePiece, which is used here, does not.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from jaxsft.data.vocabulary import (
    CONTROL,
    UNKNOWN,
    Vocabulary,
    canonical_types,
    read_gguf,
    read_model,
    serialize,
)

_MAX_UNITS, _MAX_UNIT_CHARS = 1 << 19, 24  # of the cache: about 100 MB for words, at most 400 MB


class Tokenizer:
    """Text to ids and back. It never adds BOS, and text never gives a control id.

    Attributes:
        vocab_size: number of pieces (256,000 for Gemma 1 and 2, 262,144 for Gemma 3).
        pad_id, eos_id, bos_id, start_of_turn_id, end_of_turn_id: found by the piece's name.
        stop_ids: (eos_id, end_of_turn_id); generation stops at either.
        control_ids: every id that text cannot give: the reserved tokens, with `<unk>`.
        model_bytes: the canonical model. A `tokenizer.model` of these bytes has the same digest.
        digest: SHA-256 of model_bytes, in hex.
    """

    def __init__(self, vocabulary: Vocabulary, where: str) -> None:
        """Builds it from a vocabulary. Errors are ValueError; `where` names the source in them."""
        types = canonical_types(vocabulary, where)
        self.model_bytes: bytes = serialize(vocabulary, types)
        self.digest: str = hashlib.sha256(self.model_bytes).hexdigest()
        self._processor: Any = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(self.model_bytes)
        except RuntimeError as error:
            raise ValueError(f"{where}: SentencePiece refuses the vocabulary: {error}") from error
        self.vocab_size: int = len(vocabulary.pieces)
        self._control_text = {
            i: vocabulary.pieces[i] for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)
        }
        self.control_ids: frozenset[int] = frozenset(self._control_text)
        ids = {piece: i for i, piece in self._control_text.items()}
        self.pad_id: int = ids["<pad>"]
        self.eos_id: int = ids["<eos>"]
        self.bos_id: int = ids["<bos>"]
        self.start_of_turn_id: int = ids["<start_of_turn>"]
        self.end_of_turn_id: int = ids["<end_of_turn>"]
        self.stop_ids: tuple[int, int] = (self.eos_id, self.end_of_turn_id)
        self._find_units = _unit_pattern(vocabulary.pieces).findall
        self._unit_ids: dict[str, list[int]] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Loads a SentencePiece `tokenizer.model`.

        Raises:
            ValueError: the file is missing, empty, cut off, damaged, a Git LFS pointer, or not a
                Gemma model.
        """
        return cls(read_model(Path(path)), str(path))

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Rebuilds the tokenizer from the `tokenizer.ggml.*` fields of a GGUF file.

        Raises:
            ValueError: the GGUF file is not complete, or has no SentencePiece vocabulary of Gemma.
        """
        return cls(read_gguf(Path(path)), str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and without control ids.

        Raises:
            ValueError: `text` has a lone surrogate, which UTF-8 cannot encode.
        """
        ids: list[int] = self._processor.encode(_utf8(text))
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, several times as fast if words repeat.

        Each text is cut into units where no piece of the vocabulary can cross the cut, mostly
        before spaces. So the ids of a text are the ids of its units. These are cached.

        Raises:
            ValueError: as `encode`, with the index of the text.
        """
        known, encoded = self._unit_ids, []
        for index, text in enumerate(texts):
            _utf8(text, f"text {index}: ")  # for an error with the index of the text
            units = self._find_units(text)
            new = list(set(units).difference(known))
            if not new:
                encoded.append(list(itertools.chain.from_iterable(map(known.__getitem__, units))))
                continue
            found = dict(zip(new, self._processor.encode(new), strict=True))
            ids = (found[unit] if unit in found else known[unit] for unit in units)
            encoded.append(list(itertools.chain.from_iterable(ids)))
            if len(known) > _MAX_UNITS:
                known.clear()
            # A line without spaces is one long unit. It will not repeat.
            known.update((unit, found[unit]) for unit in new if len(unit) <= _MAX_UNIT_CHARS)
        return encoded

    def piece(self, token: int) -> str:
        """The piece with this id as the vocabulary spells it: `▁word`, `<0x0A>`, `<bos>`."""
        spelling: str = self._processor.id_to_piece(token)
        return spelling

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`. Bytes that are not valid UTF-8 (part of a character) become U+FFFD.

        Control ids give their name (`<end_of_turn>`), or nothing with `skip_special`.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        # SentencePiece drops control pieces and writes "⁇" for <unk>, so it gets only the others.
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"cannot decode token id {token}: the tokenizer has ids 0 to "
                    f"{self.vocab_size - 1}; does it belong to this model?"
                )
            if token not in self._control_text:
                run.append(token)
                continue
            parts.append(self._processor.decode(run))
            run = []
            if not skip_special:
                parts.append(self._control_text[token])
        parts.append(self._processor.decode(run))
        return "".join(parts)


def _unit_pattern(pieces: Iterable[str]) -> re.Pattern[str]:
    r"""A pattern that cuts text into units. The ids of a text are the ids of its units, in order.

    BPE joins neighbours into pieces of the vocabulary. So it never joins two neighbouring
    characters that stand side by side in no piece. Gemma 3 has `▁` after another character only in
    `>▁</`, and has no piece of `\n` and another character. So a unit is a word with the spaces
    before it, or a run of newlines.
    """
    before_space, mixes_newline = set(), False
    for piece in pieces:
        before_space.update(re.findall(r"([^ \u2581])[ \u2581]", piece))
        mixes_newline |= "\n" in piece and piece.strip("\n") != ""
    line = "" if mixes_newline else r"\n"
    word = rf"[^ \u2581{line}]"
    joined = "".join(map(re.escape, sorted(before_space)))
    more = rf"(?:(?<=[{joined}])[ \u2581]+{word}*)*" if joined else ""
    return re.compile(rf"[ \u2581]*{word}+{more}|\n+|[ \u2581]+")


def _utf8(text: str, where: str = "") -> bytes:
    """`text` in UTF-8; ValueError if that is not possible."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
            "not valid Unicode text; repair or drop it"
        ) from None
