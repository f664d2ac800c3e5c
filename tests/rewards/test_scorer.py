"""No text earns more than the right answer: mutations, and two other scorers as oracles."""

import itertools
import random
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction

import math_verify
import pytest

from jaxsft.config import RewardOptions
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.rewards.one_number import read_one_number
from jaxsft.rewards.records import Completion, Reward, Task
from jaxsft.rewards.scorer import Scorer, answer_reward
from jaxsft.rewards.tasks import read_task

TEMPLATE = AnswerTemplate()
WEIGHTS = {"format": 0.2, "answer": 1.0}
UNITS = ["apples", "clips", "dollars", "km/h", "hours", "m^2", "cm³", "percent", "people°C"]
WORDS = {72: "seventy-two", 5: "five", 18: "eighteen", 1000: "one thousand"}


def task_of(answer: str, **fields: str) -> Task:
    task = read_task({"prompt": "How many are there in all?", "answer": answer} | fields)
    assert isinstance(task, Task)
    return task


def numbers() -> Iterator[str]:
    """500 references as data sets write them, each with its seed's own size and form."""
    draw = random.Random(0)
    forms: list[Callable[[], str]] = [
        lambda: str(draw.randint(0, 99)),
        lambda: str(draw.randint(100, 99_999)),
        lambda: f"{draw.randint(1_000, 9_999_999):,}",
        lambda: str(-draw.randint(1, 500)),
        lambda: f"{draw.randint(0, 500)}.{draw.randint(1, 99):02}",
        lambda: f"{draw.randint(1, 20)}/{draw.choice([3, 7, 9, 11, 13])}",
        lambda: f"${draw.randint(1, 5_000)}",
        lambda: f"{draw.randint(1, 100)}%",
    ]
    return itertools.islice((form() for form in itertools.cycle(forms)), 500)


def plain(reference: str) -> str:
    return reference.strip("$%")


def right_forms(reference: str, draw: random.Random) -> list[str]:
    """The same number with units, currency, commas, as a fraction, in LaTeX, in a sentence."""
    number = plain(reference)
    unit = draw.choice(UNITS)
    forms = [
        *(number, f" {number} \n", f"{number} {unit}", f"{number}%", f"{number}."),
        *(f"\\boxed{{{number}}}", f"**{number}**", f"x = {number}", f"The answer is {number}."),
        f"She has {number} {unit} left over in April and May.",
        number.replace("-", "\u2212"),
    ]
    if "/" not in number:
        whole = number.replace(",", "")
        point = "" if "." in whole else "."
        forms += [f"{Decimal(whole):,}", f"{whole}{point}00", f"-${number[1:]}"]
        forms[-1:] = [f"-${number[1:]}"] if number[0] == "-" else [f"${number}", f"€{number}"]
        forms += [f"{2 * int(whole)}/2"] if whole.isdecimal() else []
    else:
        over, under = number.split("/")
        forms += [f"\\frac{{{over}}}{{{under}}}", f"{over} / {under}", f"{over}\u2044{under}"]
    return forms


