"""tokenizer.json and tokens that were added, against the tokenizers library."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from jaxsft.data.added_tokens import AddedToken
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.export.hostile import hostile_texts
from jaxsft.export.tokenizer import tokenizer_json
from jaxsft.gemma.architecture import PRESETS
from jaxsft.generate.chat import text_of_tokens
from jaxsft.weights.find import check_tokenizer, find_tokenizer

Raw = dict[str, Any]
ADDED = ("<think>", "</think>", "two words", "\u2603", "<tool>")
TURNS = ("<start_of_turn>", "<end_of_turn>")


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Tokenizer:
    """Of 4,205 real pieces; SentencePiece encodes."""
    return Tokenizer.from_file(tiny_model_dir / "tokenizer.model")


@pytest.fixture(scope="module")
def raw(model: Tokenizer) -> Raw:
    """A tokenizer.json of the same pieces; read only."""
    return tokenizer_json(model)


def with_tokens(raw: Raw, *tokens: AddedToken) -> Raw:
    """The file with further added tokens, as transformers saves it."""
    return raw | {"added_tokens": [*raw["added_tokens"], *(token._asdict() for token in tokens)]}


def add(raw: Raw, *contents: str, **flags: bool) -> Raw:
    """The file with new tokens after all others."""
    first = len(raw["model"]["vocab"])
    return with_tokens(raw, *(AddedToken(first + i, c, **flags) for i, c in enumerate(contents)))


def write(directory: Path, raw: Raw, **beside: Any) -> Path:
    """tokenizer.json in a new directory, with other files, each named by its stem."""
    directory.mkdir(exist_ok=True)
    for stem, values in beside.items():
        (directory / f"{stem}.json").write_text(json.dumps(values))
    (directory / "tokenizer.json").write_text(json.dumps(raw))
    return directory / "tokenizer.json"


def oracle(raw: Raw, control: frozenset[int]) -> Callable[[str], list[int]]:
    """The library's own ids, without the control tokens in its list of added tokens."""
    kept = [token for token in raw["added_tokens"] if token["id"] not in control]
    library = tokenizers.Tokenizer.from_str(json.dumps(raw | {"added_tokens": kept}))
    return lambda text: library.encode(text, add_special_tokens=False).ids


def test_ids_are_those_of_the_library(raw: Raw, tmp_path: Path) -> None:
    """Beside a control token of any look, which no text gives."""
    file = add(raw, *ADDED, special=True)
    file = with_tokens(file, AddedToken(len(raw["model"]["vocab"]) + 5, "\u2602", special=True))
    config = {"sep_token": "\u2602", "eos_token": {"content": "<eos>"}}
    tokenizer = Tokenizer.from_file(write(tmp_path, file, tokenizer_config=config))
    first = len(raw["model"]["vocab"])
    assert tokenizer.encode("".join(ADDED)) == [*range(first, first + 5)]
    assert tokenizer.control_ids >= {first + 5, tokenizer.end_of_turn_id}
    assert tokenizer.control_ids.isdisjoint(range(first, first + 5))
    expected = oracle(file, tokenizer.control_ids)
    plain, lookalikes = hostile_texts(tokenizer)
    texts = [*plain, *lookalikes, "a\u2602b", " \u2581\u2581 x\u2581", " two words<think>\n"]
    ids = [expected(text) for text in texts]
    assert [tokenizer.encode(text) for text in texts] == ids
    assert tokenizer.encode_many(texts) == tokenizer.encode_many(texts) == ids
    assert tokenizer.control_ids.isdisjoint(token for each in ids for token in each)
    for text, each in zip(texts, ids, strict=True):
        assert tokenizer.decode(each) == text.replace("\u2581", " ")
    emoji = tokenizer.encode("x\U0001fae8\U00020000<think>")
    parts = list(text_of_tokens(tokenizer, emoji))
    assert parts == ["x", "\U0001fae8", "\U00020000", "<think>"]
    assert tokenizer.decode(emoji[:-3]) == "x\U0001fae8" + "\ufffd" * 2


