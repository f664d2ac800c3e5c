"""Tests of code: asserts are split, so that a program never meets the values it should give.

`assert f(2) == 4` becomes the expression `f(2)`, which the program's process evaluates, and 4,
which stays here. Where more stands around the call (`math.isclose(f(2), 4.0)`, `sorted(f(x)) ==
[1, 2]`) the rest of the assert is evaluated with the value that came back, in a process without a
program.
"""

import ast
import builtins
import contextlib
import math
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from jaxsft.rewards.records import Reward
from jaxsft.rewards.sandbox import Outcome, Sandbox, SandboxJob
from jaxsft.rewards.sandbox_worker import MODULES

_RELATIVE = 1e-9
_BUILTINS = frozenset(dir(builtins))
_ROOTS = frozenset(name.split(".")[0] for name in MODULES)
_DEFINITIONS = ast.FunctionDef | ast.ClassDef
_MARK = r"(?:^[ \t]*(?=~)|(?<!`)(?=`))(?P<{}>`{{3,}}+|~{{3,}}+)"
_FENCE = re.compile(
    # In one line, with code from its first character or behind the name of Python; or in lines.
    _MARK.format("one")
    + r"(?:[ \t]*(?:python|py)[0-9]*[ \t])?(?P<line>[^\n`~][^\n]*?)(?P=one)"
    + rf"|{_MARK.format('many')}[^\n`]*\n(?P<lines>.*?)"
    + r"(?:^[ \t]*(?P=many)[`~]*|(?P=many)[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL | re.IGNORECASE,
)
_VALUE = "_value_"  # with a number: the name of a call's value in the rest of its assert


class Check(NamedTuple):
    """One assert, split.

    Attributes:
      calls: what the program evaluates.
      want: (the right value,) if the assert says that the one call equals a literal; else ().
      sides: else what to evaluate with the values of the calls as `_value_0` …: one expression
        that must be true, or two that must be equal.
    """

    calls: tuple[str, ...]
    want: tuple[()] | tuple[Any]
    sides: tuple[str, ...]


class SplitTests(NamedTuple):
    """The tests of a task.

    Attributes:
      checks: the asserts of each test. The first test is the one that the prompt shows.
      setup: code that the program's process runs too.
      outside: its imports and functions, for what is evaluated without the program.
    """

    checks: tuple[tuple[Check, ...], ...]
    setup: str
    outside: str

    @property
    def calls(self) -> tuple[str, ...]:
        """All expressions that the program evaluates, in the order of the checks."""
        return tuple(call for test in self.checks for check in test for call in check.calls)

    @property
    def names(self) -> set[str]:
        """What the program must define: the names in the calls that nothing else gives."""
        used = _names_used(*map(ast.parse, self.calls))
        return used - _BUILTINS - _ROOTS - _names_bound(ast.parse(self.setup)) or used


class _CannotSplitError(ValueError):
    """A test whose calls can't be taken out of it."""


def split_tests(tests: Sequence[str], setup: str = "") -> SplitTests | str:
    """The tests without their right values in sight of a program, or why that can't be.

    Args:
      tests: each one or more `assert` statements, maybe with assignments and imports before them.
      setup: the code that runs before the solution, or after it where it needs the solution.
    """
    checks: list[tuple[Check, ...]] = []
    imports: list[ast.stmt] = []
    try:
        before = ast.parse(_plain_lines(setup)).body
        outside = _outside(before)
        known = set().union(*map(_defines, outside))
        mixed = [each for each in before if each not in outside and isinstance(each, _DEFINITIONS)]
        for text in tests:
            tree = ast.parse(textwrap.dedent(_plain_lines(text)).strip())
            local = [each for each in tree.body if isinstance(each, ast.Import | ast.ImportFrom)]
            rest = [each for each in tree.body if each not in local]
            imports += local
            checks.append(tuple(_split(rest, known | _names_bound(*local))))
        for each in (*ast.walk(ast.Module(before, [])), *imports):
            _refuse_missing(each)
    except _CannotSplitError as error:
        return str(error)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "a test is no Python"
    if not checks:
        return "no tests"
    flat = [check for test in checks for check in test]
    calls = [ast.parse(call) for check in flat for call in check.calls]
    if _names_used(*calls) & {name for each in mixed for name in _defines(each)}:
        return "a test's own function calls the solution"
    inside = f"{_inside(before, outside, flat)}\n{_source(imports)}".strip()
    return SplitTests(tuple(checks), inside, _source([*outside, *imports]))


