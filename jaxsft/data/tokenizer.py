"""Gemma's SentencePiece tokenizer, from `tokenizer.model` or rebuilt from a GGUF's vocabulary.

Both sources give the same canonical model, byte for byte: BPE, identity normaliser (nothing is
stripped, folded or prefixed; a space becomes U+2581 `▁`), byte fallback, and every reserved token
typed CONTROL. SentencePiece never produces a CONTROL piece from text, so a literal
`<end_of_turn>` in user text is ordinary text, whatever type the source gave that token.

What text means in ids equals the official `tokenizer.json` with its reserved tokens taken off the
list of added tokens (tests/golden/tokenizer_gemma3.json). One lossy case, as in the official
tokenizers: U+2581 in user text has the ids of a space and decodes to a space. Where two or more
literal `▁` touch a space, `tokenizer.json` splits the run and SentencePiece does not; ours is
SentencePiece.
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

_MAX_UNITS, _MAX_UNIT_CHARS = 1 << 19, 24  # kept: some 100 MB of words, at most 400 MB


class Tokenizer:
    """Text to ids and back; no BOS is ever added, no control id ever comes from text.

    Attributes:
        vocab_size: number of pieces (256,000 for Gemma 1 and 2, 262,144 for Gemma 3).
        pad_id, eos_id, bos_id, start_of_turn_id, end_of_turn_id: found by piece name.
        stop_ids: (eos_id, end_of_turn_id); generation stops on either.
        control_ids: every id that text cannot produce (reserved tokens, `<unk>` included).
        model_bytes: the canonical model; written to `tokenizer.model` it loads to the same digest.
        digest: SHA-256 of model_bytes, in hex.
    """

    def __init__(self, vocabulary: Vocabulary, where: str) -> None:
        """Build from a vocabulary; `where` names its source in errors, which are ValueError."""
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
        """Load a SentencePiece `tokenizer.model`.

        Raises:
            ValueError: missing, empty, truncated or damaged file, a Git LFS pointer, or a model
                that is not a Gemma one.
        """
        return cls(read_model(Path(path)), str(path))

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Rebuild the tokenizer from a GGUF file's `tokenizer.ggml.*` fields.

        Raises:
            ValueError: not a complete GGUF file, or it has no SentencePiece vocabulary of Gemma.
        """
        return cls(read_gguf(Path(path)), str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS; never a control id.

        Raises:
            ValueError: `text` holds a lone surrogate, which UTF-8 cannot express.
        """
        ids: list[int] = self._processor.encode(_utf8(text))
        return ids

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, several times as fast where words recur.

        Texts are cut where no piece of the vocabulary reaches across, mostly in front of spaces, so
        that the ids of the units, which are kept, are those of the text.

        Raises:
            ValueError: as `encode`, with the index of the offending text.
        """
        return [self._encode_by_units(text, i) for i, text in enumerate(texts)]

    def _encode_by_units(self, text: str, index: int) -> list[int]:
        _utf8(text, f"text {index}: ")  # a unit would be refused without the text's index
        known, units = self._unit_ids, self._find_units(text)
        new = list(set(units).difference(known))
        if not new:
            return list(itertools.chain.from_iterable(map(known.__getitem__, units)))
        found = dict(zip(new, self._processor.encode(new), strict=True))
        ids = [found[unit] if unit in found else known[unit] for unit in units]
        if len(known) > _MAX_UNITS:
            known.clear()
        # A line without spaces is one unit, which will not recur.
        known.update((unit, found[unit]) for unit in new if len(unit) <= _MAX_UNIT_CHARS)
        return list(itertools.chain.from_iterable(ids))

    def piece(self, token: int) -> str:
        """The vocabulary's own spelling of an id: `▁word`, `<0x0A>`, `<bos>`."""
        spelling: str = self._processor.id_to_piece(token)
        return spelling

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`. Bytes that are not valid UTF-8 (a cut character) become U+FFFD.

        Control ids give their literal text (`<end_of_turn>`), nothing with `skip_special`.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        # SentencePiece drops control pieces and spells <unk> "⁇": it only gets the runs between.
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
    r"""Cuts text into units whose ids, one after the other, are those of the text.

    BPE only ever joins neighbours into a piece of the vocabulary, so that no join crosses a place
    between two characters that no piece has side by side. Gemma 3 has `▁` behind another character
    in `>▁</` alone, and `\n` beside another nowhere: a unit is a word with the spaces in front of
    it, or a run of newlines.
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
    """UTF-8 of `text`; ValueError where it has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
            "not valid Unicode text; repair or drop it"
        ) from None
