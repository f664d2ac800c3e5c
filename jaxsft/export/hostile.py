"""Texts that tokenizers get wrong. Ours and that of an export must give the same ids for them."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxsft.data.tokenizer import Tokenizer
from jaxsft.data.tokenizer_json import BPEVocabulary, sentencepiece_vocabulary

_TEXTS = (
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 3.14159, 1,234,567 €\r\n",
    "if x:\n        return  y\n\n\n\tfor\t\tz in  range(10 ** 6):   pass  \n",
    # Combining marks, alone and stacked; Hindi, Thai; a ligature.
    "e\u0301 n\u0303 \u1e9b\u0323 Z\u0351\u036b\u0343a\u034f\u0362l\u0334 \u0928\u093f",
    "\u0e01\u0e33 \u0301 \ufb01 \u017f \u212b \u1100\u1161\u11a8",
    # Emoji of several characters; characters of four bytes that no vocabulary has.
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0001f44d\U0001f3fd",
    "\u2764\ufe0f \U0001fae8 \U00013000\U000e0001 \U00020000 \uffff \U0010ffff",
    # Chinese; Arabic, and Hebrew in directional marks; scripts that are rare.
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u0645\u0631\u062d\u0628\u0627 \u202e\u05e9\u05dc\u202c",
    "\u17a2 \u1200 \u0f00 \ua8c0",
    # Control characters, and spaces that are none.
    "a\0b \0\0 \x01\x1b[31m\x7f\x80\x9f \u00a0 \u2003 \u2028 \u2029 \u3000 \ufeff \u200b \ufffd",
    "<0x0A> <0x> <0xFF> <|im_start|> <s> </s> [INST] <b>x</b><table> <unk ><bos <ta < /b>",
    " leading, trailing ",
    "",
)
_RUNS = (
    " ",
    "\n",
    "\t",
    "\r\n",
    " \n",
    "a",
    "ab",
    "0",
    "=",
    "\0",
    "\u00e9",
    "\u4f60",
    "\U0001f600",
)
_LENGTHS = (1, 2, 3, 15, 16, 31, 32, 33, 63, 64, 100, 1000)
_PIECES_OF_A_TEXT = 1000


class HostileTexts(NamedTuple):
    """`plain` texts name no control token. `lookalikes` do, as text that a user wrote."""

    plain: list[str]
    lookalikes: list[str]


def hostile_texts(tokenizer: Tokenizer) -> HostileTexts:
    """Texts for this tokenizer: every piece of it, added tokens in several places, and oddities.

    A vocabulary that someone cut may have pieces with characters that are no pieces. Only
    SentencePiece makes them, tokenizer.json cannot. No text here has such a character.
    """
    pieces = [tokenizer.piece(i).replace("\u2581", " ") for i in range(tokenizer.vocab_size)]
    control = [pieces[i] for i in sorted(tokenizer.control_ids)]
    known = [piece for i, piece in enumerate(pieces) if i not in tokenizer.control_ids]
    letters = {piece for piece in known if len(piece) == 1}
    lost = {char for char in set("".join(known)) - letters if tokenizer.encode(char)[1:]}
    known = [piece for piece in known if lost.isdisjoint(piece)]
    plain = [*_TEXTS, *(run * length for run in _RUNS for length in _LENGTHS)]
    plain += ["\n".join(group) for group in _groups(known)]
    tags = [piece for piece in known if len(piece) > 2 and piece.isascii() and piece[0] in "<[{(|"]
    for group in _groups(tags):
        plain += ["".join(group), " ".join(group), "a".join(group), "\n ".join(group)]
    names = ["".join(group) for group in _groups(control)]
    names += [f"x {name}\n{name} y" for name in control[:8]]
    names += ["<end_of_turn>\n<start_of_turn>user\nHi<eos><bos> <start_of_turn >", "<<eos>>"]
    is_named = re.compile("|".join(map(re.escape, control))).search
    plain = [text for text in plain if lost.isdisjoint(text) and not is_named(text)]
    return HostileTexts(plain, names)


def sentencepiece_texts(tokenizer: Tokenizer) -> list[str]:
    """The hostile texts for which a `tokenizer.model` must give our ids.

    Runs of more than 31 spaces or tabs are left out: the official files differ in them.
    """
    plain, lookalikes = hostile_texts(tokenizer)
    return [text for text in (*plain, *lookalikes) if not re.search(r"[ \t]{32}", text)]


def check_sentencepiece(vocabulary: BPEVocabulary, tokenizer: Tokenizer) -> None:
    """ValueError unless a `tokenizer.model` can give the ids of a `tokenizer.json`."""
    other = Tokenizer(sentencepiece_vocabulary(vocabulary), "tokenizer.model")
    texts = sentencepiece_texts(tokenizer)
    found = zip(texts, tokenizer.encode_many(texts), other.encode_many(texts), strict=True)
    for text, ours, theirs in found:
        if ours != theirs:
            raise ValueError(
                "a flax export holds a tokenizer.model, which cannot give the ids of this model's "
                f"tokenizer.json (for {text[:40]!r}); use --format merged or peft"
            )


def _groups(pieces: Sequence[str]) -> list[list[str]]:
    size = _PIECES_OF_A_TEXT
    return [list(pieces[start : start + size]) for start in range(0, len(pieces), size)]
