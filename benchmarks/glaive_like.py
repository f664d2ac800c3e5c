"""Rows like those of glaiveai/reasoning-v1-20m, made here: `python -m benchmarks.glaive_like DIR`.

Columns and shape are the original's (`prompt`; `response` = `<think>…</think>`, a newline, the
answer), and so are the quantiles of the response's length. The text is that of
`data/sample/train.jsonl`: its sentences and halves of sentences in another order for every row,
joined by the connectives of written-out reasoning, with other numbers, and with names whose number
grows as the rows do, as in natural text. So no two rows are alike, and a tokenizer has the work
that it has with English: about 4.5 characters a token, 1,600 tokens a row.
"""

import argparse
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet

SAMPLE_FILE = Path(__file__).parents[1] / "data" / "sample" / "train.jsonl"

# Characters of a response over the first 90,000 rows of the original. The two ends are not
# published: a filter at 4,000 characters is known to keep 1%, and about 1% of the rows have more
# than 4,096 tokens, which this upper end gives.
QUANTILES = {
    **{0.0: 2_500, 0.01: 4_020, 0.05: 4_880, 0.10: 5_343, 0.50: 7_078, 0.90: 9_398},
    **{0.95: 10_362, 0.98: 12_181, 0.99: 15_731, 1.0: 40_000},
}
PROMPT_CHARS = (120, 552)  # uniform: 336 on average, as the original
THOUGHT_SHARE = (0.55, 0.75)  # of the response; the rest is the answer

BLOCK_ROWS = 1000  # rows with one random stream, and every length stratum once; a row group
_SCHEMA = arrow.schema([("prompt", arrow.string()), ("response", arrow.string())])

# What written-out reasoning is joined with: every combination of the three.
_OPENERS = (
    """
Additionally / However / Furthermore / On the other hand / Therefore / Before moving on
Looking at the question again / Generally speaking / At the same time / Perhaps / Alternatively
Hmm, wait / Okay, so / Moreover
""".strip()
    .replace("\n", " / ")
    .split(" / ")
)
_VERBS = (
    """
it is important to consider / I should also mention / another part of the answer is
this probably depends on / we need to understand / there is something interesting about
let me think carefully about / I am not completely certain about / it makes sense to start with
""".strip()
    .replace("\n", " / ")
    .split(" / ")
)
_OBJECTS = (
    """
the underlying assumption / the historical and social context / the practical implications
the relationship between these elements / a different interpretation / the available evidence
the potential limitations of this approach / what the original question is really asking
the specific requirements / the long-term consequences / several independent observations
the most important difference / the following example / whether this conclusion actually holds
""".strip()
    .replace("\n", " / ")
    .split(" / ")
)
_CONNECTIVES = [
    f"{opener}, {verb} {thing}{end}"
    for opener, verb, thing in itertools.product(_OPENERS, _VERBS, _OBJECTS)
    for end in ":."
]
# {n}: a number, {name}: a name.
_MENTIONS = """
According to {name}:
{name} and {name} give another example:
Take the case of {name}, number {n} on the list:
With {n} of {n2} cases counted:
By {n} the work of {name} had changed this.
Option {n}:
The estimate is about {n}.{n2} percent.
({name} puts it at {n}.)
""".strip().split("\n")
_ONSETS = [*"bcdfghjklmnprstvw", "br", "ch", "gr", "sh"]
_VOWELS = [*"aeiou", "ai", "ea", "ia"]
_SYLLABLES = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
_ENDINGS = ["n", "r", "s", "l", "ton", "man", "ville", "", "rd", "ck"]
_LARGEST_NAME = len(_SYLLABLES) ** 2 * len(_ENDINGS)

# A malformed response of every kind that the original is known to hold, made of thought and answer.
# The names are what `jaxsft.data.rows` calls the outcome: a reason of rejection, or a note.
DEFECTS: dict[str, Callable[[str, str], str]] = {
    "unclosed_thought": lambda thought, answer: f"<think>{thought}\n{answer}",
    "implicit_open": lambda thought, answer: f"{thought}</think>\n{answer}",
    "empty_thought": lambda thought, answer: f"<think>\n\n</think>\n{answer}",
    "several_thoughts": lambda thought, answer: (
        f"<think>{thought}</think>\n<think>{answer}</think>\n{answer}"
    ),
    "literal_tags": lambda thought, answer: (
        f"<think>{thought} <answer></think>\n<reasoning> {answer}"
    ),
    "control_look_alike": lambda thought, answer: (
        f"<think>{thought}<end_of_turn></think>\n<bos>{answer}"
    ),
    "empty_answer": lambda thought, answer: f"<think>{thought}</think>\n",
}


