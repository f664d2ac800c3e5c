import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_tokenizer import FakeTokenizer

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.chat import (
    MIN_REASONING_TOKENS,
    cut_text,
    encode_chat,
    encode_chats,
    encode_prompt,
    shorten,
)
from jaxsft.data.rows import Conversation, Turn, convert_row

CHAT = [
    Turn("system", " Be brief. "),
    Turn("user", "\nHello\n"),
    Turn("assistant", " Hi! "),
    Turn("user", "Bye"),
    Turn("assistant", "Ciao"),
]
TEMPLATE = AnswerTemplate()
LONG_THOUGHT = "First we look. Then we add 2 and 2. That makes four. " * 5


@pytest.fixture
def fake() -> FakeTokenizer:
    return FakeTokenizer()


def conversation_of(reasoning: str, answer: str = "It is four.") -> Conversation:
    row = {"prompt": "What is it?", "response": f"<think>{reasoning}</think>{answer}"}
    conversation = convert_row(row)
    assert isinstance(conversation, Conversation)
    return conversation


def shorten_one(tokenizer, conversation, max_length):
    """The shortened sample, or None; checks what is true of every one."""
    full = encode_chat(tokenizer, conversation.turns)
    (result,) = shorten(tokenizer, [(conversation, full)], max_length, TEMPLATE)
    if result is None:
        return None
    shorter, sample = result
    assert len(sample.ids) <= max_length
    assert shorter.reasoning and conversation.reasoning.startswith(shorter.reasoning)
    assert shorter.answer == conversation.answer
    assert shorter.turns[:-1] == conversation.turns[:-1]
    assert shorter.turns[-1].content == TEMPLATE.join(shorter.reasoning, shorter.answer)
    again = encode_chat(tokenizer, shorter.turns)
    np.testing.assert_array_equal(sample.ids, again.ids)
    np.testing.assert_array_equal(sample.loss_mask, again.loss_mask)
    assert sample.ids.dtype == np.int32 and sample.loss_mask.dtype == bool
    return result


def labels(tokenizer, sample) -> str:
    return tokenizer.decode(sample.ids[sample.loss_mask].tolist())


def test_ids_and_mask_by_hand(fake):
    sample = encode_chat(fake, [Turn("user", "Hi"), Turn("assistant", "Yes")])
    user, hi, mode, yes = (fake.encode(text)[0] for text in ("user", "Hi", "mode", "Yes"))
    newline, el = ord("\n"), ord("l")
    turn, end = fake.start_of_turn_id, fake.end_of_turn_id
    prompt = [fake.bos_id, turn, user, newline, hi, end, newline, turn, mode, el, newline]
    assert sample.ids.tolist() == [*prompt, yes, end]
    assert sample.loss_mask.tolist() == [False] * len(prompt) + [True, True]
    assert encode_prompt(fake, [Turn("user", "Hi")]) == prompt


def test_bulk_equals_one_by_one(fake):
    chats = [CHAT, CHAT[1:3], [Turn("user", "x"), Turn("assistant", "y")]]
    for chat, many in zip(chats, encode_chats(fake, chats), strict=True):
        one = encode_chat(fake, chat)
        np.testing.assert_array_equal(one.ids, many.ids)
        np.testing.assert_array_equal(one.loss_mask, many.loss_mask)


def test_wrong_roles(fake):
    with pytest.raises(ValueError, match="end with assistant"):
        encode_chat(fake, CHAT[:2])
    with pytest.raises(ValueError, match="end with user"):
        encode_prompt(fake, CHAT[:3])


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


def test_real_tokenizer_segments_join_as_one_text(tokenizer):
    """Texts are encoded apart from "model\\n"; the ids are those of the joined text."""
    thought, chinese, emoji = "<reasoning>So.</reasoning>", "\u4f60\u597d", "\U0001f469"
    for text in ("Hi", "123", thought, chinese, emoji, "  x", "\ttab"):
        turns = [Turn("user", text), Turn("assistant", text)]
        ids = encode_chat(tokenizer, turns).ids.tolist()
        user = tokenizer.encode("user\n" + text.strip())
        model = tokenizer.encode("model\n" + text.strip())
        assert ids == [2, 105, *user, 106, 107, 105, *model, 106]


# Shortening


def test_shorten_needs_few_encodings(fake):
    conversation = conversation_of(LONG_THOUGHT * 20)
    full = encode_chat(fake, conversation.turns)
    fake.calls = 0
    assert shorten(fake, [(conversation, full)], 500, TEMPLATE) != [None]
    assert fake.calls == 2  # the closing part and the result


