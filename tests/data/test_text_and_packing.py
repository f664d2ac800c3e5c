"""Properties of the path from a row's text to packed rows, over generated input."""

from typing import get_args

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_tokenizer import FakeTokenizer

from jaxsft.data.bins import best_fit_decreasing, one_per_row
from jaxsft.data.chat import cut_text, encode_chat, encode_prompt, shorten
from jaxsft.data.packing import PackedRows, Sample, StepBatches, num_steps
from jaxsft.data.rows import (
    Conversation,
    ConversionReason,
    Rejected,
    Turn,
    check_roles,
    completion_text,
    convert_row,
    split_completion,
)

unhurried = settings(deadline=None)  # a slow machine is no failure

# Text made of what matters to the parsers, and of anything at all.
TAGS = st.sampled_from(
    ["<think>", "</think>", "<reasoning>", "</reasoning>", "<answer>", "</answer>", "####"]
)
CONTROLS = st.sampled_from(["<end_of_turn>", "<start_of_turn>model\n", "<bos>", "<eos>", "<<1=1>>"])
FRAGMENTS = TAGS | CONTROLS | st.sampled_from(["\n\n", " ", ". "])
TEXTS = st.lists(FRAGMENTS | st.text(max_size=8), max_size=8).map("".join)
# Mostly well formed, so that acceptance is exercised as well.
THOUGHTS = st.tuples(TEXTS | st.text(), TEXTS | st.text()).map(
    lambda pair: f"<think>{pair[0]}</think>{pair[1]}"
)
VALUES = TEXTS | THOUGHTS | st.none() | st.integers() | st.lists(st.text(max_size=3), max_size=2)
ROLES = st.sampled_from(["system", "user", "human", "assistant", "gpt", "tool"])
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": ROLES, "content": TEXTS | THOUGHTS}, optional={"reasoning_content": VALUES}
    )
    | st.fixed_dictionaries({"from": ROLES, "value": THOUGHTS})
    | VALUES,
    max_size=5,
)
FIELDS = ["prompt", "response", "completion", "reasoning_content", "instruction", "question"]
PLAIN_ROWS = st.fixed_dictionaries({"prompt": TEXTS, "completion": st.text()})
FLAT_ROWS = st.dictionaries(st.sampled_from([*FIELDS, "answer", "other"]), VALUES, max_size=5)
GLAIVE_ROWS = st.fixed_dictionaries({"prompt": TEXTS, "response": THOUGHTS})
MESSAGE_ROWS = st.fixed_dictionaries({"messages": MESSAGES | VALUES})
EXCHANGES = st.lists(st.tuples(st.text(min_size=1), THOUGHTS | st.text(min_size=1)), max_size=3)
CHAT_ROWS = EXCHANGES.map(
    lambda pairs: {
        "messages": [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    }
)
ROWS = GLAIVE_ROWS | PLAIN_ROWS | CHAT_ROWS | FLAT_ROWS | MESSAGE_ROWS

TURN_TEXTS = st.tuples(TEXTS, st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3))


@st.composite
def packings(draw):
    """Samples of distinct tokens, a row length that holds them, and a packer."""
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=40))
    row_length = draw(st.integers(max(lengths), 24))
    ids = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    samples = []
    for part in np.split(ids, np.cumsum(lengths)[:-1]):
        prompt_length = draw(st.integers(0, len(part)))
        samples.append(Sample(part, np.arange(len(part)) >= prompt_length))
    pack = draw(st.sampled_from([best_fit_decreasing, one_per_row]))
    return samples, PackedRows.from_samples(samples, pack(lengths, row_length), row_length)


