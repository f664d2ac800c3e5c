"""Ordinary texts that repeat themselves: tables, boards, code, logs, lists, proofs, verse."""

import itertools
import json
import random
from collections.abc import Callable, Iterator

_VERSE = "the moon is high and i am low a river runs where roses grow my love my heart"
_CHORUS = "Oh, sing with me tonight\nOh, sing with me, all right\nUntil the morning comes"
_BUS = {"wheels": "round and round", "horn": "beep", "people": "up and down", "door": "open"}


def lines(line: Callable[[int], str], num: int) -> str:
    return "\n".join(map(line, range(num)))


def verse(seed: int, num: int) -> str:
    words = random.Random(seed)
    return lines(lambda i: " ".join(words.choice(_VERSE.split()) for _ in range(7)), num)


def grids(n: int) -> Iterator[str]:
    zeros, zero = [[0] * n for _ in range(n)], "0" * n
    yield f"The matrix is {zeros}"
    yield json.dumps(zeros, indent=1)
    yield lines(lambda i: " ".join(zero), n)
    yield "[" + lines(lambda i: " [" + " ".join(["0."] * n) + "]", n) + "]"
    yield "```python\nm = [\n" + lines(lambda i: f"    [{', '.join(zero)}],", n) + "\n]\n```"
    yield lines(lambda i: f"    [{', '.join(zero)}],", n)  # without the end
    yield lines(lambda i: " & ".join(zero) + r" \\", n)
    yield lines(lambda i: " ".join("01"[i == j] for j in range(n)), n)
    yield "a,b,c\n" + lines(lambda i: "0,0,0", n)
    yield "a,b,c\n" + lines(lambda i: "0,none,active", n // 2)
    yield "| a | b |\n|---|---|\n" + lines(lambda i: "| none | none |", n // 2)
    yield lines(lambda i: "." * n, n)
    yield lines(lambda i: "X " * n, n)
    yield lines(lambda i: ("XO" if i % 2 else "OX") * (n // 2), n // 2)
    yield lines(lambda i: "+---" * n + "+\n" + "|   " * n + "|", n // 2)
    yield lines(lambda i: "[' ', ' ', ' '],", n)
    yield lines(lambda i: " ".join(["False"] * n), n // 2)
    yield str([[False] * n] * n)
    yield lines(lambda i: "NaN NaN NaN", n // 2)
    yield json.dumps([None] * n, indent=2)
    yield lines(lambda i: "    " + "0x00, " * 12, n)
    yield lines(lambda i: f"{16 * i:08x}  {'00 ' * 16} |................|", n)
    yield lines(lambda i: "🟩" * n, n)
    yield lines(lambda i: " " * (n - i) + "*" * (2 * i + 1), n)
    yield "*" * n + "\n" + lines(lambda i: "*" + " " * n + "*", n) + "\n" + "*" * n
    yield lines(lambda i: "/\\" * n + "\n" + "\\/" * n, n // 4)
    yield "\n".join(f"{string}|" + "--0-" * n + "|" for string in "eBGDAE")
    yield zero * 8  # bits
    yield "1/3 = 0." + "3" * n * 8
    yield "1/7 = 0." + "142857" * n
    yield "Title\n" + "=" * n * 4
    yield "A" * n + "AC" * n
    yield "Ha" + "ha" * n
    yield "+".join(["1"] * n * 4)


def counts(n: int) -> Iterator[str]:
    yield lines(lambda i: f"{i + 1}. Item {i + 1}", n)
    yield lines(lambda i: f"- item {i + 1}", n)
    yield lines(lambda i: f"Day {i + 1}: Walk for 30 minutes.", n)
    yield lines(lambda i: f"{i + 1}. True", n)
    yield lines(str, n * 5)
    yield ", ".join(map(str, range(n * 5)))
    yield lines(lambda i: f"{n} x {i + 1} = {n * (i + 1)}", n)
    yield lines(lambda i: f"{n} times {i + 1} is {n * (i + 1)}.", n)
    yield lines(lambda i: f"1 times {i + 1} equals {i + 1}.", n)
    yield "\n".join("\t".join(str(i * j) for j in range(1, n + 1)) for i in range(1, n + 1))
    yield lines(lambda i: f"The square of {i} is {i * i}.", n)
    yield lines(lambda i: f"{i} + 1 = {i + 1}", n)
    yield lines(lambda i: f"[{i}] INFO heartbeat ok", n)
    yield lines(lambda i: f"2026-01-01 12:{i:02}:00 INFO heartbeat ok", n)
    yield lines(lambda i: f"64 bytes from 8.8.8.8: icmp_seq={i} time=12.{i * 7 % 10} ms", n)
    yield lines(lambda i: f"Copying file {i + 1} of {n} ... done", n)
    yield lines(lambda i: f"Epoch {i + 1}/{n} - loss: {1 / (i + 1):.4f}", n)
    yield "id,a,b\n" + lines(lambda i: f"{i},0,none", n)
    yield lines(lambda i: json.dumps({"id": i, "name": "x", "value": None}), n)
    yield lines(lambda i: f"from pkg.module_{i} import thing_{i}", n)
    yield lines(lambda i: f"    VALUE_{i} = {i}", n)
    yield lines(lambda i: f"    'key{i}': None,", n) + "\n}"
    yield lines(lambda i: f"INSERT INTO users VALUES ({i}, 'user{i}', 0);", n)
    yield lines(lambda i: f"def test_add_{i}():\n    assert add({i}, {i}) == {2 * i}\n", n)
    yield lines(lambda i: f"def test_zero_{i}():\n    assert is_zero(0)\n", n)
    yield lines(lambda i: f"test_math.py::test_case[{i}] PASSED", n)
    yield lines(lambda i: f"Chapter {i + 1} ........ {10 * i + 1}", n)
    yield lines(lambda i: f"Row {i + 1}: {'knit' if i % 2 else 'purl'} all stitches.", n)
    yield lines(lambda i: f"Step {i}. By induction a_{i + 1} = a_{i} + {2 * i + 1}.", n)
    yield lines(lambda i: f"By Lemma 2, x_{i} >= x_{i + 1}.", n)
    yield lines(lambda i: f"Case {i}: n = {i}. Then n^2 = {i * i % n}, so the claim holds.\n", n)
    yield lines(lambda i: "Fizz" * (i % 3 == 0) + "Buzz" * (i % 5 == 0) or str(i), 2 * n)


def repeats(n: int) -> Iterator[str]:
    few = n // 4
    yield lines(lambda i: "ok", n // 2)
    yield lines(lambda i: "    nop", n // 2)
    yield lines(lambda i: "    assert f(0) == 0", few)
    yield lines(lambda i: "INFO: waiting for connection", few)
    yield lines(lambda i: "<tr><td>0</td><td>none</td></tr>", few)
    yield lines(lambda i: "<tr><td>0</td><td>0</td></tr>", n) + "\n</table>"
    yield "\n".join("  " * i + "}" for i in range(n, -1, -1))
    yield "Write it:\n" + lines(lambda i: "I will not talk in class.", n // 6)
    yield "Hey Jude\n" + lines(lambda i: "Na, na, na, na-na-na na, hey Jude", min(18, n // 3))
    yield verse(n, 4) + "\n\n" + "\n\n".join([_CHORUS] * min(6, few + 1))
    yield "\n\n".join(verse(n + i, 4) + "\n\n" + _CHORUS for i in range(few))
    yield "\n\n".join(f"The {a} on the bus go {b}, {b}, {b},\n{b}, {b}." for a, b in _BUS.items())
    yield "\n".join(
        " and ".join(map(str, row)) + f" is {all(row)}"
        for row in itertools.product([True, False], repeat=min(6, n // 8 + 1))
    )
    yield "\n\n".join(f"{i} bottles of beer on the wall.\nTake one down." for i in range(n, 0, -1))


def ordinary_texts() -> Iterator[str]:
    """4,720 of them, of 0 to 60 lines and more, each in its own words and without an end."""
    for n in range(2, 61):
        yield from (*grids(n), *counts(n), *repeats(n))
