"""Lists of names in an error line: three of each kind, how many there are, what they share."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise, takewhile

from jaxsft.common.text import visible_line

MAX_LINE = 600  # characters of an error line
_NUM_SHOWN = 3
_NAME_WIDTHS = (
    200,
    120,
    90,
    70,
    55,
    40,
    34,
    28,
    20,
)  # tried in turn, until the line is short enough
_NUMBERED = ("layers", "blk", "blocks")  # a component after which comes the number of a layer


def error_line(start: str, kinds: Mapping[str, Mapping[str, str]], end: str = "") -> str:
    """One line of at most `MAX_LINE` characters: `start`: 2 missing: a, b (all …); …; `end`.

    Args:
      kinds: what is wrong ("missing") -> name -> a remark on it, or "". Kinds without names are
        left out. Names may be foreign and of any length: they are made visible and shortened.
    """
    start, end = shortened(visible_line(start), 250), shortened(visible_line(end), 200)
    line = ""
    for width in _NAME_WIDTHS:
        found = [_listed(kind, named, width) for kind, named in kinds.items() if named]
        line = f"{start}: {'; '.join(found)}{'; ' if end else ''}{end}"
        if len(line) <= MAX_LINE:
            break
    return shortened(line, MAX_LINE)


def shortened(text: str, num_chars: int) -> str:
    """The text, without its middle where it is longer than `num_chars`."""
    if len(text) <= num_chars:
        return text
    head = (num_chars - 1) // 2
    return f"{text[:head]}…{text[len(text) - (num_chars - 1 - head) :]}"


def ranges(numbers: Iterable[int]) -> str:
    """0-3, 5 for the numbers 0, 1, 2, 3 and 5."""
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _listed(kind: str, named: Mapping[str, str], width: int) -> str:
    parts = [name.split(".") for name in named]
    head = _shared_start(parts)
    tail = _shared_start([each[len(head) :][::-1] for each in parts])[::-1]
    start = ".".join([*head, ""]) if head and len(named) > 1 else ""
    end = ".".join(["", *tail]) if tail and len(named) > 1 else ""
    shown = []
    for name, remark in list(named.items())[:_NUM_SHOWN]:
        if len(name) > width:  # what they share stands at the end
            name = f"…{name[len(start) :]}" if start else name
        if len(name) > width and end:
            name = f"{name[: -len(end)]}…"
        shown.append(
            shortened(visible_line(name), width) + (f" {visible_line(remark)}" if remark else "")
        )
    if len(named) == 1:
        return f"{kind} {shown[0]}"
    said = [f"all {shortened(visible_line('.'.join([*head, '*', *tail])), max(width, 80))}"]
    layers = [layer for each in parts if (layer := _layer(each)) is not None]
    if len(layers) == len(named):
        plural = "s" if len({*layers}) > 1 else ""
        said.append(f"layer{plural} {shortened(ranges(layers), 40)}")
    common = f" ({', '.join(said)})" if head or tail else ""
    rest = ", …" if len(named) > _NUM_SHOWN else ""
    return f"{len(named):,} {kind}: {', '.join(shown)}{rest}{common}"


def _shared_start(rows: Sequence[Sequence[str]]) -> list[str]:
    columns = zip(*rows, strict=False)
    return [column[0] for column in takewhile(lambda each: len({*each}) == 1, columns)]


def _layer(parts: Sequence[str]) -> int | None:
    for before, number in pairwise(parts):
        if before in _NUMBERED and number.isdecimal() and len(number) < 6:
            return int(number)
    return None