def test_shorten_many_at_once(fake):
    chats = [conversation_of(LONG_THOUGHT * n, answer) for n in (1, 2, 9) for answer in "ab"]
    chats.insert(3, conversation_of("short", "word " * 400))
    together = shorten(
        fake, [(chat, encode_chat(fake, chat.turns)) for chat in chats], 150, TEMPLATE
    )
    assert [result is None for result in together] == [False] * 3 + [True] + [False] * 3
    for chat, result in zip(chats, together, strict=True):
        alone = shorten_one(fake, chat, 150)
        assert (alone is None) == (result is None)
        if alone is not None and result is not None:
            assert alone[0] == result[0]
            np.testing.assert_array_equal(alone[1].ids, result[1].ids)


def test_shorten_keeps_earlier_turns_and_ends_a_sentence(fake):
    turns = (*CHAT, *conversation_of(LONG_THOUGHT).turns)
    conversation = conversation_of(LONG_THOUGHT)._replace(turns=turns)
    num_tokens = len(encode_chat(fake, turns).ids)
    _, sample = shorten_one(fake, conversation, num_tokens - 10)
    text = labels(fake, sample)
    assert text.startswith("Hi!<end_of_turn>Ciao<end_of_turn><reasoning>First")
    assert text.endswith(".</reasoning>\n<answer>It is four.</answer><end_of_turn>")


def test_shorten_keeps_no_stub_of_a_reasoning(fake):
    conversation = conversation_of(LONG_THOUGHT)
    prompt = encode_prompt(fake, conversation.turns[:-1])
    closing = fake.encode("</reasoning>\n<answer>It is four.</answer>")
    needed = len(prompt) + MIN_REASONING_TOKENS + len(closing) + 1
    assert shorten_one(fake, conversation, needed - 1) is None
    assert shorten_one(fake, conversation, needed) is not None
    plain = Conversation((Turn("user", "p"), Turn("assistant", "word " * 300)), None, None)
    assert shorten_one(fake, plain, 200) is None


def test_shorten_cuts_between_bytes_of_one_character(fake):
    conversation = conversation_of("\U0001f469" * 200)  # four byte tokens each, no place to cut
    for max_length in range(200, 208):
        shorter, sample = shorten_one(fake, conversation, max_length)
        assert set(shorter.reasoning) == {"\U0001f469"}
        assert max_length - 4 < len(sample.ids)


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
    full = len(encode_chat(tokenizer, conversation.turns).ids)
    for max_length in range(full - 60, full):
        assert shorten_one(tokenizer, conversation, max_length) is not None
    tokenizer.extra = 10_000
    assert shorten_one(tokenizer, conversation, full - 1) is None


SENTENCES = st.lists(
    st.sampled_from(["So it is. ", "word ", "\n", "1. ", "\U0001f469", "\u4f60\u3002", "a" * 9])
    | st.text(max_size=5),
    max_size=40,
).map("".join)


def check_shorten(tokenizer, thought: str, max_length: int) -> None:
    conversation = convert_row({"prompt": "p", "response": f"<think>{thought}</think>It is."})
    if not isinstance(conversation, Conversation):
        return
    if len(encode_chat(tokenizer, conversation.turns).ids) > max_length:
        shorten_one(tokenizer, conversation, max_length)


@settings(deadline=None)
@given(SENTENCES, st.integers(1, 300))
def test_shorten(thought, max_length):
    check_shorten(FakeTokenizer(), thought, max_length)


@settings(deadline=None)
@given(thought=SENTENCES, max_length=st.integers(30, 120))
def test_shorten_real_tokenizer(tokenizer, thought, max_length):
    check_shorten(tokenizer, thought, max_length)


@pytest.mark.parametrize("thought", [LONG_THOUGHT, "\U0001f469\u200d\U0001f680\U0001f9ec" * 20])
def test_shorten_keeps_most_of_what_fits(tokenizer, thought):
    conversation = conversation_of(thought)
    for max_length in range(60, len(encode_chat(tokenizer, conversation.turns).ids)):
        _, sample = shorten_one(tokenizer, conversation, max_length)
        assert 0.7 * max_length < len(sample.ids)


@settings(deadline=None)
@given(SENTENCES, st.integers(-1, 250))
def test_any_cut_text(text, limit):
    text = text.strip()
    cut = cut_text(text, limit)
    assert text.startswith(cut)
    assert len(cut) <= max(limit, 0)
    assert cut == cut.rstrip()


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("One. Two. Three.", 99, "One. Two. Three."),
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
        ("abc", -1, ""),
        ("   abc", 2, ""),
    ],
)
def test_cut_text(text, limit, expected):
    assert cut_text(text, limit) == expected
