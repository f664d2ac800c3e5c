"""A reward of one's own: is the reasoning true, every word of it?

GRPO learns what pays. Where only the answer pays, answers become right below false sentences
("48 is larger than 57." and then 57). These tasks let a program check the sentence as well. Used as
`data/grpo/rewards.py:true_reasoning` in a recipe's rewards.
"""

import re

_REASONING = re.compile(r"\s*<reasoning>(.*?)</reasoning>", re.DOTALL)
_LARGER = re.compile(r"(\d+) is larger than (\d+)(?: and (\d+))?\.?")
_BEFORE = re.compile(r"([a-z]) comes before ([a-z]) in the alphabet\.?")


def true_reasoning(texts: list[str], rows: list[dict]) -> list[float]:
    """1 for reasoning that is one true sentence on the whole question, 0 for any other.

    Args:
      texts: completions.
      rows: the row of each, {"prompt", "answer", "kind"}.
    """
    return [float(_is_true(text, row)) for text, row in zip(texts, rows, strict=True)]


def _is_true(text: str, row: dict) -> bool:
    reasoning = _REASONING.match(text)
    if reasoning is None:
        return False
    said = reasoning[1].strip()
    if row["kind"] == "alphabet":
        claim = _BEFORE.fullmatch(said)
        asked = set(re.findall(r"\b[a-z]\b", row["prompt"].partition(",")[2]))
        return claim is not None and set(claim.groups()) == asked and claim[1] < claim[2]
    claim = _LARGER.fullmatch(said)
    if claim is None:
        return False
    high, *others = (int(number) for number in claim.groups() if number)
    asked = {int(number) for number in re.findall(r"\d+", row["prompt"])}
    return {high, *others} == asked and high > max(others)
