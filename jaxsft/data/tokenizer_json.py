"""Reads a `tokenizer.json`, and encodes as the tokenizers library does with it.

Taken from the file are the vocabulary, the merges and the added tokens. The rest must be what
Gemma's files say: BPE with byte fallback, a space becomes U+2581 `▁`, nothing else is normalised or
split. It is checked and built anew here, so no pattern of a file is run.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers.models import BPE
from tokenizers.normalizers import Replace

from jaxsft.common.files import read_json
from jaxsft.data.added_tokens import AddedToken, AddedTokens, added_token, read_added_tokens
from jaxsft.data.vocabulary import (
    BYTE,
    CONTROL,
    NORMAL,
    REQUIRED_PIECES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    check_head,
)

_MAX_JSON_BYTES = 1 << 27  # Gemma's is 17 to 33 MB
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNDECODED = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of a byte

_SPACE = {"String": " "}
_NORMALIZERS = [{"type": "Replace", "pattern": _SPACE, "content": "\u2581"}]
# After the normaliser there is no space left to split at.
_PRE_TOKENIZERS = [
    {"type": "Split", "pattern": _SPACE, "behavior": "MergedWithPrevious", "invert": False}
]
_DECODERS = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


class BPEVocabulary(NamedTuple):
    """A `tokenizer.json` with the added tokens of the files beside it.

    Attributes:
      pieces: in the order of their ids.
      merges: pairs of pieces that become one, first come first merged; none makes a control token.
      added: added tokens by id, control tokens too.
      control: ids that no text gives.
    """

    pieces: list[str]
    merges: list[tuple[str, str]]
    added: dict[int, AddedToken]
    control: frozenset[int]

    def text_tokens(self) -> list[AddedToken]:
        """The added tokens that are found in a text, in the order of their ids."""
        return [self.added[i] for i in sorted(self.added.keys() - self.control)]


class BPEEncoder:
    """Text to ids by the tokenizers library, without control tokens; ids to text."""

    def __init__(self, vocabulary: BPEVocabulary, where: str) -> None:
        """Raises ValueError, with `where` in it, if the library refuses the vocabulary."""
        pieces, merges, _, control = vocabulary
        ids = {piece: i for i, piece in enumerate(pieces) if i not in control or len(piece) > 1}
        try:
            self._tokenizer = tokenizers.Tokenizer(BPE(ids, merges, byte_fallback=True))
        except Exception as error:  # the library has no class of its own
            why = repr(str(error)[:200])
            raise ValueError(f"{where}: tokenizers refuses the vocabulary: {why}") from None
        self._tokenizer.normalizer = Replace(" ", "\u2581")
        self._tokenizer.add_tokens(
            [
                tokenizers.AddedToken(**{k: v for k, v in token._asdict().items() if k != "id"})
                for token in vocabulary.text_tokens()
            ]
        )
        matches = ((i, _BYTE.fullmatch(piece)) for i, piece in enumerate(pieces))
        self._bytes = {i: int(match[1], 16) for i, match in matches if match}
        self._pieces = pieces

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        encode = self._tokenizer.encode  # encode_batch starts threads, which a fork does not like
        return [encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Each byte that is not UTF-8 becomes a U+FFFD, as in SentencePiece."""
        parts, run = [], bytearray()
        for token in ids:
            if (byte := self._bytes.get(token)) is not None:
                run.append(byte)
                continue
            parts += [_decoded(run), self._pieces[token].replace("\u2581", " ")]
            run.clear()
        return "".join([*parts, _decoded(run)])


def _decoded(run: bytearray) -> str:
    return _UNDECODED.sub("\ufffd", run.decode("utf-8", "surrogateescape"))


def read_tokenizer_json(path: Path) -> BPEVocabulary:
    """The vocabulary in a `tokenizer.json`, with the added tokens of the files beside it.

    Raises:
      ValueError: the file is missing, damaged, a Git LFS pointer, not of Gemma's kind, or
        contradicts a file beside it.
    """
    check_head(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path}: too large for a tokenizer.json; get it again")
    raw = read_json(path)
    model = raw.get("model")
    if not isinstance(model, Mapping):
        raise ValueError(f"{path}: has no model: not a tokenizer.json, or damaged; get it again")
    _check_kind(path, raw, model)
    ids, merges = _vocab(path, model.get("vocab")), _merges(path, model.get("merges"))
    beside = read_added_tokens(path.parent)
    listed = raw.get("added_tokens") or []
    if not isinstance(listed, list):
        raise ValueError(f"{path}: added_tokens is not a list; get the file again")
    own = sorted(added_token(path, token) for token in listed)
    added = _with_added(path, ids, [*own, *beside.tokens])
    return _whole(path, ids, merges, added, beside)