def mutations(reference: str, draw: random.Random) -> dict[str, tuple[str, bool]]:
    """Kind -> (text, stopped): none of them is a right answer in the format."""
    number = plain(reference)
    near = str(Fraction(number.replace(",", "")) + draw.choice([1, -1, Fraction(1, 10)]))
    thought = "There are some here and there are others."
    prompt = "How many are there in all?"
    other_digits = number.translate({ord(str(i)): 0x660 + i for i in range(10)})
    wide_digits = number.translate({ord(str(i)): 0xFF10 + i for i in range(10)})
    good = TEMPLATE.join(thought, number)

    def answer(text: str) -> tuple[str, bool]:
        return TEMPLATE.join(thought, text), True

    def whole(text: str, stopped: bool = True) -> tuple[str, bool]:
        return text, stopped

    reasoning, closing = good.split("\n")
    return {
        "empty shell": whole(TEMPLATE.join("", "")),
        "blank parts": whole(TEMPLATE.join(" \n", "\t ")),
        "marks as parts": whole(TEMPLATE.join("... . . ! ?", "...")),
        "no reasoning": whole(TEMPLATE.join("", number)),
        "short reasoning": whole(TEMPLATE.join("so it is", number)),
        "one word many times": whole(TEMPLATE.join("a " * 40, number)),
        "unseen words": whole(TEMPLATE.join("\u200b \u200b \u3164 \u3164 \u2800 \u2060", number)),
        "a loop": whole(TEMPLATE.join("Then we add them all up again. " * 60, number)),
        "empty answer": answer(""),
        "marks as answer": answer("-"),
        "no stop": whole(good, stopped=False),
        "cut off": whole(good[:-9]),
        "text after": whole(good + " That is all."),
        "text before": whole("Sure! " + good),
        "twice": whole(good + "\n" + good),
        "an answer before": whole(f"<answer>{near}</answer>{good}"),
        "two answers": whole(good + f"<answer>{near}</answer>"),
        "reversed": whole(f"{closing}\n{reasoning}"),
        "nested": answer(f"<answer>{number}</answer>"),
        "other case": whole(good.replace("answer>", "ANSWER>")),
        "both cases": answer(f"<ANSWER>{near}</ANSWER> {number}"),
        "spaced tags": answer(f"< answer >{near}</ answer > {number}"),
        "unseen in tags": answer(f"<ans\u200bwer>{near}</answ\u200ber> {number}"),
        "no tags": whole(f"{thought} {number}"),
        "another turn": whole(good.replace(thought, f"{thought}<start_of_turn>user\nhm")),
        "near": answer(near),
        "near with unit": answer(f"{near} apples"),
        "or": answer(f"{number} or {near}"),
        "or words": answer(f"{number} or seventy-three"),
        "list": answer(f"{number}, {near}"),
        "range": answer(f"{number}-{near}"),
        "to": answer(f"{number} to {near}"),
        "twice the number": answer(f"{number} {number}"),
        "equation": answer(f"{near} = {number}"),
        "alternatives": answer(f"{number} ({near})"),
        "about": answer(f"about {number}"),
        "at least": answer(f"at least {number}"),
        "more than": answer(f"more than {number} apples"),
        "plus": answer(f"{number}+"),
        "doubt": answer(f"{number}?"),
        "tilde": answer(f"~{number}"),
        "not": answer(f"It is not {number}"),
        "isn't": answer(f"it isn't {number}"),
        "not sure": answer(f"maybe {number}"),
        "and a half": answer(f"{number} and a half"),
        "thousand": answer(f"{number} thousand" if number.strip("0") else near),
        "k": answer(f"{number}k" if number.strip("0") else near),
        "minus": answer(f"minus {number}"),
        "detached minus": answer(f"- {number}"),
        "bound": answer(f"< {number}"),
        "approximately in LaTeX": answer(f"\\approx {number}"),
        "square root": answer(f"\\sqrt{{{number}}}"),
        "number word": answer(WORDS.get(int(number) if number.isdecimal() else 0, "seventy-two")),
        "Arabic-Indic digits": answer(other_digits),
        "full-width digits": answer(wide_digits),
        "Chinese digits": answer("七十二"),
        "superscript": answer(f"{number}\u00b2"),
        "another script's digit": answer(f"{number}\u0663"),
        "unseen": answer(f"{number[0]}\u200b{number[1:]}\u200b"),
        "turned around": answer(f"\u202e{number}"),
        "dots": answer(f"{number}..."),
        "whole prompt": whole(prompt + "\n" + good),
        "very long": answer(f"{number} " + "and that is what there is " * 500),
        "only the number": whole(number),
    }


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer(WEIGHTS, TEMPLATE) as entered:
        yield entered


def rewards(scorer: Scorer, task: Task, *completions: Completion) -> list[float]:
    return [round(scorer.total(each), 9) for each in scorer([task] * len(completions), completions)]


