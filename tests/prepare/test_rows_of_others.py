"""Rows in the forms that people bring, given to the real command: what is taught, what is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxsft.config import SYSTEM_PROMPT
from jaxsft.data.prepared import open_prepared
from jaxsft.prepare.__main__ import main
from jaxsft.weights.find import open_tokenizer

TAUGHT = "<reasoning>One and one make two.</reasoning>\n<answer>Two.</answer><end_of_turn>"
THOUGHT = "<think>One and one make two.</think>Two."
GOOD = {"prompt": "What is 1 + 1?", "response": THOUGHT}
PLAIN = {"prompt": "Say only two, please.", "response": "Here you are: two, and no more."}


class Outcome(NamedTuple):
    code: int
    said: str  # stdout, or the error
    texts: list[str]  # each sample, prompt and all
    taught: list[str]  # the part of each that bears loss


Prepare = Callable[..., Outcome]


@pytest.fixture
def prepare(tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Prepare:
    def run(rows: list[Any], *options: str, name: str = "rows.jsonl") -> Outcome:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        fixed = ["--model.path", str(tiny_model_dir), "--data.prepared_dir", str(tmp_path / "sets")]
        fixed += ["--data.train_files", str(path), "--data.eval_files", "[]"]
        fixed += ["--data.min_completion_tokens", "0", "--data.drop_duplicates", "false"]
        code = main([*fixed, *options])
        out, err = capsys.readouterr()
        if code:
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1
            return Outcome(code, err, [], [])
        found = open_prepared(Path(out.splitlines()[-1].removeprefix("in "))).rows
        samples = [found.sample(i) for i in range(found.num_samples)]
        small = open_tokenizer(tiny_model_dir / "tokenizer.model")
        texts = [small.decode(np.asarray(sample.ids).tolist()) for sample in samples]
        taught = [small.decode(sample.ids[sample.loss_mask].tolist()) for sample in samples]
        return Outcome(code, out, texts, taught)

    return run


def messages(*texts: Any, **more: Any) -> list[dict[str, Any]]:
    roles = ("user", "assistant") * len(texts)
    found = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return [*found[:-1], found[-1] | more]


def chat(*texts: Any, **more: Any) -> dict[str, Any]:
    return {"messages": messages(*texts, **more)}


OPEN_THOUGHTS = (
    "<|begin_of_thought|>\n\nOne and one make two.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nTwo.\n\n<|end_of_solution|>"
)
WHY = "One and one make two."
PARTS = [{"type": "text", "text": "1 + "}, {"type": "text", "text": "1?"}]
# (row, what must be in the prompt); all teach TAUGHT.
ACCEPTED = [
    ({"instruction": "Add these.", "input": "1, 1", "output": THOUGHT}, "these.\n\n1, 1"),
    ({"instruction": "Add.", "input": "1, 1", "response": THOUGHT}, "Add.\n\n1, 1"),
    ({"instruction": "Add.", "context": "1, 1", "response": THOUGHT}, "1, 1"),
    ({"system": "In rhymes.", "conversations": messages("1 + 1?", THOUGHT)}, "In rhymes."),
    (chat("1 + 1?", "Two.", reasoning=WHY), "1 + 1?"),
    (chat("1 + 1?", "Two.", thinking=WHY), "1 + 1?"),
    ({"question": "1 + 1?", "thinking": WHY, "answer": "Two."}, "1 + 1?"),
    ({"conversations": messages("1 + 1?", OPEN_THOUGHTS)}, "1 + 1?"),
    ({"messages": [*messages("1 + 2?", "Five.", weight=0), *messages("1?", THOUGHT)]}, "Five."),
    ({"prompt": messages("1 + 1?"), "completion": messages("", THOUGHT)[1:]}, "1 + 1?"),
    (chat(PARTS, [{"type": "text", "text": THOUGHT}]), "1 + 1?"),
    (GOOD | {"messages": None, "conversations": None, "input": None}, "1 + 1?"),
    ({"query": "1 + 1?", "response": THOUGHT, "source": "x", "score": None}, "1 + 1?"),
    ({"question": "1 + 1?", "answer": "One and one make <<1+1=2>>two.\n#### Two."}, "1 + 1?"),
]
REJECTED = [
    ("tools", chat("Weather?", "I look.", tool_calls=[{"name": "weather"}])),
    ("tools", {"messages": [*messages("Weather?"), {"role": "tool", "content": "Sun."}]}),
    ("wrong_roles", chat("a", "b", role="critic")),
    ("wrong_roles", {"messages": [{"role": "developer", "content": "s"}, *messages("a", "b")]}),
    ("wrong_roles", {"messages": [*messages("a"), {"role": "system", "content": "s"}]}),
    ("wrong_roles", {"messages": messages("a", "b")[::-1]}),
    ("wrong_roles", {"messages": [*messages("a"), *messages("a", "b")]}),
    ("wrong_field", chat("a", None)),
    ("unknown_fields", {"foo": "a", "bar": "b"}),
    ("unknown_fields", {"text": "A whole document."}),
    ("not_text", chat("a", [{"type": "image_url", "image_url": {}}])),
    ("unused_text", {"prompt": "a", "response": "b", "hint": "c"}),
    ("unknown_tags", {"prompt": "a", "response": "<inner_thoughts>b</inner_thoughts>c"}),
    ("weight", chat("a", "b", weight=0.3)),
]


def test_every_form_teaches_the_same(prepare: Prepare) -> None:
    done = prepare([row for row, _ in ACCEPTED])
    assert done.code == 0 and f"{len(ACCEPTED)} rows read, {len(ACCEPTED)} kept" in done.said
    for (row, asked), text, taught in zip(ACCEPTED, done.texts, done.taught, strict=True):
        assert taught == TAUGHT and asked in text, (row, text)
        assert (SYSTEM_PROMPT in text) == ("system" not in row), row
    assert "columns used: answer, completion, context, conv" in done.said
    assert "; not used: source" in done.said


def test_odd_rows_among_good_ones_are_counted(prepare: Prepare) -> None:
    good = [GOOD | {"prompt": f"What is {i} + {i}?"} for i in range(40)]
    done = prepare(good + [row for _, row in REJECTED], "--data.max_drop", "0.3")
    assert done.code == 0 and "kept (74.1%)" in done.said and len(done.texts) == 40
    for reason in dict(REJECTED):
        count = [name for name, _ in REJECTED].count(reason)
        (line,) = [line for line in done.said.splitlines() if f" rejected: {reason}, as " in line]
        assert line.startswith(f"train: {count} ") and line.count("rows.jsonl:") == min(count, 2)
    assert '("hint" holds text that would not be used' in done.said
    done = prepare([row for _, row in REJECTED], name="odd.jsonl")
    assert done.code == 2 and len(done.said) < 600
    assert "no sample is left of 14 rows: 5 wrong_roles, as " in done.said


def test_answers_without_a_thought(prepare: Prepare) -> None:
    rows = [GOOD, PLAIN, {**PLAIN, "prompt": "Two?", "response": "<think>\n</think>\nIt is two."}]
    done = prepare(rows)
    assert [SYSTEM_PROMPT in text for text in done.texts] == [True, False, False]
    assert "2 noted: plain_completion" in done.said and done.taught[2] == "It is two.<end_of_turn>"
    done = prepare(rows, "--data.without_thought", "keep_plain")
    assert [SYSTEM_PROMPT in text for text in done.texts] == [True] * 3
    done = prepare(rows, "--data.without_thought", "reject", "--data.max_drop", "0.7")
    assert done.taught == [TAUGHT] and "2 rejected: no_thought" in done.said


def test_columns_template_and_earlier_reasoning(prepare: Prepare) -> None:
    row = {"task": "1 + 1?", "text": "Two.", "why": "One and one make two.", "hint": "none"}
    columns = "{prompt: task, response: text, reasoning: why}"
    done = prepare([row], "--data.columns", columns)
    assert done.taught == [TAUGHT] and "columns used: task, text, why; not used: hint" in done.said
    for columns, fault in (
        ("{prompt: task, response: text, reasoning: wy}", "names wy, which no training row has"),
        ("{prompt: task}", "name the prompt and the response, or messages"),
        ("{prompt: task, response: task}", "two parts have the same column"),
    ):
        done = prepare([row], "--data.columns", columns)
        assert (
            done.code == 2 and f"data.columns{'' if 'wy' in columns else ':'} {fault}" in done.said
        )
    template = "<think>{reasoning}</think>\n{answer}"
    done = prepare([GOOD], "--data.answer_template", template, "--data.system_prompt", "Think.")
    assert done.taught == ["<think>One and one make two.</think>\nTwo.<end_of_turn>"]
    assert "Think.\n\nWhat is 1 + 1?" in done.texts[0]
    done = prepare([GOOD], "--data.answer_template", template)
    assert done.code == 2 and "data.system_prompt asks for <reasoning>" in done.said
    talk = chat("Two?", "<think>Hm.</think>Yes.", "1 + 1?", THOUGHT)
    done = prepare([talk], "--data.earlier_reasoning", "strip")
    assert done.taught == [TAUGHT] and "model\n<answer>Yes.</answer><end_of_turn>" in done.texts[0]
    assert "Hm." not in done.texts[0]
