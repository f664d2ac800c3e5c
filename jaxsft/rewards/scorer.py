"""What completions earn: for format, right answers, tests passed, and by a user's own rewards.

    format   1 for the template's own form, ended by the stop token, with reasoning of at least
             `min_reasoning_words` words that is no loop, and an answer; else 0
    answer   1 for the right number (one_number.py says what is one), or the right words but for
             case, white space and outer punctuation; else 0. Of tasks with an answer
    tests    the share of the hidden tests that pass, if the one in the prompt does. Of code

`answer` and `tests` pay only inside the format. A wrong answer keeps what its format wins, and a
near one earns no more than that. So no text earns more than a right answer in the format.
"""

import difflib
import math
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from jaxsft.config import RewardOptions
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.loops import find_loop
from jaxsft.rewards.answer_form import answer_part, exact_parts, format_fault
from jaxsft.rewards.code_tests import SplitTests, run_tests, split_tests
from jaxsft.rewards.number_text import parse_number
from jaxsft.rewards.one_number import FILLERS, read_one_number
from jaxsft.rewards.records import Completion, Reward, Task, total_reward
from jaxsft.rewards.sandbox import Sandbox
from jaxsft.rewards.tasks import BUILT_IN
from jaxsft.rewards.user_rewards import UserFile, find_user_rewards

