import numpy as np
import pytest
from support.fake_tokenizer import FakeTokenizer

from jaxsft.data.chat import (
    MIN_REASONING_TOKENS,
    cut_text,
    encode_chat,
    encode_chats,
    encode_prompt,
    shorten,
)
from jaxsft.data.rows import Conversation, Turn, completion_text, convert_row

CHAT = [
    Turn("system", " Be brief. "),
    Turn("user", "\nHello\n"),
    Turn("assistant", " Hi! "),
    Turn("user", "Bye"),
    Turn("assistant", "Ciao"),
]
LONG_THOUGHT = "First we look. Then we add 2 and 2. That makes four. " * 5


@pytest.fixture
def fake() -> FakeTokenizer:
    return FakeTokenizer()


def conversation_of(reasoning: str, answer: str = "It is four.") -> Conversation:
    row = {"prompt": "What is it?", "response": f"<think>{reasoning}</think>{answer}"}
    conversation = convert_row(row)
    assert isinstance(conversation, Conversation)
    return conversation


def shorten_one(tokenizer, conversation, sample, max_length):
    return shorten(tokenizer, [(conversation, sample)], max_length)[0]


def labels(tokenizer, sample) -> str:
    return tokenizer.decode(sample.ids[sample.loss_mask].tolist())


def test_template(fake):
    sample = encode_chat(fake, CHAT)
    assert fake.decode(sample.ids.tolist()) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n"
        "<start_of_turn>model\nHi!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n"
        "<start_of_turn>model\nCiao<end_of_turn>"
    )
    assert sample.ids.dtype == np.int32 and sample.loss_mask.dtype == bool


def test_ids_and_mask_by_hand(fake):
    sample = encode_chat(fake, [Turn("user", "Hi"), Turn("assistant", "Yes")])
    user, hi, mode, yes = (fake.encode(text)[0] for text in ("user", "Hi", "mode", "Yes"))
    newline, el = ord("\n"), ord("l")
    turn, end = fake.start_of_turn_id, fake.end_of_turn_id
    prompt = [fake.bos_id, turn, user, newline, hi, end, newline, turn, mode, el, newline]
    assert sample.ids.tolist() == [*prompt, yes, end]
    assert sample.loss_mask.tolist() == [False] * len(prompt) + [True, True]


def test_labels_are_every_answer_and_its_end_of_turn(fake):
    assert labels(fake, encode_chat(fake, CHAT)) == "Hi!<end_of_turn>Ciao<end_of_turn>"


def test_one_bos_and_controls_in_text_stay_text(fake):
    text = "<bos>a<end_of_turn>\n<start_of_turn>model\n"
    sample = encode_chat(fake, [Turn("user", text), Turn("assistant", text + "b")])
    ids = sample.ids.tolist()
    assert ids[0] == fake.bos_id and ids.count(fake.bos_id) == 1
    assert ids.count(fake.start_of_turn_id) == ids.count(fake.end_of_turn_id) == 2
    assert ids[-1] == fake.end_of_turn_id


def test_prompt_is_the_prefix_of_the_chat(fake):
    for size in (2, 4):
        prompt = encode_prompt(fake, CHAT[:size])
        assert prompt == encode_chat(fake, CHAT[: size + 1]).ids[: len(prompt)].tolist()
        assert fake.decode(prompt).endswith("<end_of_turn>\n<start_of_turn>model\n")
    assert fake.decode(encode_prompt(fake, [Turn("user", "Hi")])) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


def test_bulk_equals_one_by_one(fake):
    chats = [CHAT, CHAT[1:3], [Turn("user", "x"), Turn("assistant", "y")]]
    for one, many in zip(
        [encode_chat(fake, c) for c in chats], encode_chats(fake, chats), strict=True
    ):
        np.testing.assert_array_equal(one.ids, many.ids)
        np.testing.assert_array_equal(one.loss_mask, many.loss_mask)
    assert encode_chats(fake, []) == []


def test_wrong_roles(fake):
    with pytest.raises(ValueError, match="end with assistant"):
        encode_chat(fake, CHAT[:2])
    with pytest.raises(ValueError, match="end with user"):
        encode_prompt(fake, CHAT[:3])


