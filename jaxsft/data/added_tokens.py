"""Tokens that were added to a tokenizer, and which tokens are control tokens.

A control token is one that a chat template, a sampler or padding inserts: Gemma's reserved names,
and special tokens that the tokenizer's settings name for a role, such as `eos_token`. No text gives
their ids. All other added tokens are text (`<think>`, `<table>`), whatever their flag `special`
says: in transformers they match in a text too, and the flag only hides them from decoded text.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.common.files import read_json
from jaxsft.data.vocabulary import (
    CONTROL,
    REQUIRED_PIECES,
    USER_DEFINED,
    Vocabulary,
    is_reserved,
)

SETTINGS_NAME = "tokenizer_config.json"
ADDED_NAME = "added_tokens.json"  # transformers 4 and earlier, beside a tokenizer.model
ROLES_NAME = "special_tokens_map.json"  # transformers 4; later tokenizer_config.json has them
_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
_MAX_SETTINGS_BYTES = 1 << 25  # Gemma 3's has 1.2 MB


class AddedToken(NamedTuple):
    """A token that is found in a text before the vocabulary's other pieces.

    The flags are those of `tokenizers.AddedToken`.
    """

    id: int
    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    @property
    def looks_around(self) -> bool:
        """Does it depend on, or take away, the text beside it?"""
        return self.lstrip or self.rstrip or self.single_word


class AddedTokens(NamedTuple):
    """What the files beside a vocabulary say: tokens by id, and the names that have a role."""

    tokens: list[AddedToken]
    roles: frozenset[str]

    def is_control(self, content: str, special: bool) -> bool:
        """Is it a control token?"""
        return is_reserved(content) or (special and content in self.roles)


def read_added_tokens(directory: Path) -> AddedTokens:
    """Added tokens of `tokenizer_config.json` or, if it lists none, of `added_tokens.json`.

    transformers reads them in this way. Raises ValueError for a file that is damaged.
    """
    settings, roles = (_read(directory / name) for name in (SETTINGS_NAME, ROLES_NAME))
    named = frozenset(_role_names(settings)) | frozenset(_role_names(roles))
    listed = settings.get("added_tokens_decoder")
    if listed is not None:
        tokens = _listed(directory / SETTINGS_NAME, listed)
    else:
        path = directory / ADDED_NAME
        special = named | _contents(settings, "extra") | _contents(roles, "extra")
        tokens = []
        for content, i in _read(path).items():
            flags = {"special": content in special, "normalized": content not in special}
            tokens.append(added_token(path, {"id": i, "content": content, **flags}))
    return AddedTokens(sorted(tokens), named)


def with_added_tokens(vocabulary: Vocabulary, beside: AddedTokens, where: str) -> Vocabulary:
    """The vocabulary of a `tokenizer.model` with the tokens that the files beside it add or rename.

    Raises ValueError, with `where` in it, for a token that SentencePiece cannot find in the same
    way, or whose id contradicts the vocabulary.
    """
    pieces = list(vocabulary.pieces)
    scores, types = list(vocabulary.scores), list(vocabulary.types)
    ids = {piece: i for i, piece in enumerate(pieces)}
    for token in beside.tokens:
        i, content = token.id, token.content
        if i == len(pieces) and content not in ids:
            pieces.append(content)
            scores.append(0.0)
            types.append(USER_DEFINED)
        elif i < len(pieces) and content not in ids and _may_be_renamed(pieces[i]):
            pieces[i] = content
        elif ids.get(content) != i:
            raise ValueError(
                f"{where}: {content[:40]!r} cannot have the id {i} that a file beside it gives: "
                "there must be no gap and no other piece; save the tokenizer again"
            )
        if token.looks_around:
            raise ValueError(
                f"{where}: {content[:40]!r} is added with lstrip, rstrip or single_word, which "
                "SentencePiece does not have; save a tokenizer.json with transformers"
            )
        if pieces[i] != "<unk>":
            types[i] = CONTROL if beside.is_control(content, token.special) else USER_DEFINED
        ids[content] = i
    return Vocabulary(pieces, scores, types)


def _may_be_renamed(piece: str) -> bool:
    return is_reserved(piece) and piece not in REQUIRED_PIECES


def added_token(where: Path | str, raw: Any) -> AddedToken:
    """An added token from its JSON; ValueError, with `where` in it, for anything else."""
    if isinstance(raw, Mapping):
        i: Any = raw.get("id")
        content: Any = raw.get("content")
        flags = [raw.get(flag, False) for flag in _FLAGS]
        is_id = isinstance(i, int) and not isinstance(i, bool) and i >= 0
        is_text = isinstance(content, str) and re.fullmatch("[^\ud800-\udfff]+", content, re.DOTALL)
        if is_id and is_text and set(map(type, flags)) == {bool}:
            return AddedToken(i, content, *flags)
    raise ValueError(f"{where}: an added token is malformed ({repr(raw)[:80]}); get the file again")


def _listed(path: Path, listed: Any) -> list[AddedToken]:
    if not isinstance(listed, Mapping):
        raise ValueError(f"{path}: added_tokens_decoder is not an object; get the file again")
    tokens = []
    for key, raw in listed.items():
        known = isinstance(raw, Mapping) and key.isascii() and key.isdecimal() and len(key) < 10
        tokens.append(added_token(path, {**raw, "id": int(key)} if known else raw))
    return tokens


def _read(path: Path) -> dict[str, Any]:
    """The object in a file, {} if there is none."""
    if not path.is_file():
        return {}
    if path.stat().st_size > _MAX_SETTINGS_BYTES:
        raise ValueError(f"{path}: too large for settings of a tokenizer; get the file again")
    return read_json(path)


def _role_names(settings: Mapping[str, Any]) -> Iterable[str]:
    """Tokens with a role: the values of `eos_token`, `pad_token` and so on."""
    extra = settings.get("extra_special_tokens")
    roles = [value for key, value in settings.items() if key.endswith("_token")]
    # As an object it names roles too: transformers has `boi_token` of Gemma 3 in it.
    return _names([*roles, *(extra.values() if isinstance(extra, Mapping) else ())])


def _contents(settings: Mapping[str, Any], kind: str) -> frozenset[str]:
    """Special tokens without a role, by their older and newer name."""
    lists = (settings.get(f"{name}_special_tokens") for name in (kind, "additional"))
    return frozenset(name for each in lists if isinstance(each, list) for name in _names(each))


def _names(values: Iterable[Any]) -> Iterable[str]:
    for value in values:
        name = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(name, str):
            yield name