@pytest.fixture(scope="module")
def flagged(raw: Raw, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """(tokenizer, the library's ids) for added tokens with a flag."""

    @functools.cache
    def make(flag: str) -> tuple[Tokenizer, Callable[[str], list[int]]]:
        letters = ("\u2603",) if flag == "single_word" else ()
        contents = [content for content in (*ADDED, "\n<") if content not in letters]
        file = add(raw, *contents, **{flag: True})
        tokenizer = Tokenizer.from_file(write(tmp_path_factory.mktemp(flag), file))
        return tokenizer, oracle(file, tokenizer.control_ids)

    return make


PARTS = ["<think>", "two words", "two", " words", "\u2603", " ", "\n", "\u2581", "a", ">", "</b>"]


@pytest.mark.parametrize("flag", ["special", "normalized", "lstrip", "rstrip", "single_word"])
@settings(max_examples=150, deadline=None)
@given(text=st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join))
def test_texts_cut_into_units(flag: str, text: str, flagged: Callable[[str], Any]) -> None:
    """A token may reach over a space, or take away what stands beside it."""
    tokenizer, expected = flagged(flag)
    assert tokenizer.encode_many([text]) == [tokenizer.encode(text)] == [expected(text)]


def test_tokenizer_json_decides_where_the_two_files_differ(
    model: Tokenizer, raw: Raw, tmp_path: Path
) -> None:
    """SentencePiece encodes where they agree, which a further control token does not change."""
    (tmp_path / "tokenizer.model").write_bytes(model.model_bytes)
    num = model.vocab_size

    def of(raw: Raw, **beside: Any) -> Tokenizer:
        write(tmp_path, raw, **beside)
        return Tokenizer.from_file(find_tokenizer(tmp_path, None))

    same, image = of(raw), of(add(raw, "<image_soft_token>", special=True))
    assert same.bpe is None and same.digest == model.digest
    assert image.bpe is None and (image.vocab_size, image.num_text_ids) == (num + 1, num)
    assert image.piece(num) == "<image_soft_token>" and num in image.control_ids
    assert image.vocabulary_digest == model.vocabulary_digest

    renamed = json.loads(json.dumps(raw).replace("<unused7>", "<think>"))
    for token in renamed["added_tokens"]:
        token["special"] &= token["content"] != "<think>"
    unused = model.encode("<unused7>")
    (think,) = of(renamed).encode("<think>")
    assert think in model.control_ids and model.decode([think]) == "<unused7>" and len(unused) > 1
    assert of(add(raw, "<think>")).encode("a<think>")[1:] == [num]
    # Two merges in another order, and an ordinary piece that became an added token.
    swapped = copy.deepcopy(raw)
    swapped["model"]["merges"].reverse()
    (word,) = model.encode(" the")
    for other in (swapped, with_tokens(raw, AddedToken(word, model.piece(word)))):
        assert of(other).bpe is not None
    listed = {num: {"content": "<think>", "special": False}}
    told = of(raw, tokenizer_config={"added_tokens_decoder": listed})
    assert told.bpe is not None and told.encode("<think>") == [num]
    assert Tokenizer.from_file(tmp_path / "tokenizer.model").encode("<think>") == [num]


