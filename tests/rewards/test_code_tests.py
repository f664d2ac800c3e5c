"""Asserts are split so that right values stay outside; what the parts earn, in the real sandbox."""

import json

import pytest

from jaxsft.rewards.code_tests import code_of, run_tests, split_tests
from jaxsft.rewards.sandbox import Sandbox

# (a test, a right solution, a wrong one): as MBPP has them, and as other sets do.
SPLIT = [
    ("assert f(2) == 4", "def f(x): return x * x", "def f(x): return x + 3"),
    ("assert 4 == f(2)", "def f(x): return x * x", "def f(x): return 5"),
    ("assert\tf(2) == 4, 'no'\r\n", "def f(x): return 4", "def f(x): return '4'"),
    ("assert f(2)", "def f(x): return [x]", "def f(x): return []"),
    ("assert not f(2)", "def f(x): return 0", "def f(x): return 1"),
    ("assert f(2) is True", "def f(x): return True", "def f(x): return 1"),
    ("assert f(2) == True", "def f(x): return 1", "def f(x): return 2"),
    ("assert f(2) is None", "def f(x): pass", "def f(x): return 0"),
    ("assert f(2) == 0.3", "def f(x): return 0.1 + 0.2", "def f(x): return 0.3001"),
    ("assert math.isclose(f(2), 0.3)", "def f(x): return 0.1 + 0.2", "def f(x): return 0.2"),
    ("assert abs(f(2) - 0.3) < 1e-6", "def f(x): return 0.1 + 0.2", "def f(x): return 0.2"),
    ("assert set(f(2)) == set([1, 2])", "def f(x): return [2, 1, 1]", "def f(x): return [1]"),
    ("assert sorted(f(2)) == [1, 2]", "def f(x): return (2, 1)", "def f(x): return [1]"),
    ("assert list(f(2)) == [0, 1]", "def f(x): yield from range(x)", "def f(x): return 7"),
    ("assert list(map(f, [1, 2])) == [1, 4]", "def f(x): return x * x", "def f(x): return 1"),
    ("assert tuple(f(2)) == (0, 1)", "def f(x): return range(x)", "def f(x): return ()"),
    ("assert len(f(2)) == 2", "def f(x): return 'ab'", "def f(x): return 2"),
    ("assert f(2) in [3, 4]", "def f(x): return 4", "def f(x): return 5"),
    ("assert 3 < f(2) < 5", "def f(x): return 4", "def f(x): return 5"),
    ("assert f(1) == 1 and f(2) == 4", "def f(x): return x * x", "def f(x): return 1"),
    ("assert f(2).lower() == 'a'", "def f(x): return 'A'", "def f(x): return 'B'"),
    ("assert f(2)[0] == 3", "def f(x): return [3]", "def f(x): return []"),
    ("assert type(f(2)) == int", "def f(x): return x", "def f(x): return 2.0"),
    ("assert isinstance(f(2), list)", "def f(x): return []", "def f(x): return ()"),
    ("assert f(g(2)) == 9", "def g(x): return x + 1\ndef f(x): return x * x", "f = g = int"),
    ("assert sum(10, 15) == 6", "def sum(a, b): return 6", "def sum(a, b): return a"),
    ("assert int(f(2)) == 4", "def f(x): return 4.0", "def f(x): return 5.0"),
    ("assert Stack([1]).top() == 1", "class Stack(list):\n def top(s): return s[-1]", "Stack = 1"),
    ("import math\nassert f(math.pi) == 3", "f = int", "f = float"),
    ("r = f(2)\nassert r == 4\nassert r > 3", "def f(x): return 4", "def f(x): return 5"),
    ("want = [4]\nassert f(2) == want", "def f(x): return [4]", "want = 0\ndef f(x): return want"),
    ("assert f(3) == math.factorial(3)", "def f(x): return 6", "def f(x): return 7"),
    ("assert f(lambda x: x + 1) == 3", "def f(g): return g(2)", "def f(g): return g(1)"),
    ("assert f(2) == {1: {2, 3}}", "def f(x): return {1: {3, 2}}", "def f(x): return {1: [2, 3]}"),
    ("assert str(f(2)) == 'P2'", "class P:\n def __str__(s): return 'P2'\nf = lambda x: P()", ""),
    ("assert repr(P(2)) == 'P2'", "class P(int):\n def __repr__(s): return 'P2'", "P = int"),
    ("assert [f(x) for x in (1, 2)] == [1, 4]", "def f(x): return x * x", "def f(x): return x"),
    ("assert sum(f(x) for x in [1, 2]) == 5", "def f(x): return x * x", "def f(x): return x"),
    ("assert f(2) == range(2)", "f = range", "def f(x): return [0, 1]"),
    ("assert list(f([1, 2])) == [1, 2]", "from collections import deque as f", "f = reversed"),
    ("assert sorted(f(2), key=abs) == [1, -2]", "def f(x): yield from (-2, 1)", "f = range"),
    ("assert f('b a') == Counter(['a', 'b'])", "def f(s): return dict.fromkeys(s.split(), 1)", ""),
]
IMPORTS = "from collections import Counter"


