"""Reads Gemma's vocabulary from `tokenizer.model` or GGUF, and makes one canonical model of it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import (  # type: ignore[attr-defined]
    ModelProto,
    TrainerSpec,
)

from jaxsft.formats.gguf import GGUFFile

# SentencePiece's piece types; `tokenizer.ggml.token_type` uses the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Found by name, because the ids differ: <start_of_turn> is 106 in Gemma 1 and 2, 105 in Gemma 3.
REQUIRED_PIECES = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")

# Reserved in Gemma 1, 2 or 3. Sources give them different types. In a tokenizer.model turn tokens
# and unused tokens may be USER_DEFINED, which match in text; in a GGUF <start_of_image> may be.
_RESERVED = re.compile(
    r"<(pad|eos|bos|unk|mask|2mass|start_of_turn|end_of_turn|start_of_image|end_of_image"
    r"|image_soft_token|unused\d+)>|\[multimodal\]|\[@BOS@\]"
)
_MAX_MODEL_BYTES = 1 << 28  # Gemma's tokenizer.model is 4 to 5 MB


class Vocabulary(NamedTuple):
    """The pieces in the order of their ids, as in the source."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]  # NORMAL ... BYTE


def read_gguf(path: Path) -> Vocabulary:
    """The vocabulary in a GGUF file; ValueError if it has none, or not one of Gemma's kind."""
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


def read_model(path: Path) -> Vocabulary:
    """The vocabulary in a `tokenizer.model`; ValueError if it does not work as Gemma's does."""
    if check_head(path).startswith(b"GGUF"):
        raise ValueError(f"{path}: a GGUF file, not a tokenizer.model; load it as GGUF")
    if path.stat().st_size > _MAX_MODEL_BYTES:
        raise ValueError(f"{path}: too large for a tokenizer.model; is it the model's weights?")
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        proto.Clear()
    pieces = [piece.piece for piece in proto.pieces]
    if not all(isinstance(piece, str) for piece in pieces):  # bytes: not UTF-8
        raise ValueError(f"{path}: a piece is not UTF-8: damaged file; get it again")
    # The two specs come after the pieces, so a file that was cut off lacks one of them.
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


def is_reserved(piece: str) -> bool:
    """Is it the name of a token that Gemma 1, 2 or 3 reserves, such as `<end_of_turn>`?"""
    return _RESERVED.fullmatch(piece) is not None


def canonical_types(vocabulary: Vocabulary, where: str) -> list[int]:
    """Types of the pieces [vocab_size]; reserved tokens are CONTROL, whatever the source says.

    Raises ValueError, with `where` in it, if the vocabulary is damaged or not a Gemma one.
    """
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
        CONTROL if is_reserved(piece) else kind for piece, kind in zip(pieces, types, strict=True)
    ]
    canonical[pieces.index("<unk>")] = UNKNOWN  # a GGUF types it CONTROL
    return canonical


def serialize(vocabulary: Vocabulary, types: Sequence[int]) -> bytes:
    """The canonical ModelProto as bytes; equal vocabularies give equal bytes."""
    proto = ModelProto()
    for piece, score, kind in zip(vocabulary.pieces, vocabulary.scores, types, strict=True):
        if kind == USER_DEFINED:  # llama.cpp's converter writes `▁` as a space here
            piece = piece.replace(" ", "\u2581")
        # Only NORMAL scores count; the others are -1000 in a GGUF. The + 0.0 turns -0.0 into 0.0.
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


def check_head(path: Path) -> bytes:
    """The first bytes of a file; ValueError if it is empty, unreadable or a Git LFS pointer."""
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