def test_tokens_added_to_a_tokenizer_model(model: Tokenizer, tmp_path: Path) -> None:
    """transformers 4 leaves added_tokens.json, or names them in tokenizer_config.json."""
    path, num = tmp_path / "tokenizer.model", model.vocab_size
    path.write_bytes(model.model_bytes)
    names = ("<think>", "</think>", "[PAD]")
    added = tmp_path / "added_tokens.json"
    added.write_text(json.dumps({name: num + i for i, name in enumerate(names)}))
    roles = tmp_path / "special_tokens_map.json"
    roles.write_text(json.dumps({"pad_token": "[PAD]"}))
    tokenizer = Tokenizer.from_file(path)
    ids = tokenizer.encode("<think>[PAD]</think>")
    assert (ids[0], ids[-1]) == (num, num + 1) and num + 2 not in ids
    assert num + 2 in tokenizer.control_ids and tokenizer.num_text_ids == num + 2
    assert Tokenizer.from_file(path).digest == tokenizer.digest != model.digest

    settings = tmp_path / "tokenizer_config.json"
    seven = next(i for i in model.control_ids if model.piece(i) == "<unused7>")
    listed = {str(seven): {"content": "<think>"}, str(num): {"content": "<tool>"}}
    settings.write_text(json.dumps({"added_tokens_decoder": listed}))
    assert Tokenizer.from_file(path).encode("<think><tool>") == [seven, num]
    for i, token, why in (
        (num + 1, {"content": "<tool>"}, "'<tool>' cannot have the id"),
        (5000, {"content": "the"}, "'the' cannot have the id 5000"),
        (model.end_of_turn_id, {"content": "<tool>"}, "'<tool>' cannot have the id"),
        (num, {"content": "<tool>", "lstrip": True}, "'<tool>' is added with lstrip"),
        (num, {"content": ""}, "an added token is malformed"),
        (num, {"content": "\ud800"}, "an added token is malformed"),
        ("x", {"content": "<tool>"}, "an added token is malformed"),
        (num, ["<tool>"], "an added token is malformed"),
    ):
        settings.write_text(json.dumps({"added_tokens_decoder": {i: token}}))
        with pytest.raises(ValueError, match=r"^/.*/tokenizer(_config\.json|\.model): ") as caught:
            Tokenizer.from_file(path)
        assert why in str(caught.value) and "\n" not in str(caught.value)


def changed(raw: Raw, **model: Any) -> Raw:
    return raw | {"model": raw["model"] | model}