def test_split_asserts_tell_right_from_wrong():
    attempts = []
    for text, right, wrong in SPLIT:
        tests = split_tests([text], IMPORTS)
        assert not isinstance(tests, str), (text, tests)
        attempts += [(right, tests), (wrong, tests)]
    with Sandbox() as sandbox:
        rewards = run_tests(sandbox, attempts)
    for (text, _, _), right, wrong in zip(SPLIT, rewards[::2], rewards[1::2], strict=True):
        assert (right, wrong.value) == ((1.0, "passes"), 0.0), (text, right, wrong)


@pytest.mark.parametrize(
    ("test", "setup", "why"),
    [
        *(("f(2) == 4", "", "no assert"), ("", "", "no assert"), ("assert", "", "no Python")),
        *(("assert 1 == 1", "", "calls nothing"), ("assert f(2) == f(3)", "", "with itself")),
        ("assert all(f(x) == y for x, y in [(1, 1)])", "", "in a loop"),
        ("for x in [1]:\n    assert f(x) == 1", "", "no assert"),
        ("s = []\ns.append(1)\nassert f(s) == 1", "", "more than"),
        ("assert check(f)", "def check(g): return f(2) == 4", "own function"),
        ("assert np.all(f(2))", "import numpy as np", "needs numpy"),
        ("import scipy.stats\nassert f(2) == 1", "", "needs scipy.stats"),
        ("assert f(2) == " + "(" * 300 + "4" + ")" * 300, "", "no Python"),
    ],
)
def test_what_cannot_be_split_is_refused(test: str, setup: str, why: str):
    assert why in split_tests([test], setup)
    assert split_tests([], "") == "no tests"


@pytest.mark.parametrize(
    ("test", "setup"),
    [
        *(("assert f(2) == 776151", ""), ("assert math.isclose(f(2), 776151.0)", "import math")),
        ("assert f(data) == want", "data = [2]\nwant = 776151"),
        ("want = 776151\nassert sorted(f(2)) == [want]", ""),
        ("assert f(2) == make()", "def make(): return later() + 1\ndef later(): return 776151"),
        ("assert check(f(2), 776151)", "def check(a, b): return a == b and 776151"),
    ],
)
def test_no_right_value_is_sent_to_the_program(test: str, setup: str):
    tests = split_tests([test], setup)
    assert "776151" not in json.dumps([tests.setup, tests.calls])


def test_what_the_solution_may_need_of_the_setup_stays(sandbox):
    setup = "class Node: v = 3\ndef make(): return Node()\nwant = 3"
    tests = split_tests(["assert f(make()) == want", "assert f(None) == 3"], setup)
    assert "want" not in tests.setup
    right = "def f(node):\n    return node.v if node else Node.v"
    assert run_tests(sandbox, [(right, tests)]) == [(1.0, "passes")]


