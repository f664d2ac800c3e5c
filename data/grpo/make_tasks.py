"""Makes the rows in this directory: `python data/grpo/make_tasks.py`.

    warmup.jsonl              96 rows, 8 of each of 12 small tasks, with a sentence of reasoning
    largest.jsonl             400 prompts "Which number is the largest …" with their answers
    largest_heldout.jsonl     128 others
    mix.jsonl                 1,200 prompts, 400 of each of three tasks
    mix_heldout.jsonl         192 others

The three tasks of the mix are those whose reasoning rewards.py can check. The rows are the same on
every machine.
"""

import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
WORDS = (
    "apple bridge candle desert engine falcon garden harbor island jacket kitchen ladder magnet "
    "needle orange pepper quarry ribbon silver tunnel umbrella violin window yogurt zebra anchor "
    "basket camel dragon elbow forest goat hammer iron jungle kettle lemon mirror nest ocean "
    "pencil queen rabbit saddle tiger uncle valley walnut box cup"
).split()
KINDS = {
    "animal": "falcon zebra camel goat rabbit tiger horse whale owl fox".split(),
    "food": "apple orange pepper yogurt lemon walnut bread cheese rice soup".split(),
    "tool": "hammer needle ladder pencil saw drill wrench shovel rake broom".split(),
}


class Problem(NamedTuple):
    """A question, its answer, and a true sentence that leads to it."""

    kind: str
    question: str
    answer: str
    reasoning: str


def larger(rng: random.Random) -> Problem:
    low, high = sorted(rng.sample(range(10, 100), 2))
    first, second = rng.sample([low, high], 2)
    question = f"Which number is larger, {first} or {second}?"
    return Problem("larger", question, str(high), f"{high} is larger than {low}.")


def largest(rng: random.Random) -> Problem:
    numbers = rng.sample(range(10, 100), 3)
    high = max(numbers)
    low, middle = (n for n in numbers if n != high)
    question = f"Which number is the largest: {numbers[0]}, {numbers[1]} or {numbers[2]}?"
    return Problem("largest", question, str(high), f"{high} is larger than {low} and {middle}.")


def alphabet(rng: random.Random) -> Problem:
    first, second = sorted(rng.sample(string.ascii_lowercase, 2))
    shown = rng.sample([first, second], 2)
    question = f"Which letter comes first in the alphabet, {shown[0]} or {shown[1]}?"
    reasoning = f"{first} comes before {second} in the alphabet."
    return Problem("alphabet", question, first, reasoning)


def first_letter(rng: random.Random) -> Problem:
    word = rng.choice(WORDS)
    question = f"What is the first letter of the word {word}?"
    return Problem("first_letter", question, word[0], f"The word {word} starts with {word[0]}.")


def last_letter(rng: random.Random) -> Problem:
    word = rng.choice(WORDS)
    question = f"What is the last letter of the word {word}?"
    return Problem("last_letter", question, word[-1], f"The word {word} ends with {word[-1]}.")


def longer_word(rng: random.Random) -> Problem:
    short, long = sorted(rng.sample(WORDS, 2), key=len)
    while len(long) < len(short) + 2:
        short, long = sorted(rng.sample(WORDS, 2), key=len)
    first, second = rng.sample([short, long], 2)
    question = f"Which word is longer, {first} or {second}?"
    reasoning = f"The word {long} has more letters than {short}."
    return Problem("longer_word", question, long, reasoning)


def even_or_odd(rng: random.Random) -> Problem:
    number = rng.randint(100, 999)
    kind, digit = ("odd" if number % 2 else "even"), number % 10
    reasoning = f"{number} ends in {digit}, and {digit} is {kind}."
    return Problem("even_or_odd", f"Is {number} even or odd?", kind, reasoning)


def divisible_by_five(rng: random.Random) -> Problem:
    number = rng.randint(10, 999)
    number = rng.choice([number, number // 5 * 5])
    answer = "no" if number % 5 else "yes"
    reasoning = f"{number} ends in {number % 10}, so the answer is {answer}."
    return Problem("divisible_by_five", f"Is {number} divisible by 5?", answer, reasoning)


def next_number(rng: random.Random) -> Problem:
    start, step = rng.randint(1, 30), rng.randint(1, 9)
    numbers = [start + i * step for i in range(5)]
    question = f"What number comes next: {', '.join(map(str, numbers[:4]))}?"
    reasoning = f"Each number is {step} more, and {numbers[3]} plus {step} is {numbers[4]}."
    return Problem("next_number", question, str(numbers[4]), reasoning)


def count_words(rng: random.Random) -> Problem:
    words = rng.sample(WORDS, rng.randint(2, 6))
    counted = ", ".join(f"{i} {word}" for i, word in enumerate(words, 1))
    question = f"How many words are here: {' '.join(words)}?"
    return Problem("count_words", question, str(len(words)), f"Counting gives {counted}.")


def count_up(rng: random.Random) -> Problem:
    first, second = rng.randint(1, 20), rng.randint(1, 6)
    numbers = ", ".join(str(first + i) for i in range(1, second + 1))
    reasoning = f"Counting {second} up from {first} gives {numbers}."
    return Problem("count_up", f"What is {first} + {second}?", str(first + second), reasoning)


def kind_of_thing(rng: random.Random) -> Problem:
    kind = rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    question = f"Is {word} an animal, a food or a tool?"
    return Problem("kind_of_thing", question, kind, f"The word {word} is a kind of {kind}.")


CHECKED = (larger, largest, alphabet)  # by rewards.py
TASKS = (
    *CHECKED, first_letter, last_letter, longer_word, even_or_odd, divisible_by_five, next_number,
    count_words, count_up, kind_of_thing,
)  # fmt: skip


def distinct(
    task: Callable[[random.Random], Problem], seed: str, without: set[str]
) -> Iterator[Problem]:
    """Problems of a task without an end, none with a question that is in `without`."""
    rng = random.Random(seed)
    while True:
        problem = task(rng)
        if problem.question not in without:
            without.add(problem.question)
            yield problem


def write(name: str, rows: list[dict[str, str]]) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (HERE / name).write_text(text, encoding="utf-8")


def prompts(problems: list[Problem]) -> list[dict[str, str]]:
    return [{"prompt": p.question, "answer": p.answer, "kind": p.kind} for p in problems]


def main() -> None:
    """Writes the files."""
    taken: set[str] = set()
    take = {task: distinct(task, task.__name__, taken) for task in TASKS}
    # Held-out problems first: nothing else has their questions.
    largest_heldout = [next(take[largest]) for _ in range(128)]
    # Of the alphabet's 650 questions 64 are held out, too.
    mix_heldout = [next(take[task]) for _ in range(64) for task in CHECKED]
    warmup = [next(take[task]) for _ in range(8) for task in TASKS]
    largest_train = [next(take[largest]) for _ in range(400)]
    mix = [next(take[task]) for _ in range(400) for task in CHECKED]
    write(
        "warmup.jsonl",
        [
            {"prompt": p.question, "response": f"<think>{p.reasoning}</think>\n{p.answer}"}
            for p in warmup
        ],
    )
    write("largest.jsonl", prompts(largest_train))
    write("largest_heldout.jsonl", prompts(largest_heldout))
    write("mix.jsonl", prompts(mix))
    write("mix_heldout.jsonl", prompts(mix_heldout))


if __name__ == "__main__":
    main()