NFC = {"type": "NFC"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
EVIL = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
REFUSED: list[tuple[str, Callable[[Raw], Any]]] = [
    ("which has a model of the type BPE", lambda raw: changed(raw, type="WordPiece")),
    (
        "which has a model of the type BPE",
        lambda raw: changed(raw, type="Unigram", vocab=[["a", 0]]),
    ),
    ("which has byte_fallback", lambda raw: changed(raw, byte_fallback=False)),
    ("no dropout, no ignore_merges", lambda raw: changed(raw, dropout=0.1, ignore_merges=True)),
    ("no continuing_subword_prefix", lambda raw: changed(raw, continuing_subword_prefix="##")),
    ("another normalizer", lambda raw: raw | {"normalizer": NFC}),
    ("another normalizer", lambda raw: raw | {"normalizer": None}),
    ("another pre_tokenizer", lambda raw: raw | {"pre_tokenizer": BYTE_LEVEL}),
    ("another pre_tokenizer", lambda raw: raw | {"pre_tokenizer": EVIL}),
    ("another decoder", lambda raw: raw | {"decoder": {"type": "Sequence", "decoders": 7}}),
    ("has no model", lambda raw: raw | {"model": None}),
    ("model.vocab is not", lambda raw: changed(raw, vocab={"a": "b"})),
    ("model.vocab is not", lambda raw: changed(raw, vocab=[])),
    ("a piece is not Unicode", lambda raw: changed(raw, vocab={"\ud800": 0})),
    ("model.merges is not", lambda raw: changed(raw, merges=["a b c"])),
    ("model.merges is not", lambda raw: changed(raw, merges=[["a", 7]])),
    ("model.merges is not", lambda raw: changed(raw, merges=None)),
    ("tokenizers refuses", lambda raw: changed(raw, merges=[["no", "such pieces"]])),
    ("do not count from 0", lambda raw: changed(raw, vocab=raw["model"]["vocab"] | {"<x>": 9999})),
    ("do not count from 0", lambda raw: changed(raw, vocab=raw["model"]["vocab"] | {"<x>": 7})),
    ("do not count from 0", lambda raw: changed(raw, vocab=raw["model"]["vocab"] | {"<x>": -1})),
    ("lacks byte pieces (<0xC3>)", lambda raw: without(raw, "<0xC3>")),
    ("lacks <end_of_turn>", lambda raw: without(raw, "<end_of_turn>")),
    ("added_tokens is not a list", lambda raw: raw | {"added_tokens": {"a": 1}}),
    ("a letter as a single_word", lambda raw: add(raw, "\u2603", single_word=True)),
    ("an added token is malformed", lambda raw: raw | {"added_tokens": ["<think>"]}),
    ("an added token is malformed", lambda raw: with_tokens(raw, AddedToken(True, "<x>"))),
    ("has the id 5 in", lambda raw: with_tokens(raw, AddedToken(9999, name_of(raw, 5)))),
    ("cannot be read as JSON", lambda raw: "[" * 100_000),
    ("cannot be read as JSON", lambda raw: json.dumps(raw)[:-2]),
    ("is not a JSON object", lambda raw: "[]"),
    ("git lfs pull", lambda raw: "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    ("is empty", lambda raw: ""),
]


def name_of(raw: Raw, number: int) -> str:
    return next(piece for piece, i in raw["model"]["vocab"].items() if i == number)


def without(raw: Raw, piece: str) -> Raw:
    """The file with another name in a piece's place."""
    vocab = {"<other>" if p == piece else p: i for p, i in raw["model"]["vocab"].items()}
    added = [token for token in raw["added_tokens"] if token["content"] != piece]
    return changed(raw, vocab=vocab) | {"added_tokens": added}


@pytest.mark.parametrize(("why", "change"), REFUSED, ids=range(len(REFUSED)))
def test_other_files_are_refused_in_a_line(
    why: str, change: Callable[[Raw], Any], raw: Raw, tmp_path: Path
) -> None:
    file, path = change(raw), tmp_path / "tokenizer.json"
    path.write_text(file if isinstance(file, str) else json.dumps(file))
    with pytest.raises(ValueError) as caught:
        Tokenizer.from_file(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and why in line
    assert "\n" not in line and len(line) < 400


def test_files_in_other_spellings(model: Tokenizer, raw: Raw, tmp_path: Path) -> None:
    """Merges as text, parts as sequences or left out, and <0x09> as a tab: older conversions."""
    file = changed(raw, merges=[" ".join(pair) for pair in raw["model"]["merges"]])
    del file["model"]["type"]
    file["normalizer"] = {"type": "Sequence", "normalizers": [file["normalizer"]]}
    text = "In  between\tspaces\n\n"
    assert Tokenizer.from_file(write(tmp_path, file)).encode(text) == model.encode(text)
    proto = ModelProto.FromString(model.model_bytes)
    tab = next(i for i, piece in enumerate(proto.pieces) if piece.piece == "\t")
    byte = next(i for i, piece in enumerate(proto.pieces) if piece.piece == "<0x09>")
    assert tab > byte


def test_an_embedding_has_a_row_for_each_token_of_a_text(
    model: Tokenizer, raw: Raw, tmp_path: Path
) -> None:
    image = Tokenizer.from_file(write(tmp_path, add(raw, "<image_soft_token>")))
    num = model.vocab_size

    def check(tokenizer: Tokenizer, rows: int) -> None:
        config = PRESETS["gemma-3-1b"]
        check_tokenizer(tokenizer, config.__class__(**{**vars(config), "vocab_size": rows}))

    for tokenizer, rows in ((model, num), (model, num + 2048), (image, num), (image, num + 1)):
        check(tokenizer, rows)
    for tokenizer, rows in ((model, num - 1), (model, num + 6144), (image, num - 1)):
        with pytest.raises(ValueError, match=f"the model's embedding {rows} rows; use the"):
            check(tokenizer, rows)