@pytest.mark.parametrize("spare", [0, 1, 7, 30, 60])
def test_shorten_keeps_head_answer_and_end_of_turn(fake, spare):
    conversation = conversation_of(LONG_THOUGHT)
    full = encode_chat(fake, conversation.turns)
    empty = encode_chat(
        fake, [*conversation.turns[:-1], Turn("assistant", completion_text("", "It is four."))]
    )
    max_length = len(empty.ids) + 20 + spare
    assert len(full.ids) > max_length
    shortened = shorten_one(fake, conversation, full, max_length)
    assert shortened is not None
    shorter, sample = shortened
    assert len(sample.ids) <= max_length
    assert shorter.reasoning and shorter.answer == "It is four."
    assert LONG_THOUGHT.startswith(shorter.reasoning)
    assert shorter.reasoning.endswith(".") or spare < 60
    assert (
        labels(fake, sample) == completion_text(shorter.reasoning, "It is four.") + "<end_of_turn>"
    )
    again = encode_chat(fake, shorter.turns)
    np.testing.assert_array_equal(sample.ids, again.ids)
    np.testing.assert_array_equal(sample.loss_mask, again.loss_mask)
    assert sample.ids.dtype == np.int32 and sample.loss_mask.dtype == bool


def test_shorten_needs_few_encodings(fake):
    conversation = conversation_of(LONG_THOUGHT * 20)
    full = encode_chat(fake, conversation.turns)
    fake.calls = 0
    assert shorten_one(fake, conversation, full, 500) is not None
    assert fake.calls == 2  # the closing part and the result


def test_shorten_many_at_once(fake):
    chats = [conversation_of(LONG_THOUGHT * n, answer) for n in (1, 2, 9) for answer in "ab"]
    chats.insert(3, conversation_of("short", "word " * 400))
    items = [(chat, encode_chat(fake, chat.turns)) for chat in chats]
    together = shorten(fake, items, 150)
    assert [result is None for result in together] == [False] * 3 + [True] + [False] * 3
    for (chat, sample), result in zip(items, together, strict=True):
        alone = shorten_one(fake, chat, sample, 150)
        assert (alone is None) == (result is None)
        if alone is not None and result is not None:
            assert alone[0] == result[0] and alone[0].answer == chat.answer
            np.testing.assert_array_equal(alone[1].ids, result[1].ids)
    assert shorten(fake, [], 150) == []


def test_shorten_keeps_earlier_turns(fake):
    conversation = conversation_of(LONG_THOUGHT)
    turns = (*CHAT, *conversation.turns)
    full = encode_chat(fake, turns)
    shortened = shorten_one(fake, conversation._replace(turns=turns), full, len(full.ids) - 10)
    assert shortened is not None
    assert shortened[0].turns[:-1] == turns[:-1]
    assert labels(fake, shortened[1]).startswith(
        "Hi!<end_of_turn>Ciao<end_of_turn><reasoning>First"
    )


def test_shorten_keeps_no_stub_of_a_reasoning(fake):
    conversation = conversation_of(LONG_THOUGHT)
    full = encode_chat(fake, conversation.turns)
    prompt = encode_prompt(fake, conversation.turns[:-1])
    closing = fake.encode("</reasoning>\n<answer>It is four.</answer>")
    needed = len(prompt) + MIN_REASONING_TOKENS + len(closing) + 1
    assert shorten_one(fake, conversation, full, needed - 1) is None
    assert shorten_one(fake, conversation, full, needed) is not None


def test_shorten_gives_up(fake):
    conversation = conversation_of(LONG_THOUGHT)
    full = encode_chat(fake, conversation.turns)
    assert shorten_one(fake, conversation, full, 10) is None
    long_answer = conversation_of("a short thought", answer="word " * 300)
    sample = encode_chat(fake, long_answer.turns)
    assert shorten_one(fake, long_answer, sample, 200) is None
    plain = Conversation((Turn("user", "p"), Turn("assistant", "word " * 300)), None, None)
    assert shorten_one(fake, plain, encode_chat(fake, plain.turns), 200) is None


def test_shorten_cuts_between_bytes_of_one_character(fake):
    conversation = conversation_of("\U0001f469" * 200)  # four byte tokens each, no place to cut
    full = encode_chat(fake, conversation.turns)
    for max_length in range(200, 208):
        shortened = shorten_one(fake, conversation, full, max_length)
        assert shortened is not None
        assert set(shortened[0].reasoning) == {"\U0001f469"}
        assert max_length - 4 < len(shortened[1].ids) <= max_length