def _check_kind(path: Path, raw: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """ValueError that names whatever differs from Gemma's tokenizers."""
    parts: dict[str, tuple[list[Any], list[list[Any]]]] = {
        "normalizer": (_steps(raw.get("normalizer"), "normalizers"), [_NORMALIZERS]),
        "pre_tokenizer": (
            _steps(raw.get("pre_tokenizer"), "pretokenizers"),
            [[], _PRE_TOKENIZERS],
        ),
        "decoder": (_steps(raw.get("decoder"), "decoders"), [_DECODERS]),
    }
    expected = {
        "a model of the type BPE": model.get("type", "BPE") == "BPE",
        "byte_fallback": model.get("byte_fallback") is True,
        "no dropout": not model.get("dropout"),
        "no continuing_subword_prefix": not model.get("continuing_subword_prefix"),
        "no end_of_word_suffix": not model.get("end_of_word_suffix"),
        "no ignore_merges": not model.get("ignore_merges"),
        **{f"another {name}": steps in known for name, (steps, known) in parts.items()},
    }
    if lacking := [name for name, holds in expected.items() if not holds]:
        raise ValueError(f"{path}: not a Gemma tokenizer, which has {', '.join(lacking)}")


def _steps(raw: Any, key: str) -> list[Any]:
    """The steps of a normaliser, pre-tokenizer or decoder: none, itself, or those of a sequence."""
    if raw is None:
        return []
    is_sequence = isinstance(raw, Mapping) and raw.get("type") == "Sequence"
    return raw.get(key, [raw]) if is_sequence else [raw]


def _vocab(path: Path, raw: Any) -> dict[str, int]:
    """Piece -> id."""
    is_vocab = isinstance(raw, dict) and raw and set(map(type, raw.values())) == {int}
    if not is_vocab:
        raise ValueError(f"{path}: model.vocab is not an object of pieces and ids; get it again")
    try:
        "".join(raw).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{path}: a piece is not Unicode text: damaged; get it again") from None
    if "" in raw:
        raise ValueError(f"{path}: model.vocab has an empty piece: damaged; get it again")
    return raw


def _merges(path: Path, raw: Any) -> list[tuple[str, str]]:
    """The merges; older files have them as "a b"."""
    if isinstance(raw, list):
        pairs = [tuple(m.split(" ") if isinstance(m, str) else m or ()) for m in raw]
        if all(len(pair) == 2 and type(pair[0]) is type(pair[1]) is str for pair in pairs):
            return pairs
    raise ValueError(f"{path}: model.merges is not a list of pairs; get the file again")


def _with_added(
    path: Path, ids: dict[str, int], tokens: Iterable[AddedToken]
) -> dict[int, AddedToken]:
    """The added tokens by id; later flags win. Those that are new get a place in `ids`."""
    added = {}
    for token in tokens:
        if token.single_word and len(token.content) == 1 and token.content not in ids:
            raise ValueError(
                f"{path}: {token.content!r}: a letter as a single_word is not supported"
            )
        known = ids.setdefault(token.content, token.id)
        if known != token.id:
            raise ValueError(
                f"{path}: {token.content[:40]!r} has the id {known} in the vocabulary and "
                f"{token.id} as an added token, here or beside it; save the tokenizer again"
            )
        added[token.id] = token
    return added


def _whole(
    path: Path,
    ids: Mapping[str, int],
    merges: list[tuple[str, str]],
    added: dict[int, AddedToken],
    beside: AddedTokens,
) -> BPEVocabulary:
    """Checks that ids count from 0 and that nothing is missing, and finds the control tokens."""
    pieces = sorted(ids, key=ids.__getitem__)
    for i, piece in enumerate(pieces):
        if ids[piece] != i:
            raise ValueError(
                f"{path}: the ids do not count from 0: {piece[:40]!r} has the id {ids[piece]}, and "
                f"{i} must come; the file, or one with added tokens beside it, is stale or damaged"
            )
    if missing := [piece for piece in REQUIRED_PIECES if piece not in ids]:
        raise ValueError(f"{path}: the vocabulary lacks {', '.join(missing)}: not a Gemma one")
    # transformers' conversion of Gemma 1 and 2 spells <0x09> as a tab.
    spelt = {f"<0x{i:02X}>" for i in range(256) if i > 127 or chr(i) not in ids}
    if missing := sorted(spelt - ids.keys()):
        raise ValueError(
            f"{path}: the vocabulary lacks byte pieces ({', '.join(missing[:3])}): damaged file"
        )
    control = {
        i
        for i, piece in enumerate(pieces)
        if beside.is_control(piece, i in added and added[i].special)
    }
    names = {pieces[i] for i in control}
    merges = [(a, b) for a, b in merges if a + b not in names]
    if letters := {name for name in names if len(name) == 1}:
        merges = [pair for pair in merges if letters.isdisjoint(pair)]
    return BPEVocabulary(pieces, merges, added, frozenset(control))


def sentencepiece_vocabulary(vocabulary: BPEVocabulary) -> Vocabulary:
    """The nearest vocabulary for SentencePiece. Its ids may differ, so compare them before use.

    Pieces that merges make get their place as the score. A run of spaces that both is an added
    token and made by merges is an ordinary piece: as text it comes with spaces, not with `▁`.
    """
    made = {a + b: -float(rank) for rank, (a, b) in reversed([*enumerate(vocabulary.merges)])}
    text_tokens = {token.id for token in vocabulary.text_tokens()}
    pieces = list(vocabulary.pieces)
    if "<0x09>" not in pieces:
        pieces[pieces.index("\t")] = "<0x09>"
    last = -float(len(made))
    scores, types = [], []
    for i, piece in enumerate(pieces):
        if i in vocabulary.control:
            kind = UNKNOWN if piece == "<unk>" else CONTROL
        elif _BYTE.fullmatch(piece):
            kind = BYTE
        elif i in text_tokens and not (piece in made and not piece.strip("\u2581")):
            kind = USER_DEFINED
        else:  # SentencePiece would make a piece that no merge makes
            kind = NORMAL if piece in made or len(piece) == 1 else UNUSED
        scores.append(made.get(piece, last - i) if kind == NORMAL else 0.0)
        types.append(kind)
    return Vocabulary(pieces, scores, types)


def digest_of(vocabulary: BPEVocabulary) -> str:
    """SHA-256, in hex, of all that decides the ids of a text."""
    pieces, merges, _, control = vocabulary
    decisive = [pieces, merges, vocabulary.text_tokens(), sorted(control)]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()


def means_the_same(model: Vocabulary, types: Sequence[int], vocabulary: BPEVocabulary) -> bool:
    """Does a `tokenizer.model` have the vocabulary of the `tokenizer.json` beside it?

    The latter may have further control tokens (`<image_soft_token>` of Gemma 3). Then the two give
    the same ids for all texts but few odd ones: see data/tokenizer.py.
    """
    pieces, control, num = vocabulary.pieces, vocabulary.control, len(model.pieces)
    names = [
        piece.replace(" ", "\u2581") if kind == USER_DEFINED else piece
        for piece, kind in zip(model.pieces, types, strict=True)
    ]
    if "<0x09>" not in pieces[:num]:  # transformers' conversion of Gemma 1 and 2
        names = ["\t" if name == "<0x09>" else name for name in names]
    text_tokens = vocabulary.text_tokens()
    if (
        names != pieces[:num]
        or not control.issuperset(range(num, len(pieces)))
        or {i for i in control if i < num} != _of_type(types, CONTROL, UNKNOWN)
        or {token.id for token in text_tokens} != _of_type(types, USER_DEFINED)
        or any(token.looks_around for token in text_tokens)
    ):
        return False
    scores = {
        piece: score
        for piece, score, kind in zip(names, model.scores, types, strict=True)
        if kind == NORMAL
    }
    order = [scores[made] for made in map("".join, vocabulary.merges) if made in scores]
    return order == sorted(order, reverse=True)


def _of_type(types: Sequence[int], *kinds: int) -> set[int]:
    return {i for i, kind in enumerate(types) if kind in kinds}
