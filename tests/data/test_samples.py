import re

import numpy as np
import pytest
from support.fake_tokenizer import FakeTokenizer
from support.samples import load_samples

from jaxsft.config import SYSTEM_PROMPT, DataOptions
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.chat import encode_chat
from jaxsft.data.rows import Turn

GOOD = {"prompt": "What is 1 + 1?", "response": "<think>One and one.</think>Two"}
LONG = {"prompt": "p", "response": f"<think>{'We add one more. ' * 30}</think>Two"}
LONG_ANSWER = {"prompt": "p", "response": f"<think>Short.</think>{'Two. ' * 80}"}


@pytest.fixture
def fake() -> FakeTokenizer:
    return FakeTokenizer()


def load(files, tokenizer, max_length, overlong, system_prompt, **options):
    """As load_samples, without filters unless they are asked for."""
    off = {"drop_duplicates": False, "drop_degenerate": False}
    off |= {"min_completion_tokens": 0, "max_drop": 1.0, "without_thought": "reject"}
    lengths = {"max_length": max_length, "overlong": overlong, "system_prompt": system_prompt}
    heldout_files = options.pop("heldout_files", ())
    return load_samples(
        files, tokenizer, DataOptions(**{**off, **lengths, **options}), heldout_files=heldout_files
    )


def text_of(fake, sample) -> str:
    return fake.decode(sample.ids.tolist())


def test_sample_is_the_encoded_chat(write, fake):
    samples, report = load([write(GOOD)], fake, 500, "raise", SYSTEM_PROMPT)
    turns = [
        Turn("system", SYSTEM_PROMPT),
        Turn("user", "What is 1 + 1?"),
        Turn("assistant", AnswerTemplate().join("One and one.", "Two")),
    ]
    expected = encode_chat(fake, turns)
    np.testing.assert_array_equal(samples[0].ids, expected.ids)
    np.testing.assert_array_equal(samples[0].loss_mask, expected.loss_mask)
    assert (report.rows_read, report.samples) == (1, 1)
    assert report.num_tokens == len(expected.ids)
    assert report.num_loss_tokens == expected.loss_mask.sum()


def test_system_prompt_is_optional_and_gives_way(write, fake):
    own = [
        {"role": "system", "content": "Own."},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "<think>r</think>c"},
    ]
    path = write(GOOD, {"messages": own})
    texts = [text_of(fake, s) for s in load(path, fake, 500, "raise", "Ours.")[0]]
    assert texts[0].startswith("<bos><start_of_turn>user\nOurs.\n\nWhat is")
    assert texts[1].startswith("<bos><start_of_turn>user\nOwn.\n\np<end_of_turn>")
    texts = [text_of(fake, s) for s in load(path, fake, 500, "raise", None)[0]]
    assert texts[0].startswith("<bos><start_of_turn>user\nWhat is")


def test_loss_on_prompt(write, fake):
    path = write(GOOD, LONG)
    samples, report = load(path, fake, 200, "shorten", None, loss_on_prompt=True)
    for sample in samples:
        assert not sample.loss_mask[0] and sample.loss_mask[1:].all()
    assert report.shortened == 1
    assert report.num_loss_tokens == report.num_tokens - 2


def test_every_row_is_counted(write, fake):
    path = write(
        GOOD,
        {"prompt": "p", "response": "no thought"},
        {"prompt": "p", "response": "r</think>a <eos>"},
        {"prompt": "p", "response": "<think>"},
        {"prompt": "p", "response": "nor here"},
        LONG,
        LONG_ANSWER,
    )
    samples, report = load(path, fake, 200, "shorten", None)
    assert len(samples) == report.samples == 3
    assert report.rows_read == 7
    assert report.rejected == {"no_thought": 2, "unclosed_thought": 1, "too_long": 1}
    assert report.noted == {"implicit_open": 1, "control_look_alike": 1}
    assert report.shortened == 1
    assert report.samples + report.num_rejected == report.rows_read
    text = "\n".join(report.lines())
    assert "7 rows read, 3 kept (42.9%)" in text
    assert f"2 rejected: no_thought, as {path}:2 (an answer has no" in text
    assert f"; {path}:5 (an answer has no" in text  # two examples
    assert re.search(
        rf"1 rejected: too_long, as {re.escape(str(path))}:7 \(\d+ tokens, limit 200\)", text
    )
    assert re.search(r"1 shortened by \d+ tokens", text)
    assert "1 noted: implicit_open" in text


