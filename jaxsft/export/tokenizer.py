"""Writes a tokenizer with which transformers gives exactly our ids, with the chat template.

`tokenizer.model` alone is not enough: transformers 5 converts it (with sentencepiece and protobuf),
and the result splits runs of more than 31 spaces differently. `tokenizer.json` is not converted.
"""

import json
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from jaxsft.common.files import write_json
from jaxsft.data.added_tokens import AddedToken
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.data.vocabulary import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, is_reserved
from jaxsft.export.chat_template import chat_template
from jaxsft.weights.find import Taught


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, max_positions: int, taught: Taught | None
) -> None:
    """Writes tokenizer.json, tokenizer_config.json with the chat template, and tokenizer.model.

    There is no tokenizer.model if the model's tokenizer.json decides: it would give other ids.
    """
    if tokenizer.bpe is None:
        (directory / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    text = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    settings: dict[str, Any] = {
        # Uses tokenizer.json as it is; GemmaTokenizer builds its own from it in twice the time.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "model_max_length": max_positions,
        "chat_template": chat_template(taught),
    }
    names = (tokenizer.piece(i) for i in sorted(tokenizer.control_ids))
    if others := [name for name in names if not is_reserved(name)]:
        # With a role they are control tokens, here and when the export is read again.
        settings["extra_special_tokens"] = {f"control_{i}": name for i, name in enumerate(others)}
    write_json(directory / "tokenizer_config.json", settings)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer in the format of the `tokenizers` library."""
    if tokenizer.bpe is None:
        pieces, merges, added = _from_sentencepiece(tokenizer)
    else:
        pieces, merges, _, control = tokenizer.bpe
        added = [*tokenizer.bpe.text_tokens()]
        added += [AddedToken(i, pieces[i], special=True) for i in control]
    added = sorted(added)
    bos = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}]
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [token._asdict() for token in added],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*bos, first],
            "pair": [*bos, first, *bos, second],
            "special_tokens": {
                "<bos>": {"id": "<bos>", "ids": [tokenizer.bos_id], "tokens": ["<bos>"]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def _from_sentencepiece(
    tokenizer: Tokenizer,
) -> tuple[list[str], list[tuple[str, str]], list[AddedToken]]:
    """(pieces, merges, added tokens).

    Ordinary pieces become BPE, with a merge for each way to cut a piece in two, best score first.
    SentencePiece first finds the user-defined pieces (tags, runs of white space), the longest first
    and with `▁` for a space. They become added tokens that are found after normalisation; the
    official file finds them before it, and gets a literal `▁▁` wrong.
    """
    pieces = ModelProto.FromString(tokenizer.model_bytes).pieces
    spelt = [(piece.piece, piece.type, piece.score) for piece in pieces]
    normal = {text: -score for text, kind, score in spelt if kind == NORMAL}
    merges = [
        (text[:cut], text[cut:])
        for text in sorted(normal, key=lambda text: normal[text])
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in normal and text[cut:] in normal
    ]
    added = [
        AddedToken(i, text, special=kind != USER_DEFINED, normalized=kind == USER_DEFINED)
        for i, (text, kind, _) in enumerate(spelt)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    return [text for text, _, _ in spelt], merges, added