_DEFAULTS = RewardOptions()
_OUTSIDE = Reward(0.0, "outside the format")
# Scripts without blanks between words: every letter counts as a word.
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W\d_]+|(?<=\d)[.,]\d+)*")
_TYPOGRAPHIC = str.maketrans(
    dict.fromkeys("\u2018\u2019\u201a\u201b\u02bc\u2032\uff07", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033\uff02", '"')
    | dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d", "-")
    | {"\u2026": "..."}
)
_BOXED = re.compile(r"\\boxed\{(.*)\}", re.DOTALL)


class Scorer:
    """Scores completions. A context manager: entered, it has the processes that it needs.

    Enter it before JAX starts.

    Args:
      weights: of each reward, by name: those of BUILT_IN, and FILE.py:FUNCTION.
      template: the form of an answer.
      options: what the rewards ask, and how long they may take.
      beside: the directory of the recipe, where a FILE is looked for after the working directory.
      log: takes a line on a user's own reward that failed or printed.

    Raises:
      ValueError: a name or weight is none; or, when entered, a user's file cannot be loaded.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        template: AnswerTemplate,
        options: RewardOptions = _DEFAULTS,
        *,
        beside: Path | None = None,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        check_weights(weights)
        self.weights = dict(weights)
        self._template = template
        self._min_words = options.min_reasoning_words
        own = [name for name in weights if name not in BUILT_IN]
        self._user_files = [
            UserFile(path, names, options.function_seconds, log)
            for path, names in find_user_rewards(own, beside).items()
        ]
        self._code_seconds = options.code_seconds
        self._sandbox: Sandbox | ValueError | None = None
        self._stack = ExitStack()

    @property
    def user_files(self) -> dict[str, str]:
        """The SHA-256 (hex) of each file of a user's own rewards, and of what they imported from
        their folders, for the identity of a run."""
        return {str(path): d for each in self._user_files for path, d in each.digests.items()}

    def __enter__(self) -> Self:
        with self._stack:
            for each in self._user_files:
                self._stack.enter_context(each)
            if "tests" in self.weights:
                try:
                    sandbox = Sandbox(cpu_seconds=self._code_seconds)
                    self._sandbox = self._stack.enter_context(sandbox)
                except ValueError as error:  # that matters only if there is code to run
                    self._sandbox = error
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """ValueError if there are tests among the tasks and programs cannot be run safely here."""
        if isinstance(self._sandbox, ValueError) and any(task.tests for task in tasks):
            raise self._sandbox

    def __call__(
        self, tasks: Sequence[Task], completions: Sequence[Completion]
    ) -> list[dict[str, Reward]]:
        """The rewards of each completion of the task beside it that apply to its kind, by name, in
        the order of the weights."""
        self.check_tasks(tasks)
        found: list[dict[str, Reward]] = [{} for _ in tasks]
        programs: list[tuple[dict[str, Reward], str, SplitTests]] = []
        for task, completion, rewards in zip(tasks, completions, found, strict=True):
            rewards["format"], answer = self._format(task, completion)
            if task.answer is not None:
                rewards["answer"] = answer_reward(answer, task) if answer else _OUTSIDE
            if task.tests:
                rewards["tests"] = _OUTSIDE
                if answer and "tests" in self.weights:
                    programs.append((rewards, answer, _tests_of(task)))
        if programs:
            assert isinstance(self._sandbox, Sandbox)  # check_tasks says so
            attempts = [(answer, tests) for _, answer, tests in programs]
            scores = run_tests(self._sandbox, attempts)
            for (rewards, _, _), score in zip(programs, scores, strict=True):
                rewards["tests"] = score
        for each in self._user_files:
            texts = [completion.text for completion in completions]
            for name, values in each.score(texts, [task.row for task in tasks]).items():
                for rewards, value in zip(found, values, strict=True):
                    if value is not None:
                        rewards[name] = value
        return [{name: each[name] for name in self.weights if name in each} for each in found]

    def tests_passed(
        self,
        tasks: Sequence[Task],
        completions: Sequence[Completion],
        rewards: Sequence[Mapping[str, Reward]],
    ) -> list[bool | None]:
        """Whether all tests of each task pass on the completion's code, in the format or not; None
        without tests, and where `tests` is none of the rewards.

        The code is that of the answer's part, or of the whole text where no part has any.

        Args:
          rewards: what `__call__` gave for these tasks and completions.
        """
        given = [each.get("tests") for each in rewards]
        outside = [i for i, each in enumerate(given) if each is _OUTSIDE]
        attempts = []
        for i in outside:
            text = completions[i].text
            attempts.append((answer_part(text, self._template) or text, _tests_of(tasks[i])))
        if attempts:
            assert isinstance(self._sandbox, Sandbox)  # check_tasks says so
            for i, score in zip(outside, run_tests(self._sandbox, attempts), strict=True):
                given[i] = score
        return [None if each is None else each.value >= 1 for each in given]

    def total(self, rewards: Mapping[str, Reward]) -> float:
        """The sum of what `__call__` gave for one completion, each by its weight."""
        return total_reward(rewards, self.weights)

    def _format(self, task: Task, completion: Completion) -> tuple[Reward, str]:
        """(its reward, the answer; "" outside the format)."""
        fault = self._format_fault(task, completion)
        parts = exact_parts(completion.text, self._template)
        if fault or parts is None:
            return Reward(0.0, fault or "not in the format"), ""
        return Reward(1.0, "in the format"), parts[1].strip()

    def _format_fault(self, task: Task, completion: Completion) -> str | None:
        text, template = completion.text, self._template
        if not completion.stopped:
            return "not ended by the stop token"
        if "<start_of_turn>" in text:
            return "begins another turn"
        if fault := format_fault(text, template):
            return fault
        plain = _plain_tags(text)
        for marker in (each for each in template.markers if each.startswith("<")):
            if plain.count(_plain_tags(marker)) > 1:
                return f"{marker} once more in another form"
        parts = exact_parts(text, template)
        assert parts is not None  # `format_fault` says so
        reasoning, answer = parts
        is_marks = task.answer is not None and not has_letters(task.answer)
        if not answer.strip() or not (is_marks or has_letters(answer)):
            return "the answer is empty"
        if reasoning.strip() and template.split(text) is None:
            return f"text between {template.end_of_reasoning} and {template.start_of_answer}"
        words = visible_words(reasoning)
        if len(words) < self._min_words:
            return f"{len(words)} words of reasoning, fewer than {self._min_words}"
        num_distinct = len(set(words))
        if num_distinct < (self._min_words + 1) // 2:
            return f"{num_distinct} different words in the reasoning"
        return "the reasoning ends in a loop" if find_loop(reasoning) else None


def _tests_of(task: Task) -> SplitTests:
    tests = split_tests(task.tests, task.setup)
    assert isinstance(tests, SplitTests)  # `read_task` rejects others
    return tests


def check_weights(weights: Mapping[str, float]) -> None:
    """ValueError, naming the reward, unless all names and weights of rewards can be used."""
    for name, weight in weights.items():
        if name not in BUILT_IN and ":" not in name:
            close = difflib.get_close_matches(name, BUILT_IN, 1)
            is_file = name.endswith(".py")
            hint = f"did you mean {close[0]}? " if close else ""
            hint = f"write {name}:FUNCTION. " if is_file else hint
            raise ValueError(
                f"rewards: there is no reward {name!r}; {hint}Built in are {', '.join(BUILT_IN)}; "
                "your own is FILE.py:FUNCTION"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ValueError(f"rewards: the weight of {name} must be a number, not {weight!r}")
        if not math.isfinite(weight):
            raise ValueError(f"rewards: the weight of {name} must be finite, not {weight}")
        if name in BUILT_IN and weight < 0:
            raise ValueError(f"rewards: the weight of {name} must be at least 0, not {weight}")
    if not any(weights.values()):
        raise ValueError("rewards: none has a weight; give one at least, as {answer: 1.0}")


def answer_reward(answer: str, task: Task) -> Reward:
    """1 for the right answer, 0 for any other; of tasks with an answer."""
    assert task.answer is not None
    if task.kind == "text" or (task.kind != "number" and parse_number(task.answer) is None):
        if _bare(answer) == _bare(task.answer):
            return Reward(1.0, "right")
        return Reward(0.0, f"{_shown(answer)} instead of {_shown(task.answer)}")
    given, wanted = (read_one_number(each, task.prompt) for each in (answer, task.answer))
    if given.number is None:
        return Reward(0.0, f"the answer {given.fault}")
    if given.number == wanted.number:
        return Reward(1.0, "right")
    return Reward(0.0, f"{_shown(answer)} instead of {_shown(task.answer)}")


def has_letters(text: str) -> bool:
    """Whether there is a letter or a digit in the text that is seen."""
    return any(c.isalnum() and c not in FILLERS for c in text)


def visible_words(text: str) -> list[str]:
    """The words and numbers of a text, without case; "22(.50)=11 cows" has 22, 50, 11 and cows."""
    words = []
    for word in _WORD.findall(text):
        if letters := _UNSPACED.findall(word):
            words += letters
        elif has_letters(word):
            words.append(word.casefold())
    return words


def _bare(text: str) -> str:
    """A text as it is compared: composed, with plain quotes and dashes, without case, spare white
    space and outer punctuation."""
    boxed = _BOXED.fullmatch(text.strip())
    text = unicodedata.normalize("NFC", boxed[1] if boxed else text).translate(_TYPOGRAPHIC)
    text = " ".join(text.casefold().split())
    first, last = 0, len(text)
    while first < last and _is_outer(text[first]):
        first += 1
    while first < last and _is_outer(text[last - 1]):
        last -= 1
    return text[first:last] or text


def _is_outer(char: str) -> bool:
    return char.isspace() or char == "`" or unicodedata.category(char).startswith("P")


def _shown(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 40 else f"{text[:39]}…"


def _plain_tags(text: str) -> str:
    """The text without case, characters that are not seen, and white space inside tags."""
    unseen = {ord(c): None for c in set(text) if unicodedata.category(c) == "Cf"}
    text = " ".join(text.translate(unseen).casefold().split())
    for mark in "</>":
        text = text.replace(f" {mark}", mark).replace(f"{mark} ", mark)
    return text