def test_drop_and_raise(write, fake):
    path = write(GOOD, LONG)
    samples, report = load(path, fake, 120, "drop", None)
    assert (len(samples), report.rejected, report.shortened) == (1, {"too_long": 1}, 0)
    with pytest.raises(ValueError, match=r"rows.jsonl:2 \(\d+ tokens, limit 120\): too long"):
        load(path, fake, 120, "raise", None)


def test_hopeless_lengths_are_not_tokenised(write, fake):
    huge = {"prompt": "p", "response": f"<think>{'We add. ' * 4000}</think>Two"}
    path = write(GOOD, huge)
    _, report = load(path, fake, 120, "shorten", None)
    assert report.examples == {"too_long": [f"{path}:2 (32,044 characters, limit 120 tokens)"]}
    with pytest.raises(ValueError, match=r"rows.jsonl:2 \(32,044 characters.*: too long"):
        load(path, fake, 120, "raise", None)


def test_no_sample_left(write, fake):
    path = write({"prompt": "p", "response": "no"}, LONG)
    with pytest.raises(ValueError, match=r"no sample is left of 2 rows: ") as caught:
        load(path, fake, 100, "drop", None)
    assert "1 no_thought, as " in str(caught.value)
    assert "1 too_long, as " in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no rows in the range 2:"):
        load(path, fake, 100, "drop", None, start=2)
    with pytest.raises(ValueError, match="no files: no rows"):
        load([], fake, 100, "drop", None)


def test_range_runs_over_all_files(write, fake):
    rows = [{"prompt": f"p{i}", "response": "<think>r</think>a"} for i in range(6)]
    paths = [write(*rows[:2], name="a.jsonl"), write(*rows[2:], name="b.jsonl")]
    for start, stop in ((0, None), (1, 4), (2, 3), (5, 6)):
        samples, report = load(paths, fake, 500, "raise", None, start=start, stop=stop)
        names = [re.findall(r"p\d", text_of(fake, sample))[0] for sample in samples]
        assert names == [f"p{i}" for i in range(6)][start:stop]
        assert report.rows_read == len(names)
    # Fewer rows than the recipe counts on would silently mean more epochs.
    with pytest.raises(ValueError, match=r"only 1 of these 94 are there; lower data.stop"):
        load(paths, fake, 500, "raise", None, start=5, stop=99)


def test_more_rows_than_one_chunk(write, fake):
    rows = [{"prompt": f"p{i}", "response": "<think>r</think>a"} for i in range(2100)]
    samples, report = load(write(*rows), fake, 500, "raise", None)
    assert report.samples == 2100
    assert all(f"p{i}<end" in text_of(fake, sample) for i, sample in enumerate(samples))


def test_real_tokenizer(write, tokenizer):
    path = write(GOOD, LONG, {"prompt": "<bos>", "response": "<think>\U0001f469<eos></think>\0"})
    samples, report = load(path, tokenizer, 120, "shorten", SYSTEM_PROMPT)
    assert (report.samples, report.shortened) == (3, 1)
    for sample in samples:
        assert len(sample.ids) <= 120
        text = tokenizer.decode(sample.ids[sample.loss_mask].tolist())
        assert text.startswith("<reasoning>") and text.endswith("</answer><end_of_turn>")
        assert sample.ids[-1] == tokenizer.end_of_turn_id
        assert sample.ids.tolist().count(tokenizer.bos_id) == 1


def test_filters_are_counted_with_their_places(write, fake):
    loop = {"prompt": "q", "response": f"<think>{'Again and again. ' * 80}</think>Two"}
    filler = {"prompt": "r", "response": "<think>Hm.</think>I hope this helps!"}
    question = "How many legs have three spiders and two birds in all together?"
    asked = {"prompt": f"  {question.upper()} Tell me.", "response": "<think>r</think>28"}
    path = write(GOOD, loop, GOOD, filler, asked)
    heldout = write({"question": question, "answer": "Eight each.\n#### 28"}, name="heldout.jsonl")
    off = {"drop_duplicates": False, "drop_degenerate": False, "drop_contaminated": False}
    on = {name: True for name in off}
    samples, report = load(path, fake, 4000, "raise", None, heldout_files=[heldout], **on)
    assert report.rejected == {"degenerate": 2, "duplicate": 1, "contaminated": 1}
    assert len(samples) == 1 and report.by_source == {str(path): {"rows_read": 5, "samples": 1}}
    assert report.examples["degenerate"][1] == f'{path}:4 (the answer is only "I hope this helps!")'
    assert report.examples["duplicate"] == [f"{path}:3 (the same conversation came before)"]
    _, report = load(path, fake, 4000, "raise", None, heldout_files=[heldout], **off)
    assert report.samples == 5


