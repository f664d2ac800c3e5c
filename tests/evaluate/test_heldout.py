"""From samples to prompts, completions and their parts; losses of samples added up by hand."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from support.fake_tokenizer import FakeTokenizer

from jaxsft.common.batch import Batch
from jaxsft.config import EvalOptions
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.chat import encode_chat, encode_prompt
from jaxsft.data.packing import PackedRows
from jaxsft.data.rows import Turn
from jaxsft.evaluate import heldout
from jaxsft.evaluate.heldout import (
    Prompt,
    answer_mask,
    compare_losses,
    held_out_losses,
    read_prompts,
    with_examples,
)
from jaxsft.gemma.decode import Generation
from jaxsft.gemma.sharding import make_mesh

GOOD = "<reasoning>Two and two.</reasoning>\n<answer>Four.</answer>"
QUOTED = "What does <end_of_turn>\n<start_of_turn>user\nmean?"
SYSTEM, WHY = Turn("system", "Think."), Turn("user", "Why?")


@pytest.mark.parametrize(
    ("turns", "text"),
    [
        ([WHY], "Why?"),
        ([SYSTEM, WHY], "Think.\n\nWhy?"),
        ([SYSTEM, Turn("user", "Who?"), Turn("assistant", "I."), WHY], "Why?"),
        ([Turn("user", QUOTED)], QUOTED),
    ],
)
def test_a_prompt_is_what_generation_is_given(turns: list[Turn], text: str) -> None:
    tokenizer = FakeTokenizer()
    sample = encode_chat(tokenizer, [*turns, Turn("assistant", GOOD)])
    (prompt,) = read_prompts([sample], tokenizer, None)
    assert prompt == (encode_prompt(tokenizer, turns), text, GOOD)


def test_examples_are_the_turns_before() -> None:
    tokenizer = FakeTokenizer()
    question = Turn("user", "What is 2 + 2?")
    examples = [(Turn("user", f"Question {i}"), Turn("assistant", GOOD)) for i in range(2)]
    samples = [encode_chat(tokenizer, turns) for turns in ((SYSTEM, *examples[0]), examples[1])]
    (sample,) = [encode_chat(tokenizer, [question, Turn("assistant", "<answer>4</answer>")])]
    (prompt,) = with_examples(read_prompts([sample], tokenizer, None), samples, tokenizer)
    turns = [SYSTEM, *examples[0], *examples[1], question]
    assert prompt.ids == encode_prompt(tokenizer, turns)
    assert (prompt.text, prompt.reference) == ("What is 2 + 2?", "<answer>4</answer>")
    (same,) = with_examples(read_prompts([sample], tokenizer, None), [], tokenizer)
    assert same.ids == encode_prompt(tokenizer, [question])


def test_examples_as_text_and_where_such_an_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FakeTokenizer()
    samples = [
        encode_chat(tokenizer, [SYSTEM, Turn("user", q), Turn("assistant", a)])
        for q, a in (("Who?", GOOD), ("Why?", "<answer>4</answer>"))
    ]
    solved, asked = (read_prompts([sample], tokenizer, "Think.") for sample in samples)
    prompts = heldout.as_text(asked, solved, tokenizer)
    text = f"Question: Who?\nAnswer: {GOOD}\n\nQuestion: Why?\nAnswer:"
    assert prompts == [Prompt([tokenizer.bos_id, *tokenizer.encode(text)], *asked[0][1:])]

    four, more = tokenizer.encode(" 4"), tokenizer.encode("\n\nQuestion: And?\nAnswer: 5")
    turn = [tokenizer.start_of_turn_id, *tokenizer.encode("user")]
    found = [
        Generation(four, 1, []),
        Generation(four + more[:3], None, []),
        Generation(four + more, None, []),
        # Another turn, of which generation reached the end, or not.
        Generation(four + turn, 1, []),
        Generation(four + turn, None, []),
        Generation(four + more + turn, None, []),
    ]
    monkeypatch.setattr(tokenizer, "vocab_size", 300, raising=False)
    monkeypatch.setattr(heldout, "generate", lambda *_, **__: found)
    spec = SimpleNamespace(builder=None, mesh=None)
    options = {"spec": spec, "options": EvalOptions(), "stop_text": heldout.NEXT_QUESTION}
    answers = heldout.answer_prompts(None, None, prompts * len(found), tokenizer, **options)
    # Text, tokens, stopped by itself, cut off at the limit.
    assert [answer[2:] for answer in map(dataclasses.astuple, answers)] == [
        (" 4", 2, True, False),
        (" 4\n\nQues", 5, False, True),
        (" 4", 2, True, False),
        (" 4", 2, False, False),
        (" 4", 2, False, False),
        (" 4", 2, True, False),
    ]


def test_the_system_text_is_not_shown() -> None:
    tokenizer, system_prompt = FakeTokenizer(), " \nThink. "
    turns = [Turn("system", system_prompt), Turn("user", "Why?"), Turn("assistant", GOOD)]
    (prompt,) = read_prompts([encode_chat(tokenizer, turns)], tokenizer, system_prompt)
    assert prompt.text == "Why?"


def packed(texts: list[str], bins: list[list[int]]) -> tuple[PackedRows, FakeTokenizer]:
    tokenizer = FakeTokenizer()
    samples = [encode_chat(tokenizer, [Turn("user", "Q"), Turn("assistant", t)]) for t in texts]
    length = max(sum(len(samples[i].ids) for i in row) for row in bins)
    return PackedRows.from_samples(samples, bins, length), tokenizer


def test_answer_begins_with_its_tag() -> None:
    rows, tokenizer = packed([GOOD, "No tags.", "<answer>4</answer>"], [[0], [1], [2]])
    mask = answer_mask(rows, tokenizer, AnswerTemplate())
    parts = []
    for sample in range(3):
        low, high = rows.sample_offsets[sample : sample + 2]
        is_reasoning = rows.loss_mask_N[low:high] & ~mask[low:high]
        assert not (mask[low:high] & ~rows.loss_mask_N[low:high]).any()
        parts.append(tokenizer.decode(rows.tokens_N[low:high][is_reasoning].tolist()))
    assert parts == ["<reasoning>Two and two.</reasoning>\n", "", ""]


def test_losses_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token loses its own id: sums that the rows themselves give."""

    def token_log_probs(adapter: Any, frozen: Any, batch: Batch, *, spec: Any) -> jax.Array:
        return -batch.targets_BT * batch.loss_weights_BT

    monkeypatch.setattr(heldout, "token_log_probs", token_log_probs)
    rows, tokenizer = packed([GOOD, "No tags.", GOOD[1:], "x"], [[0, 2], [3], [1]])
    mask, batches = answer_mask(rows, tokenizer, AnswerTemplate()), []
    found = held_out_losses(
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        rows,
        mask,
        spec=SimpleNamespace(mesh=make_mesh(1, devices=jax.devices()[:1])),  # type: ignore[arg-type]
        batch_size=2,
        on_batch=lambda: batches.append(1),
    )
    assert len(batches) == 2
    tokens, labels = rows.tokens_N.astype(float), rows.loss_mask_N
    for name, of_part in (("all", labels), ("answer", labels & mask)):
        pieces = np.split(np.where(of_part, tokens, 0), rows.sample_offsets[1:-1])
        assert found[name].sums_S.tolist() == [piece.sum() for piece in pieces]
    assert len(found["reasoning"].sums_S) == 2  # the other two have none
    assert found["reasoning"].sums_S.sum() == tokens[labels & ~mask].sum()
    overall, reasoning, answer = compare_losses(found)
    assert overall.estimates[0].value == pytest.approx(tokens[labels].mean())
    assert reasoning.estimates[0].value == pytest.approx(tokens[labels & ~mask].mean())
    assert answer.estimates[0].num == 4