# A row in MBPP's format: CRLF, tabs, and a set-up that needs the solution's class.
TREE = {
    "code": "class Node:\r\n\tdef __init__(self, v):\r\n\t\tself.v = v\r\n\t\tself.next = None\r\n"
    "def total(n):\r\n\treturn n.v + total(n.next) if n else 0",
    "test_setup_code": "one = Node(1)\r\ntwo = Node(2) \r\ntwo.next = one",
    "test_list": ["assert total(one) == 1", "assert total(two) == 3", "assert total(None) == 0"],
}
HARDCODED = TREE["code"].replace("n.v + total(n.next)", "1")


@pytest.mark.parametrize(
    ("answer", "value", "reason"),
    [
        (TREE["code"], 1.0, "passes"),
        ("Think:\n```\nx\n```\nSo:\n```python\n" + TREE["code"] + "\n```\nDone.", 1.0, "passes"),
        ("```python\r\n" + TREE["code"] + "\r\n", 1.0, "passes"),  # the fence is never closed
        ("```" + "\n" + TREE["code"] + "```", 1.0, "passes"),
        ("    " + TREE["code"].replace("\n", "\n    "), 1.0, "passes"),
        (HARDCODED, 0.5, "1 of 2 hidden tests: wrong value"),
        (TREE["code"].replace("v + ", "v + 1 + "), 0.0, "wrong value"),  # the shown one is required
        (TREE["code"].replace("def total", "def sum_of"), 0.0, "no function total"),
        (TREE["code"].replace("return n.v", "return n.w"), 0.0, "raised AttributeError"),
        (TREE["code"] + "\nraise ValueError", 0.0, "raised ValueError"),
        (TREE["code"] + "\nopen('x')", 0.0, "forbidden call"),
        (TREE["code"] + "\n)", 0.0, "syntax"),
        *(("", 0.0, "no code"), ("```python\n```", 0.0, "no code")),
    ],
)
def test_rewards_of_a_row(answer: str, value: float, reason: str, sandbox):
    tests = split_tests(TREE["test_list"], TREE["test_setup_code"])
    assert run_tests(sandbox, [(answer, tests)]) == [(value, reason)]


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox() as made:
        yield made


def test_an_only_test_is_the_one_that_pays(sandbox):
    tests = split_tests(TREE["test_list"][:1], TREE["test_setup_code"])
    assert run_tests(sandbox, [(HARDCODED, tests)]) == [(1.0, "passes")]


RIGHT = "def f(x):\n    return x + 1"


@pytest.mark.parametrize(
    "answer",
    [
        *(f"{mark}{info}\n{RIGHT}\n{mark}" for mark in ("```", "~~~", "````")
          for info in ("Python", "py3", " python3", "{.python}")),
        *(f"1.\n  ~~~\n  {RIGHT.replace(chr(10), chr(10) + '  ')}\n  ~~~\n", f"~~~\n{RIGHT}"),
        *(f"```f = lambda x: x + 1{end}```" for end in ("", " ")),
        "```Python f = lambda x: x + 1``` is it",
        *(f"```\n{RIGHT}\n```\nThen:\n{other}" for other in (
            "```python\nprint(f(2))\n```", "~~~\n>>> f(2)\n3\n~~~", "```3```", "```\ng = f\n```")),
        f"```\ndef f(x): return 0\n```\nBetter:\n```\n{RIGHT}\n```\nSo:\n```\nf(1)\n```",
    ],
)  # fmt: skip
def test_the_fence_with_the_program_counts(answer: str, sandbox):
    tests = split_tests(["assert f(1) == 2", "assert f(2) == 3"])
    assert run_tests(sandbox, [(answer, tests)]) == [(1.0, "passes")]


@pytest.mark.parametrize("piece", ["`", "~~~\n", "```\n", "``` a", "```x\n~~~\n", "\n  ~~~"])
def test_many_fences_take_no_longer_than_their_length(piece: str):
    assert code_of(piece * 50_000, {"f"}) is not None


@pytest.mark.parametrize("lines", ["a\r\nb", "a\rb", "\n\na\nb\n\n"])
def test_code_of_an_answer(lines: str):
    assert code_of(lines) == "a\nb"
    assert code_of("Use `x`:\n~~~ ```py\n" + lines + "\n```\nor not") == "a\nb"
