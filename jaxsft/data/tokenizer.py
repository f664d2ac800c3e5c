"""Gemma's tokenizer, from `tokenizer.json`, `tokenizer.model` or the vocabulary of a GGUF file.

It is BPE with byte fallback and does not normalise text (a space becomes U+2581 `▁`, nothing else
changes). Text never gives a control id: `<end_of_turn>` in user text is ordinary text, whatever
type the source gives to that token. Which tokens are control tokens: data/added_tokens.py.

`tokenizer.json` is what other users of a model have, so it decides. If the `tokenizer.model` beside
it has the same vocabulary, or there is no `tokenizer.json`, SentencePiece encodes. Its ids equal
those of the official `tokenizer.json` without reserved tokens in its list of added tokens
(tests/support/golden/tokenizer_gemma3.json). There are two exceptions. U+2581 in user text gets the
ids of a space and decodes to a space, as in the official tokenizers. If two or more literal `▁`
stand next to a space, `tokenizer.json` splits them and SentencePiece does not. (For Gemma 1 and 2
the official files also differ in runs of tabs and of more than 31 spaces.) Otherwise the tokenizers
library encodes, and all ids are those of `tokenizer.json`.
"""

import functools
import hashlib
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from jaxsft.data.added_tokens import read_added_tokens, with_added_tokens
from jaxsft.data.tokenizer_json import (
    BPEEncoder,
    BPEVocabulary,
    digest_of,
    means_the_same,
    read_tokenizer_json,
    sentencepiece_vocabulary,
)
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
        vocab_size: number of ids (256,000 for Gemma 1 and 2, 262,144 for Gemma 3 before others
            were added).
        num_text_ids: one more than the highest id that a text gives; an embedding has a row for
            each. Control tokens may come after them.
        pad_id, eos_id, bos_id, start_of_turn_id, end_of_turn_id: found by the piece's name.
        stop_ids: (eos_id, end_of_turn_id); generation stops at either.
        control_ids: every id that text cannot give: the reserved tokens, with `<unk>`.
        bpe: what `tokenizer.json` holds, None if SentencePiece encodes.
        digest: SHA-256, in hex, of all that decides the ids. With SentencePiece it is that of
            `model_bytes`: a `tokenizer.model` of these bytes has the same digest.
        vocabulary_digest: SHA-256 of the pieces that text gives and of the control ids between
            them. Tokenizers that have the same give the same ids for all texts but odd ones.
    """

    def __init__(self, vocabulary: Vocabulary | BPEVocabulary, where: str) -> None:
        """Builds it from a vocabulary. Errors are ValueError; `where` names the source in them."""
        self.bpe: BPEVocabulary | None = None
        self._encoder: BPEEncoder | _SentencePiece
        if isinstance(vocabulary, BPEVocabulary):
            self.bpe, pieces, control = vocabulary, vocabulary.pieces, vocabulary.control
            self._encoder, self.digest = BPEEncoder(vocabulary, where), digest_of(vocabulary)
            cuts_texts = not any(token.looks_around for token in vocabulary.text_tokens())
        else:
            types = canonical_types(vocabulary, where)
            self._encoder = _SentencePiece(serialize(vocabulary, types), where)
            self.digest = hashlib.sha256(self._encoder.model_bytes).hexdigest()
            pieces = [self._encoder.piece(i) for i in range(len(types))]
            control = frozenset(i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN))
            cuts_texts = True
        self._pieces: list[str] = pieces
        self.control_ids: frozenset[int] = control
        self.vocab_size: int = len(pieces)
        self.num_text_ids: int = 1 + max(set(range(len(pieces))) - control)
        ids = {pieces[i]: i for i in control}
        self.pad_id: int = ids["<pad>"]
        self.eos_id: int = ids["<eos>"]
        self.bos_id: int = ids["<bos>"]
        self.start_of_turn_id: int = ids["<start_of_turn>"]
        self.end_of_turn_id: int = ids["<end_of_turn>"]
        self.stop_ids: tuple[int, int] = (self.eos_id, self.end_of_turn_id)
        self._find_units = _unit_pattern(pieces).findall if cuts_texts else _whole_text
        self._unit_ids: dict[str, list[int]] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Loads a `tokenizer.json` or a SentencePiece `tokenizer.model`.

        Added tokens of files beside it (tokenizer_config.json, added_tokens.json) count too.

        Raises:
            ValueError: the file is missing, empty, cut off, damaged, a Git LFS pointer, or not a
                Gemma model; or it contradicts the files beside it.
        """
        path, where = Path(path), str(path)
        if path.suffix != ".json":
            model = read_model(path)
            return cls(with_added_tokens(model, read_added_tokens(path.parent), where), where)
        vocabulary = read_tokenizer_json(path)
        beside = path.with_name("tokenizer.model")
        if beside.is_file():
            model = read_model(beside)
            if means_the_same(model, canonical_types(model, str(beside)), vocabulary):
                further = vocabulary.pieces[len(model.pieces) :]
                nothing, kinds = [0.0] * len(further), [CONTROL] * len(further)
                pieces, scores, types = model
                model = Vocabulary([*pieces, *further], [*scores, *nothing], [*types, *kinds])
                return cls(model, str(beside))
        return cls(vocabulary, where)

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Rebuilds the tokenizer from the `tokenizer.ggml.*` fields of a GGUF file.

        Raises:
            ValueError: the GGUF file is not complete, or has no SentencePiece vocabulary of Gemma.
        """
        return cls(read_gguf(Path(path)), str(path))

    @functools.cached_property
    def model_bytes(self) -> bytes:
        """A `tokenizer.model`: the canonical one if SentencePiece encodes, else the nearest one."""
        if self.bpe is None:
            assert isinstance(self._encoder, _SentencePiece)
            return self._encoder.model_bytes
        nearest = sentencepiece_vocabulary(self.bpe)
        return serialize(nearest, nearest.types)

    @property
    def vocabulary_digest(self) -> str:
        """See the class."""
        num = self.num_text_ids
        # transformers' conversion of Gemma 1 and 2 spells <0x09> as a tab.
        known = ["<0x09>" if piece == "\t" else piece for piece in self._pieces[:num]]
        known += [str(i) for i in sorted(self.control_ids) if i < num]
        return hashlib.sha256("\0".join(known).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and without control ids.

        Raises:
            ValueError: `text` has a lone surrogate, which UTF-8 cannot encode.
        """
        _utf8(text)
        return self._encoder.encode([text])[0]

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
            found = dict(zip(new, self._encoder.encode(new), strict=True))
            ids = (found[unit] if unit in found else known[unit] for unit in units)
            encoded.append(list(itertools.chain.from_iterable(ids)))
            if len(known) > _MAX_UNITS:
                known.clear()
            # A line without spaces is one long unit. It will not repeat.
            known.update((unit, found[unit]) for unit in new if len(unit) <= _MAX_UNIT_CHARS)
        return encoded

    def piece(self, token: int) -> str:
        """The piece with this id as the vocabulary spells it: `▁word`, `<0x0A>`, `<bos>`."""
        return self._pieces[token]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`. Bytes that are not valid UTF-8 (part of a character) become U+FFFD.

        Control ids give their name (`<end_of_turn>`), or nothing with `skip_special`.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        # The encoders drop control pieces or write "⁇" for <unk>, so they get only the others.
        parts: list[str] = []
        run: list[int] = []
        for token in map(int, ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(
                    f"cannot decode token id {token}: the tokenizer has ids 0 to "
                    f"{self.vocab_size - 1}; does it belong to this model?"
                )
            if token not in self.control_ids:
                run.append(token)
                continue
            parts.append(self._encoder.decode(run))
            run = []
            if not skip_special:
                parts.append(self._pieces[token])
        parts.append(self._encoder.decode(run))
        return "".join(parts)


class _SentencePiece:
    """A canonical `tokenizer.model` in memory."""

    def __init__(self, model_bytes: bytes, where: str) -> None:
        self.model_bytes = model_bytes
        self._processor: Any = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError as error:
            raise ValueError(f"{where}: SentencePiece refuses the vocabulary: {error}") from error

    def piece(self, token: int) -> str:
        spelling: str = self._processor.id_to_piece(token)
        return spelling

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(texts)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text


def _whole_text(text: str) -> list[str]:
    """A text as its only unit, where added tokens depend on the text around them."""
    return [text] if text else []


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


def _utf8(text: str, where: str = "") -> None:
    """ValueError if the text cannot be encoded in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
            "not valid Unicode text; repair or drop it"
        ) from None