def test_all_trained_answers_count_as_completion(write, fake):
    turns = [
        ("user", "u"),
        ("assistant", "one two three four"),
        ("user", "u"),
        ("assistant", "Yes"),
    ]
    untrained = [{"role": r, "content": c, "weight": int(c == "Yes")} for r, c in turns]
    trained = [{"role": r, "content": c} for r, c in turns]
    path = write({"messages": trained}, {"messages": untrained})
    options = {"without_thought": "keep_plain", "min_completion_tokens": 5}
    _, report = load(path, fake, 500, "raise", None, **options)
    assert (report.samples, report.rejected) == (1, {"too_short": 1})


def test_too_short_and_too_many_lost(write, fake):
    path = write(GOOD, {"prompt": "p", "completion": "No."})
    keep = {"without_thought": "keep_plain"}
    _, report = load(path, fake, 500, "raise", None, min_completion_tokens=5, **keep)
    assert report.rejected == {"too_short": 1}
    assert report.examples["too_short"] == [f"{path}:2 (3 tokens of completion, 5 at least)"]
    with pytest.raises(ValueError, match=r"50.0% of 2 rows are left out, more than data.max_"):
        load(path, fake, 500, "raise", None, min_completion_tokens=5, max_drop=0.49, **keep)
    load(path, fake, 500, "raise", None, min_completion_tokens=5, max_drop=0.5, **keep)


def test_what_rows_say_cannot_reach_the_terminal_raw(write, fake):
    escape = {"prompt": "p", "response": "<think>Hm.</think>Sure \n\n\x1b[!"}
    _, report = load(write(GOOD, escape), fake, 500, "raise", None, drop_degenerate=True)
    text = "\n".join(report.lines())
    assert "\x1b" not in text and "\\u{1b}" in text and len(text.splitlines()) == 3


def test_the_system_text_asks_only_for_thoughts_that_are_there(write, fake):
    plain, own = (
        {"prompt": "p", "response": "a"},
        {"system": "Own.", "prompt": "q", "response": "b"},
    )
    path = write(GOOD, plain, own)

    def first_lines(policy):
        samples, _ = load(path, fake, 500, "raise", "Ours.", without_thought=policy)
        return [text_of(fake, sample).split("\n")[1] for sample in samples]

    assert first_lines("drop_system") == ["Ours.", "p<end_of_turn>", "Own."]
    assert first_lines("keep_plain") == ["Ours.", "Ours.", "Own."]
    assert first_lines("reject") == ["Ours."]


def test_untrained_turns_bear_no_loss_on_the_prompt_either(write, fake):
    turns = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]
    messages = [{"role": role, "content": text, "weight": text != "two"} for role, text in turns]
    (sample,), _ = load(
        write({"messages": messages}), fake, 500, "raise", None, without_thought="keep_plain",
        loss_on_prompt=True,
    )  # fmt: skip
    left_out = fake.decode(sample.ids[~sample.loss_mask].tolist())
    assert left_out == "<bos>two<end_of_turn>"


def test_columns_are_reported_and_contradictions_refused(write, fake):
    path = write({"task": "p", "text": "<think>r</think>a", "hint": "h"})
    columns = {"prompt": "task", "response": "text"}
    _, report = load(path, fake, 500, "raise", None, columns=columns)
    assert report.columns == {str(path): {"used": ["task", "text"], "unused": ["hint"]}}
    assert "columns used: task, text; not used: hint" in report.lines()
    for options, words in (
        ({"columns": {"promt": "task"}}, "'promt' is no part of a row; use messages, system"),
        ({"answer_template": "{answer}"}, "must have {reasoning} and then {answer}"),
        ({"answer_template": "<a>{reasoning}</a>\\n{answer}"}, "backslash and an n"),
        ({"answer_template": "So: {reasoning} And So: {answer}"}, "or inside another one"),
        ({"answer_template": "<a>{reasoning}</a>{answer}"}, "asks for <reasoning>, which data.ans"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            load(path, fake, 500, "raise", SYSTEM_PROMPT, **options)
