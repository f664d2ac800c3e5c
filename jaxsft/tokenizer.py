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
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
    ModelProto,
    TrainerSpec,
)

from jaxsft.gguf_io import GGUFFile

# SentencePiece's piece types; `tokenizer.ggml.token_type` uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Looked up by name: the ids differ between Gemma 1/2 and 3 (<start_of_turn> is 106 or 105).
REQUIRED_PIECES = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

# Reserved in Gemma 1, 2 or 3. Sources disagree on their types: a tokenizer.model may have turn and
# unused tokens as USER_DEFINED (matched in text!), a GGUF has <start_of_image> so.
_RESERVED = re.compile(
    r"<(pad|eos|bos|unk|mask|2mass|start_of_turn|end_of_turn|start_of_image|end_of_image"
    r"|image_soft_token|unused\d+)>|\[multimodal\]|\[@BOS@\]"
)
_MAX_MODEL_BYTES = 1 << 28  # Gemma's tokenizer.model is 4 to 5 MB


class Vocabulary(NamedTuple):
    """Pieces by id, as the source has them."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]  # NORMAL ... BYTE


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
        types = _canonical_types(vocabulary, where)
        self.model_bytes: bytes = _serialize(vocabulary, types)
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

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Load a SentencePiece `tokenizer.model`.

        Raises:
            ValueError: missing, empty, truncated or damaged file, a Git LFS pointer, or a model
                that is not a Gemma one.
        """
        return cls(_read_model(Path(path)), str(path))

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Rebuild the tokenizer from a GGUF file's `tokenizer.ggml.*` fields.

        Raises:
            ValueError: not a complete GGUF file, or it has no SentencePiece vocabulary of Gemma.
        """
        return cls(_read_gguf(Path(path)), str(path))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS; never a control id.

        Raises:
            ValueError: `text` holds a lone surrogate, which UTF-8 cannot express.
        """
        ids: list[int] = self._processor.encode(_utf8(text))
        return ids

    def encode_many(self, texts: Sequence[str], num_threads: int = -1) -> list[list[int]]:
        """`encode` of every text, on `num_threads` threads (-1: one per core).

        Python lists take about 40 bytes a token: hand over some thousand texts at a time.

        Raises:
            ValueError: as `encode`, with the index of the offending text.
        """
        encoded = [_utf8(text, f"text {i}: ") for i, text in enumerate(texts)]
        ids: list[list[int]] = self._processor.encode(encoded, num_threads=num_threads)
        return ids

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


def _read_gguf(path: Path) -> Vocabulary:
    """The vocabulary in a GGUF file."""
    metadata = GGUFFile(path).metadata

    def contents(name: str, kind: str) -> Any:
        value = metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            raise ValueError(
                f"{path}: the file has no tokenizer.ggml.{name}; use a complete model file, or "
                "give a tokenizer.model"
            )
        found = value.dtype.kind if isinstance(value, np.ndarray) else type(value).__name__
        if found != kind or len(value) == 0:
            raise ValueError(f"{path}: tokenizer.ggml.{name} is empty or of a wrong type")
        return value

    if (model := contents("model", "str")) != "llama":
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {model!r}; Gemma 1, 2 and 3 have 'llama'"
        )
    scores, types = contents("scores", "f"), contents("token_type", "i")
    return Vocabulary(contents("tokens", "list"), scores.tolist(), types.tolist())