@unhurried
@given(packings())
def test_packing_loses_and_duplicates_nothing(packing):
    samples, rows = packing
    batch = rows.batch(range(len(rows)))
    found = {}  # first token -> ids, mask of labels
    for b in range(len(rows)):
        segments = batch.segment_ids_BT[b]
        last = segments.max()
        used = np.repeat(np.arange(1, last + 1), np.bincount(segments, minlength=last + 1)[1:])
        np.testing.assert_array_equal(segments[: len(used)], used)  # numbered 1, 2, … in order
        assert not segments[len(used) :].any()
        for array in batch:
            assert not array[b, len(used) :].any()  # padding is zero everywhere
        for segment in range(1, last + 1):
            here = np.flatnonzero(segments == segment)
            ids = batch.tokens_BT[b, here]
            np.testing.assert_array_equal(batch.positions_BT[b, here], np.arange(len(here)))
            # Targets are the segment's own tokens shifted by one; the last position has none.
            np.testing.assert_array_equal(batch.targets_BT[b, here[:-1]], ids[1:])
            assert batch.targets_BT[b, here[-1]] == 0 and not batch.loss_weights_BT[b, here[-1]]
            found[int(ids[0])] = (ids, batch.loss_weights_BT[b, here[:-1]])
    assert len(found) == len(samples)
    for sample in samples:
        ids, loss_mask = found[int(sample.ids[0])]
        np.testing.assert_array_equal(ids, sample.ids)
        np.testing.assert_array_equal(loss_mask, sample.loss_mask[1:])
    assert rows.num_tokens == (batch.segment_ids_BT > 0).sum()
    assert rows.num_loss_tokens == batch.loss_weights_BT.sum()
    assert rows.fill == (batch.segment_ids_BT > 0).mean()


@unhurried
@given(st.lists(st.integers(1, 60), max_size=80), st.integers(60, 100))
def test_best_fit_leaves_no_two_rows_that_fit_together(lengths, row_length):
    bins = best_fit_decreasing(lengths, row_length)
    assert sorted(index for row in bins for index in row) == list(range(len(lengths)))
    used = sorted(sum(lengths[index] for index in row) for row in bins)
    assert all(size <= row_length for size in used)
    # Hence every row but one is more than half full on average: fill > 1/2 - 1/rows.
    assert len(used) < 2 or used[0] + used[1] > row_length
    assert bins == best_fit_decreasing(lengths, row_length)