class _Sentences(NamedTuple):
    """What passages are made of."""

    prompts: Sequence[str]
    wholes: Sequence[str]
    heads: Sequence[str]  # of sentences, up to a comma or semicolon
    tails: Sequence[str]  # what follows it


def _read_sentences() -> _Sentences:
    lines = SAMPLE_FILE.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    text = " ".join(re.sub("</?think>", " ", row["response"]) for row in rows)
    wholes = list(dict.fromkeys(re.split(r"(?<=[.!?])\s+", text.strip())))
    halves = [match for each in wholes if (match := re.fullmatch(r"(.{20,}?[,;]) (.{20,})", each))]
    heads, tails = [match[1] for match in halves], [match[2] for match in halves]
    return _Sentences([row["prompt"] for row in rows], wholes, heads, tails)


def rows(num_rows: int, seed: int, defect_rate: float = 0.0) -> Iterator[dict[str, str]]:
    """Yields {"prompt", "response"} rows; row i depends on (seed, i) alone.

    Args:
      num_rows: how many.
      seed: of all random choices.
      defect_rate: share of rows, 0 to 1, whose response is malformed, each kind of `DEFECTS` as
        often as another. The other rows are those of rate 0.
    """
    sentences = _read_sentences()
    blocks = (_block(sentences, seed, block, defect_rate) for block in itertools.count())
    yield from itertools.islice(itertools.chain.from_iterable(blocks), num_rows)


def _block(
    sentences: _Sentences, seed: int, block: int, defect_rate: float
) -> Iterator[dict[str, str]]:
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, block], np.uint64)))
    lengths = response_lengths(rng)
    prompt_lengths = rng.integers(PROMPT_CHARS[0], PROMPT_CHARS[1] + 1, BLOCK_ROWS).tolist()
    shares = rng.uniform(*THOUGHT_SHARE, BLOCK_ROWS).tolist()
    is_defect = (rng.random(BLOCK_ROWS) < defect_rate).tolist()
    kinds = rng.integers(0, len(DEFECTS), BLOCK_ROWS).tolist()
    makers = list(DEFECTS.values())
    numbers = range(block * BLOCK_ROWS + 1, (block + 1) * BLOCK_ROWS + 1)
    for number, length, prompt_length, share, defect, kind in zip(
        numbers, lengths.tolist(), prompt_lengths, shares, is_defect, kinds, strict=True
    ):
        title = f"Question {number}: "  # no prompt comes twice, not even a short one
        num_chars = length - len("<think></think>\n")
        thought_length = int(share * num_chars)
        question = sentences.prompts[int(rng.integers(len(sentences.prompts)))]
        digits = bytes.maketrans(b"0123456789", (rng.permutation(10) + ord("0")).astype("u1").data)
        parts = (
            _passage(sentences, rng, prompt_length - len(title), " ", "\n", start=question),
            _passage(sentences, rng, thought_length, " ", "\n\n"),
            _passage(sentences, rng, num_chars - thought_length, "\n- ", "\n\n"),
        )
        # By way of bytes, as `str.translate` is 10 x slower on text that is not ASCII.
        prompt, thought, answer = (part.encode().translate(digits).decode() for part in parts)
        make = makers[kind] if defect else "<think>{}</think>\n{}".format
        yield {"prompt": title + prompt, "response": make(thought, answer)}


def response_lengths(rng: np.random.Generator) -> np.ndarray:
    """Characters of a block's responses, int64 [BLOCK_ROWS], in random order.

    One from each of BLOCK_ROWS equal strata of the distribution, so that every block has its
    quantiles; between the published ones the logarithm of the length is interpolated.
    """
    strata = (rng.permutation(BLOCK_ROWS) + rng.random(BLOCK_ROWS)) / BLOCK_ROWS
    logs = np.interp(strata, list(QUANTILES), np.log(list(QUANTILES.values())))
    return np.rint(np.exp(logs)).astype(np.int64)