def _refuse_missing(node: ast.AST) -> None:
    """Refuses an import of what a program can't import, as numpy."""
    match node:
        case ast.Import(names):
            modules = [each.name for each in names]
        case ast.ImportFrom(module):
            modules = [module or "."]
        case _:
            return
    for each in modules:
        if each.split(".")[0] not in _ROOTS:
            raise _CannotSplitError(f"needs {each}, which the sandbox does not have")


def _source(statements: Sequence[ast.stmt]) -> str:
    return "\n".join(map(ast.unparse, statements))


def _plain_lines(code: str) -> str:
    return code.replace("\r\n", "\n").replace("\r", "\n")


def _names_bound(*nodes: ast.AST) -> set[str]:
    """Names that assignments, arguments, imports and definitions give, anywhere in the nodes."""
    names = set()
    for each in (each for node in nodes for each in ast.walk(node)):
        match each:
            case ast.Name(name, ast.Store()) | ast.arg(name):
                names.add(name)
            case ast.FunctionDef(name) | ast.ClassDef(name):
                names.add(name)
            case ast.alias(name, other):
                names.add((other or name).split(".")[0])
    return names


def _names_used(*nodes: ast.AST) -> set[str]:
    names = (each for node in nodes for each in ast.walk(node) if isinstance(each, ast.Name))
    return {each.id for each in names if isinstance(each.ctx, ast.Load)}


def _outside(setup: Sequence[ast.stmt]) -> list[ast.stmt]:
    """The imports, definitions and assigned names that need nothing of a solution."""
    chosen = [each for each in setup if _defines(each)]
    while True:
        known = _BUILTINS.union(*map(_defines, chosen))
        keep = [each for each in chosen if _names_used(each) <= known | _names_bound(each)]
        if len(keep) == len(chosen):
            return chosen
        chosen = keep


def _inside(setup: Sequence[ast.stmt], outside: Sequence[ast.stmt], checks: Sequence[Check]) -> str:
    """What the program's process needs of the setup: not what only gives right values."""
    calls = [ast.parse(call) for check in checks for call in check.calls]
    defined = {name: each for each in outside for name in _defines(each)}
    secret = _names_used(*(ast.parse(side) for check in checks for side in check.sides))
    while more := _names_used(*(defined[name] for name in secret & {*defined})) - secret:
        secret |= more
    kept: list[ast.stmt] = []
    for each in reversed(setup):
        is_import = isinstance(each, ast.Import | ast.ImportFrom)
        is_secret = each in outside and not is_import and _defines(each) & secret
        if not is_secret or _defines(each) & _names_used(*kept, *calls):
            kept.insert(0, each)
    return _source(kept)


def _defines(statement: ast.stmt) -> set[str]:
    """The names that an import, a definition or an assignment to one name gives values."""
    match statement:
        case ast.Import() | ast.ImportFrom():
            return _names_bound(statement)
        case ast.FunctionDef(name) | ast.ClassDef(name) | ast.Assign([ast.Name(name)]):
            return {name}
    return set()


def _split(statements: Sequence[ast.stmt], known: set[str]) -> Iterator[Check]:
    """The asserts of one test. What was assigned to a name before stands for that name."""
    stands_for: dict[str, ast.expr] = {}
    if not statements or not isinstance(statements[-1], ast.Assert):
        raise _CannotSplitError("a test is no assert")
    for each in statements:
        match each:
            case ast.Assign([ast.Name(name)], value):
                stands_for[name] = _Names(stands_for).visit(value)
            case ast.Assert(test):
                yield _check(_Names(stands_for).visit(test), known)
            case _:
                raise _CannotSplitError("a test is more than assignments and asserts")


class _Names(ast.NodeTransformer):
    """Puts expressions in the place of names."""

    def __init__(self, stands_for: dict[str, ast.expr]) -> None:
        self._stands_for = stands_for

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._stands_for.get(node.id, node)