def in_format(*answers: str) -> list[Completion]:
    thought = "First 48 were sold, and then half as many."
    return [Completion(TEMPLATE.join(thought, answer), True) for answer in answers]


def other_scorer(text: str, stopped: bool, reference: str) -> float:
    """Another way to the same reward: by characters and decimals, and without grammar of hedges."""
    cut = re.split(r"<(/?)(reasoning|answer)>", text.strip())
    tags = [a + b for a, b in zip(cut[1::3], cut[2::3], strict=True)]
    if not stopped or tags != ["reasoning", "/reasoning", "answer", "/answer"]:
        return 0.0
    before, thought, _, answer, after = cut[0::3]
    if before or after or len(thought.split()) < 5 or not answer.strip(" .-\n\t"):
        return 0.0
    runs = ["".join(run) for is_digit, run in itertools.groupby(answer, str.isdigit) if is_digit]
    signed = answer.replace("\u2212", "-").replace("-$", "-").replace("m^2", "").replace("³", "")
    if "/" in reference:
        digits = re.sub(r"\\frac\{(\d+)\}\{", r"\1/", signed.replace("\u2044", "/"))
        found = re.findall(r"-?\d+/\d+", digits.replace(" / ", "/"))
        is_right = [Fraction(each) for each in found] == [Fraction(reference)]
        return 1.2 if is_right and len(runs) < 4 else 0.2
    signed = re.sub(r"(\d+)/2\b", lambda half: str(Decimal(half[1]) / 2), signed)
    values = [Decimal(each) for each in re.findall(r"-?\d+(?:\.\d+)?", signed.replace(",", ""))]
    return 1.2 if values == [Decimal(plain(reference).replace(",", ""))] else 0.2


def test_no_mutation_earns_more_than_the_right_answer(scorer: Scorer) -> None:
    draw = random.Random(1)
    kinds: set[str] = set()
    for reference in numbers():
        task = task_of(reference)
        forms = right_forms(reference, draw)
        for form, earned in zip(forms, rewards(scorer, task, *in_format(*forms)), strict=True):
            assert earned == 1.2, (reference, form)
            assert other_scorer(in_format(form)[0].text, True, reference) == 1.2, (reference, form)
        mutants = mutations(reference, draw)
        earned = rewards(scorer, task, *(Completion(*each) for each in mutants.values()))
        for (kind, (text, stopped)), value in zip(mutants.items(), earned, strict=True):
            assert value <= 0.2, (reference, kind, text)
            assert value <= other_scorer(text, stopped, reference), (reference, kind, text)
            assert value == 0.0 or kind not in list(mutants)[:25], (reference, kind)
        kinds |= mutants.keys()
    assert len(kinds) >= 60


# What math-verify takes as right and ours does not: it takes one of several numbers, reads no hedge
# and no tag, and reads digits of other scripts.
STRICTER = frozenset(
    (
        "about", "alternatives", "and a half", "another script's digit", "approximately in LaTeX",
        "at least", "both cases", "bound", "detached minus", "dots", "doubt", "equation", "isn't",
        "k", "minus", "more than", "not", "not sure", "or words", "plus", "range", "spaced tags",
        "superscript", "thousand", "twice the number", "unseen in tags", "very long",
    )
)  # fmt: skip
# Nothing is wrong with the answer of these.
OF_THE_FORM = frozenset(
    (
        "short reasoning", "one word many times", "unseen words", "a loop", "no stop",
        "another turn",
    )
)  # fmt: skip


