"""Writes a tokenizer with which transformers gives exactly our ids, with the chat template.

`tokenizer.model` alone is not enough: transformers 5 converts it (with sentencepiece and protobuf),
and the result splits runs of more than 31 spaces differently. `tokenizer.json` is not converted.
"""

import json
from pathlib import Path
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from jaxsft.common.files import write_json
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.data.vocabulary import CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from jaxsft.export.chat_template import chat_template
from jaxsft.weights.find import Taught


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, max_positions: int, taught: Taught | None
) -> None:
    """Writes tokenizer.model, tokenizer.json and tokenizer_config.json with the chat template."""
    (directory / "tokenizer.model").write_bytes(tokenizer.model_bytes)
    text = json.dumps(tokenizer_json(tokenizer), ensure_ascii=False)
    (directory / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
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
    write_json(directory / "tokenizer_config.json", settings)


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The tokenizer in the format of the `tokenizers` library.

    Ordinary pieces become BPE, with a merge for each way to cut a piece in two, best score first.
    SentencePiece first finds the user-defined pieces (tags, runs of white space), the longest first
    and with `▁` for a space. They become added tokens that are found after normalisation; the
    official file finds them before it, and gets a literal `▁▁` wrong.
    """
    pieces = ModelProto.FromString(tokenizer.model_bytes).pieces
    spelt = [(piece.piece, piece.type, piece.score) for piece in pieces]
    normal = {text: -score for text, kind, score in spelt if kind == NORMAL}
    merges = [
        [text[:cut], text[cut:]]
        for text in sorted(normal, key=lambda text: normal[text])
        for cut in range(len(text) - 1, 0, -1)
        if text[:cut] in normal and text[cut:] in normal
    ]
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": kind == USER_DEFINED,
            "special": kind != USER_DEFINED,
        }
        for i, (text, kind, _) in enumerate(spelt)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
    bos = [{"SpecialToken": {"id": "<bos>", "type_id": 0}}]
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
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
            "vocab": {text: i for i, (text, _, _) in enumerate(spelt)},
            "merges": merges,
        },
    }