def _check(test: ast.expr, known: set[str]) -> Check:
    """One assert's expression, split."""
    calls = _Calls(known | _ROOTS, test)
    rest = calls.visit(test)
    if not calls.found:
        raise _CannotSplitError("a test calls nothing of the solution")
    found = tuple(ast.unparse(each) for each in calls.found)
    for each in ast.walk(rest):
        if isinstance(each, ast.Compare):
            sides = [_has_value(side) for side in (each.left, *each.comparators)]
            if sum(sides) > 1:
                raise _CannotSplitError("a test compares the solution with itself")
    match rest:
        case ast.Compare(left, [ast.Eq()], [right]):
            for one, other in ((left, right), (right, left)):
                if isinstance(one, ast.Name) and _has_value(one):
                    with contextlib.suppress(ValueError, TypeError):
                        return Check(found, (ast.literal_eval(other),), ())
            if not _is_type(left) and not _is_type(right):
                return Check(found, (), (ast.unparse(left), ast.unparse(right)))
    return Check(found, (), (f"bool({ast.unparse(rest)})",))


def _is_type(node: ast.expr) -> bool:
    """Whether this is a class, which isn't compared as values are."""
    match node:
        case ast.Call(ast.Name("type")):
            return True
        case ast.Name(name):
            return name in _BUILTINS
    return False


def _has_value(node: ast.AST) -> bool:
    """Whether the value of a call stands in this expression."""
    return any(name.startswith(_VALUE) for name in _names_used(node))