def _read_model(path: Path) -> Vocabulary:
    """The vocabulary in a `tokenizer.model`, after checking that it works as Gemma's does."""
    if _read_head(path).startswith(b"GGUF"):
        raise ValueError(f"{path}: a GGUF file, not a tokenizer.model; load it as GGUF")
    if path.stat().st_size > _MAX_MODEL_BYTES:
        raise ValueError(f"{path}: too large for a tokenizer.model; is it the model's weights?")
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        proto.Clear()
    pieces = [piece.piece for piece in proto.pieces]
    if not all(isinstance(piece, str) for piece in pieces):  # protobuf gives bytes then
        raise ValueError(f"{path}: a piece is not UTF-8: damaged file; get it again")
    # Pieces are stored before the two specs, so a file cut between records lacks one.
    if not (pieces and proto.HasField("trainer_spec") and proto.HasField("normalizer_spec")):
        raise ValueError(f"{path}: no SentencePiece model, or truncated; get tokenizer.model again")
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    expected = {
        "model_type BPE": trainer.model_type == TrainerSpec.BPE,
        "byte_fallback": trainer.byte_fallback,
        "no treat_whitespace_as_suffix": not trainer.treat_whitespace_as_suffix,
        "no precompiled_charsmap": not normalizer.precompiled_charsmap,
        "no add_dummy_prefix": not normalizer.add_dummy_prefix,
        "no remove_extra_whitespaces": not normalizer.remove_extra_whitespaces,
        "escape_whitespaces": normalizer.escape_whitespaces,
    }
    if lacking := [name for name, holds in expected.items() if not holds]:
        raise ValueError(f"{path}: not a Gemma tokenizer, which has {', '.join(lacking)}")
    scores, types = ([getattr(piece, name) for piece in proto.pieces] for name in ("score", "type"))
    return Vocabulary(pieces, scores, types)


def _canonical_types(vocabulary: Vocabulary, where: str) -> list[int]:
    """Piece types [vocab_size] with reserved tokens CONTROL, whatever the source says."""
    pieces, scores, types = vocabulary
    if not len(pieces) == len(scores) == len(types):
        raise ValueError(
            f"{where}: {len(pieces)} pieces, {len(scores)} scores, {len(types)} types: damaged file"
        )
    present = set(pieces)
    if missing := [piece for piece in REQUIRED_PIECES if piece not in present]:
        raise ValueError(f"{where}: the vocabulary lacks {', '.join(missing)}: not a Gemma one")
    if not np.isfinite(np.asarray(scores, np.float64)).all():
        raise ValueError(f"{where}: the vocabulary has a score that is not finite: damaged file")
    if not all(pieces) or not set(types) <= set(range(NORMAL, BYTE + 1)):
        raise ValueError(f"{where}: the vocabulary has an empty or untyped piece: damaged file")
    canonical = [
        CONTROL if _RESERVED.fullmatch(piece) else kind
        for piece, kind in zip(pieces, types, strict=True)
    ]
    canonical[pieces.index("<unk>")] = UNKNOWN  # a GGUF types it CONTROL
    return canonical


def _serialize(vocabulary: Vocabulary, types: Sequence[int]) -> bytes:
    """The canonical ModelProto; equal vocabularies give equal bytes."""
    proto = ModelProto()
    for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, types, strict=True):
        if kind == USER_DEFINED:  # llama.cpp's converter writes runs of `▁` as plain spaces
            piece = piece.replace(" ", "\u2581")
        # Only NORMAL scores count; the others are -1000 in a GGUF. The + 0.0 makes -0.0 be 0.0.
        proto.pieces.add(piece=piece, score=score + 0.0 if kind == NORMAL else 0.0, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = TrainerSpec.BPE
    trainer.vocab_size = len(proto.pieces)
    trainer.byte_fallback = True
    for name in ("pad", "eos", "bos", "unk"):
        setattr(trainer, f"{name}_piece", f"<{name}>")
        setattr(trainer, f"{name}_id", vocabulary.pieces.index(f"<{name}>"))
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = False
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return bytes(proto.SerializeToString(deterministic=True))


def _read_head(path: Path) -> bytes:
    """The first bytes of a file that is readable, not empty and no Git LFS pointer."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    if not head:
        raise ValueError(f"{path}: the file is empty; get it again")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path}: a Git LFS pointer, not the file itself; run 'git lfs pull'")
    return head


def _utf8(text: str, where: str = "") -> bytes:
    """UTF-8 of `text`; ValueError where it has none."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}lone surrogate U+{ord(text[error.start]):04X} at character {error.start}: "
            "not valid Unicode text; repair or drop it"
        ) from None
