"""The tokenizer against ids of the official tokenizer.json, and against damaged files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

from jaxsft.data.tokenizer import Tokenizer
from jaxsft.data.vocabulary import BYTE, CONTROL, NORMAL, USER_DEFINED, Vocabulary
from jaxsft.formats.gguf import GGUFFile

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "support/golden/tokenizer_gemma3.json").read_text()
)
CASES = GOLDEN["cases"]

# Gemma 1/2 order, in which the turn tokens have the ids 106 and 107.
SMALL_PIECES = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<2mass>", "[@BOS@]"),
    *(f"<unused{i}>" for i in range(99)),
    *("<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "  ", "   ", "<b>"),
    *(f"<0x{i:02X}>" for i in range(256)),
    *("ab", "\u2581a", "\u2581", "a", "b", "<", ">", "_", "e", "n", "d", "o", "f", "t", "u", "r"),
]


def small_vocabulary() -> Vocabulary:
    """SMALL_PIECES with the types that llama.cpp's converter gives them."""
    types = [CONTROL] * 108 + [USER_DEFINED] * 5 + [BYTE] * 256 + [NORMAL] * 16
    scores = [-float(i) if kind == NORMAL else -1000.0 for i, kind in enumerate(types)]
    return Vocabulary(SMALL_PIECES, scores, types)