class _Calls(ast.NodeTransformer):
    """Takes out of an assert what only the program can evaluate.

    That is what uses a name that is no builtin, no module and not bound in the test: `f(x)` of
    `f(x)[0]`; all of `Stack(3).pop()` and `root.left.data`, as objects don't travel. A builtin's
    call goes with it where nothing else is in sight, as in `len(f(x))` and `map(f, [1, 2])`, and so
    does `[f(x) for x in y]`. A test of builtins only means the outermost: it is the solution's own
    `sum`.
    """

    def __init__(self, known: set[str], test: ast.expr) -> None:
        self.found: list[ast.expr] = []
        self._known = known | _BUILTINS
        self._bound = _names_bound(test)
        if not _names_used(test) - self._known - self._bound:
            called = (each for each in ast.walk(test) if isinstance(each, ast.Call))
            names = [each.func.id for each in called if isinstance(each.func, ast.Name)]
            self._known -= {*names[:1]} & _BUILTINS

    def _is_own(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id not in self._known | self._bound

    def _is_chain(self, node: ast.expr) -> bool:
        """Whether this is a name of the program's, with attributes and calls around it."""
        match node:
            case ast.Attribute(ast.Call(ast.Name(name))) if not name[:1].isupper():
                return False  # `f(x).lower()`: the value of `f(x)` travels
            case ast.Attribute(value):
                return self._is_chain(value)
            case ast.Call(ast.Name(name), [one], []) if name in _BUILTINS & self._known:
                return name != "type" and self._is_chain(one)
            case ast.Call(ast.Name(name), args) if name in _BUILTINS & self._known:
                return any(map(self._is_own, [*args, *(each.value for each in node.keywords)]))
            case ast.ListComp(one) | ast.SetComp(one) | ast.GeneratorExp(one):
                return self._is_chain(one) and _names_bound(node) <= _names_used(one)
            case ast.Call(func):
                return self._is_chain(func)
        return self._is_own(node)

    def visit(self, node: ast.AST) -> Any:
        """Replaces each such expression by the name of its value."""
        if not isinstance(node, ast.expr) or not self._is_chain(node):
            return self.generic_visit(node)
        if _names_used(node) & self._bound - _names_bound(node):
            raise _CannotSplitError("a test calls the solution in a loop")
        self.found.append(node)
        return ast.Name(f"{_VALUE}{len(self.found) - 1}", ast.Load())


def code_of(answer: str, names: Collection[str] = ()) -> str:
    """The code in an answer: of its fences (``` or ~~~) the last of those that define most of the
    names; all of it without a fence."""
    answer = _plain_lines(answer)
    blocks = [found["line"] or found["lines"] or "" for found in _FENCE.finditer(answer)]
    blocks = [textwrap.dedent(each).strip("\n") for each in blocks or [answer]]
    if len(blocks) == 1:
        return blocks[0]
    return max(reversed(blocks), key=lambda block: len(_defined(block).intersection(names)))


def _defined(code: str) -> set[str]:
    """The names that a program defines; none of what is no program."""
    try:
        with warnings.catch_warnings():  # of odd escapes in strings
            warnings.simplefilter("ignore")
            return set().union(*map(_defines, ast.parse(code).body))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return set()


def same_value(got: Any, want: Any) -> bool:
    """Python's `==`, but floats are equal to 1e-9 relative."""
    if isinstance(got, int | float | complex) and isinstance(want, int | float | complex):
        if got == want or (isinstance(got, int) and isinstance(want, int)):
            return got == want
        try:
            gap = abs(got - want)
            return gap <= _RELATIVE * max(abs(got), abs(want)) and math.isfinite(gap)
        except OverflowError:
            return False
    if type(got) is not type(want):
        return isinstance(got, set | frozenset) and got == want
    if isinstance(got, type(iter([]))):  # a range, a dict's keys …
        return same_value(list(got), list(want))
    if isinstance(got, list | tuple):
        return len(got) == len(want) and all(map(same_value, got, want))
    if isinstance(got, dict):
        return got.keys() == want.keys() and all(same_value(got[key], want[key]) for key in want)
    return got == want


def run_tests(sandbox: Sandbox, attempts: Sequence[tuple[str, SplitTests]]) -> list[Reward]:
    """The reward of each (answer, tests of its task)."""
    found = sandbox.run(
        [
            SandboxJob(code_of(answer, tests.names), tests.setup, tests.calls)
            for answer, tests in attempts
        ]
    )
    second = [_sides(tests, each) for (_, tests), each in zip(attempts, found, strict=True)]
    at = [i for i, program in enumerate(second) if program.calls]
    sides: list[list[Outcome]] = [[] for _ in attempts]
    for i, each in zip(at, sandbox.run([second[i] for i in at]), strict=True):
        sides[i] = each
    return [
        score_code(answer, tests, calls, rest)
        for (answer, tests), calls, rest in zip(attempts, found, sides, strict=True)
    ]


def _sides(tests: SplitTests, outcomes: Sequence[Outcome]) -> SandboxJob:
    """What is left of the asserts when the calls have their values, as a program of its own."""
    rest, calls, values = iter(outcomes), [], {}
    for number, check in enumerate(check for test in tests.checks for check in test):
        came = [next(rest) for _ in check.calls]
        if check.sides and not any(each.error for each in came):
            for i, each in enumerate(came):
                values[f"{_VALUE}{i}_{number}"] = each.value
            calls += [re.sub(rf"\b{_VALUE}\d+\b", rf"\g<0>_{number}", each) for each in check.sides]
    imports = f"import {', '.join(sorted(_ROOTS))}\n"
    return SandboxJob("", imports + tests.outside, tuple(calls), values)


def score_code(
    answer: str, tests: SplitTests, outcomes: Sequence[Outcome], sides: Sequence[Outcome] = ()
) -> Reward:
    """The share of the hidden tests that pass, if the shown one does; else 0.

    Args:
      answer: the answer's text.
      tests: the tests of its task.
      outcomes: those of `tests.calls`.
      sides: those of the checks that have sides, for which all calls gave a value.
    """
    if not code_of(answer, tests.names).strip():
        return Reward(0.0, "no code")
    calls, rest = iter(outcomes), iter(sides)
    faults = [_fault(test, calls, rest) for test in tests.checks]
    shown, hidden = faults[0], faults[1:] or faults
    if shown:
        return Reward(0.0, shown)
    passed = hidden.count("")
    if passed == len(hidden):
        return Reward(1.0, "passes")
    first = next(each for each in hidden if each)
    return Reward(passed / len(hidden), f"{passed} of {len(hidden)} hidden tests: {first}")


def _fault(test: Sequence[Check], calls: Iterator[Outcome], sides: Iterator[Outcome]) -> str:
    """Why a test fails, "" if it passes."""
    faults = []
    for check in test:
        came = [next(calls) for _ in check.calls]
        errors = [_explain(each.error, check) for each in came if each.error]
        if not errors and check.sides:
            came = [next(sides) for _ in check.sides]
            errors = [each.error for each in came if each.error]
        got, want = [each.value for each in came], [*check.want] or [True]
        got, want = (got[:1], got[1:]) if len(check.sides) == 2 else (got, want)
        wrong = "" if errors or same_value(got[0], want[0]) else "wrong value"
        faults.append(errors[0] if errors else wrong)
    return next((each for each in faults if each), "")


def _explain(error: str, check: Check) -> str:
    """ "no f" of a call of f: the program has no function f."""
    name = error.removeprefix("no ")
    is_function = name != error and any(call.startswith(f"{name}(") for call in check.calls)
    return f"no function {name}" if is_function else error