def test_math_verify_agrees_but_where_ours_is_stricter_on_purpose() -> None:
    def theirs(reference: str, answer: str) -> bool:
        both = (math_verify.parse(each, parsing_timeout=None) for each in (reference, answer))
        return math_verify.verify(*both, timeout_seconds=None)

    draw, stricter = random.Random(2), set()
    for reference in itertools.islice(numbers(), 24):
        task, number = task_of(reference), plain(reference)
        for form in (number, f"{number} apples", f"\\boxed{{{number}}}", f"${number}$"):
            assert answer_reward(form, task).value == 1.0
            assert theirs(number, form), (number, form)
        for kind, (text, _) in mutations(reference, draw).items():
            parts = TEMPLATE.split(text)
            if kind not in OF_THE_FORM and parts and theirs(number, parts[1]):
                assert answer_reward(parts[1], task).value == 0.0, (kind, reference)
                stricter.add(kind)
    assert stricter <= STRICTER


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("72", 72), ("$1,080.50", "1080.5"), ("3/4 of a mile", "3/4"), ("72 thousand", 72000)),
        *(("$72k", 72000), ("1.5 million people", 1500000), ("72 miles per hour", 72)),
        *(("72 ft²", 72), ("9.8 m/s^2", "9.8"), ("1\u00bd cups", "3/2"), ("6 dozen", 72)),
        *(("-$5", -5), ("\\(72\\)", 72), ("$$\\boxed{72}$$", 72), ("是72个", 72), ("72!", 72)),
        *(("72 apples or pears", None), ("2024-05-01", None), ("7:30", None), ("2*36", None)),
        *(("72万", None), ("72\u2460", None), ("Ⅷ", None), ("1/0", None), ("x-72", None)),
        *(("minus 72", None), ("between 72 and LXXIII", None), ("half of 72", None), ("", None)),
        *(("-(72)", None), ("\u2212 ( 72 )", None), ("sqrt(72)", None), ("(x-y): 72", 72)),
        *(("72~km", 72), ("72\\ \\mathrm{cm^2}", 72), ("~ $72", None), ("72-ish", None)),
        *(("72 \\pm 1", None), ("<b>72</b>", None), ("72\x00", None), ("9" * 5000, None)),
    ],
)
def test_the_one_number_of_an_answer(text: str, number: int | str | None) -> None:
    read = read_one_number(text)
    assert read.number == (None if number is None else Fraction(number))
    assert bool(read.fault) == (number is None)


QUESTION = "Natalia sold clips. How many clips did Natalia sell altogether?"
FAIR = {
    5: [
        "5 apples", "The answer is 5 apples.", "So, the final answer is: **5**", "She has 5 left.",
        "Natalia sold 5 clips.", "In total, 5 hair clips were sold in May", "5 miles per hour",
        "5 apples per tree", "US$5", "5 USD", "$5.00", "5 \\text{cm}", "$\\boxed{5}$", "5 (clips)",
        "5-inch", "5 m²", "5 °C", "It adds up to $5.", "x = 5", "(B) 5", "+5", "#### 5", "5/1",
        "5 more clips", "A total of 5 clips",
    ],
    -5: ["- 5", "\u2212 5", "\u20115", "-$5", "- $5", "The answer is - 5", "**- 5**", "x = - 5"],
    72: ["72 marbles", "a weight of 72 kg", "an area of 72 m^2"],
    24: ["2 dozen", "2 dozen clips", "The answer is 2 dozens."],
    1080: ["1 080", "1\u2009080", "1\u00a0080 clips", "$1\u202f080", "1'080", "1\u2019080"],
    10**6: ["10^6", "10**6 clips", "1e6", "$10^{6}$", "10⁶", "1 000 000", "1 million"],
}  # fmt: skip
UNFAIR = [
    "5 plus a dozen", "5 is false", "5 but could also be different", "any number but 5", "not 5",
    "5\u0336", "5\u0338", "5\u0301", "5\ufe0f\u20e3", "5\u20dd", "\u200b5", "5\u034f", "5\u3164",
    "~~5~~", "<s>5</s>", "\\cancel{5}", "5 or so", "all but 5", "everything besides 5",
    "5 (not really)", "5, just kidding", "close to 5", "nicht 5", "5 oder mehr", "pas 5", "- -5",
    "5 times itself", "5π", "5i", "5x", "f(5)", "x_5", "the number after 5", "a third of 5",
    "out of 5", "5 false", "5 (false)", "5. False.", "5: wrong", "I doubt it is 5", "Nobody has 5",
    "5 \u043e\u0440 more", "n\u043et 5", "5 \U0001d428\U0001d42b more", "5 🤷", "no 5", "5 = x",
    "5 * x", "5 − cost", "5 allegedly", "5 unless it is", "what is 5", "5 and then some",
    "5 give or take",
    "5 - false", "5+", "5 if true", "\u00b15", "5 with a chance of more", "5 something",
    "2 dozen and a half", "5 nicht", "5 nope", "5 aint", "5 roundish", "5 etc", "5 max", "5 bogus",
    "5 and more", "5, also more", "5 clips and others", "5 and so on", "5 upwards", "5 plusminus",
    "5 lakhs", "5 tens", "5 gross", "5 score", "5 pairs", "5 mil", "5 googol", "5 is far off",
    "is it 5", "can it be 5", "does she have 5", "can be 5", "5 isnt it",
]  # fmt: skip