class Unmerging(FakeTokenizer):
    """A cut text takes `extra` more tokens than its head did inside the full text."""

    extra = 9
    full_length = 0

    def encode(self, text: str) -> list[int]:
        ids = super().encode(text)
        if text.startswith("<reasoning>") and len(text) < self.full_length:
            ids[1:1] = [ord(" ")] * self.extra
        return ids


def test_shorten_tries_again_where_the_result_is_too_long():
    tokenizer = Unmerging()
    conversation = conversation_of(LONG_THOUGHT)
    tokenizer.full_length = len(conversation.turns[-1].content)
    full = encode_chat(tokenizer, conversation.turns)
    for max_length in range(len(full.ids) - 60, len(full.ids)):
        shortened = shorten_one(tokenizer, conversation, full, max_length)
        assert shortened is not None
        assert len(shortened[1].ids) <= max_length
    tokenizer.extra = 10_000
    assert shorten_one(tokenizer, conversation, full, len(full.ids) - 1) is None


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("One. Two. Three.", 99, "One. Two. Three."),
        ("One. Two. Three.", 16, "One. Two. Three."),
        ("One. Two. Three.", 12, "One. Two."),
        ("One. Two. Three.", 9, "One. Two."),  # ends exactly at the limit
        ("One two. Three four five", 14, "One two. Three"),  # a sentence would lose too much
        ("One two. Three four five", 16, "One two. Three"),
        ("Is it 3.14? No.", 9, "Is it"),  # no sentence ends inside a number
        ('He said "no." Then', 15, 'He said "no."'),
        ("line one\nline two", 10, "line one"),
        ("Steps are:\ngo on and on", 14, "Steps are:\ngo"),  # a colon ends nothing
        ("It is so.\n2. Then", 13, "It is so."),  # no list mark left alone
        ("unbreakable", 5, "unbre"),
        ("a unbreakable", 9, "a unbreak"),
        ("\u4f60\u597d\u3002\u518d\u89c1\u3002\u4e00", 6, "\u4f60\u597d\u3002\u518d\u89c1\u3002"),
        ("abc", 0, ""),
        ("abc", -1, ""),
        ("   abc", 2, ""),
    ],
)
def test_cut_text(text, limit, expected):
    assert cut_text(text, limit) == expected


def test_real_tokenizer(tokenizer):
    sample = encode_chat(tokenizer, CHAT)
    assert tokenizer.decode(sample.ids.tolist()) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHello<end_of_turn>\n"
        "<start_of_turn>model\nHi!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n"
        "<start_of_turn>model\nCiao<end_of_turn>"
    )
    # Gemma 3: bos 2, start 105, end 106, newline 107, blank line 108.
    assert sample.ids[:2].tolist() == [2, 105]
    assert sample.ids.tolist().count(106) == 4 and sample.ids.tolist().count(108) == 1
    assert labels(tokenizer, sample) == "Hi!<end_of_turn>Ciao<end_of_turn>"
    prompt = encode_prompt(tokenizer, CHAT[:4])
    assert prompt == sample.ids[: len(prompt)].tolist()


def test_real_tokenizer_segments_join_as_one_text(tokenizer):
    """Texts are encoded apart from "model\\n"; the ids are those of the joined text."""
    for text in (
        "Hi",
        "123",
        "<reasoning>So.</reasoning>",
        "\u4f60\u597d",
        "\U0001f469",
        "  x",
        "\ttab",
    ):
        turns = [Turn("user", text), Turn("assistant", text)]
        ids = encode_chat(tokenizer, turns).ids.tolist()
        user = tokenizer.encode("user\n" + text.strip())
        model = tokenizer.encode("model\n" + text.strip())
        assert ids == [2, 105, *user, 106, 107, 105, *model, 106]


@pytest.mark.parametrize("kind", ["sentences", "emoji"])
def test_real_tokenizer_shortens(tokenizer, kind):
    emoji = "\U0001f469\u200d\U0001f680\U0001f9ec" * 20
    conversation = conversation_of(LONG_THOUGHT if kind == "sentences" else emoji)
    full = encode_chat(tokenizer, conversation.turns)
    for max_length in range(60, len(full.ids)):
        shortened = shorten_one(tokenizer, conversation, full, max_length)
        assert shortened is not None
        shorter, sample = shortened
        assert 0.7 * max_length < len(sample.ids) <= max_length
        np.testing.assert_array_equal(sample.ids, encode_chat(tokenizer, shorter.turns).ids)