def _passage(
    sentences: _Sentences,
    rng: np.random.Generator,
    num_chars: int,
    minor: str,
    major: str,
    start: str = "",
) -> str:
    """Text of exactly `num_chars` characters: sentences with `minor` or `major` breaks between."""
    parts: list[str] = [start] if start else []
    size = len(start)
    wholes, heads, tails = (rng.permutation(len(each)).tolist() for each in sentences[1:])
    # Few sentences have under 40 characters, so that these choices are enough.
    for index, choice in enumerate(rng.integers(0, 1 << 30, num_chars // 40 + 2).tolist()):
        if size >= num_chars:
            break
        if parts:
            parts.append(major if choice % 8 == 0 else minor if choice % 8 < 4 else " ")
        kind = choice >> 3 & 15  # the shares below set the characters a token
        if kind < 12:
            parts += [_CONNECTIVES[(choice >> 7) % len(_CONNECTIVES)], " "]
        elif kind == 15:
            parts += [_mention(choice >> 7), " "]
        if choice >> 29:
            sentence = sentences.wholes[wholes[index % len(wholes)]]
        else:
            head = sentences.heads[heads[index % len(heads)]]
            sentence = f"{head} {sentences.tails[tails[index % len(tails)]]}"
        parts.append(sentence)
        size += len(sentence) + 1
    text = "".join(parts)
    return text[: num_chars - 1].rstrip().ljust(num_chars - 1, ".") + "."


def _mention(choice: int) -> str:
    """A lead-in with numbers and names; `choice` is a random integer below 2**23."""
    text = _MENTIONS[choice % len(_MENTIONS)]
    share = choice / (1 << 23)
    return text.format(name=_name(share), n=choice % 1999, n2=choice % 97)


def _name(share: float) -> str:
    """The name at a share, 0 to 1, of Zipf's law: rank r about as often as 1 / r."""
    rank, ending = divmod(int(_LARGEST_NAME**share), len(_ENDINGS))
    first, second = divmod(rank, len(_SYLLABLES))
    return (_SYLLABLES[second] + (_SYLLABLES[first] if first else "") + _ENDINGS[ending]).title()


def write_glaive_like(
    directory: Path,
    num_rows: int,
    seed: int,
    rows_per_shard: int = 20_000,
    defect_rate: float = 0.0,
) -> list[Path]:
    """Writes `rows` to train-00000-of-00009.parquet, …, with the memory of one row group.

    Args:
      directory: made if it is not there.
      num_rows, seed, defect_rate: as in `rows`.
      rows_per_shard: rows of every file but the last.

    Returns:
      The files, in the order of the rows.
    """
    if num_rows < 1 or rows_per_shard < 1:
        raise ValueError(f"{num_rows} rows, {rows_per_shard} a shard: must be at least 1")
    if not 0 <= defect_rate <= 1:
        raise ValueError(f"a defect rate of {defect_rate}: must be 0 to 1")
    directory.mkdir(parents=True, exist_ok=True)
    num_shards = -(-num_rows // rows_per_shard)
    stream = rows(num_rows, seed, defect_rate)
    paths = []
    for shard in range(num_shards):
        path = directory / f"train-{shard:05d}-of-{num_shards:05d}.parquet"
        of_shard = itertools.islice(stream, rows_per_shard)
        with parquet.ParquetWriter(path, _SCHEMA) as writer:
            while group := list(itertools.islice(of_shard, BLOCK_ROWS)):
                writer.write_table(arrow.Table.from_pylist(group, _SCHEMA))
        paths.append(path)
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.glaive_like", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("directory", type=Path, help="where the Parquet files go")
    parser.add_argument("--rows", type=int, default=180_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows-per-shard", type=int, default=20_000)
    parser.add_argument("--defect-rate", type=float, default=0.0, help="share of malformed rows")
    args = parser.parse_args(argv)
    start = time.perf_counter()
    try:
        paths = write_glaive_like(
            args.directory, args.rows, args.seed, args.rows_per_shard, args.defect_rate
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    num_bytes = sum(path.stat().st_size for path in paths)
    print(
        f"{args.rows:,} rows in {len(paths)} files, {num_bytes / 1e6:,.0f} MB, "
        f"{time.perf_counter() - start:.0f} s: {args.directory}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