def test_fair_answers_give_their_number_and_hedges_none() -> None:
    for number, answers in FAIR.items():
        for answer in answers:
            assert read_one_number(answer, QUESTION) == (number, ""), answer
    for answer in UNFAIR:
        read = read_one_number(answer, QUESTION)
        assert read.number is None and read.fault, answer
    assert read_one_number("5 яблок", "Сколько яблок?").number == 5
    assert read_one_number("6 dozen", "How many dozen eggs?").number == 6
    assert read_one_number("Tom repaired 5 kites").number is None  # no words of the question


def test_text_around_the_parts_is_outside_the_format(scorer: Scorer) -> None:
    good = in_format("72")[0].text
    for odd in ("x" + good, good + " x", good.replace(">\n<", "> So: <"), good + "\n<b>"):
        (found,) = scorer([task_of("72")], [Completion(odd, True)])
        assert scorer.total(found) == 0.0 and "text" in found["format"].reason, odd
    spaced = "\n " + good.replace(">\n<", ">\n\n\t<") + " \n"
    assert rewards(scorer, task_of("72"), Completion(spaced, True)) == [1.2]


@pytest.mark.parametrize(
    ("answer", "reference", "is_right"),
    [
        *(("Tuesday", "tuesday", True), ("**Tuesday.**", "Tuesday", True), ("(B)", "B", True)),
        *(("New  York\n", "new york", True), ("\\boxed{yes}", "Yes", True), ("é", "e\u0301", True)),
        *(("Straße", "STRASSE", True), ("+", "+", True), ("?", "?", True), ("!", "?", False)),
        *(("Tuesday or Monday", "Tuesday", False), ("not yes", "yes", False), ("", "yes", False)),
        *(("it\u2019s \u201cso\u201d", 'it\'s "so"', True), ("a\u2013b", "a-b", True)),
        *(("so\u2026 it is", "so... it is", True), ("y\u0336es", "yes", False)),
        *(("a horse", "horse", False), ("y\u200bes", "yes", False), ("yes no", "yes", False)),
    ],
)
def test_words_are_right_if_they_are_the_same(
    scorer: Scorer, answer: str, reference: str, is_right: bool
) -> None:
    (earned,) = rewards(scorer, task_of(reference), *in_format(answer))
    assert (earned == 1.2) == is_right


def test_what_is_right_is_a_matter_of_the_kind(scorer: Scorer) -> None:
    as_text, as_number = task_of("5", kind="text"), task_of("5 km", kind="Number")
    assert rewards(scorer, as_text, *in_format("5", "5.0", "5 km")) == [1.2, 0.2, 0.2]
    assert rewards(scorer, as_number, *in_format("5", "5.0 miles", "6 km")) == [1.2, 1.2, 0.2]
    own = task_of("5", kind="my sums")
    assert rewards(scorer, own, *in_format("5", "5.0", "five")) == [1.2, 1.2, 0.2]