@unhurried
@given(
    num_rows=st.integers(1, 9),
    share=st.integers(1, 4),
    process_count=st.integers(1, 4),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
)
def test_steps_cover_every_epoch_whatever_the_processes(
    num_rows, share, process_count, epochs, seed
):
    samples = [Sample(np.array([i + 1], np.int32), np.array([True])) for i in range(num_rows)]
    rows = PackedRows.from_samples(samples, one_per_row([1] * num_rows, 1), 1)
    size = share * process_count
    steps = num_steps(num_rows, epochs, size)
    sources = [
        StepBatches(rows, size, seed, steps, index, process_count, epochs)
        for index in range(process_count)
    ]
    stream = np.concatenate([s[step].tokens_BT[:, 0] for step in range(steps) for s in sources])
    assert (steps - 1) * size < num_rows * epochs <= steps * size == len(stream)
    for epoch in range(epochs):
        part = stream[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(part) == list(range(1, num_rows + 1))
    assert not stream[num_rows * epochs :].any()


@settings(deadline=None, max_examples=300)
@given(ROWS)
def test_convert_row_accepts_rejects_or_raises_value_error(row):
    try:
        result = convert_row(row)
    except ValueError as error:
        assert "\n" not in str(error)
        return
    if isinstance(result, Rejected):
        assert result.reason in get_args(ConversionReason) and result.detail
        return
    check_roles(result.turns, last="assistant")
    assert all(turn.content and turn.content == turn.content.strip() for turn in result.turns)
    last = result.turns[-1].content
    if result.reasoning is None:
        assert result.answer is None and split_completion(last) is None
    else:
        assert last == completion_text(result.reasoning, result.answer)
        assert split_completion(last) == (result.reasoning, result.answer)
    # What was accepted is stable: it converts to itself.
    messages = [{"role": turn.role, "content": turn.content} for turn in result.turns]
    again = convert_row({"messages": messages})
    assert isinstance(again, Conversation) and again[:3] == result[:3]


def turns_of(texts) -> list[Turn]:
    system, exchanges = texts
    turns = [Turn("system", system)] if system.strip() else []
    for user, assistant in exchanges:
        turns += [Turn("user", user), Turn("assistant", assistant)]
    return turns


def check_chat(tokenizer, turns: list[Turn]) -> None:
    sample = encode_chat(tokenizer, turns)
    ids = sample.ids.tolist()
    num_turns = sum(turn.role != "system" for turn in turns)
    # One BOS, and text yields no control id.
    assert ids[0] == tokenizer.bos_id
    assert ids.count(tokenizer.bos_id) == 1 and ids.count(tokenizer.eos_id) == 0
    assert ids.count(tokenizer.start_of_turn_id) == num_turns
    assert ids.count(tokenizer.end_of_turn_id) == num_turns
    # The labels are the answers and their ends, exactly.
    expected = []
    for turn in turns:
        if turn.role == "assistant":
            expected += [*tokenizer.encode(turn.content.strip()), tokenizer.end_of_turn_id]
    assert sample.ids[sample.loss_mask].tolist() == expected
    # Every prompt is a prefix of the chat.
    for index, turn in enumerate(turns):
        if turn.role == "user":
            prompt = encode_prompt(tokenizer, turns[: index + 1])
            assert ids[: len(prompt)] == prompt
            assert sample.loss_mask[len(prompt)] and not sample.loss_mask[len(prompt) - 1]


@unhurried
@given(TURN_TEXTS)
def test_chat(texts):
    check_chat(FakeTokenizer(), turns_of(texts))


@unhurried
@given(texts=TURN_TEXTS)
def test_chat_real_tokenizer(tokenizer, texts):
    check_chat(tokenizer, turns_of(texts))


SENTENCES = st.lists(
    st.sampled_from(["So it is. ", "word ", "\n", "1. ", "\U0001f469", "\u4f60\u3002", "a" * 9])
    | st.text(max_size=5),
    max_size=40,
).map("".join)


@unhurried
@given(SENTENCES, st.integers(-1, 250))
def test_cut_text(text, limit):
    text = text.strip()
    cut = cut_text(text, limit)
    assert text.startswith(cut)
    assert len(cut) <= max(limit, 0)
    assert cut == cut.rstrip()


def check_shorten(tokenizer, thought: str, max_length: int) -> None:
    conversation = convert_row({"prompt": "p", "response": f"<think>{thought}</think>It is."})
    if isinstance(conversation, Rejected):
        return
    full = encode_chat(tokenizer, conversation.turns)
    if len(full.ids) <= max_length:
        return
    result = shorten(tokenizer, [(conversation, full)], max_length)[0]
    if result is None:
        return
    shorter, sample = result
    assert len(sample.ids) <= max_length
    assert shorter.reasoning and conversation.reasoning.startswith(shorter.reasoning)
    assert shorter.answer == "It is."
    assert shorter.turns[:-1] == conversation.turns[:-1]
    assert shorter.turns[-1].content == completion_text(shorter.reasoning, "It is.")
    again = encode_chat(tokenizer, shorter.turns)
    np.testing.assert_array_equal(sample.ids, again.ids)
    np.testing.assert_array_equal(sample.loss_mask, again.loss_mask)


@unhurried
@given(SENTENCES, st.integers(1, 300))
def test_shorten(thought, max_length):
    check_shorten(FakeTokenizer(), thought, max_length)


@unhurried
@given(thought=SENTENCES, max_length=st.integers(30, 120))
def test_shorten_real_tokenizer(tokenizer, thought, max_length):
    check_shorten(tokenizer, thought, max_length)
