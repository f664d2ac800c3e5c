"""Rows of every layout as tasks; nothing that a row says is dropped, and no row raises."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxsft.data.fields import UNREAD, Repeated
from jaxsft.data.replies import Rejected
from jaxsft.data.rows import RowOptions
from jaxsft.rewards.records import Task
from jaxsft.rewards.tasks import is_for_training, read_task

OWN = ("format", "my_rewards.py:brevity")
TESTS = ["assert f(1) == 2", "assert f(2) == 3", "assert f(3) == 4"]


def read(row: Any, **how: Any) -> Task:
    task = read_task(row, **how)
    assert isinstance(task, Task), task
    return task


@pytest.mark.parametrize(
    ("row", "kind", "answer"),
    [
        (
            {"question": "q", "answer": "She had 48/2 = <<48/2=24>>24.\n#### 1,024"},
            "number",
            "1,024",
        ),
        ({"question": "q", "answer": "x #### 72"}, "number", "72"),
        ({"question": "q", "answer": "#### 5 #### 72\nSo she has them."}, "number", "72"),
        ({"prompt": "q", "response": "#### Step 1\nadd\n####$1,080\n"}, "number", "$1,080"),
        ({"prompt": "q", "answer": "So it is. #### Tuesday"}, "text", "Tuesday"),
        ({"prompt": "q", "response": "#### Step 1\nso \\boxed{72}"}, "number", "72"),
        ({"question": "q", "answer": "72"}, "number", "72"),
        ({"question": "q", "answer": "So it is.\n#### Tuesday"}, "text", "Tuesday"),
        ({"problem": "q", "solution": "Then 3/4.\n#### 3/4"}, "number", "3/4"),
        ({"problem": "q", "solution": "so it is \\boxed{\\frac{3}{4}}."}, "number", "\\frac{3}{4}"),
        ({"problem": "q", "solution": "long", "answer": "5"}, "number", "5"),
        ({"problem": "q", "solution": "long", "final_answer": "5", "answer": "x"}, "number", "5"),
        ({"prompt": "q", "answer": 72}, "number", "72"),
        ({"prompt": "q", "answer": 7.5}, "number", "7.5"),
        ({"prompt": "q", "answer": 1e-7}, "number", "0.0000001"),
        ({"prompt": "q", "answer": True}, "text", "true"),
        ({"prompt": "q", "answer": "-$5.20"}, "number", "-$5.20"),
        ({"prompt": "q", "answer": "5 km"}, "text", "5 km"),
        ({"prompt": "q", "answer": "5 km", "kind": " NUMBER "}, "number", "5 km"),
        ({"prompt": "q", "answer": "5", "kind": "text"}, "text", "5"),
        ({"prompt": "q", "answer": "5", "kind": "my sums"}, "my sums", "5"),
        ({"instruction": "q", "output": "<think>hm</think>\n72"}, "number", "72"),
        ({"prompt": "q", "completion": "72", "reasoning": "hm"}, "number", "72"),
        ({"prompt": "q", "ground_truth": "<think>hm</think>72"}, "number", "72"),
        (
            {"prompt": "q", "response": "<reasoning>a b</reasoning>\n<answer>7</answer>"},
            *("number", "7"),
        ),
        ({"prompt": [{"role": "user", "content": "q"}], "answer": "no"}, "text", "no"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "<think>hm</think>It is \\boxed{72}."},
                ]
            },
            *("number", "72"),
        ),
    ],
    ids=repr,
)
def test_the_answer_of_a_row(row: dict[str, Any], kind: str, answer: str) -> None:
    assert read(row)[:6] == ("q", kind, answer, (), "", row)


def test_a_system_text_and_earlier_turns_stay() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "q1"}]
    messages += [{"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"}]
    task = read({"messages": messages, "answer": "5"})
    assert task.prompt == "q2"
    assert [turn[:2] for turn in task.earlier] == [
        ("system", "S"),
        ("user", "q1"),
        ("assistant", "a1"),
    ]
    assert read({"prompt": "q", "answer": "5", "system": "S"}).earlier[0].content == "S"
    assert read({"prompt": "q", "answer": "5", "input": "given"}).prompt == "q\n\ngiven"


def test_mbpp_shows_the_first_test_in_the_words_that_training_uses() -> None:
    row = {"text": "Write f.\r\n", "code": "def f(x):\r\n  return x + 1", "task_id": 601}
    row |= {"test_setup_code": "import math\r\n", "test_list": TESTS, "challenge_test_list": ["x"]}
    task = read(row)
    assert task.prompt == (
        "Write f.\nYour code should pass these tests:\n\nimport math\n\nassert f(1) == 2"
    )
    assert task[1:5] == ("code", None, tuple(TESTS), "import math\n")
    sanitized = {"source_file": "a b.ipynb", "task_id": 601, "prompt": "Write f.", "code": "x"}
    sanitized |= {"test_imports": ["import math"], "test_list": TESTS}
    task = read(sanitized)
    assert task.prompt.endswith(":\n\nimport math\nassert f(1) == 2")
    assert task[1:5] == ("code", None, tuple(TESTS), "import math")


def test_tests_of_other_rows() -> None:
    shown = "q\nYour code should pass these tests:\n\nassert f(1) == 2"
    assert read({"prompt": "q", "tests": TESTS}).prompt == shown
    together = read({"question": "q", "tests": "\n".join(TESTS), "kind": "Code"})
    assert together[:4] == (shown, "code", None, tuple(TESTS))
    with_test = read({"prompt": f"q such that {TESTS[0]}", "tests": TESTS})
    assert with_test.prompt == f"q such that {TESTS[0]}"
    # What the prompt shows is not hidden.
    both = read({"prompt": f"q {TESTS[1]}", "tests": TESTS, "setup": "import re"})
    assert both[3:5] == ((TESTS[0], TESTS[2]), "import re")
    assert read({"prompt": "q", "tests": TESTS, "kind": "golf"}).kind == "golf"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q"}, "no answer and no tests"),
        ({"prompt": "q", "answer": None}, "no answer and no tests"),
        ({"prompt": "q", "answer": " "}, "no answer and no tests"),
        ({"prompt": "q", "kind": "poem"}, "no answer and no tests"),
        ({"prompt": "q", "tests": []}, "no answer and no tests"),
        ({"prompt": "q", "answer": float("inf")}, "no number of ordinary size"),
        ({"prompt": "q", "answer": ["72"]}, "must be an object with role"),
        ({"prompt": "q", "answer": {"value": 72}}, "a dict, not a text"),
        ({"prompt": "q", "answer": "many", "kind": "number"}, '"kind" is number'),
        ({"prompt": "q", "answer": "72", "kind": 5}, '"kind" is a int'),
        ({"prompt": "q", "answer": "72", "kind": "code"}, "no tests"),
        ({"prompt": "q", "tests": TESTS, "kind": "text"}, "has tests"),
        ({"prompt": "q", "tests": TESTS[:1]}, "at least two"),
        ({"prompt": "\n".join(TESTS), "tests": TESTS}, "at least two"),
        ({"prompt": "q", "tests": ["assert f(", "assert f(2) == 3"]}, "no Python"),
        ({"prompt": "q", "tests": [5, 6]}, "a int, not a text"),
        ({"prompt": "q", "response": "word " * 80}, "80 words"),
        ({"question": "q", "answer": "#### Step 1\nShe has many."}, "last ####"),
        ({"question": "q", "answer": "She has none. ####"}, "nothing after the ####"),
        ({"prompt": "q", "answer": "<think>72"}, "1 <think> and 0 </think>"),
        ({"prompt": "q", "answer": "\ud800"}, "lone surrogate"),
        ({"prompt": "q", "answer": "72", "hint": "see here"}, '"hint" holds text'),
        ({"answer": "72"}, "no prompt"),
        ({"prompt": "", "answer": "72"}, "no text"),
        (["72"], "is a list"),
    ],
)
def test_a_row_without_a_task_says_why(row: Any, said: str) -> None:
    rejected = read_task(row)
    assert isinstance(rejected, Rejected) and said in rejected.detail, rejected


def test_a_reward_of_the_users_own_gets_rows_that_only_it_can_score() -> None:
    poem = {"prompt": "q", "kind": "poem", "words": ["moon", "sea"]}
    assert read(poem, rewards=OWN)[:3] == ("q", "poem", None)
    assert read({"prompt": "q", "answer": "72", "hint": "see"}, rewards=OWN).row["hint"] == "see"
    assert isinstance(read_task({"prompt": "q", "kind": "text"}, rewards=OWN), Rejected)
    assert isinstance(read_task({"prompt": "q"}, rewards=OWN), Rejected)


def test_columns_that_the_user_names() -> None:
    how = RowOptions(columns={"prompt": "task", "response": "target"})
    row = {"task": "q", "target": "72 apples", "kind": "number", "prompt": "other", "note": "text"}
    assert read(row, how=how)[:3] == ("q", "number", "72 apples")
    without = read_task({"task": "q"}, how)
    assert isinstance(without, Rejected) and "data.columns" in without.detail


@pytest.mark.parametrize(
    ("task_id", "is_one"),
    [
        *((600, False), (601, True), (974, True), (975, False), ("Mbpp/11", False), (11.0, False)),
        *(("mbpp_601", True), (" 510 ", False), ("0601", True), (None, False), (True, False)),
        *(("", False), ([601], False)),
    ],
)
def test_of_mbpp_only_training_ids_are_trained_on(task_id: Any, is_one: bool) -> None:
    for name in ("tests", "test_list"):
        fields = {"prompt": "q", name: TESTS, "task_id": task_id}
        assert is_for_training(read(fields)) == is_one
    assert is_for_training(read({"prompt": "q", "answer": "5", "task_id": task_id}))


def test_code_of_ones_own_is_trained_on() -> None:
    assert is_for_training(read({"prompt": "q", "tests": TESTS}))
    assert is_for_training(read({"prompt": "q", "tests": TESTS, "task_id": "mine/11"}))
    assert not is_for_training(read({"prompt": "q", "test_list": TESTS, "task_id": "mine/11"}))
    assert not is_for_training(read({"prompt": "q", "test_list": TESTS}))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(["72", "#### 5", "\\boxed{", "<think>", "assert f(1) == 2", UNREAD,
                       Repeated(("a", "b")), b"x", "number", "\ud800", "\x00"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)  # fmt: skip
NAMES = st.sampled_from(
    [
        "prompt",
        "question",
        "text",
        "messages",
        "answer",
        "final_answer",
        "tests",
        "test_list",
        "kind",
        "setup",
        "test_imports",
        "test_setup_code",
        "code",
        "response",
        "reasoning",
        "system",
        "input",
        "task_id",
        "other",
    ]
)


@given(st.dictionaries(NAMES, VALUES, max_size=6) | VALUES, st.sampled_from([OWN, ("answer",)]))
def test_no_row_raises(row: Any, rewards: tuple[str, ...]) -> None:
    task = read_task(row, rewards=rewards)
    assert isinstance(task, Rejected) or (isinstance(task, Task) and is_for_training(task) < 2)


def test_an_answer_without_text_is_rejected() -> None:
    rejected = read_task({"question": "q", "answer": "She has none.\n####"})
    assert isinstance(rejected, Rejected) and rejected.reason == "empty_answer"


def test_a_deep_row_is_rejected() -> None:
    deep = json.loads("[" * 900 + "]" * 900)
    for _ in range(3000):
        deep = [deep]
    assert isinstance(read_task({"prompt": "q", "answer": "5", "other": deep}), Task | Rejected)
    assert isinstance(read_task({"prompt": deep, "tests": deep, "kind": deep}), Rejected)