def write_gguf(
    path: Path, vocabulary: Vocabulary | None, model: str = "llama", **replaced: Any
) -> Path:
    """A GGUF of one tensor and a vocabulary, with other fields from `replaced` (None: without)."""
    writer = gguf.GGUFWriter(path, "gemma3")
    if vocabulary is not None:
        fields = vocabulary._asdict() | replaced
        writer.add_tokenizer_model(model)
        for name, add in (
            ("pieces", writer.add_token_list),
            ("scores", writer.add_token_scores),
            ("types", writer.add_token_types),
        ):
            if fields[name] is not None:
                add(fields[name])
    writer.add_tensor("x", np.arange(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("small") / "small.gguf", small_vocabulary())


@pytest.fixture(scope="module")
def small(small_gguf: Path) -> Tokenizer:
    return Tokenizer.from_gguf(small_gguf)


# ---- ids


def test_ids_equal_the_official_ones(tokenizer: Tokenizer) -> None:
    assert len(CASES) >= 120
    different = [c["text"] for c in CASES if tokenizer.encode(c["text"]) != c["ids"]]
    assert different == []
    # Bulk encoding, the second time from the cache of units.
    texts, expected = [c["text"] for c in CASES], [c["ids"] for c in CASES]
    assert tokenizer.encode_many(texts) == tokenizer.encode_many(texts) == expected


# All that decides where texts are cut: spaces of both spellings, newlines, `>` before a space.
HARD_PARTS = st.sampled_from(
    [
        *" \u2581\n\t\r></-_.,a1\0\u00e9\u4f60\u00a0",
        *("  ", "\n\n", "> </", ">\u2581</", "</b>", "<b>", "word", "ing"),
        *("e\u0301", "\U0001f469\u200d", "<end_of_turn>", "<unused7>"),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(HARD_PARTS, max_size=40).map("".join) | st.text(max_size=60))
def test_units_give_the_ids_of_the_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode_many([text]) == [tokenizer.encode(text)]


def test_what_is_kept_of_units_is_bounded(tokenizer: Tokenizer) -> None:
    """Lines without spaces are units of their own, which do not recur: they aren't kept."""
    lines = [f"{i}\u4f60\u597d" * 40 for i in range(200)]
    other = Tokenizer(small_vocabulary(), "small")
    assert other.encode_many(lines) == [other.encode(line) for line in lines]
    assert not other._unit_ids


@settings(max_examples=200, deadline=None)
@given(st.text("ab<>_n \u2581\n", max_size=30))
def test_units_of_other_vocabularies(text: str) -> None:
    """Pieces that reach over a space or a newline: `b\u2581a` and `n\\n`."""
    small = small_vocabulary()
    pieces = [*small.pieces, "b\u2581", "b\u2581a", "n\n", "n\na", "\na"]
    scores = [*small.scores, *(-1.0 - i for i in range(5))]
    other = Tokenizer(Vocabulary(pieces, scores, [*small.types, *[NORMAL] * 5]), "other")
    assert other.encode_many([text]) == [other.encode(text)]


def test_literal_u2581_is_a_space(tokenizer: Tokenizer) -> None:
    """The one deviation from tokenizer.json; its cause is in the golden file's header."""
    for case in GOLDEN["literal_u2581"]:
        ids = tokenizer.encode(case["text"])
        assert ids == tokenizer.encode(case["text"].replace("\u2581", " "))
        assert ids != case["ids"]


def test_model_with_user_defined_control_tokens_gives_the_same_tokenizer(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Google's tokenizer.model has the turn and unused tokens as pieces that match in text."""
    proto = ModelProto.FromString(tokenizer.model_bytes)
    retyped = 0
    for piece in proto.pieces[4:]:
        if piece.type == CONTROL:
            piece.type, piece.score = USER_DEFINED, 0.0
            retyped += 1
    proto.trainer_spec.split_digits = True
    path = tmp_path / "tokenizer.model"
    path.write_bytes(proto.SerializeToString())
    loaded = Tokenizer.from_file(path)
    assert retyped > 6000
    assert [loaded.encode(case["text"]) for case in CASES] == [case["ids"] for case in CASES]
    assert loaded.digest == tokenizer.digest


def test_saved_model_loads_to_the_same_digest(small: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small.model_bytes)
    assert Tokenizer.from_file(path).digest == small.digest
    pieces, scores, types = small_vocabulary()
    vocabularies = [Vocabulary(pieces, [*scores[:-1], s], types) for s in (-999.0, 0.0, -0.0)]
    other, zero, minus_zero = (Tokenizer(each, "other").digest for each in vocabularies)
    assert other != small.digest and zero == minus_zero


# Surrogates are no characters; everything else is, and the pieces are where tokenizers break.
TEXTS = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from([" ", "\n", "\t", "\r\n", "\0", "\u2581", "\ufeff", "\u200d", "\u0301"]),
        st.builds(lambda c, n: c * n, st.sampled_from(" \n\t"), st.integers(1, 70)),
        st.sampled_from(["<end_of_turn>", "<bos>", "<pad>", "<unused7>", "<end_", "</", "<0x0A>"]),
        st.sampled_from(["<start_of_image>", "[multimodal]", "<table>", "</b>", "<unk>", "<ta"]),
    )
).map("".join)


@settings(max_examples=300, deadline=None, database=None)
@given(text=TEXTS)
def test_any_text_round_trips_and_yields_no_control_id(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text.replace("\u2581", " ")
    assert tokenizer.decode(ids, skip_special=True) == text.replace("\u2581", " ")
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.encode_many([text, text]) == [ids, ids]


def test_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"^text 1: lone surrogate U\+D83D at character 3"):
        tokenizer.encode_many(["fine", "ok \ud83d broken"])


# ---- control tokens and decoding


def test_special_ids_of_gemma_3(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 262_144
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)
    assert (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id) == (105, 106)
    assert tokenizer.stop_ids == (1, 106)
    assert {0, 1, 2, 3, 4, 5, 105, 106, 255_999, 256_000, 262_143} <= tokenizer.control_ids


def test_special_ids_of_gemma_1_and_2_are_found_by_name(small: Tokenizer) -> None:
    assert (small.start_of_turn_id, small.end_of_turn_id) == (106, 107)
    assert small.stop_ids == (1, 107)
    assert small.control_ids == frozenset(range(108))
    assert small.encode("<end_of_turn>\n\n") == [SMALL_PIECES.index(c) for c in "<end_of_t"] + [
        SMALL_PIECES.index(c) for c in ("u", "r", "n", ">", "\n\n")
    ]
    assert small.decode(small.encode("<b>   a\tb[@BOS@]")) == "<b>   a\tb[@BOS@]"


def test_decode_of_control_ids(tokenizer: Tokenizer) -> None:
    ids = [2, *tokenizer.encode(" a "), 105, *tokenizer.encode(" b"), 3, 106, 106]
    literal = "<bos> a <start_of_turn> b<unk><end_of_turn><end_of_turn>"
    assert tokenizer.decode(ids) == literal
    assert tokenizer.decode(np.asarray(ids)) == literal
    assert tokenizer.decode(ids, skip_special=True) == " a  b"
    assert tokenizer.decode([]) == ""


def test_decode_of_cut_characters_and_of_wrong_ids(small: Tokenizer) -> None:
    assert small.decode(small.encode("a\u20ac")[:-1]) == "a\ufffd\ufffd"
    for token in (-1, 385):
        with pytest.raises(ValueError, match=rf"token id {token}: the tokenizer has ids 0 to 384"):
            small.decode([2, token])


# ---- files


def refused(load: Callable[[Path], object], path: Path) -> str:
    """The one-line error of loading `path`, which names the path."""
    with pytest.raises(ValueError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize("load", [Tokenizer.from_file, Tokenizer.from_gguf, GGUFFile])
def test_files_that_are_no_files(load: Callable[[Path], object], tmp_path: Path) -> None:
    assert "No such file" in refused(load, tmp_path / "missing")
    assert "directory" in refused(load, tmp_path)
    path = tmp_path / "file"
    path.write_bytes(b"")
    assert "empty" in refused(load, path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(load, path)
    path.write_bytes(bytes(range(256)) * 8)
    refused(load, path)


def test_gguf_without_a_usable_tokenizer(tmp_path: Path) -> None:
    def message(vocabulary: Vocabulary | None, **replaced: Any) -> str:
        path = write_gguf(tmp_path / "x.gguf", vocabulary, **replaced)
        return refused(Tokenizer.from_gguf, path)

    good = small_vocabulary()
    size = len(SMALL_PIECES)
    renamed = ["x" + p if p.endswith("_turn>") else p for p in SMALL_PIECES]
    assert "no tokenizer.ggml.model" in message(None)
    assert "is 'gpt2'" in message(good, model="gpt2")
    assert "no tokenizer.ggml.scores" in message(good, scores=None)
    assert "lacks <start_of_turn>, <end_of_turn>" in message(good, pieces=renamed)
    assert f"{size} pieces, 3 scores" in message(good, scores=[0.0] * 3)
    assert "wrong type" in message(good, scores=[0] * size)
    assert "not finite" in message(good, scores=[float("nan")] * size)
    assert "untyped" in message(good, types=[7] * size)
    assert "empty" in message(good, pieces=[*SMALL_PIECES[:-1], ""])
    assert "SentencePiece refuses" in message(good, pieces=[*SMALL_PIECES[:-1], "a"])
    assert "256 byte pieces" in message(good, types=[NORMAL] * size)
    not_utf8 = tmp_path / "x.gguf"
    data = write_gguf(not_utf8, good).read_bytes()
    not_utf8.write_bytes(data.replace(b"<end_of_turn>", b"<end_of_tur\xff>"))
    assert "utf-8" in refused(Tokenizer.from_gguf, not_utf8)


def test_gguf_is_not_a_tokenizer_model_nor_the_reverse(
    small: Tokenizer, small_gguf: Path, tmp_path: Path
) -> None:
    assert "GGUF" in refused(Tokenizer.from_file, small_gguf)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(small.model_bytes)
    assert "not a GGUF file" in refused(Tokenizer.from_gguf, path)


def test_model_of_another_kind_is_refused_by_what_differs(small: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for spec, field, value, named in (
        ("trainer_spec", "model_type", 1, "model_type BPE"),
        ("trainer_spec", "byte_fallback", False, "byte_fallback"),
        ("trainer_spec", "treat_whitespace_as_suffix", True, "no treat_whitespace_as_suffix"),
        ("normalizer_spec", "precompiled_charsmap", b"nmt", "no precompiled_charsmap"),
        ("normalizer_spec", "add_dummy_prefix", True, "no add_dummy_prefix"),
        ("normalizer_spec", "remove_extra_whitespaces", True, "no remove_extra_whitespaces"),
        ("normalizer_spec", "escape_whitespaces", False, "escape_whitespaces"),
    ):
        proto = ModelProto.FromString(small.model_bytes)
        setattr(getattr(proto, spec), field, value)
        path.write_bytes(proto.SerializeToString())
        assert refused(Tokenizer.from_file, path).endswith(f"which has {named}")


@pytest.mark.parametrize("kind", ["gguf", "model"])
def test_truncated_and_damaged_files_are_refused_or_harmless(
    kind: str, small: Tokenizer, small_gguf: Path, tmp_path: Path
) -> None:
    load = Tokenizer.from_gguf if kind == "gguf" else Tokenizer.from_file
    whole = small_gguf.read_bytes() if kind == "gguf" else small.model_bytes
    path = tmp_path / "file"
    for size in [*range(0, len(whole), 37), *range(len(whole) - 40, len(whole))]:
        path.write_bytes(whole[:size])
        refused(load, path)
    harmless = 0
    for position in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            loaded = load(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:  # a letter, a score or a tensor value
            harmless += 1
            assert loaded.control_ids.isdisjoint(loaded.encode("<end_of_turn> a"))
    assert harmless > 0


@pytest.mark.parametrize("last", [["some", "strings"], [1.0, 2.0], "a string", 7])
def test_gguf_truncated_in_its_last_field_is_refused(last: Any, tmp_path: Path) -> None:
    """Without tensors nothing after the field would notice."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "gemma3")
    if isinstance(last, list):
        writer.add_array("last", last)
    else:
        writer.add_key_value("last", last, gguf.GGUFValueType.get_type(last))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    whole = path.read_bytes()
    found = GGUFFile(path).metadata["last"]
    assert (list(found) if isinstance(last, list) else found) == last
    for size in range(24, len(whole)):
        path.write_bytes(whole[:size])
        assert "truncated or damaged" in refused(GGUFFile, path)