def test_a_wrong_answer_keeps_its_format_and_says_why(scorer: Scorer) -> None:
    (found,) = scorer([task_of("72")], in_format("73 clips"))
    assert found == {
        "format": Reward(1.0, "in the format"),
        "answer": Reward(0.0, "73 clips instead of 72"),
    }
    (found,) = scorer([task_of("72")], [Completion("72", True)])
    assert found["format"].reason == "no tags" and found["answer"].reason == "outside the format"


@pytest.mark.parametrize(
    "piece", [" ", "<", "< ", "-", "72 ", "1,", "\\boxed{", "as many as ", "a."]
)
def test_a_long_text_takes_no_longer_than_its_length(scorer: Scorer, piece: str) -> None:
    texts = [TEMPLATE.join("We count them all here.", piece * 50_000), piece * 50_000]
    for task in (task_of("72"), task_of("Tuesday")):
        assert max(rewards(scorer, task, *(Completion(each, True) for each in texts))) <= 0.2


def test_reasoning_in_any_script_and_of_the_length_that_is_asked() -> None:
    thoughts = ["一共有七十二个", "22(.50)=11 cows and 3", "don't know it's the one", "3 > 2."]
    texts = [Completion(TEMPLATE.join(each, "72"), True) for each in thoughts]
    with Scorer(WEIGHTS, TEMPLATE) as scorer:
        assert rewards(scorer, task_of("72"), *texts) == [1.2, 1.2, 1.2, 0.0]
    with Scorer(WEIGHTS, TEMPLATE, RewardOptions(min_reasoning_words=2)) as scorer:
        assert rewards(scorer, task_of("72"), *texts) == [1.2] * 4


def test_another_template_has_the_same_rewards() -> None:
    template = AnswerTemplate("<think>{reasoning}</think>{answer}")
    good = "<think>There are 48 and 24 of them.</think>72"
    texts = [good, good.replace("</think>", ""), good + "<think>", good[len("<think>") :]]
    with Scorer(WEIGHTS, template) as scorer:
        found = rewards(scorer, task_of("72"), *(Completion(each, True) for each in texts))
    assert found == [1.2, 0.0, 0.0, 0.0]


def test_code_earns_the_share_of_its_hidden_tests() -> None:
    tests = ["assert add(1, 2) == 3", "assert add(2, 2) == 4", "assert add(0, 0) == 0"]
    task = read_task({"text": "Add two numbers.", "code": "", "test_list": tests, "task_id": 601})
    assert isinstance(task, Task) and "assert add(1, 2) == 3" in task.prompt
    right, half = (
        "def add(a, b):\n    return a + b",
        "def add(a, b):\n    return 3 if a == 1 else 4",
    )
    shown = "def add(a, b):\n    return {(1, 2): 3}.get((a, b))"
    answers = [f"```python\n{right}\n```", right, half, shown, "import sys; sys.exit(0)"]
    with Scorer({"format": 0.2, "answer": 1.0, "tests": 1.0}, TEMPLATE) as scorer:
        number = task_of("72")
        completions = [*in_format(*answers, "72"), Completion(right, True)]
        found = scorer([task] * 5 + [number, task], completions)
        totals = [round(scorer.total(each), 9) for each in found]
    assert totals == [1.2, 1.2, 0.7, 0.2, 0.2, 1.2, 0.0]
    assert [list(each) for each in found[4:6]] == [["format", "tests"], ["format", "answer"]]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"fromat": 1.0}, "did you mean format"),
        ({"my_rewards.py": 1.0}, "write my_rewards.py:FUNCTION"),
        ({"answer": float("nan")}, "must be finite"),
        ({"answer": True}, "must be a number"),
        ({"answer": -1.0}, "at least 0"),
        ({"answer": 0.0}, "none has a weight"),
        ({}, "none has a weight"),
    ],
)
def test_rewards_that_are_none_are_refused_by_name(weights: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match="rewards") as error:
        Scorer(weights, TEMPLATE)
    assert said in str(error.value)
